"""Writes the requests that evaluation programs send, from reading how their adapters build them.

    python tests/golden/adapters/make_bodies.py

Neither program can be installed beside glimt, so nothing of them runs here; each file names the
source that was read. The pictures are small and drawn, the questions made up.

What their users set: OPENAI_API_BASE, OPENAI_API_KEY and LMMS_IMAGE_ENCODE_FORMAT for lmms-eval;
LMDEPLOY_API_BASE and LMDEPLOY_API_KEY, or OPENAI_API_BASE and OPENAI_API_KEY, for VLMEvalKit.
"""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

FOLDER = Path(__file__).parent
LMMS_EVAL = "lmms-eval 0.7.3 (package index), lmms_eval/"
GPT = "open-compass/VLMEvalKit at 00006c5b, vlmeval/api/gpt.py"
LMDEPLOY = "open-compass/VLMEvalKit at 00a38125, vlmeval/api/lmdeploy.py"
BASE = "open-compass/VLMEvalKit at 037868f9, vlmeval/api/base.py"

SUFFIX = "\nAnswer the question using a single word or phrase."
MINDIE_SUFFIX = " Answer the question using a single word or phrase."
MODEL = "small"


def drawn(colours: tuple[str, ...]) -> Image.Image:
    """Stripes, 8 pixels wide each and 16 high."""
    picture = Image.new("RGB", (8 * len(colours), 16))
    for i, colour in enumerate(colours):
        picture.paste(colour, (8 * i, 0, 8 * i + 8, 16))
    return picture


FLAG = drawn(("blue", "white", "red"))
SIGN = drawn(("black", "yellow"))


def url(picture: Image.Image, kind: str, **options: Any) -> str:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(stream.getvalue()).decode()}"


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said}


def picture(address: str, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": address, **more}}


def user(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


# --- lmms-eval: the openai package's client, whole replies -----------------------------------


def lmms_eval(*messages: dict[str, Any], max_tokens: int = 256) -> dict[str, Any]:
    """Its three OpenAI adapters send these four fields and no other."""
    return {
        "model": MODEL,
        "messages": list(messages),
        "max_tokens": max_tokens,
        "temperature": 0,
    }


LMMS_EVAL_BODIES = {
    "lmms_eval_simple": (
        f"{LMMS_EVAL}models/simple/openai.py",
        "--model openai --force_simple: the text first, then each picture as PNG",
        lmms_eval(user(text(f"What country is this?{MINDIE_SUFFIX}"), picture(url(FLAG, "PNG")))),
    ),
    "lmms_eval_simple_without_picture": (
        f"{LMMS_EVAL}models/simple/openai.py",
        "a question without a picture is still a list of parts",
        lmms_eval(user(text("What is the capital of France?")), max_tokens=64),
    ),
    "lmms_eval_chat": (
        f"{LMMS_EVAL}models/chat/openai.py, protocol.py and api/task.py",
        "--model openai: pictures first, then the text",
        lmms_eval(user(picture(url(FLAG, "PNG")), text(f"What country is this?{SUFFIX}"))),
    ),
    "lmms_eval_chat_jpeg": (
        f"{LMMS_EVAL}protocol.py",
        "LMMS_IMAGE_ENCODE_FORMAT=JPEG: the same pictures at quality 85",
        lmms_eval(
            user(picture(url(FLAG, "JPEG", quality=85)), text(f"What country is this?{SUFFIX}"))
        ),
    ),
    "lmms_eval_chat_interleaved": (
        f"{LMMS_EVAL}tasks/mmmu/utils.py and protocol.py",
        "a task with doc_to_messages: texts and pictures in the question's order",
        lmms_eval(
            user(
                text("Compare"),
                picture(url(FLAG, "PNG")),
                text("with"),
                picture(url(SIGN, "PNG")),
                text("Which has more colours?\n(A) the first\n(B) the second"),
            ),
            max_tokens=16,
        ),
    ),
    "lmms_eval_async": (
        f"{LMMS_EVAL}models/chat/async_openai.py and api/model.py",
        "--model async_openai with system_prompt: the system text is a list of parts as well",
        lmms_eval(
            {"role": "system", "content": [text("You read signs.")]},
            user(picture(url(SIGN, "PNG")), text(f"What is on the sign?{SUFFIX}")),
        ),
    ),
}


# --- VLMEvalKit: a plain POST to the full address --------------------------------------------


def vlmevalkit(*messages: dict[str, Any], max_tokens: int = 256, **more: Any) -> dict[str, Any]:
    """Keys of the model's configuration that the adapter does not know come on top."""
    return {
        "model": MODEL,
        "messages": list(messages),
        "n": 1,
        "temperature": 0,
        **more,
        "max_tokens": max_tokens,
    }


VLMEVALKIT_BODIES = {
    "vlmevalkit_gpt4v": (
        GPT,
        "class GPT4V, img_size 512: JPEG with detail low, the picture first as in TextVQA",
        vlmevalkit(
            user(
                picture(url(FLAG, "JPEG"), detail="low"), text(f"What country is this?{SUFFIX}")
            )
        ),
    ),
    "vlmevalkit_gpt4v_high": (
        GPT,
        "img_detail high, system_prompt and another key of the configuration",
        vlmevalkit(
            {"role": "system", "content": "You read signs."},
            user(picture(url(SIGN, "JPEG"), detail="high"), text(f"What is it?{SUFFIX}")),
            top_p=0.9,
        ),
    ),
    "vlmevalkit_text_only": (
        GPT,
        "texts without a picture are joined into one part by line feeds",
        vlmevalkit(user(text("Who wrote Faust?\nAnswer in one word.")), max_tokens=64),
    ),
    "vlmevalkit_working": (
        BASE,
        "what it asks to see whether a server works; its default is 2048 tokens",
        vlmevalkit(user(text("hello")), max_tokens=64),
    ),
    "vlmevalkit_several_turns": (
        GPT,
        "a multi-turn data set: every turn is a list of parts, the assistant's too",
        vlmevalkit(
            user(picture(url(FLAG, "JPEG"), detail="low"), text("Which colours?")),
            {"role": "assistant", "content": [text("Blue, white and red.")]},
            user(text("And which is in the middle?")),
            max_tokens=64,
        ),
    ),
    "vlmevalkit_lmdeploy": (
        LMDEPLOY,
        "class LMDeployAPI: JPEG, no detail",
        vlmevalkit(user(picture(url(SIGN, "JPEG")), text(f"What is it?{SUFFIX}"))),
    ),
    "vlmevalkit_lmdeploy_own_keys": (
        LMDEPLOY,
        "a prompt builder's own keys stand beside the address",
        vlmevalkit(
            user(
                text("<IMAGE_TOKEN>\nWhat is it?"),
                picture(url(SIGN, "JPEG"), max_dynamic_patch=6),
            )
        ),
    ),
}


def main() -> None:
    """Write every file anew."""
    for name, (source, says, body) in (LMMS_EVAL_BODIES | VLMEVALKIT_BODIES).items():
        whole = {"source": source, "says": says, "body": body}
        written = json.dumps(whole, indent=2, ensure_ascii=False) + "\n"
        (FOLDER / f"{name}.json").write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()

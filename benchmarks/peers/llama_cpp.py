"""GLM-4's language part in glimt against llama.cpp, which has no tower for GLM-4v.

usage: python -m benchmarks.peers.llama_cpp --format bf16|int8|w8a8|int4 [--layers 4]
needs: pip install llama-cpp-python gguf

A GGUF file of the published widths with random weights, made in a temporary folder, and a
synthetic text model of the same widths, in one process and by turns: a prompt of as many tokens as
a picture and a question have, never seen before; then a token at a time, alone and for eight rows
that share the prompt. Both compute the last token's logits only, cut prompts as they do by default
and choose the likeliest token. llama.cpp's 8-bit and 4-bit formats have a scale per 32 weights and
round activations to 8 bits, so w8a8 and int4-g32 are what comes nearest; both hold the head in
8 bits then. Printed: median seconds and, of each pair of neighbours, the ratio; then one JSON line.
"""

from __future__ import annotations

import ctypes
import json
import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.peers.by_turns import Repeats, Seconds, compare, exactly
from glimt.config import EngineConfig
from glimt.devices.host import plan_threads
from glimt.engine import Engine
from glimt.errors import EngineError
from glimt.synthetic import PUBLISHED

try:
    import gguf
    import llama_cpp
except ImportError:
    gguf = llama_cpp = None

INSTALL = "this needs two packages; install them with: pip install llama-cpp-python gguf"
PROMPT_TOKENS = 1625  # a picture's 1602 and a question
ROWS = 8
FIGURES = ("prefill", "per token", f"step of {ROWS} rows")
# Ours, and what llama.cpp calls the nearest to it: of the blocks, of the head.
FORMATS: Mapping[str, tuple[str, str, str]] = {
    "bf16": ("none", "BF16", "BF16"),
    "int8": ("int8", "Q8_0", "Q8_0"),
    "w8a8": ("w8a8", "Q8_0", "Q8_0"),
    "int4": ("int4", "Q4_0", "Q8_0"),
    "int4-g32": ("int4-g32", "Q4_0", "Q8_0"),
}


# --- the file --------------------------------------------------------------------------------


def text_config(layers: int) -> dict[str, Any]:
    """GLM-4v-9B's config.json as the text model that it contains."""
    raw = {key: value for key, value in PUBLISHED["glm-4v-9b"].items() if key != "vision_config"}
    return raw | {"num_layers": layers}


def write_gguf(path: Path, raw: Mapping[str, Any], blocks: str, head: str) -> None:
    """A GGUF file of llama.cpp's architecture `chatglm`, with random weights and no vocabulary.

    blocks, head: names of ggml types
    """
    writer = gguf.GGUFWriter(path, "chatglm")
    _add_keys(writer, raw)
    noise = np.random.default_rng(0).standard_normal((256, raw["ffn_hidden_size"]), np.float32)
    for name, shape, role in _tensors(raw):
        if len(shape) == 1:
            ones = np.full(shape, float(name.endswith("norm.weight")), np.float32)
            writer.add_tensor(name, ones)
            continue
        kind = gguf.GGMLQuantizationType[head if role == "head" else blocks]
        writer.add_tensor(name, _repeated(noise, shape, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_keys(writer: Any, raw: Mapping[str, Any]) -> None:
    writer.add_context_length(raw["seq_length"])
    writer.add_embedding_length(raw["hidden_size"])
    writer.add_feed_forward_length(raw["ffn_hidden_size"])
    writer.add_block_count(raw["num_layers"])
    writer.add_head_count(raw["num_attention_heads"])
    writer.add_head_count_kv(raw["multi_query_group_num"])
    writer.add_layer_norm_rms_eps(raw["layernorm_epsilon"])
    writer.add_rope_dimension_count(raw["kv_channels"] // 2)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(raw["padded_vocab_size"])
    writer.add_tokenizer_model("none")


def _tensors(raw: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """llama.cpp's names, shapes and the role of each."""
    size, inner, dim = raw["hidden_size"], raw["ffn_hidden_size"], raw["kv_channels"]
    words = (raw["padded_vocab_size"], size)
    qkv = (raw["num_attention_heads"] + 2 * raw["multi_query_group_num"]) * dim
    yield "token_embd.weight", words, "blocks"
    for i in range(raw["num_layers"]):
        yield f"blk.{i}.attn_norm.weight", (size,), "blocks"
        yield f"blk.{i}.attn_qkv.weight", (qkv, size), "blocks"
        yield f"blk.{i}.attn_qkv.bias", (qkv,), "blocks"
        yield f"blk.{i}.attn_output.weight", (size, size), "blocks"
        yield f"blk.{i}.ffn_norm.weight", (size,), "blocks"
        yield f"blk.{i}.ffn_up.weight", (2 * inner, size), "blocks"
        yield f"blk.{i}.ffn_down.weight", (size, inner), "blocks"
    yield "output_norm.weight", (size,), "blocks"
    yield "output.weight", words, "head"


def _repeated(noise: np.ndarray, shape: tuple[int, ...], kind: Any) -> np.ndarray:
    """The rows of `noise`, scaled to keep activations' size, over and over; as the file's bytes."""
    rows, columns = shape
    few = gguf.quants.quantize(noise[:, :columns] / np.sqrt(columns), kind)
    return np.tile(few, (-(-rows // len(few)), 1))[:rows]


# --- llama.cpp -------------------------------------------------------------------------------


class LlamaError(Exception):
    """llama.cpp refused what it was given."""


class Llama:
    """A loaded file and a cache for all rows."""

    def __init__(self, path: Path, num_words: int, threads: int, num_steps: int) -> None:
        llama_cpp.llama_backend_init()
        self._log = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p())
        model = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), model)
        if not self.model:
            raise LlamaError(f"llama.cpp cannot load {path}: it may be too old for this file")
        self.context = llama_cpp.llama_init_from_model(self.model, _context(threads, num_steps))
        if not self.context:
            raise LlamaError("llama.cpp cannot make a context: is there too little memory?")
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.num_words = num_words
        self.batch = llama_cpp.llama_batch_init(PROMPT_TOKENS, 0, 1)

    def run(self, rows: Sequence[tuple[int, int, int, bool]]) -> list[int]:
        """One step. rows: token, position, sequence, and whether its logits are wanted.

        Returns the likeliest next token of those.
        """
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, is_last) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, is_last
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        if code := llama_cpp.llama_decode(self.context, batch):
            raise LlamaError(f"llama_decode returned {code} for {len(rows)} tokens")
        wanted = [i for i, row in enumerate(rows) if row[3]]
        return [self._likeliest(i) for i in wanted]

    def _likeliest(self, index: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self.context, index)
        return int(np.ctypeslib.as_array(logits, (self.num_words,)).argmax())

    def answer(self, ids: Sequence[int], num_steps: int) -> Seconds:
        """The three figures, for a prompt of its own."""
        end = len(ids)
        llama_cpp.llama_memory_clear(self.memory, True)
        began = time.perf_counter()
        first = self.run([(token, i, 0, i == end - 1) for i, token in enumerate(ids)])
        prefill = time.perf_counter() - began
        alone = self._step_seconds(first, end, num_steps)
        llama_cpp.llama_memory_seq_rm(self.memory, 0, end, -1)
        for sequence in range(1, ROWS):
            llama_cpp.llama_memory_seq_cp(self.memory, 0, sequence, -1, -1)
        tokens = [(first[0] + row) % self.num_words for row in range(ROWS)]
        together = self._step_seconds(tokens, end, num_steps)
        return dict(zip(FIGURES, (prefill, alone, together), strict=True))

    def _step_seconds(self, tokens: list[int], position: int, num_steps: int) -> float:
        """Of one step that gives every row a token; each row is a sequence of its own."""
        began = time.perf_counter()
        for i in range(num_steps):
            tokens = self.run([(t, position + i, row, True) for row, t in enumerate(tokens)])
        return (time.perf_counter() - began) / num_steps

    def close(self) -> None:
        """Free what llama.cpp holds."""
        llama_cpp.llama_batch_free(self.batch)
        llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)


def _context(threads: int, num_steps: int) -> Any:
    """Room for the prompt and for what each row adds to it; rows share the prompt's cells."""
    context = llama_cpp.llama_context_default_params()
    context.n_ctx = PROMPT_TOKENS + ROWS * num_steps
    context.n_batch = PROMPT_TOKENS
    context.n_seq_max, context.kv_unified = ROWS, True
    context.n_threads = context.n_threads_batch = threads
    return context


# --- glimt -----------------------------------------------------------------------------------


class Glimt:
    """An engine on a synthetic text model."""

    def __init__(self, folder: Path, raw: Mapping[str, Any], quant: str, threads: int) -> None:
        (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
        model = f"synthetic:{folder}"
        config = EngineConfig(
            model=model, dtype="bfloat16", quant=quant, num_threads=threads, max_num_seqs=ROWS
        )
        self.engine = Engine.load(config)
        bare = len(self.engine.prepare_text("中").prompt.token_ids) - 1
        self.num_letters = PROMPT_TOKENS - bare

    def answer(self, seed: int, num_steps: int) -> Seconds:
        """The three figures, for a prompt of its own."""
        letters = random.Random(seed)
        text = "".join(chr(letters.randrange(0x4E00, 0x9FA5)) for _ in range(self.num_letters))
        prefill, alone = self._run(text, 1, num_steps)
        _, together = self._run(text, ROWS, num_steps)  # its prompt is cached by now
        return dict(zip(FIGURES, (prefill, alone, together), strict=True))

    def _run(self, text: str, num_rows: int, num_steps: int) -> tuple[float, float]:
        """Seconds until every row has a token, and of one step that gives each one more."""
        # Rows start one after the other: those that start first need a few tokens more.
        sampling = exactly(num_steps + 2 * num_rows)
        requests = [self.engine.prepare_text(text, sampling) for _ in range(num_rows)]
        began = time.perf_counter()
        for request in requests:
            self.engine.add_request(request)
        waiting = {request.request_id for request in requests}
        while waiting:
            waiting -= self._step()
        first = time.perf_counter()
        for _ in range(num_steps):
            if len(self._step()) < num_rows:
                raise EngineError("a row got no token: the cache was too small")
        last = time.perf_counter()
        for request in requests:
            self.engine.abort(request.request_id)
        return first - began, (last - first) / num_steps

    def _step(self) -> set[str]:
        """The requests that a step gave tokens to."""
        outputs = self.engine.step()
        if failed := [output.error for output in outputs if output.error]:
            raise EngineError(failed[0])
        return {output.request_id for output in outputs if output.token_ids}


# --- both ------------------------------------------------------------------------------------


@contextmanager
def both(name: str, layers: int, num_steps: int) -> Iterator[tuple[Glimt, Llama]]:
    """Both sides on models of the same shapes; the file is gone once it is read."""
    quant, blocks, head = FORMATS[name]
    raw, threads = text_config(layers), plan_threads(None).count
    with tempfile.TemporaryDirectory() as folder:
        glimt = Glimt(Path(folder), raw, quant, threads)
        path = Path(folder) / "synthetic.gguf"
        write_gguf(path, raw, blocks, head)
        llama = Llama(path, raw["padded_vocab_size"], threads, num_steps)
        try:
            yield glimt, llama
        finally:
            llama.close()


def prompt_ids(seed: int, num_words: int) -> list[int]:
    """Random words."""
    words = random.Random(seed)
    return [words.randrange(num_words) for _ in range(PROMPT_TOKENS)]


def main(
    name: Annotated[str, typer.Option("--format", help=f"One of {', '.join(FORMATS)}.")] = "bf16",
    layers: Annotated[int, typer.Option(min=1, max=40, help="Of 40.")] = 4,
    repeats: Repeats = 4,
    tokens: Annotated[int, typer.Option(min=1, help="Steps of decoding that are timed.")] = 8,
) -> None:
    """Measure by turns, print a table and one JSON line."""
    if name not in FORMATS:
        raise typer.BadParameter(f"{name!r} is none of {', '.join(FORMATS)}", param_hint="--format")
    if llama_cpp is None:
        typer.echo(INSTALL, err=True)
        raise typer.Exit(1)
    with both(name, layers, tokens) as (glimt, llama):
        sides = (
            lambda i: glimt.answer(i, tokens),
            lambda i: llama.answer(prompt_ids(i, llama.num_words), tokens),
        )
        said = {"format": name, "llama_cpp": llama_cpp.__version__}
        compare(sides, ("glimt", "llama_cpp"), ("glimt", "llama.cpp"), repeats, said)


if __name__ == "__main__":
    typer.run(main)

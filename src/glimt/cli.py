"""The command line: options and help. The work is in commands/, loaded when a command runs.

Nothing here imports torch, so that `glimt --help` and the completion of a shell are instant.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from glimt import __version__
from glimt.errors import GlimtError

# Its own module differs from one release of typer to the next.
_UsageError: Any = typer.BadParameter.__base__


class _Commands(TyperGroup):
    """The one place that turns errors into exit codes; unexpected ones keep their traceback."""

    def invoke(self, ctx: Any) -> Any:
        as_json = "--json" in ctx.args
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except _UsageError as error:
            if as_json:
                from glimt.commands.console import print_json, usage_object

                print_json(usage_object(error.format_message()))
            raise
        except BrokenPipeError:  # whoever read has left, and needs no message
            raise
        except (GlimtError, OSError) as error:
            from glimt.commands.console import exit_code, say_error

            say_error(error, with_traceback=bool(ctx.params.get("debug")))
            raise typer.Exit(exit_code(error)) from error


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Run the GLM vision-language models, VisualGLM-6B and GLM-4v-9B.",
)


def main() -> None:
    """The entry point of the installed command."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed, as by >&-
            nothing = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115 open until the end
            setattr(sys, name, nothing)
    for stream in (sys.stdout, sys.stderr):
        # Where the terminal is not UTF-8, an answer with question marks beats a traceback.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    app(prog_name="glimt")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"glimt {__version__}")
        raise typer.Exit


@app.callback()
def root(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show log lines, and the traceback of every error.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """What comes before the command."""
    if debug:
        logging.basicConfig(level=logging.INFO, stream=sys.stderr)
        logging.getLogger("glimt").setLevel(logging.DEBUG)


# --- options that several commands have ------------------------------------------------------


def _option(names: str, say: str, panel: str, metavar: str | None = None) -> Any:
    return typer.Option(*names.split(), help=say, rich_help_panel=panel, metavar=metavar)


_MODEL, _ASK, _SAMPLE, _OUT = "Model", "Question", "Sampling", "Output"
_FAMILY = "Default: the family's."

Model = Annotated[
    str,
    _option(
        "--model -m",
        "Folder with config.json, weights and tokenizer; or demo, demo-visualglm.",
        _MODEL,
        "DIR",
    ),
]
Dtype = Annotated[
    str,
    _option("--dtype", "auto, float32, bfloat16 or float16: to compute in.", _MODEL, "TYPE"),
]
DeviceName = Annotated[
    str, _option("--device", "To compute on; glimt doctor lists them.", _MODEL, "NAME")
]
Threads = Annotated[
    int | None,
    _option("--threads", "Default: as many as this process may run on.", _MODEL, "N"),
]
MaxModelLen = Annotated[
    int | None,
    _option("--max-model-len", "Tokens of context, pictures included.", _MODEL, "N"),
]
KvBytes = Annotated[
    int | None,
    _option("--kv-bytes", "Memory for the cached contexts; bytes.", _MODEL, "N"),
]
KvDtype = Annotated[
    str,
    _option(
        "--kv-dtype",
        "auto or int8: of the cached contexts; int8 takes half of the memory.",
        _MODEL,
        "TYPE",
    ),
]
DraftTokens = Annotated[
    int,
    _option(
        "--draft-tokens",
        "Guess up to N tokens from earlier text and check them in one step, 4 say; 0: do not.",
        _MODEL,
        "N",
    ),
]


def _size(text: str | int) -> int:
    from glimt.commands.sizes import parse_size

    try:
        return parse_size(str(text))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


MemoryLimit = Annotated[
    int | None,
    typer.Option(
        "--memory-limit",
        help="For weights, caches and work together: 16G, 512M or bytes.",
        rich_help_panel=_MODEL,
        metavar="SIZE",
        parser=_size,
    ),
]
RotaryTable = Annotated[
    str,
    _option(
        "--rotary-table",
        "auto, hub_fp16 or fp32_product: how VisualGLM's positions are rounded.",
        _MODEL,
        "NAME",
    ),
]

Quant = Annotated[
    str,
    _option(
        "--quant",
        "int8, w8a8, int4 …: quantise the language model while loading; see glimt quantize.",
        _MODEL,
        "NAME",
    ),
]
QuantHead = Annotated[
    str, _option("--quant-head", "The same for the output head; auto: what suits.", _MODEL, "NAME")
]
QuantTower = Annotated[
    str, _option("--quant-tower", "The same for the vision tower.", _MODEL, "NAME")
]

Images = Annotated[
    list[str] | None,
    _option("--image -i", "A picture to ask about; may be repeated.", _ASK, "PATH"),
]
System = Annotated[
    str | None, _option("--system -s", "What the model is told before the question.", _ASK, "TEXT")
]
Language = Annotated[
    str, _option("--lang", "auto, zh or en: of the prompt template.", _ASK, "LANG")
]

MaxTokens = Annotated[
    int | None,
    _option(
        "--max-tokens", "Longest answer; to the end of the context if not given.", _SAMPLE, "N"
    ),
]
MinTokens = Annotated[
    int | None,
    _option("--min-tokens", "Shortest answer, before the model may end it.", _SAMPLE, "N"),
]
Temperature = Annotated[
    float | None,
    _option("--temperature -t", f"0: always the likeliest token. {_FAMILY}", _SAMPLE, "T"),
]
TopP = Annotated[
    float | None,
    _option("--top-p", f"Only the likeliest tokens that make up P in all. {_FAMILY}", _SAMPLE, "P"),
]
TopK = Annotated[
    int | None, _option("--top-k", f"Only the K likeliest tokens; 0: all. {_FAMILY}", _SAMPLE, "K")
]
MinP = Annotated[
    float | None,
    _option("--min-p", "Only tokens at least P times as likely as the likeliest.", _SAMPLE, "P"),
]
RepetitionPenalty = Annotated[
    float | None,
    _option("--repetition-penalty", f"Above 1: repeats less. {_FAMILY}", _SAMPLE, "R"),
]
PresencePenalty = Annotated[
    float | None,
    _option("--presence-penalty", "Taken once from every token of the answer.", _SAMPLE, "A"),
]
FrequencyPenalty = Annotated[
    float | None,
    _option("--frequency-penalty", "Taken at each occurrence in the answer.", _SAMPLE, "A"),
]
Seed = Annotated[
    int | None, _option("--seed", "The same seed gives the same answer.", _SAMPLE, "S")
]
Stop = Annotated[
    list[str] | None,
    _option("--stop", "Ends the answer where this text appears; may be repeated.", _SAMPLE, "TEXT"),
]
StopTokenIds = Annotated[
    list[int] | None,
    _option("--stop-token-id", "Ends the answer at this token; may be repeated.", _SAMPLE, "ID"),
]
IgnoreEos = Annotated[bool, _option("--ignore-eos", "Go on where the model would end.", _SAMPLE)]
Verbose = Annotated[
    bool, _option("--verbose -v", "Tell on stderr what takes how much memory.", _OUT)
]
AsJson = Annotated[bool, _option("--json", "One JSON object on stdout, for scripts.", _OUT)]


_ENGINE_FIELDS = (
    "model", "dtype", "device", "num_threads", "max_model_len", "kv_bytes", "kv_dtype",
    "memory_limit_bytes", "num_draft_tokens", "rotary_table", "quant", "quant_head", "quant_tower",
)  # fmt: skip
_SAMPLING_FIELDS = (
    "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty",
    "presence_penalty", "frequency_penalty", "seed", "n", "stop", "stop_token_ids", "logprobs",
    "ignore_eos",
)  # fmt: skip
_LISTS = ("stop", "stop_token_ids")


def _engine(ctx: typer.Context) -> dict[str, Any]:
    """Fields of EngineConfig, from the options of the same names."""
    return {name: ctx.params[name] for name in _ENGINE_FIELDS}


def _sampling(ctx: typer.Context) -> dict[str, Any]:
    """Fields of SamplingParams, from the options of the same names."""
    given = {name: ctx.params[name] for name in _SAMPLING_FIELDS if name in ctx.params}
    return given | {name: tuple(given[name] or ()) for name in _LISTS}


# --- commands --------------------------------------------------------------------------------


@app.command()
def generate(
    ctx: typer.Context,
    model: Model = "demo",
    prompt: Annotated[
        str | None,
        _option("--prompt -p", "The question; - reads it from standard input.", _ASK, "TEXT"),
    ] = None,
    messages: Annotated[
        Path | None,
        _option("--messages", "A JSON file with a whole conversation instead.", _ASK, "FILE"),
    ] = None,
    image: Images = None,
    system: System = None,
    lang: Language = "auto",
    max_tokens: MaxTokens = None,
    min_tokens: MinTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    presence_penalty: PresencePenalty = None,
    frequency_penalty: FrequencyPenalty = None,
    seed: Seed = None,
    n: Annotated[int, _option("--n -n", "How many answers.", _SAMPLE, "N")] = 1,
    stop: Stop = None,
    stop_token_ids: StopTokenIds = None,
    logprobs: Annotated[
        int | None,
        _option("--logprobs", "With --json: the K likeliest tokens at each place.", _SAMPLE, "K"),
    ] = None,
    ignore_eos: IgnoreEos = False,
    dtype: Dtype = "auto",
    device: DeviceName = "cpu",
    num_threads: Threads = None,
    max_model_len: MaxModelLen = None,
    kv_bytes: KvBytes = None,
    kv_dtype: KvDtype = "auto",
    memory_limit_bytes: MemoryLimit = None,
    num_draft_tokens: DraftTokens = 0,
    rotary_table: RotaryTable = "auto",
    quant: Quant = "none",
    quant_head: QuantHead = "auto",
    quant_tower: QuantTower = "none",
    as_json: AsJson = False,
    quiet: Annotated[bool, _option("--quiet -q", "Nothing but the answer.", _OUT)] = False,
    verbose: Verbose = False,
) -> None:
    """Answer one question about pictures or text."""
    from glimt.commands.generate import GenerateJob
    from glimt.commands.generate import generate as run

    job = GenerateJob(
        engine=_engine(ctx),
        sampling=_sampling(ctx),
        prompt=prompt,
        messages=messages,
        images=tuple(image or ()),
        system=system,
        language=lang,
        as_json=as_json,
        is_quiet=quiet,
        is_verbose=verbose,
    )
    run(job)


@app.command()
def chat(
    ctx: typer.Context,
    model: Model = "demo",
    image: Images = None,
    system: System = None,
    lang: Language = "auto",
    max_tokens: MaxTokens = None,
    min_tokens: MinTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    presence_penalty: PresencePenalty = None,
    frequency_penalty: FrequencyPenalty = None,
    seed: Seed = None,
    stop: Stop = None,
    stop_token_ids: StopTokenIds = None,
    ignore_eos: IgnoreEos = False,
    dtype: Dtype = "auto",
    device: DeviceName = "cpu",
    num_threads: Threads = None,
    max_model_len: MaxModelLen = None,
    kv_bytes: KvBytes = None,
    kv_dtype: KvDtype = "auto",
    memory_limit_bytes: MemoryLimit = None,
    num_draft_tokens: DraftTokens = 0,
    rotary_table: RotaryTable = "auto",
    quant: Quant = "none",
    quant_head: QuantHead = "auto",
    quant_tower: QuantTower = "none",
    verbose: Verbose = False,
) -> None:
    """Talk about pictures; /help inside lists what else can be typed."""
    from glimt.commands.chat import ChatJob
    from glimt.commands.chat import chat as run

    job = ChatJob(
        engine=_engine(ctx),
        sampling=_sampling(ctx),
        images=tuple(image or ()),
        system=system,
        language=lang,
        is_verbose=verbose,
    )
    run(job)


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A model folder.")],
    as_json: AsJson = False,
) -> None:
    """Tell what a model folder holds, what it takes to run, and what is wrong with it."""
    from glimt.commands.show import show_checkpoint

    if not show_checkpoint(folder, as_json):
        raise typer.Exit(1)


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="VisualGLM's SAT folder, or its .pt file.")
    ],
    target: Annotated[Path, typer.Argument(metavar="DST", help="A folder that does not exist.")],
    qkv_layout: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="auto, blocks or interleaved: order of the source's query, key and value rows.",
        ),
    ] = "auto",
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH", help="ice_text.model or its folder; else looked for beside SRC."
        ),
    ] = None,
) -> None:
    """Make a model folder of a VisualGLM checkpoint in its SAT form."""
    from glimt.commands.show import convert_with_bar

    convert_with_bar(source, target, qkv_layout, tokenizer)


@app.command()
def quantize(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="A model folder; or demo, demo-visualglm.")
    ],
    target: Annotated[Path, typer.Argument(metavar="DST", help="The folder to write.")],
    blocks: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="NAME",
            help="int8, w8a8, int4, int4-g32, int4-g128, int4-asym …: of the language blocks.",
        ),
    ] = "int8",
    head: Annotated[
        str, typer.Option(metavar="NAME", help="Of the output head; auto: what suits --format.")
    ] = "auto",
    tower: Annotated[str, typer.Option(metavar="NAME", help="Of the vision tower.")] = "none",
    force: Annotated[
        bool, typer.Option("--force", help="Replace DST if it is a model folder.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write a model folder with weights in few bits; it loads in seconds and takes less memory."""
    from glimt.commands.show import quantize_with_bar

    quantize_with_bar(source, target, (blocks, head, tower), force, as_json)


@app.command()
def evaluate(
    ctx: typer.Context,
    questions: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder with questions.jsonl and its pictures.")
    ],
    model: Model = "demo",
    against: Annotated[
        str | None,
        typer.Option(metavar="TYPE", help="Compare with the same model in this dtype as well."),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(metavar="N", help="Questions of each task and language at most."),
    ] = None,
    dtype: Dtype = "auto",
    device: DeviceName = "cpu",
    num_threads: Threads = None,
    max_model_len: MaxModelLen = None,
    kv_bytes: KvBytes = None,
    kv_dtype: KvDtype = "auto",
    memory_limit_bytes: MemoryLimit = None,
    num_draft_tokens: DraftTokens = 0,
    rotary_table: RotaryTable = "auto",
    quant: Quant = "none",
    quant_head: QuantHead = "auto",
    quant_tower: QuantTower = "none",
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Count right answers to a folder of questions, by task and language."""
    from glimt.commands.evaluate import EvaluateJob, run

    run(
        EvaluateJob(
            engine=_engine(ctx),
            questions=questions,
            against=against,
            limit=limit,
            as_json=as_json,
            is_verbose=verbose,
        )
    )


@app.command()
def doctor(
    as_json: AsJson = False,
    limits: Annotated[
        bool,
        typer.Option("--limits", help="Measure what the machine reads and multiplies at most."),
    ] = False,
) -> None:
    """Tell what this machine can run, what is wrong, and how to mend it."""
    from glimt.commands.doctor import doctor as run

    if not run(as_json, limits):
        raise typer.Exit(1)


# --- bench -----------------------------------------------------------------------------------

bench_app = typer.Typer(
    cls=_Commands, no_args_is_help=True, help="Measure how fast this machine is."
)
app.add_typer(bench_app, name="bench")


@bench_app.command("synthetic")
def bench_synthetic(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="glm-4v-9b, visualglm-6b, or a folder whose config.json gives the shapes.",
        ),
    ],
    layers: Annotated[
        int | None, _option("--layers", "Of the language model; as published.", _MODEL, "L")
    ] = None,
    vision_layers: Annotated[
        int | None, _option("--vision-layers", "Of the tower; as published.", _MODEL, "V")
    ] = None,
    dtype: Dtype = "auto",
    kv_dtype: KvDtype = "auto",
    quant: Quant = "none",
    quant_head: QuantHead = "auto",
    quant_tower: QuantTower = "none",
    device: DeviceName = "cpu",
    num_threads: Threads = None,
    memory_limit_bytes: MemoryLimit = None,
    batch: Annotated[
        str, _option("--batch", "Rows that decode together, with commas.", _ASK, "N,N")
    ] = "1,2,4,8,10",
    output_len: Annotated[int, _option("--output-len", "Tokens of each answer.", _ASK, "N")] = 64,
    repeats: Annotated[
        int, _option("--repeats", "Samples of each first token that must count.", _ASK, "N")
    ] = 5,
    seed: Annotated[int, _option("--seed", "Of weights, texts and pictures.", _ASK, "S")] = 0,
    as_json: AsJson = False,
    out: Annotated[
        Path | None, _option("--out", "Write the JSON object to a file as well.", _OUT, "FILE")
    ] = None,
) -> None:
    """Time a published model's shapes with random weights; nothing is downloaded."""
    from glimt.commands.bench import bench_synthetic as run

    run(
        model,
        layers,
        vision_layers,
        seed,
        batch,
        as_json,
        out,
        dtype=dtype,
        kv_dtype=kv_dtype,
        quant=quant,
        quant_head=quant_head,
        quant_tower=quant_tower,
        device=device,
        num_threads=num_threads,
        memory_limit_bytes=memory_limit_bytes,
        output_len=output_len,
        repeats=repeats,
    )

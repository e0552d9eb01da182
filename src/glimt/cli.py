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


def _option(
    names: str, say: str, panel: str, metavar: str | None = None, parser: Any = None
) -> Any:
    return typer.Option(
        *names.split(), help=say, rich_help_panel=panel, metavar=metavar, parser=parser
    )


def _size(text: str | int) -> int:
    from glimt.sizes import parse_size

    try:
        return parse_size(str(text))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


_MODEL, _ASK, _SAMPLE, _RUN, _OUT = "Model", "Question", "Sampling", "Run", "Output"
_FAMILY = "Default: the family's."

Model = Annotated[
    str,
    _option(
        "--model -m",
        "A model folder (config.json, weights, tokenizer), demo, demo-visualglm, or a synthetic "
        "model such as synthetic:glm-4v-9b.",
        _MODEL,
        "DIR",
    ),
]
Dtype = Annotated[
    str,
    _option(
        "--dtype",
        "What to compute in: auto, float32, bfloat16 or float16; auto: the checkpoint's, "
        "if the device likes it.",
        _MODEL,
        "TYPE",
    ),
]
DeviceName = Annotated[
    str, _option("--device", "What to compute on; glimt doctor lists them.", _MODEL, "NAME")
]
Threads = Annotated[
    int | None,
    _option(
        "--threads",
        "How many threads compute. Default: one for each core that this process may run on.",
        _MODEL,
        "N",
    ),
]
MaxModelLen = Annotated[
    int | None,
    _option(
        "--max-model-len",
        "Longest context in tokens, pictures and answer included. Default: the checkpoint's.",
        _MODEL,
        "N",
    ),
]
KvBytes = Annotated[
    int | None,
    _option(
        "--kv-bytes",
        "Size of the KV cache: 4G, 512M or bytes. Default: what can be used, at most a quarter "
        "of the free memory.",
        _MODEL,
        "SIZE",
        _size,
    ),
]
KvDtype = Annotated[
    str,
    _option(
        "--kv-dtype",
        "How the KV cache is stored: auto or int8; auto: as --dtype, int8: a byte per value.",
        _MODEL,
        "TYPE",
    ),
]
DraftTokens = Annotated[
    int,
    _option(
        "--draft-tokens",
        "Draft up to N tokens, at most 16, from earlier text (prompt lookup) and check them in "
        "one step; 0: none.",
        _MODEL,
        "N",
    ),
]

MemoryLimit = Annotated[
    int | None,
    _option(
        "--memory-limit",
        "Weights, caches and work together take at most this much: 16G, 512M or bytes. "
        "Default: no limit.",
        _MODEL,
        "SIZE",
        _size,
    ),
]
RotaryTable = Annotated[
    str,
    _option(
        "--rotary-table",
        "How VisualGLM's rotary tables are rounded: auto, hub_fp16 or fp32_product.",
        _MODEL,
        "NAME",
    ),
]

Quant = Annotated[
    str,
    _option(
        "--quant",
        "Quantise the language model while loading: none, int8, w8a8, int4, int4-g32, "
        "int4-g128, int4-asym …",
        _MODEL,
        "NAME",
    ),
]
QuantHead = Annotated[
    str,
    _option(
        "--quant-head",
        "The same for the output head; auto: what suits --quant.",
        _MODEL,
        "NAME",
    ),
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
    str,
    _option(
        "--lang",
        "Language of VisualGLM's prompt template: auto, zh or en; auto: the last question's.",
        _ASK,
        "LANG",
    ),
]

MaxTokens = Annotated[
    int | None,
    _option(
        "--max-tokens", "Longest answer, in tokens. Default: to the context's end.", _SAMPLE, "N"
    ),
]
MinTokens = Annotated[
    int | None,
    _option("--min-tokens", f"Tokens before the model may end the answer. {_FAMILY}", _SAMPLE, "N"),
]
Temperature = Annotated[
    float | None,
    _option(
        "--temperature -t",
        f"Higher: more varied; 0: always the likeliest token. {_FAMILY}",
        _SAMPLE,
        "T",
    ),
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
    _option(
        "--min-p",
        f"Only tokens at least P times as likely as the likeliest. {_FAMILY}",
        _SAMPLE,
        "P",
    ),
]
RepetitionPenalty = Annotated[
    float | None,
    _option("--repetition-penalty", f"Above 1: repeats less. {_FAMILY}", _SAMPLE, "R"),
]
PresencePenalty = Annotated[
    float | None,
    _option(
        "--presence-penalty",
        "Above 0: what the answer holds comes again less. Default: 0.",
        _SAMPLE,
        "A",
    ),
]
FrequencyPenalty = Annotated[
    float | None,
    _option(
        "--frequency-penalty", "The same, for each time that it holds it. Default: 0.", _SAMPLE, "A"
    ),
]
Seed = Annotated[
    int | None,
    _option("--seed", "The same seed gives the same answer. Default: a random one.", _SAMPLE, "S"),
]
Stop = Annotated[
    list[str] | None,
    _option("--stop", "End the answer where this text appears; may be repeated.", _SAMPLE, "TEXT"),
]
StopTokenIds = Annotated[
    list[int] | None,
    _option("--stop-token-id", "End the answer at this token; may be repeated.", _SAMPLE, "ID"),
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
        _option(
            "--messages",
            "A JSON file with a whole conversation, instead of --prompt.",
            _ASK,
            "FILE",
        ),
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
    n: Annotated[int, _option("--n -n", "How many answers, at most 64.", _SAMPLE, "N")] = 1,
    stop: Stop = None,
    stop_token_ids: StopTokenIds = None,
    logprobs: Annotated[
        int | None,
        _option("--logprobs", "With --json: log-probabilities, and the K likeliest.", _SAMPLE, "K"),
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
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A model folder; or demo, demo-visualglm.")
    ],
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
    target: Annotated[
        Path, typer.Argument(metavar="DST", help="The folder to write; new or empty.")
    ],
    qkv_layout: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Order of the source's query, key and value rows: auto, blocks or interleaved.",
        ),
    ] = "auto",
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH", help="ice_text.model or its folder; else looked for beside SRC."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a model folder of a VisualGLM checkpoint in its SAT form."""
    from glimt.commands.show import convert_with_bar

    convert_with_bar(source, target, qkv_layout, tokenizer, as_json)


@app.command()
def quantize(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="A model folder; or demo, demo-visualglm.")
    ],
    target: Annotated[
        Path, typer.Argument(metavar="DST", help="The folder to write; new or empty.")
    ],
    blocks: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="NAME",
            help="Of the language model: none, int8, w8a8, int4, int4-g32, int4-g128, int4-asym …",
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
    """Write a model folder with quantised weights; it loads in seconds and takes less memory."""
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
        typer.Option(
            metavar="TYPE", help="Compare with the same model in this dtype, not quantised."
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Ask at most N questions of each task and language. Default: all."
        ),
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
        int | None, _option("--layers", "Of the language model. Default: all.", _MODEL, "N")
    ] = None,
    vision_layers: Annotated[
        int | None, _option("--vision-layers", "Of the vision tower. Default: all.", _MODEL, "N")
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
        str,
        _option(
            "--batch", "How many sequences decode together: sizes with commas between.", _RUN, "N,N"
        ),
    ] = "1,2,4,8,10",
    output_len: Annotated[
        int, _option("--output-len", "Tokens of each answer, at least 2.", _RUN, "N")
    ] = 64,
    repeats: Annotated[
        int, _option("--repeats", "Steady samples of each first token.", _RUN, "N")
    ] = 5,
    seed: Annotated[int, _option("--seed", "Seed of weights, texts and pictures.", _RUN, "S")] = 0,
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

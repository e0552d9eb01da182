"""What the commands' options are made of: those that several share, and where errors end.

Nothing here imports torch, so that `glimt --help` and the completion of a shell are instant.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar, get_type_hints

import typer
from typer.core import TyperGroup

from glimt.errors import GlimtError

# Its own module differs from one release of typer to the next.
_UsageError: Any = typer.BadParameter.__base__


class Commands(TyperGroup):
    """The one place that turns errors into exit codes; unexpected ones keep their traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        as_json = "--json" in ctx.args
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except _UsageError as error:
            if as_json and ctx.parent is None:  # a group inside a group passes it on
                from glimt.commands.console import print_json, usage_object

                print_json(usage_object(error.format_message()))
            raise
        except BrokenPipeError:  # whoever read has left, and needs no message
            raise
        except (GlimtError, OSError) as error:
            from glimt.commands.console import exit_code, say_error

            say_error(error, with_traceback=bool(ctx.params.get("debug")))
            raise typer.Exit(exit_code(error)) from error


def option(names: str, say: str, panel: str, metavar: str | None = None, parser: Any = None) -> Any:
    """An option of a command; panel: the heading under which --help shows it."""
    return typer.Option(
        *names.split(), help=say, rich_help_panel=panel, metavar=metavar, parser=parser
    )


def size_option(text: str | int) -> int:
    """Bytes of what was typed. Raises typer's own error."""
    from glimt.sizes import parse_size

    try:
        return parse_size(str(text))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


MODEL, ASK, SAMPLE, RUN, OUT = "Model", "Question", "Sampling", "Run", "Output"
_FAMILY = "Default: the family's."

Model = Annotated[
    str,
    option(
        "--model -m",
        "A model folder (config.json, weights, tokenizer), demo, demo-visualglm, or a synthetic "
        "model such as synthetic:glm-4v-9b.",
        MODEL,
        "DIR",
    ),
]
Dtype = Annotated[
    str,
    option(
        "--dtype",
        "What to compute in: auto, float32, bfloat16 or float16; auto: the checkpoint's, "
        "if the device likes it.",
        MODEL,
        "TYPE",
    ),
]
DeviceName = Annotated[
    str, option("--device", "What to compute on; glimt doctor lists them.", MODEL, "NAME")
]
TpSize = Annotated[
    int,
    option(
        "--tp",
        "Divide the model among N processes, each with a card of its own or its share of the "
        "cores: 1, 2, 4 or 8.",
        MODEL,
        "N",
    ),
]
Threads = Annotated[
    int | None,
    option(
        "--threads",
        "How many threads compute. Default: one for each core that this process may run on.",
        MODEL,
        "N",
    ),
]
MaxModelLen = Annotated[
    int | None,
    option(
        "--max-model-len",
        "Longest context in tokens, pictures and answer included. Default: the checkpoint's.",
        MODEL,
        "N",
    ),
]
KvBytes = Annotated[
    int | None,
    option(
        "--kv-bytes",
        "Size of the KV cache: 4G, 512M or bytes. Default: what can be used, at most a quarter "
        "of the free memory.",
        MODEL,
        "SIZE",
        size_option,
    ),
]
KvDtype = Annotated[
    str,
    option(
        "--kv-dtype",
        "How the KV cache is stored: auto or int8; auto: as --dtype, int8: a byte per value.",
        MODEL,
        "TYPE",
    ),
]
DraftTokens = Annotated[
    int,
    option(
        "--draft-tokens",
        "Draft up to N tokens, at most 16, from earlier text (prompt lookup) and check them in "
        "one step; 0: none.",
        MODEL,
        "N",
    ),
]

MemoryLimit = Annotated[
    int | None,
    option(
        "--memory-limit",
        "Weights, caches and work together take at most this much: 16G, 512M or bytes. "
        "Default: no limit.",
        MODEL,
        "SIZE",
        size_option,
    ),
]
RotaryTable = Annotated[
    str,
    option(
        "--rotary-table",
        "How VisualGLM's rotary tables are rounded: auto, hub_fp16 or fp32_product.",
        MODEL,
        "NAME",
    ),
]

Quant = Annotated[
    str,
    option(
        "--quant",
        "Quantise the language model while loading: none, int8, w8a8, int4, int4-g32, "
        "int4-g128, int4-asym …",
        MODEL,
        "NAME",
    ),
]
QuantHead = Annotated[
    str,
    option(
        "--quant-head",
        "The same for the output head; auto: what suits --quant.",
        MODEL,
        "NAME",
    ),
]
QuantTower = Annotated[
    str, option("--quant-tower", "The same for the vision tower.", MODEL, "NAME")
]

VisionRuntime = Annotated[
    str,
    option(
        "--vision-runtime",
        "What runs the vision tower: torch, or onnxruntime or om with --vision-model.",
        MODEL,
        "NAME",
    ),
]
VisionModel = Annotated[
    str | None,
    option("--vision-model", "The file that glimt export vision wrote.", MODEL, "FILE"),
]

Images = Annotated[
    list[str] | None,
    option("--image -i", "A picture to ask about; may be repeated.", ASK, "PATH"),
]
System = Annotated[
    str | None, option("--system -s", "What the model is told before the question.", ASK, "TEXT")
]
Language = Annotated[
    str,
    option(
        "--lang",
        "Language of VisualGLM's prompt template: auto, zh or en; auto: the last question's.",
        ASK,
        "LANG",
    ),
]

MaxTokens = Annotated[
    int | None,
    option(
        "--max-tokens", "Longest answer, in tokens. Default: to the context's end.", SAMPLE, "N"
    ),
]
MinTokens = Annotated[
    int | None,
    option("--min-tokens", f"Tokens before the model may end the answer. {_FAMILY}", SAMPLE, "N"),
]
Temperature = Annotated[
    float | None,
    option(
        "--temperature -t",
        f"Higher: more varied; 0: always the likeliest token. {_FAMILY}",
        SAMPLE,
        "T",
    ),
]
TopP = Annotated[
    float | None,
    option("--top-p", f"Only the likeliest tokens that make up P in all. {_FAMILY}", SAMPLE, "P"),
]
TopK = Annotated[
    int | None, option("--top-k", f"Only the K likeliest tokens; 0: all. {_FAMILY}", SAMPLE, "K")
]
MinP = Annotated[
    float | None,
    option(
        "--min-p",
        f"Only tokens at least P times as likely as the likeliest. {_FAMILY}",
        SAMPLE,
        "P",
    ),
]
RepetitionPenalty = Annotated[
    float | None,
    option("--repetition-penalty", f"Above 1: repeats less. {_FAMILY}", SAMPLE, "R"),
]
PresencePenalty = Annotated[
    float | None,
    option(
        "--presence-penalty",
        "Above 0: what the answer holds comes again less. Default: 0.",
        SAMPLE,
        "A",
    ),
]
FrequencyPenalty = Annotated[
    float | None,
    option(
        "--frequency-penalty", "The same, for each time that it holds it. Default: 0.", SAMPLE, "A"
    ),
]
Seed = Annotated[
    int | None,
    option("--seed", "The same seed gives the same answer. Default: a random one.", SAMPLE, "S"),
]
Stop = Annotated[
    list[str] | None,
    option("--stop", "End the answer where this text appears; may be repeated.", SAMPLE, "TEXT"),
]
StopTokenIds = Annotated[
    list[int] | None,
    option("--stop-token-id", "End the answer at this token; may be repeated.", SAMPLE, "ID"),
]
IgnoreEos = Annotated[bool, option("--ignore-eos", "Go on where the model would end.", SAMPLE)]
Verbose = Annotated[bool, option("--verbose -v", "Tell on stderr what takes how much memory.", OUT)]
Report = Annotated[
    Path | None,
    option(
        "--report",
        "Write a report into this folder: one HTML file, Markdown, and plots as PNG.",
        OUT,
        "DIR",
    ),
]
AsJson = Annotated[bool, option("--json", "One JSON object on stdout, for scripts.", OUT)]


# --- groups of options -----------------------------------------------------------------------

Group: TypeAlias = Mapping[str, tuple[Any, Any]]
"""Options by the field that they fill: what they are, and the default."""

ENGINE: Group = {  # fields of EngineConfig
    "model": (Model, "demo"),
    "dtype": (Dtype, "auto"),
    "device": (DeviceName, "cpu"),
    "tp_size": (TpSize, 1),
    "num_threads": (Threads, None),
    "max_model_len": (MaxModelLen, None),
    "kv_bytes": (KvBytes, None),
    "kv_dtype": (KvDtype, "auto"),
    "memory_limit_bytes": (MemoryLimit, None),
    "num_draft_tokens": (DraftTokens, 0),
    "rotary_table": (RotaryTable, "auto"),
    "quant": (Quant, "none"),
    "quant_head": (QuantHead, "auto"),
    "quant_tower": (QuantTower, "none"),
    "vision_runtime": (VisionRuntime, "torch"),
    "vision_model": (VisionModel, None),
}
SAMPLING: Group = {  # fields of SamplingParams
    "max_tokens": (MaxTokens, None),
    "min_tokens": (MinTokens, None),
    "temperature": (Temperature, None),
    "top_p": (TopP, None),
    "top_k": (TopK, None),
    "min_p": (MinP, None),
    "repetition_penalty": (RepetitionPenalty, None),
    "presence_penalty": (PresencePenalty, None),
    "frequency_penalty": (FrequencyPenalty, None),
    "seed": (Seed, None),
    "stop": (Stop, None),
    "stop_token_ids": (StopTokenIds, None),
    "ignore_eos": (IgnoreEos, False),
}
Fields: TypeAlias = Mapping[str, Any]


def max_tokens_by_default(count: int) -> Group:
    """SAMPLING of a command whose answers end after so many tokens where nothing else is said."""
    said = f"Longest answer, in tokens. Default: {count}."
    changed = Annotated[int | None, option("--max-tokens", said, SAMPLE, "N")]
    return {**SAMPLING, "max_tokens": (changed, None)}


R = TypeVar("R")


def gathers(**groups: Group) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Give a command all options of some groups; it gets each group as one mapping of fields.

    groups: by the name of the parameter in whose place the options stand
    """

    def decorate(command: Callable[..., R]) -> Callable[..., R]:
        @functools.wraps(command)
        def gathered(**given: Any) -> R:
            taken = {
                name: {field: _value(given.pop(field)) for field in group}
                for name, group in groups.items()
            }
            return command(**given, **taken)

        parameters = list(_parameters(command, groups))
        gathered.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        gathered.__annotations__ = {each.name: each.annotation for each in parameters}
        return gathered

    return decorate


def takes(job: Callable[..., Any]) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Give a command the options of another function, whose result it gets as `job`."""

    def decorate(command: Callable[..., R]) -> Callable[..., R]:
        own = [each for each in _parameters(command, {}) if each.name != "job"]

        @functools.wraps(command)
        def taking(**given: Any) -> R:
            kept = {each.name: given.pop(each.name) for each in own}
            return command(job=job(**given), **kept)

        parameters = [*inspect.signature(job).parameters.values(), *own]
        taking.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        taking.__annotations__ = {each.name: each.annotation for each in parameters}
        return taking

    return decorate


def _value(given: Any) -> Any:
    return tuple(given) if isinstance(given, list) else given


def _parameters(
    command: Callable[..., Any], groups: Mapping[str, Group]
) -> Iterator[inspect.Parameter]:
    """What the command line is told: the command's own parameters, groups spelled out."""
    hints = get_type_hints(command, include_extras=True)
    for own in inspect.signature(command).parameters.values():
        if own.name not in groups:
            kind = inspect.Parameter.KEYWORD_ONLY
            yield own.replace(kind=kind, annotation=hints[own.name])
        for name, (option_type, default) in groups.get(own.name, {}).items():
            yield inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=option_type
            )

"""MindIE's `run_pa.sh` for GLM-4v: python -m glimt.compat.mindie, which scripts/run_pa.sh calls.

    --run|--performance|--precision [--trust_remote_code] WEIGHTS IMAGES [MAX_BATCH] [MAX_IN]
    [MAX_OUT]

Knows its arguments and their defaults, and which command of glimt does the same.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from glimt.bench.throughput import PROMPT
from glimt.commands.console import exit_code, say_error
from glimt.compat.captions import pictures_of, print_captions
from glimt.compat.launch import run_glimt, say_ignored
from glimt.config import EngineConfig
from glimt.errors import GlimtError

MODES = ("run", "performance", "precision")
PREDICTIONS = "predict_result.json"
_ALL_BATCHES = "1,2,3,4,5,6,7,8,9,10"  # without a MAX_BATCH, as the older script loops
_MAX_OUTPUT = 256


@dataclass(frozen=True, slots=True)
class Arguments:
    """What the script was given; None for what was not.

    ignored: arguments that do nothing here, as they were typed
    """

    mode: str
    weights: str
    images: str
    max_batch: int | None = None
    max_input: int | None = None
    max_output: int | None = None
    ignored: tuple[str, ...] = ()

    @property
    def output_len(self) -> int:
        """Tokens of an answer."""
        return self.max_output or _MAX_OUTPUT

    @property
    def max_model_len(self) -> int | None:
        """Tokens of prompt and answer; None, the checkpoint's, without MAX_IN."""
        return None if self.max_input is None else self.max_input + self.output_len

    @property
    def context(self) -> list[str]:
        """The option of `glimt` for it."""
        return [] if self.max_model_len is None else ["--max-model-len", str(self.max_model_len)]


def parse(arguments: Sequence[str] | None = None) -> Arguments:
    """Read the script's arguments, options anywhere among them; ends the process if they are wrong.

    arguments: None for those of the process
    """
    made = argparse.ArgumentParser(
        prog="run_pa.sh", description="MindIE's run_pa.sh for GLM-4v.", allow_abbrev=False
    )
    modes = made.add_mutually_exclusive_group(required=True)
    said = ("caption the pictures", "time one picture by batch size", "write predict_result.json")
    for mode, does in zip(MODES, said, strict=True):
        modes.add_argument(f"--{mode}", dest="mode", action="store_const", const=mode, help=does)
    made.add_argument(
        "-trust_remote_code",
        "--trust_remote_code",
        action="store_true",
        help="ignored: no code of a checkpoint is ever run",
    )
    made.add_argument("weights", metavar="WEIGHTS", help="the model folder")
    made.add_argument("images", metavar="IMAGES", help="a folder of pictures")
    for name in ("MAX_BATCH", "MAX_IN", "MAX_OUT"):
        made.add_argument(name.lower(), nargs="?", type=_count, metavar=name)
    given = made.parse_intermixed_args(arguments)
    return Arguments(
        mode=given.mode,
        weights=given.weights,
        images=given.images,
        max_batch=given.max_batch,
        max_input=given.max_in,
        max_output=given.max_out,
        ignored=("--trust_remote_code",) if given.trust_remote_code else (),
    )


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def performance_argv(given: Arguments) -> list[str]:
    """Of `glimt bench throughput`, on the folder's first picture; files into the working folder.

    Raises ConfigError for a folder without pictures.
    """
    batch = str(given.max_batch) if given.max_batch else _ALL_BATCHES
    picture = str(pictures_of(Path(given.images))[0])
    command = ["bench", "throughput", "-m", given.weights, "--image", picture, "--prompt", PROMPT]
    command += ["--batch", batch, "--output-len", str(given.output_len), *given.context]
    return [*command, "--out", "."]


def precision_argv(given: Arguments) -> list[str]:
    """Of `glimt predict`: the likeliest tokens, as the original's top_k of 1."""
    command = ["predict", "-m", given.weights, "--images", given.images, "--prompt", PROMPT]
    command += ["--batch", str(given.max_batch or 1), "--max-tokens", str(given.output_len)]
    return [*command, "--temperature", "0", *given.context, "--out", PREDICTIONS]


def main(arguments: Sequence[str] | None = None) -> None:
    """Translate and run; arguments: None for those of the process."""
    given = parse(arguments)
    say_ignored(os.environ, given.ignored)
    try:
        if given.mode == "run":
            raise SystemExit(0 if _run(given) else 1)
        argv = performance_argv(given) if given.mode == "performance" else precision_argv(given)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (GlimtError, OSError) as error:
        say_error(error)
        raise SystemExit(exit_code(error)) from error
    run_glimt(argv)


def _run(given: Arguments) -> bool:
    """Caption every picture; tells whether all could be."""
    config = EngineConfig(
        model=given.weights, max_num_seqs=given.max_batch or 1, max_model_len=given.max_model_len
    )
    return print_captions(config, Path(given.images), given.output_len)


if __name__ == "__main__":
    main()

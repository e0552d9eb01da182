"""`python -m glimt.demo [PICTURE or FOLDER …]`: both demo models answer in both languages.

Where the right answers are known (questions.json), each answer is marked. Exit code 1 if any of
those is wrong, 2 if a file cannot be used.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path

from glimt.commands.console import exit_code, out_console, printable, say_error
from glimt.commands.running import facts
from glimt.demo.questions import Asked, Example, examples_of
from glimt.errors import GlimtError
from glimt.llm import LLM
from glimt.loader import BUILT_IN
from glimt.types import RequestOutput, SamplingParams

_GREEDY = SamplingParams(temperature=0, max_tokens=64)
_TOYS = (
    "These two are toy models of about five million parameters each, made to try glimt with.\n"
    "They know garments, simple drawn scenes and very short texts, and nothing else; they are\n"
    "not GLM-4v-9B and VisualGLM-6B, but their files have the same form and run the same way.\n"
    "这是两个各约五百万参数的玩具模型，只用来试用 glimt：它们认得衣物、简单的图形和很短的文字，\n"
    "别的都不会。它们不是 GLM-4v-9B 和 VisualGLM-6B，只是文件形式和运行方式相同。"
)


def main(paths: Sequence[str]) -> int:
    """Ask both models about every picture and say how many answers are right."""
    try:
        examples = examples_of([Path(path) for path in paths])
        _print(f"{_TOYS}\n")
        marks = {name: _ask_all(name, examples) for name in BUILT_IN}
    except GlimtError as error:
        say_error(error)
        return exit_code(error)
    for name, right in marks.items():
        if right:
            _print(f"{name}: {sum(right)} of {len(right)} answers are right")
    return 0 if all(map(all, marks.values())) else 1


def _ask_all(name: str, examples: Sequence[Example]) -> list[bool]:
    """Whether each answer is right, of those whose right answer is known."""
    llm = LLM(name, max_num_seqs=1)
    marks = []
    for example in examples:
        for asked in example.asked:
            output = _ask(llm, example, asked)
            right = _right_answer(llm, asked)
            _show(name, example.name, asked.question, output, right)
            if right is not None:
                marks.append(output.text == right)
    return marks


def _ask(llm: LLM, example: Example, asked: Asked) -> RequestOutput:
    parts = [
        {"type": "image", "image": example.picture},
        {"type": "text", "text": asked.question},
    ]
    return llm.chat([{"role": "user", "content": parts}], _GREEDY)


def _right_answer(llm: LLM, asked: Asked) -> str | None:
    """As the family shows it: VisualGLM mends punctuation."""
    processor = llm.engine.opened.processor
    return None if asked.answer is None else processor.finish_text(asked.answer)


def _show(
    model: str, picture: str, question: str, output: RequestOutput, right: str | None
) -> None:
    mark = "" if right is None else "  (right)" if output.text == right else f"  (WRONG: {right})"
    _print(f"{model}  {picture}")
    _print(f"  Q  {question}")
    _print(f"  A  {' '.join(output.text.split())}{mark}")
    out_console().print(f"  {facts(output.usage, output.timings)}\n", style="dim", soft_wrap=True)


def _print(text: str) -> None:
    out_console().print(printable(text), soft_wrap=True)


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Where the terminal is not UTF-8, an answer with question marks beats a traceback.
        sys.stdout.reconfigure(errors="replace")
    sys.exit(main(sys.argv[1:]))

"""Answers of one setting: how many are right, and how they differ from another setting's."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from glimt.evaluate.forced import Divergence, Places, compare, forced_logits, summary
from glimt.evaluate.questions import Question
from glimt.llm import LLM
from glimt.types import RequestOutput, SamplingParams

BATCH = 64  # questions asked together
MAX_TOKENS = 64  # of an answer; a longer one is wrong

OnDone = Callable[[int], None]
Counts: TypeAlias = defaultdict[tuple[str, str], list[int]]  # asked, right, agreed


@dataclass(frozen=True, slots=True)
class Tally:
    """Answers of one task in one language.

    right:  equal to the right answer, character by character
    agreed: equal to the reference's answer; None without a reference
    """

    task: str
    language: str
    asked: int
    right: int
    agreed: int | None

    @property
    def accuracy(self) -> float:
        """Right answers over questions."""
        return self.right / self.asked


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All tallies; divergence from the reference, teacher-forced on its own greedy answers."""

    tallies: tuple[Tally, ...]
    divergence: Divergence | None

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data, for JSON."""
        tallies = [asdict(tally) | {"accuracy": tally.accuracy} for tally in self.tallies]
        return {"tasks": tallies, "divergence": self.divergence and asdict(self.divergence)}


def evaluate(
    llm: LLM,
    questions: Sequence[Question],
    reference: LLM | None = None,
    on_done: OnDone = lambda count: None,
) -> Evaluation:
    """Ask every question greedily, of the reference too if there is one.

    on_done: called with the number of questions done since the last call
    """
    counts: Counts = defaultdict(lambda: [0, 0, 0])
    places: list[Places] = []
    for batch in _batches(questions):
        ours = _ask(llm, batch)
        theirs = _ask(reference, batch) if reference else ours
        for question, answer, other in zip(batch, ours, theirs, strict=True):
            is_right = answer.text == finished(llm, question.answer)
            _count(counts, question, is_right, answer.text == other.text)
        if reference:
            places.append(_compare(reference, llm, batch, theirs))
        on_done(len(batch))
    return Evaluation(_tallies(counts, reference is not None), summary(places) if places else None)


def _count(counts: Counts, question: Question, is_right: bool, is_agreed: bool) -> None:
    count = counts[question.task, question.language]
    for i, more in enumerate((1, is_right, is_agreed)):
        count[i] += more


def _tallies(counts: Counts, has_reference: bool) -> tuple[Tally, ...]:
    return tuple(
        Tally(task, language, asked, right, agreed if has_reference else None)
        for (task, language), (asked, right, agreed) in sorted(counts.items())
    )


def _compare(
    reference: LLM, llm: LLM, questions: Sequence[Question], answers: Sequence[RequestOutput]
) -> Places:
    """Both models' distributions along the reference's own answers."""
    conversations = [question.messages for question in questions]
    tokens = [answer.token_ids for answer in answers]
    logits = (forced_logits(model, conversations, tokens) for model in (reference, llm))
    return compare(*logits)


def finished(llm: LLM, answer: str) -> str:
    """An answer as the family shows it: VisualGLM mends punctuation."""
    return llm.engine.opened.processor.finish_text(answer)


def _batches(questions: Sequence[Question]) -> Iterator[Sequence[Question]]:
    for start in range(0, len(questions), BATCH):
        yield questions[start : start + BATCH]


def _ask(llm: LLM, questions: Sequence[Question]) -> list[RequestOutput]:
    sampling = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    return llm.chat([question.messages for question in questions], sampling)

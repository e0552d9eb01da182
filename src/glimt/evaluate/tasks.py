"""Answers of one setting: how many are right, and how they differ from another setting's."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from glimt.errors import RequestError
from glimt.evaluate.forced import Divergence, PerToken, compare, forced_logits, summary
from glimt.evaluate.questions import Question
from glimt.llm import LLM
from glimt.types import RequestOutput, SamplingParams

BATCH = 64  # questions asked together
MAX_TOKENS = 64  # of an answer; a longer one is wrong
_GREEDY = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)

OnDone = Callable[[int], None]
OnFailed = Callable[[Question, str], None]
Answers: TypeAlias = dict[int, RequestOutput]  # by the question's place in its batch
Counts: TypeAlias = defaultdict[tuple[str, str], list[int]]  # asked, right, agreed, failed


@dataclass(frozen=True, slots=True)
class Tally:
    """Answers of one task in one language.

    right:  equal to the right answer, character by character
    agreed: equal to the reference's answer; None without a reference
    failed: could not be asked or answered (a broken picture, say); neither right nor agreed
    """

    task: str
    language: str
    asked: int
    right: int
    agreed: int | None
    failed: int

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
    on_done: OnDone | None = None,
    on_failed: OnFailed = lambda question, why: None,
) -> Evaluation:
    """Ask every question greedily, of the reference too if there is one.

    on_done:   called with the number of questions done since the last call
    on_failed: called for each question that could not be asked or answered; the others go on
    """
    counts: Counts = defaultdict(lambda: [0, 0, 0, 0])
    compared: list[PerToken] = []
    for batch in _batches(questions):
        ours = _ask(llm, dict(enumerate(batch)), on_failed)
        could = {i: batch[i] for i in ours}
        theirs = _ask(reference, could, on_failed) if reference else ours
        for i, question in enumerate(batch):
            _count(counts, question, finished(llm, question.answer), ours.get(i), theirs.get(i))
        if reference:
            compared += _compare(reference, llm, could, theirs)
        if on_done:
            on_done(len(batch))
    divergence = summary(compared) if compared else None
    return Evaluation(_tallies(counts, reference is not None), divergence)


def _count(
    counts: Counts,
    question: Question,
    right: str,
    ours: RequestOutput | None,
    theirs: RequestOutput | None,
) -> None:
    count = counts[question.task, question.language]
    is_right = ours is not None and ours.text == right
    is_agreed = ours is not None and theirs is not None and ours.text == theirs.text
    for i, more in enumerate((1, is_right, is_agreed, ours is None)):
        count[i] += more


def _tallies(counts: Counts, has_reference: bool) -> tuple[Tally, ...]:
    return tuple(
        Tally(task, language, asked, right, agreed if has_reference else None, failed)
        for (task, language), (asked, right, agreed, failed) in sorted(counts.items())
    )


def _compare(
    reference: LLM, llm: LLM, questions: Mapping[int, Question], answers: Answers
) -> list[PerToken]:
    """Both models' distributions along the reference's own answers, one part per answer."""
    conversations = [questions[i].messages for i in answers]
    tokens = [answer.token_ids for answer in answers.values()]
    theirs, ours = (forced_logits(model, conversations, tokens) for model in (reference, llm))
    return [compare(*both) for both in zip(theirs, ours, strict=True)]


def finished(llm: LLM, answer: str) -> str:
    """An answer as the family shows it: VisualGLM mends punctuation."""
    return llm.engine.opened.processor.finish_text(answer)


def _batches(questions: Sequence[Question]) -> Iterator[Sequence[Question]]:
    for start in range(0, len(questions), BATCH):
        yield questions[start : start + BATCH]


def _ask(llm: LLM, questions: Mapping[int, Question], on_failed: OnFailed) -> Answers:
    """The answers of a batch, without those that failed."""
    if not questions:
        return {}
    try:
        outputs = llm.chat([question.messages for question in questions.values()], _GREEDY)
    except RequestError:  # one of them cannot be asked; which one, shows when each is alone
        return _ask_each(llm, questions, on_failed)
    answers = dict(zip(questions, outputs, strict=True))
    for i, output in list(answers.items()):
        if output.finish_reason == "error":
            on_failed(questions[i], str(output.completions[0].error))
            del answers[i]
    return answers


def _ask_each(llm: LLM, questions: Mapping[int, Question], on_failed: OnFailed) -> Answers:
    can_be_asked = {}
    for i, question in questions.items():
        try:
            llm.engine.prepare_chat(question.messages, _GREEDY)
        except RequestError as error:
            on_failed(question, str(error))
        else:
            can_be_asked[i] = question
    return _ask(llm, can_be_asked, on_failed)

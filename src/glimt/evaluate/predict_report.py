"""What `glimt predict` found, as a report: pictures with their answers, counts, speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from glimt.evaluate.pictures import card
from glimt.evaluate.predict import Prediction
from glimt.reports.document import Card, Cards, Document, Plot, Section, Table
from glimt.reports.plots import Axis, draw_histogram

MAX_CARDS = 100  # a report of more is too large for a browser to scroll


@dataclass(frozen=True, slots=True)
class Predictions:
    """A run that ended.

    done:     what was asked in this run
    skipped:  how many pictures had an answer already
    others:   names in the folder that are no pictures
    batch:    how many pictures were in the engine together
    """

    prompt: str
    done: tuple[Prediction, ...]
    skipped: int
    others: tuple[str, ...]
    seconds: float
    batch: int

    @property
    def answered(self) -> tuple[Prediction, ...]:
        """Those with an answer."""
        return tuple(each for each in self.done if each.answer is not None)

    @property
    def failed(self) -> tuple[Prediction, ...]:
        """Those without."""
        return tuple(each for each in self.done if each.answer is None)

    @property
    def num_tokens(self) -> int:
        """Tokens of all answers."""
        return sum(each.num_tokens for each in self.done)

    @property
    def num_cut(self) -> int:
        """Answers that reached the longest allowed."""
        return sum(each.is_cut for each in self.done)

    @property
    def pictures_per_s(self) -> float:
        """Pictures answered in a second of the run."""
        return len(self.answered) / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_s(self) -> float:
        """Output tokens in a second of the run, picture process time included."""
        return self.num_tokens / self.seconds if self.seconds else 0.0

    @property
    def status(self) -> str:
        """One line: how much was asked and answered."""
        kept = f"; {self.skipped} had an answer already" if self.skipped else ""
        if self.failed:
            return f"Errors: {len(self.failed)} of {len(self.done)} pictures failed{kept}"
        return f"Whole run: {len(self.answered)} pictures answered{kept}"


def predict_document(
    found: Predictions,
    facts: Mapping[str, str],
    pictures: Mapping[str, Image.Image] | None = None,
) -> Document:
    """The report; pictures: those that are no files, by name."""
    sections: list[Section] = [_speed(found)]
    if found.answered:
        sections += [_lengths(found), _cards(found, pictures or {})]
    if found.failed:
        sections.append(_failures(found.failed))
    title = "Predictions: answers about pictures"
    return Document(title, found.status, not found.failed, facts, tuple(sections))


def _speed(found: Predictions) -> Table:
    answered = found.answered
    rows = [
        ("pictures answered", str(len(answered))),
        ("pictures failed", str(len(found.failed))),
        ("answered by an earlier run", str(found.skipped)),
        ("files that are no pictures", str(len(found.others))),
        ("in the engine together", str(found.batch)),
        ("wall time", f"{found.seconds:.1f} s"),
    ]
    if answered:
        rows += [
            ("pictures per second", f"{found.pictures_per_s:.2f}"),
            ("output tokens per second", f"{found.tokens_per_s:.1f}"),
            ("tokens per answer, mean", f"{found.num_tokens / len(answered):.1f}"),
            ("answers cut at the longest allowed", str(found.num_cut)),
            ("picture process time, mean", _mean_s([each.image_s for each in answered])),
            ("TTFT, waiting included, mean", _mean_s([each.ttft_s for each in answered])),
        ]
    note = (
        "One run over the pictures. Picture process time is the time in the vision tower, which "
        "pictures may share."
    )
    return Table("Counts and speed", ("what", "figure"), tuple(rows), note)


def _mean_s(seconds: Sequence[float]) -> str:
    return f"{sum(seconds) / len(seconds):.3f} s"


def _lengths(found: Predictions) -> Plot:
    tokens = [float(each.num_tokens) for each in found.answered]
    png = draw_histogram([("answers", tokens)], Axis("tokens of an answer"))
    said = (
        f"Tokens of {len(tokens)} answers, from {min(tokens):.0f} to {max(tokens):.0f}; the "
        "dashed line is their mean."
    )
    return Plot("Length of the answers", "predict_lengths", png, said)


def _cards(found: Predictions, pictures: Mapping[str, Image.Image]) -> Cards:
    shown = sorted(found.answered, key=lambda each: each.picture)[:MAX_CARDS]
    cards = [_card(each, pictures) for each in shown]
    more = len(found.answered) - len(shown)
    note = f"{more} more answers are in the predictions file." if more else ""
    return Cards(f"Asked: {found.prompt}", tuple(each for each in cards if each), note)


def _card(each: Prediction, pictures: Mapping[str, Image.Image]) -> Card | None:
    lines = [("answer", each.answer or "(empty)")]
    return card(each.picture, pictures.get(each.picture, each.picture), lines)


def _failures(failed: Sequence[Prediction]) -> Table:
    rows = tuple((each.picture, str(each.error)) for each in failed)
    return Table("Failed", ("picture", "why"), rows, marked=frozenset(range(len(rows))))

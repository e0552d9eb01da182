"""What a judgement says in words: the winner, the pass line, and what was not judged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from glimt.evaluate.bootstrap import MIN_PICTURES, Comparison
from glimt.evaluate.judge import COSINE, Judgement, Verdict

# Of the mean difference of MindIE's cosine, for two programs that run the same model.
LINE, LINE_INTERVAL, LINE_PICTURES = 0.002, 0.005, 100


@dataclass(frozen=True, slots=True)
class Told:
    """A judgement with the names of its files, for those who print it."""

    labels: tuple[str, ...]
    found: Judgement

    @property
    def ranking(self) -> str:
        """The figure that names the winner: MindIE's, and CIDEr-D where no CLIP judged."""
        return COSINE if COSINE in self.found.verdicts[0].figures else "cider_d"

    @property
    def winner(self) -> str | None:
        """The label of the better file; None without two files or where nobody knows."""
        compared = self.found.comparisons.get(self.ranking)
        return self.better(compared) if compared else None

    def better(self, compared: Comparison) -> str | None:
        """The label of the file with the higher figure; None where the pictures do not tell."""
        return self.labels[compared.mean_difference > 0] if compared.has_winner else None


def labels_of(files: Sequence[str]) -> tuple[str, ...]:
    """Short names of files: the last parts of their paths, or all where those are the same."""
    names = [file.replace("\\", "/").rpartition("/")[2] for file in files]
    if len(set(names)) == len(names):
        return tuple(names)
    numbered = [f"{i + 1}: {file}" for i, file in enumerate(files)]
    return tuple(files) if len(set(files)) == len(files) else tuple(numbered)


def winner_text(told: Told) -> str:
    """The winner by the ranking figure, or why there is none."""
    compared = told.found.comparisons[told.ranking]
    label = next(each.label for each in told.found.figures if each.name == told.ranking)
    if told.winner:
        return f"Winner by {label}: {told.winner}, over {compared.num_pictures} pictures."
    if compared.num_pictures < MIN_PICTURES:
        few = f"{compared.num_pictures} pictures are too few for an interval"
        return f"No winner by {label}: {few}; at least {MIN_PICTURES} are needed."
    many = f"no difference that {compared.num_pictures} pictures show"
    return f"No winner by {label}: {many}."


def line_result(compared: Comparison) -> str:
    """`passed`, `failed`, or `too few pictures`."""
    if compared.num_pictures < LINE_PICTURES:
        return "too few pictures"
    is_near = abs(compared.mean_difference) <= LINE
    is_inside = compared.low >= -LINE_INTERVAL and compared.high <= LINE_INTERVAL
    return "passed" if is_near and is_inside else "failed"


def line_text(told: Told) -> str | None:
    """Whether the two count as the same in quality; None without a CLIP."""
    compared = told.found.comparisons.get(COSINE)
    if compared is None:
        return None
    rule = (
        f"mean cosines at most {LINE} apart, interval within ±{LINE_INTERVAL}, "
        f"{LINE_PICTURES} pictures or more"
    )
    return f"Pass line ({rule}): {line_result(compared)}."


def remarks(told: Told) -> Iterator[str]:
    """What limits the figures: cut texts, empty ones, pictures without captions."""
    for label, verdict in zip(told.labels, told.found.verdicts, strict=True):
        yield from _remarks_on(label, verdict, len(told.found.pictures))
    captioned = told.found.num_captioned
    if captioned is not None and captioned < len(told.found.pictures):
        yield f"{captioned} of {len(told.found.pictures)} pictures have captions"
    if len(told.labels) == 2:
        yield f"same text in both files: {told.found.agreement:.1%} of the answers"


def _remarks_on(label: str, verdict: Verdict, count: int) -> Iterator[str]:
    if verdict.num_cut:
        yield (
            f"{label}: {verdict.num_cut} of {count} answers are longer than CLIP's context; their "
            "tails are never judged (ask for one short sentence)"
        )
    if verdict.num_empty:
        yield f"{label}: {verdict.num_empty} of {count} answers are empty"


def interval_text(compared: Comparison) -> str:
    """The mean difference and its interval."""
    low, high = f"{compared.low:+.5f}", f"{compared.high:+.5f}"
    return f"{compared.mean_difference:+.5f} [{low}, {high}]"

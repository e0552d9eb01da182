"""Answers about pictures judged: by a CLIP, against captions, and one file against another.

Every figure belongs to one answer, so that two files are compared picture by picture; BLEU alone
is of all answers together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar

import numpy as np
from PIL import Image
from torch import Tensor

from glimt.errors import ImageError
from glimt.evaluate.bootstrap import Comparison, Floats, compare_paired
from glimt.evaluate.captions import CaptionScores, References, caption_scores, rarity_of
from glimt.evaluate.clip import Clip
from glimt.evaluate.judge_files import Answered
from glimt.evaluate.pictures import read_rgb

PREFIX = "A photo depicts "  # CLIPScore's
WEIGHT = 2.5  # CLIPScore's, which spreads the usual cosines over 0 to 1

T = TypeVar("T")
OnDone: TypeAlias = "Callable[[int], None] | None"
Figures: TypeAlias = dict[str, Floats]  # by FIGURES' names, [num_pictures]; NaN where there is none


@dataclass(frozen=True, slots=True)
class Figure:
    """What is measured of each answer. variant: whose definition, and how it is scaled."""

    name: str
    label: str
    variant: str


COSINE = "cosine"
FIGURES = (
    Figure(COSINE, "mean cosine", "MindIE: plain cosine, no prefix"),
    Figure("clip_score", "CLIPScore", "2.5 x max(cos, 0), with its prefix"),
    Figure("clip_score_100", "CLIP score x100", "max(100 cos, 0), no prefix"),
    Figure("ref_clip_score", "RefCLIPScore", "with the nearest caption, harmonic"),
    Figure("cider_d", "CIDEr-D", "against captions, 0 to 10"),
    Figure("rouge_l", "ROUGE-L", "against captions, beta 1.2"),
    Figure("exact_match", "exact match", "same words as a caption"),
)
BLEU = tuple(f"bleu_{n}" for n in range(1, 5))


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of one predictions file.

    figures:    of each answer
    bleu:       BLEU-1 to BLEU-4; empty without captions
    num_cut:    answers longer than CLIP's context, whose tails were not judged; None without CLIP
    num_empty:  answers without any text
    """

    figures: Figures
    bleu: tuple[float, ...]
    num_cut: int | None
    num_empty: int

    def mean(self, name: str) -> float:
        """The mean of a figure over the answers that have it."""
        return float(np.nanmean(self.figures[name]))


@dataclass(frozen=True, slots=True)
class Judgement:
    """What was found. answers: of each file, in the order of `pictures`; failed: picture, why."""

    pictures: tuple[Answered, ...]
    verdicts: tuple[Verdict, ...]
    failed: tuple[tuple[str, str], ...]
    num_captioned: int | None
    comparisons: Mapping[str, Comparison] = field(default_factory=dict)

    @property
    def figures(self) -> list[Figure]:
        """Those that were measured, in the order in which they are told."""
        measured = self.verdicts[0].figures if self.verdicts else {}
        return [each for each in FIGURES if each.name in measured]

    @property
    def agreement(self) -> float:
        """Of two files, the share of pictures whose answers are the same text."""
        same = [each.answers[0] == each.answers[-1] for each in self.pictures]
        return sum(same) / len(same)


def judge(
    pictures: Sequence[Answered],
    clip: Clip | None,
    captions: References | None,
    batch: int,
    seed: int,
    on_done: OnDone = None,
) -> Judgement:
    """Judge the answers to pictures; each picture has one answer of each file.

    captions: references by picture name; a picture without has no figure against them
    batch:    pictures that go through the CLIP together
    on_done:  called with the number of pictures judged since the last call; only a CLIP calls it
    """
    failed: list[tuple[str, str]] = []
    seen = _see(pictures, clip, captions, batch, failed, on_done) if clip else None
    kept = seen.pictures if seen else tuple(pictures)
    if not kept:
        return Judgement((), (), tuple(failed), None)
    said = _against_captions(kept, captions) if captions else None
    verdicts = tuple(_verdict(kept, i, seen, said) for i in range(len(kept[0].answers)))
    num_captioned = sum(each.name in captions for each in kept) if captions else None
    compared = _compare(verdicts, seed) if len(verdicts) == 2 else {}
    return Judgement(kept, verdicts, tuple(failed), num_captioned, compared)


def _verdict(
    kept: Sequence[Answered], i: int, seen: _Seen | None, said: Sequence[_Said] | None
) -> Verdict:
    figures: Figures = {}
    if seen:
        figures |= _clip_figures(seen, i)
    if said:
        figures |= said[i].figures
    cut = sum(seen.cut[i]) if seen else None
    empty = sum(not each.answers[i].strip() for each in kept)
    return Verdict(figures, said[i].bleu if said else (), cut, empty)


def _compare(verdicts: Sequence[Verdict], seed: int) -> dict[str, Comparison]:
    compared = {}
    for name in verdicts[0].figures:
        first, second = (verdict.figures[name] for verdict in verdicts)
        has_both = ~np.isnan(first) & ~np.isnan(second)
        if has_both.any():
            compared[name] = compare_paired(first[has_both], second[has_both], seed)
    return compared


# --- by a CLIP -------------------------------------------------------------------------------


@dataclass(slots=True)
class _Seen:
    """Cosines of pictures that could be read; the lists inside are one for each file.

    nearest: of each answer, the largest cosine with a caption; NaN without one
    """

    pictures: tuple[Answered, ...]
    plain: list[list[float]]
    prefixed: list[list[float]]
    nearest: list[list[float]]
    cut: list[list[bool]]

    @classmethod
    def empty(cls, num_files: int) -> _Seen:
        plain, prefixed, nearest = (_lists(num_files, float) for _ in range(3))
        return cls((), plain, prefixed, nearest, _lists(num_files, bool))


def _lists(count: int, kind: type[T]) -> list[list[T]]:
    return [[] for _ in range(count)]


def _see(
    pictures: Sequence[Answered],
    clip: Clip,
    captions: References | None,
    batch: int,
    failed: list[tuple[str, str]],
    on_done: OnDone,
) -> _Seen:
    seen = _Seen.empty(len(pictures[0].answers))
    for start in range(0, len(pictures), batch):
        part = pictures[start : start + batch]
        read = [(each, rgb) for each in part if (rgb := _read(each, failed)) is not None]
        if read:
            _see_batch(read, clip, captions, seen)
        if on_done:
            on_done(len(part))
    return seen


def _read(each: Answered, failed: list[tuple[str, str]]) -> Image.Image | None:
    try:
        return read_rgb(each.path)
    except ImageError as error:
        failed.append((each.key, error.message))
        return None


def _see_batch(
    read: Sequence[tuple[Answered, Image.Image]],
    clip: Clip,
    captions: References | None,
    seen: _Seen,
) -> None:
    kept = [each for each, _ in read]
    images = clip.embed_pictures([rgb for _, rgb in read])
    references = _reference_vectors(clip, kept, captions or {})
    seen.pictures += tuple(kept)
    for i in range(len(kept[0].answers)):
        texts = [each.answers[i] for each in kept]
        tokens = [clip.encode(text) for text in texts]
        prefixed = clip.embed_tokens([clip.encode(PREFIX + text) for text in texts])
        seen.plain[i] += (images * clip.embed_tokens(tokens)).sum(-1).tolist()
        seen.prefixed[i] += (images * prefixed).sum(-1).tolist()
        seen.cut[i] += [each.is_cut for each in tokens]
        seen.nearest[i] += [_nearest(*pair) for pair in zip(prefixed, references, strict=True)]


def _reference_vectors(
    clip: Clip, kept: Sequence[Answered], captions: References
) -> list[Tensor | None]:
    """Of each picture, [num_captions, embed_dim]; None where it has none."""
    texts = [captions.get(each.name, ()) for each in kept]
    flat = [clip.encode(PREFIX + text) for own in texts for text in own]
    if not flat:
        return [None] * len(kept)
    parts = clip.embed_tokens(flat).split([len(own) for own in texts])
    return [part if len(part) else None for part in parts]


def _nearest(answer: Tensor, references: Tensor | None) -> float:
    return float("nan") if references is None else float((references @ answer).max())


def _clip_figures(seen: _Seen, i: int) -> Figures:
    """Source: Hessel et al., CLIPScore, EMNLP 2021, arXiv 2104.08718, sections 3 and 3.1."""
    plain, prefixed, nearest = (
        np.array(values[i], dtype=np.float64)
        for values in (seen.plain, seen.prefixed, seen.nearest)
    )
    score = WEIGHT * np.maximum(prefixed, 0)
    figures = {COSINE: plain, "clip_score": score, "clip_score_100": np.maximum(100 * plain, 0)}
    if not np.isnan(nearest).all():
        nearest = np.maximum(nearest, 0)
        total = score + nearest
        mean = 2 * score * nearest / np.where(total == 0, 1.0, total)
        figures["ref_clip_score"] = mean
    return figures


# --- against captions ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Said:
    figures: Figures
    bleu: tuple[float, ...]


def _against_captions(kept: Sequence[Answered], captions: References) -> list[_Said] | None:
    """Scores of each file; None if no picture has captions."""
    places = [i for i, each in enumerate(kept) if each.name in captions]
    if not places:
        return None
    references = [captions[kept[i].name] for i in places]
    rare = rarity_of(references)
    return [
        _said(
            len(kept),
            places,
            caption_scores([kept[i].answers[file] for i in places], references, rare),
        )
        for file in range(len(kept[0].answers))
    ]


def _said(count: int, places: Sequence[int], scores: CaptionScores) -> _Said:
    figures = {}
    for name in ("cider_d", "rouge_l", "exact_match"):
        figures[name] = np.full(count, np.nan)
        figures[name][places] = getattr(scores, name)
    return _Said(figures, scores.bleu)

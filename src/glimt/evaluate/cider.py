"""CIDEr-D: how much of what people agree on an answer says, rare words counting more.

Source: Vedantam et al., CIDEr, CVPR 2015, arXiv 1411.5726, sections 4 and 5 (the D form: counts
clipped at the reference's, a Gaussian penalty of the length, times 10).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from glimt.evaluate.caption_words import MAX_ORDER, Words, ngrams

_SIGMA = 6.0  # words of difference in length
_SCALE = 10.0


@dataclass(frozen=True, slots=True)
class Rarity:
    """In how many pictures' references each n-gram occurs, of how many pictures."""

    num_pictures: int
    counts: Mapping[Words, int]

    def weight(self, gram: Words) -> float:
        """Inverse document frequency; what no reference has is as rare as what one has."""
        return math.log(self.num_pictures) - math.log(max(1, self.counts.get(gram, 0)))


def rarity(references: Iterable[Sequence[Words]]) -> Rarity:
    """Count over the references of all pictures; of a single one, every weight is 0."""
    counts: Counter[Words] = Counter()
    num_pictures = 0
    for refs in references:
        num_pictures += 1
        counts.update({gram for ref in refs for order in ngrams(ref) for gram in order})
    return Rarity(num_pictures, counts)


def cider_d(answer: Words, references: Sequence[Words], rare: Rarity) -> float:
    """The score of one answer: the mean over its references and the orders, from 0 to 10."""
    ours = _Weighted.of(answer, rare)
    scores = [_similarity(ours, _Weighted.of(ref, rare)) for ref in references]
    return _SCALE * sum(scores) / len(scores)


@dataclass(frozen=True, slots=True)
class _Weighted:
    """A caption's n-grams, each count times its weight; and their lengths as vectors.

    num_pairs: of words that follow each other, which the reference code takes for the length
    """

    vectors: tuple[dict[Words, float], ...]
    norms: tuple[float, ...]
    num_pairs: int

    @classmethod
    def of(cls, caption: Words, rare: Rarity) -> _Weighted:
        vectors = tuple(
            {gram: count * rare.weight(gram) for gram, count in order.items()}
            for order in ngrams(caption)
        )
        norms = tuple(math.sqrt(sum(v * v for v in each.values())) for each in vectors)
        return cls(vectors, norms, max(0, len(caption) - 1))


def _similarity(answer: _Weighted, reference: _Weighted) -> float:
    """Clipped cosine, averaged over the orders, times the penalty of the length."""
    cosines = sum(
        _clipped(answer.vectors[n], reference.vectors[n])
        / ((answer.norms[n] * reference.norms[n]) or 1.0)
        for n in range(MAX_ORDER)
    )
    apart = answer.num_pairs - reference.num_pairs
    return cosines / MAX_ORDER * math.exp(-(apart**2) / (2 * _SIGMA**2))


def _clipped(answer: Mapping[Words, float], reference: Mapping[Words, float]) -> float:
    shared = answer.keys() & reference.keys()
    return sum(min(answer[gram], reference[gram]) * reference[gram] for gram in shared)

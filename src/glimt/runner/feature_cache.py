"""Picture features by digest, under a byte budget, least recently used out first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Set

from torch import Tensor


class FeatureCache:
    """Holds [num_tokens, hidden_size] per picture.

    capacity_tokens: rows in all; a picture larger than that is simply not kept
    """

    def __init__(self, capacity_tokens: int) -> None:
        self.capacity_tokens = capacity_tokens
        self.num_tokens = 0
        self._features: OrderedDict[bytes, Tensor] = OrderedDict()

    @property
    def digests(self) -> Set[bytes]:
        """The pictures that are kept."""
        return self._features.keys()

    def get(self, digest: bytes) -> Tensor | None:
        """A picture's [num_tokens, hidden_size], marked as just used; None if it is not kept."""
        features = self._features.get(digest)
        if features is not None:
            self._features.move_to_end(digest)
        return features

    def put(self, digest: bytes, features: Tensor) -> None:
        """Keep a picture's [num_tokens, hidden_size], dropping the longest unused to make room."""
        self.drop(digest)
        if len(features) > self.capacity_tokens:
            return
        while self.num_tokens + len(features) > self.capacity_tokens:
            _, oldest = self._features.popitem(last=False)
            self.num_tokens -= len(oldest)
        # A copy, because a slice of a larger result would keep all of it in memory.
        self._features[digest] = features.clone()
        self.num_tokens += len(features)

    def drop(self, digest: bytes) -> None:
        """Forget a picture."""
        features = self._features.pop(digest, None)
        if features is not None:
            self.num_tokens -= len(features)

    def __len__(self) -> int:
        return len(self._features)

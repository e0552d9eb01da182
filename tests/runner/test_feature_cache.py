"""The picture feature cache by hand, then against a plain list."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glimt.runner.feature_cache import FeatureCache


def rows(count: int, value: float = 0.0) -> torch.Tensor:
    return torch.full((count, 2), value)


def kept(cache: FeatureCache, *names: bytes) -> list[bytes]:
    """Which of these are cached, without marking any as used."""
    return [name for name in names if name in cache._features]


def test_the_budget_counts_tokens_not_pictures():
    """Would catch a budget that large pictures overrun."""
    cache = FeatureCache(10)
    cache.put(b"a", rows(4))
    cache.put(b"b", rows(6))
    assert (len(cache), cache.num_tokens) == (2, 10)
    cache.put(b"c", rows(1))
    assert kept(cache, b"a", b"b", b"c") == [b"b", b"c"]
    assert cache.num_tokens == 7


def test_the_longest_unused_goes_first():
    """Would catch eviction in the order of arrival although a picture is in steady use."""
    cache = FeatureCache(6)
    for name in (b"a", b"b", b"c"):
        cache.put(name, rows(2))
    assert cache.get(b"a") is not None
    cache.put(b"d", rows(2))
    assert kept(cache, b"a", b"b", b"c", b"d") == [b"a", b"c", b"d"]


def test_a_large_picture_pushes_out_as_many_as_it_needs():
    """Would catch only one picture being dropped, whatever the size."""
    cache = FeatureCache(6)
    for name in (b"a", b"b", b"c"):
        cache.put(name, rows(2))
    cache.put(b"d", rows(3))
    assert kept(cache, b"a", b"b", b"c", b"d") == [b"c", b"d"]
    assert cache.num_tokens == 5


def test_a_picture_beyond_the_budget_is_not_kept_and_pushes_nothing_out():
    """Would catch a cache emptied for a picture that cannot be kept anyway."""
    cache = FeatureCache(4)
    cache.put(b"a", rows(3))
    cache.put(b"huge", rows(5))
    assert kept(cache, b"a", b"huge") == [b"a"]
    cache.put(b"exact", rows(4))
    assert kept(cache, b"a", b"exact") == [b"exact"]
    assert cache.num_tokens == 4


def test_putting_a_picture_again_replaces_it():
    """Would catch its tokens counted twice, or the old features kept."""
    cache = FeatureCache(6)
    cache.put(b"a", rows(3, 1.0))
    cache.put(b"b", rows(3))
    cache.put(b"a", rows(2, 2.0))  # now the younger of the two
    assert (len(cache), cache.num_tokens) == (2, 5)
    assert torch.equal(cache.get(b"a"), rows(2, 2.0))
    cache.put(b"c", rows(4))
    assert kept(cache, b"a", b"b", b"c") == [b"a", b"c"]


def test_a_replacement_that_is_too_large_removes_the_old_one():
    """Would catch stale features under a digest whose new ones could not be kept."""
    cache = FeatureCache(3)
    cache.put(b"a", rows(2))
    cache.put(b"a", rows(4))
    assert cache.get(b"a") is None
    assert cache.num_tokens == 0


def test_a_cache_of_no_capacity_keeps_nothing():
    """Would catch feature_cache_bytes=0 not turning the cache off, or failing."""
    cache = FeatureCache(0)
    cache.put(b"a", rows(1))
    assert cache.get(b"a") is None
    assert (len(cache), cache.num_tokens) == (0, 0)


def test_dropping_frees_the_tokens_once():
    """Would catch a negative count after a picture is forgotten twice."""
    cache = FeatureCache(4)
    cache.put(b"a", rows(3))
    cache.drop(b"a")
    cache.drop(b"a")
    assert (len(cache), cache.num_tokens) == (0, 0)
    cache.put(b"b", rows(4))
    assert kept(cache, b"b") == [b"b"]


def test_one_kept_picture_does_not_keep_its_whole_batch():
    """Would catch a slice of the tower's output held as it is: its storage is that of all the
    pictures that went through the tower together, so the budget would mean nothing.
    """
    cache = FeatureCache(4)
    many = torch.arange(80.0).view(40, 2)
    cache.put(b"a", many[4:8])
    found = cache.get(b"a")
    assert torch.equal(found, many[4:8])
    assert found.untyped_storage().nbytes() == found.nbytes


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 8),
    st.lists(st.tuples(st.sampled_from("pgd"), st.sampled_from(b"abcd"), st.integers(1, 6))),
)
def test_any_order_of_calls_keeps_the_budget_and_the_order(capacity, calls):
    """Would catch any drift between the count and what is kept; the model is a list by last use."""
    cache = FeatureCache(capacity)
    model: list[tuple[int, int]] = []  # (name, size), longest unused first
    for call, name, size in calls:
        entry = next((e for e in model if e[0] == name), None)
        if entry and call in "pgd":
            model.remove(entry)
        if call == "g":
            found = cache.get(bytes([name]))
            assert (found is None) == (entry is None)
            if entry:
                assert len(found) == entry[1]
                model.append(entry)
        elif call == "d":
            cache.drop(bytes([name]))
        else:
            cache.put(bytes([name]), rows(size))
            if size <= capacity:
                while sum(s for _, s in model) + size > capacity:
                    model.pop(0)
                model.append((name, size))
        assert cache.num_tokens == sum(s for _, s in model) <= capacity
        assert list(cache._features) == [bytes([n]) for n, _ in model]

"""Attention by torch's fused kernels alone: no mask is made, and no keys or values are repeated.

Both would be: a mask of a chunk over its context has as many values as scores, and GLM-4v has 16
query heads for each KV head.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, is_causal: bool) -> Tensor:
    """One sequence: [q, num_heads, head_dim] over [k, num_kv_heads, head_dim] -> as query.

    is_causal: the last query sees all keys, each one before it one less
    """
    (num_queries, heads, _), (num_keys, kv_heads, _) = query.shape, key.shape
    group = heads // kv_heads
    grouped = query.unflatten(1, (kv_heads, group)).permute(1, 2, 0, 3)
    keys, values = (x.transpose(0, 1)[:, None].expand(-1, group, -1, -1) for x in (key, value))
    is_causal = is_causal and num_queries > 1  # one query sees all
    is_square = num_queries == num_keys
    out = F.scaled_dot_product_attention(
        grouped,
        keys,
        values,
        attn_mask=None if is_square or not is_causal else causal_lower_right(num_queries, num_keys),
        is_causal=is_causal and is_square,
        scale=scale,
    )
    return out.permute(2, 0, 1, 3).flatten(1, 2)


def attend_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_starts: Sequence[int],
    key_starts: Sequence[int],
    scale: float,
) -> Tensor:
    """As Device.varlen_attention; sequences of equal lengths, as pictures mostly are, at once.

    query: [num_queries, num_heads, head_dim]; key, value: [num_keys, num_heads, head_dim]
    """
    if _is_even(query_starts) and _is_even(key_starts):
        count = len(query_starts) - 1
        q, k, v = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(0, 1)
    spans = zip(pairwise(query_starts), pairwise(key_starts), strict=True)
    return torch.cat(
        [
            attend(query[q0:q1], key[k0:k1], value[k0:k1], scale, False)
            for (q0, q1), (k0, k1) in spans
        ]
    )


def _is_even(starts: Sequence[int]) -> bool:
    return len({stop - start for start, stop in pairwise(starts)}) == 1

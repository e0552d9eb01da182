"""VisualGLM-6B as the published code computes it on plain torch, to time and to compare with.

The same operations in the same order and dtypes as the hub's modeling_chatglm.py and, for the
vision part, SwissArmyTransformer's ViT and Q-Former, written anew; parameters bear the checkpoint's
names. One request without padding. Left out is what costs nothing: dropouts of zero, and the
options that the published config.json does not use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glimt.models.visualglm import EvaConfig, QformerConfig, VisualGlmConfig

KeysValues = tuple[Tensor, Tensor]  # [length, 1, num_heads, head_dim] each
Past = list[KeysValues]


# --- tower and Q-Former ----------------------------------------------------------------------


def attend(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """Full attention between [1, num_tokens, hidden_size] tensors."""
    q, k, v = (x.unflatten(-1, (num_heads, -1)).permute(0, 2, 1, 3) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v)
    return out.permute(0, 2, 1, 3).contiguous().flatten(2)


class VisionAttention(nn.Module):
    """Full attention of tower and Q-Former."""

    def __init__(self, size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query_key_value = nn.Linear(size, 3 * size)
        self.dense = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        """[1, num_tokens, hidden_size] -> the same."""
        q, k, v = self.query_key_value(x).chunk(3, dim=-1)
        return self.dense(attend(q, k, v, self.num_heads))


class CrossAttention(nn.Module):
    """The queries read the tower's output."""

    def __init__(self, config: QformerConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.num_heads = config.num_heads
        self.query = nn.Linear(size, size)
        self.key_value = nn.Linear(config.vision_size, 2 * size)
        self.dense = nn.Linear(size, size)

    def forward(self, x: Tensor, states: Tensor) -> Tensor:
        """[1, num_queries, hidden_size], [1, num_patches, vision_size] -> the first's shape."""
        k, v = self.key_value(states).chunk(2, dim=-1)
        return self.dense(attend(self.query(x), k, v, self.num_heads))


class GeluMlp(nn.Module):
    """Two linears with the exact GELU between them."""

    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(size, inner)
        self.dense_4h_to_h = nn.Linear(inner, size)

    def forward(self, x: Tensor) -> Tensor:
        """[1, num_tokens, hidden_size] -> the same."""
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x)))


class EvaBlock(nn.Module):
    """Pre-norm block."""

    def __init__(self, config: EvaConfig) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.layernorm_epsilon
        self.input_layernorm = nn.LayerNorm(size, eps)
        self.attention = VisionAttention(size, config.num_heads)
        self.post_attention_layernorm = nn.LayerNorm(size, eps)
        self.mlp = GeluMlp(size, config.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        """[1, num_tokens, hidden_size] -> the same."""
        x = x + self.attention(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class QformerBlock(nn.Module):
    """Post-norm block; the norm after its MLP is the next block's first."""

    def __init__(self, config: QformerConfig, crosses: bool) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.layernorm_epsilon
        self.input_layernorm = nn.LayerNorm(size, eps)
        self.attention = VisionAttention(size, config.num_heads)
        self.post_attention_layernorm = nn.LayerNorm(size, eps)
        if crosses:
            self.cross_attention = CrossAttention(config)
            self.post_cross_attention_layernorm = nn.LayerNorm(size, eps)
        self.crosses = crosses
        self.mlp = GeluMlp(size, config.intermediate_size)

    def forward(self, x: Tensor, states: Tensor) -> Tensor:
        """[1, num_queries, hidden_size] -> the same."""
        x = self.input_layernorm(x)
        x = self.post_attention_layernorm(x + self.attention(x))
        if self.crosses:
            x = self.post_cross_attention_layernorm(x + self.cross_attention(x, states))
        return x + self.mlp(x)


class EvaTower(nn.Module):
    """EVA ViT-G, with the checkpoint's nesting of names."""

    def __init__(self, config: EvaConfig) -> None:
        super().__init__()
        size, patch = config.hidden_size, config.patch_size
        blocks = nn.ModuleList(EvaBlock(config) for _ in range(config.num_layers))
        proj = nn.Conv2d(3, size, kernel_size=patch, stride=patch)
        self.transformer = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(1, size),
                "position_embeddings": nn.Embedding(config.num_positions, size),
                "layers": blocks,
            }
        )
        self.mixins = nn.ModuleDict(
            {
                "patch_embedding": nn.ModuleDict({"proj": proj}),
                "cls": nn.ModuleDict({"ln_vision": nn.LayerNorm(size)}),
            }
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """[1, 3, height, width], normalised -> [1, 1 + num_patches, hidden_size]."""
        patches = (
            self.mixins["patch_embedding"].get_submodule("proj")(pixels).flatten(2).transpose(1, 2)
        )
        first = self.transformer["word_embeddings"](torch.zeros(1, 1, dtype=torch.long))
        x = torch.cat((first, patches), dim=1)
        x = x + self.transformer["position_embeddings"](torch.arange(x.shape[1]).unsqueeze(0))
        for block in self.transformer["layers"].children():
            x = block(x)
        return self.mixins["cls"].get_submodule("ln_vision")(x)


class Qformer(nn.Module):
    """Learned queries through all blocks."""

    def __init__(self, config: QformerConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.num_queries = config.num_queries
        self.transformer = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(config.num_queries, size),
                "layers": nn.ModuleList(QformerBlock(config, c) for c in config.crosses),
                "final_layernorm": nn.LayerNorm(size, config.layernorm_epsilon),
            }
        )

    def forward(self, states: Tensor) -> Tensor:
        """[1, num_patches, vision_size] -> [1, num_queries, hidden_size]."""
        x = self.transformer["word_embeddings"](torch.arange(self.num_queries).unsqueeze(0))
        for block in self.transformer["layers"].children():
            x = block(x, states)
        return self.transformer["final_layernorm"](x)


# --- language model --------------------------------------------------------------------------


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh form, written out as the original does."""
    return 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * x * (1.0 + 0.044715 * x * x)))


class Rotary:
    """Cosines and sines of one block, made longer when a longer sequence comes."""

    def __init__(self, width: int) -> None:
        frequencies = 1.0 / (10000 ** (torch.arange(0, width, 2, device="cpu").float() / width))
        self.inv_freq = frequencies.half()  # whatever the model's dtype
        self.cos = self.sin = torch.empty(0)

    def tables(self, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[length, width] each."""
        if length > len(self.cos) or dtype != self.cos.dtype:
            angles = torch.outer(torch.arange(length, dtype=dtype), self.inv_freq.to(dtype))
            both = torch.cat((angles, angles), dim=-1)
            self.cos, self.sin = both.cos(), both.sin()
        return self.cos[:length], self.sin[:length]


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs (i, i + half) of each head.

    x: [num_tokens, 1, num_heads, dim]; cos, sin: [num_tokens, 1, 1, dim]
    """
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


class SelfAttention(nn.Module):
    """Scores written out, softmax in float32; the cache is joined anew in every step."""

    def __init__(self, config: VisualGlmConfig, index: int) -> None:
        super().__init__()
        size = config.hidden_size
        self.num_heads, self.head_dim = config.num_heads, size // config.num_heads
        self.coefficient = float(index + 1)  # keeps half-precision scores small
        self.rotary = Rotary(self.head_dim // 2)
        self.query_key_value = nn.Linear(size, 3 * size)
        self.dense = nn.Linear(size, size)

    def forward(
        self, x: Tensor, positions: Tensor, mask: Tensor, past: KeysValues | None
    ) -> tuple[Tensor, KeysValues]:
        """[num_tokens, 1, hidden_size] -> the same, and all keys and values so far.

        positions: [2, num_tokens]; mask: [1, 1, num_tokens, length], True where nothing is seen
        """
        qkv = self.query_key_value(x).unflatten(-1, (self.num_heads, 3 * self.head_dim))
        q, k, v = qkv.chunk(3, dim=-1)
        q, k = self._rotate(q, k, positions)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=0), torch.cat((past[1], v), dim=0)
        return self.dense(self._attend(q, k, v, mask)), (k, v)

    def _rotate(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Half of each head by the position, half by the block position."""
        cos, sin = self.rotary.tables(int(positions.max()) + 1, q.dtype)
        halves = []
        for q_half, k_half, where in zip(
            q.chunk(2, dim=-1), k.chunk(2, dim=-1), positions, strict=True
        ):
            turn = F.embedding(where, cos)[:, None, None], F.embedding(where, sin)[:, None, None]
            halves.append((rotated(q_half, *turn), rotated(k_half, *turn)))
        (q1, k1), (q2, k2) = halves
        return torch.cat((q1, q2), dim=-1), torch.cat((k1, k2), dim=-1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        q = q / (math.sqrt(self.head_dim) * self.coefficient)
        q, k, v = (x.flatten(1, 2).transpose(0, 1) for x in (q, k, v))  # [num_heads, tokens, dim]
        scores = torch.baddbmm(q.new_zeros(1, 1, 1), q, k.transpose(1, 2), beta=0.0).unsqueeze(0)
        if not (mask == 0).all():
            scores.masked_fill_(mask, -10000.0)
        weights = F.softmax(scores.float() * self.coefficient, dim=-1).type(scores.dtype)
        out = torch.bmm(weights[0], v).unsqueeze(0)
        return out.permute(2, 0, 1, 3).contiguous().flatten(2)


class Mlp(nn.Module):
    """Two linears with the tanh form of GELU between them."""

    def __init__(self, config: VisualGlmConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.inner_hidden_size)
        self.dense_4h_to_h = nn.Linear(config.inner_hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[num_tokens, 1, hidden_size] -> the same."""
        return self.dense_4h_to_h(gelu_tanh(self.dense_h_to_4h(x)))


class Block(nn.Module):
    """The residual is the normalised input, times sqrt(2 * num_layers)."""

    def __init__(self, config: VisualGlmConfig, index: int) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.layernorm_epsilon
        self.input_layernorm = nn.LayerNorm(size, eps)
        self.attention = SelfAttention(config, index)
        self.post_attention_layernorm = nn.LayerNorm(size, eps)
        self.mlp = Mlp(config)
        self.alpha = (2 * config.num_layers) ** 0.5

    def forward(
        self, x: Tensor, positions: Tensor, mask: Tensor, past: KeysValues | None
    ) -> tuple[Tensor, KeysValues]:
        """[num_tokens, 1, hidden_size] -> the same, and the block's keys and values."""
        x = self.input_layernorm(x)
        attended, present = self.attention(x, positions, mask, past)
        x = self.post_attention_layernorm(x * self.alpha + attended)
        return x * self.alpha + self.mlp(x), present


class OriginalVisualGlm(nn.Module):
    """The whole model, answering one request at a time."""

    def __init__(self, config: VisualGlmConfig) -> None:
        super().__init__()
        self.config, self.side = config, config.eva.image_size[0]
        size = config.hidden_size
        self.image_encoder = nn.ModuleDict(
            {
                "vit": EvaTower(config.eva),
                "qformer": Qformer(config.qformer),
                "glm_proj": nn.Linear(config.qformer.hidden_size, size),
            }
        )
        self.transformer = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(config.vocab_size, size),
                "layers": nn.ModuleList(Block(config, i) for i in range(config.num_layers)),
                "final_layernorm": nn.LayerNorm(size, config.layernorm_epsilon),
            }
        )
        self.lm_head = nn.Linear(size, config.vocab_size, bias=False)

    def image_features(self, pixels: Tensor) -> Tensor:
        """[1, 3, height, width], normalised -> [1, image_length, hidden_size]."""
        parts = self.image_encoder
        return parts["glm_proj"](parts["qformer"](parts["vit"](pixels)))

    def prefill(self, ids: Sequence[int], features: Tensor) -> tuple[Tensor, Past]:
        """The prompt -> logits [1, num_tokens, vocab_size] of all its tokens.

        The picture's vectors stand in for the placeholders, a run of zeros.
        """
        begin, n = ids.index(0), len(ids)
        words = self._embed(ids)
        after = begin + features.shape[1]
        x = torch.cat((words[:, :begin], features, words[:, after:]), dim=1)
        context = ids.index(self.config.bos_token_id)
        position = torch.arange(n)
        position[context:] = ids.index(self.config.gmask_token_id)
        block = torch.cat((torch.zeros(context, dtype=torch.long), torch.arange(n - context) + 1))
        seen = torch.ones(1, n, n).tril_()
        seen[:, :, :context] = 1
        return self._forward(x, torch.stack((position, block)), (seen < 0.5).unsqueeze(1), None)

    def decode(
        self, token_id: int, index: int, ids: Sequence[int], past: Past
    ) -> tuple[Tensor, Past]:
        """The answer's token number `index` -> logits [1, 1, vocab_size] of the next."""
        block = len(ids) - ids.index(self.config.bos_token_id) + 1 + index
        where = torch.tensor([[ids.index(self.config.gmask_token_id)], [block]])
        mask = torch.zeros(1, 1, 1, len(past[0][0]) + 1, dtype=torch.bool)
        return self._forward(self._embed([token_id]), where, mask, past)

    def _embed(self, ids: Sequence[int]) -> Tensor:
        return self.transformer["word_embeddings"](torch.tensor([ids]))

    def _forward(
        self, x: Tensor, positions: Tensor, mask: Tensor, past: Past | None
    ) -> tuple[Tensor, Past]:
        x, presents = x.transpose(0, 1), []
        for i, layer in enumerate(self.transformer["layers"].children()):
            x, present = layer(x, positions, mask, past[i] if past else None)
            presents.append(present)
        x = self.transformer["final_layernorm"](x)
        return self.lm_head(x).permute(1, 0, 2).contiguous(), presents

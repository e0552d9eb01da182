"""GLM-4v-9B as the published code computes it on plain torch, to time and to compare with.

The same operations in the same order and dtypes as the hub's modeling_chatglm.py and visual.py
(June 2024, torch 2), written anew; parameters bear the checkpoint's names. One request without
padding, so there is no mask. Left out is what costs nothing: dropouts of zero, and the options that
the published config.json does not use.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glimt.models.glm4v_9b import Glm4vConfig, VisionConfig

Past = list[tuple[Tensor, Tensor]]  # of each block: keys and values [1, num_kv_heads, length, dim]


# --- tower and adapter -----------------------------------------------------------------------


class PatchEmbedding(nn.Module):
    """A convolution, the class token in front, learned positions."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size, patch = config.hidden_size, config.patch_size
        self.proj = nn.Conv2d(3, size, kernel_size=patch, stride=patch)
        self.cls_embedding = nn.Parameter(torch.empty(1, size))
        self.position_embedding = nn.Embedding(config.num_positions, size)

    def forward(self, pixels: Tensor) -> Tensor:
        """[1, 3, height, width] -> [1, 1 + num_patches, hidden_size]."""
        x = self.proj(pixels).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_embedding.expand(len(x), -1, -1), x), dim=1)
        x += self.position_embedding.weight.unsqueeze(0)
        return x


class VisionAttention(nn.Module):
    """Full attention; queries, keys and values are views of one product's output."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[1, num_tokens, hidden_size] -> the same."""
        qkv = self.query_key_value(x).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.dense(out.transpose(1, 2).flatten(2))


class VisionMlp(nn.Module):
    """Two linears with the exact GELU between them."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[1, num_tokens, hidden_size] -> the same."""
        return self.fc2(F.gelu(self.fc1(x)))


class VisionLayer(nn.Module):
    """The norms act on the outputs of the branches."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attention = VisionAttention(config)
        self.mlp = VisionMlp(config)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """[1, num_tokens, hidden_size] -> the same."""
        x = x + self.input_layernorm(self.attention(x))
        return x + self.post_attention_layernorm(self.mlp(x))


class Glu(nn.Module):
    """The adapter's projection, norm and gated MLP."""

    def __init__(self, config: Glm4vConfig) -> None:
        super().__init__()
        size, inner = config.hidden_size, config.ffn_hidden_size
        self.linear_proj = nn.Linear(size, size, bias=False)
        self.norm1 = nn.LayerNorm(size)
        self.dense_h_to_4h = nn.Linear(size, inner, bias=False)
        self.gate_proj = nn.Linear(size, inner, bias=False)
        self.dense_4h_to_h = nn.Linear(inner, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[1, num_tokens, hidden_size] -> the same."""
        x = F.gelu(self.norm1(self.linear_proj(x)))
        return self.dense_4h_to_h(F.silu(self.gate_proj(x)) * self.dense_h_to_4h(x))


class Vision(nn.Module):
    """EVA2-CLIP-E, a 2 by 2 convolution, the adapter, and the vectors around its output."""

    def __init__(self, config: Glm4vConfig, vision: VisionConfig) -> None:
        super().__init__()
        size = config.hidden_size
        layers = nn.ModuleList(VisionLayer(vision) for _ in range(vision.num_layers))
        self.patch_embedding = PatchEmbedding(vision)
        self.transformer = nn.ModuleDict({"layers": layers})
        self.linear_proj = Glu(config)
        self.conv = nn.Conv2d(vision.hidden_size, size, kernel_size=2, stride=2)
        self.boi = nn.Parameter(torch.empty(1, 1, size))
        self.eoi = nn.Parameter(torch.empty(1, 1, size))
        self.grid, self.scaling_factor = vision.grid, vision.scaling_factor

    def forward(self, pixels: Tensor) -> Tensor:
        """[1, 3, height, width], normalised -> [1, num_image_tokens, hidden_size]."""
        x = self.patch_embedding(pixels)
        for layer in self.transformer["layers"].children():
            x = layer(x)
        x = x[:, 1:].unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        x = self.linear_proj(self.conv(x).flatten(2).transpose(1, 2))
        return torch.cat((self.boi, x, self.eoi), dim=1) / self.scaling_factor


# --- language model --------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """Everything in float32, one rounding at the end."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[…, size] -> the same."""
        variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
        scaled = x * torch.rsqrt(variance + self.eps)
        return (self.weight * scaled).to(x.dtype)


def rotary_table(num_positions: int, width: int, base: float, dtype: torch.dtype) -> Tensor:
    """[num_positions, width / 2, 2]: cosines and sines, computed in float32."""
    theta = 1.0 / (base ** (torch.arange(0, width, 2, dtype=torch.float32) / width))
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), theta)
    return torch.stack((angles.cos(), angles.sin()), dim=-1).to(dtype)


def rotated(x: Tensor, table: Tensor) -> Tensor:
    """Turn neighbouring pairs of the first part of each head; the rest passes through.

    x: [1, num_heads, num_tokens, head_dim]; table: [num_tokens, num_pairs, 2]
    """
    num_pairs = table.shape[1]
    turned, rest = x[..., : 2 * num_pairs], x[..., 2 * num_pairs :]
    pairs = turned.reshape(*x.shape[:3], num_pairs, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = table[..., 0], table[..., 1]
    out = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return torch.cat((out.flatten(3), rest), dim=-1)


class SelfAttention(nn.Module):
    """Grouped-query attention. The cache is joined anew and widened to all heads in every step."""

    def __init__(self, config: Glm4vConfig) -> None:
        super().__init__()
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.split, self.head_dim = (heads * dim, kv_heads * dim, kv_heads * dim), dim
        self.num_groups = heads // kv_heads
        bias = config.qkv_bias or config.linear_bias
        self.query_key_value = nn.Linear(config.hidden_size, sum(self.split), bias=bias)
        self.dense = nn.Linear(heads * dim, config.hidden_size, bias=config.linear_bias)

    def forward(
        self, x: Tensor, table: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """[1, num_tokens, hidden_size] -> the same, and all keys and values so far."""
        parts = self.query_key_value(x).split(self.split, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in parts)
        q, k = rotated(q, table), rotated(k, table)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        out = F.scaled_dot_product_attention(
            q, self._widened(k), self._widened(v), is_causal=past is None
        )
        return self.dense(out.transpose(1, 2).contiguous().flatten(2)), (k, v)

    def _widened(self, x: Tensor) -> Tensor:
        """A copy with each head as often as queries read it."""
        groups = x.unsqueeze(2).expand(-1, -1, self.num_groups, -1, -1)
        return groups.contiguous().flatten(1, 2)


class Mlp(nn.Module):
    """SwiGLU, gate and up in one product."""

    def __init__(self, config: Glm4vConfig) -> None:
        super().__init__()
        size, inner, bias = config.hidden_size, config.ffn_hidden_size, config.linear_bias
        self.dense_h_to_4h = nn.Linear(size, 2 * inner, bias=bias)
        self.dense_4h_to_h = nn.Linear(inner, size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[1, num_tokens, hidden_size] -> the same."""
        gate, up = self.dense_h_to_4h(x).chunk(2, dim=-1)
        return self.dense_4h_to_h(F.silu(gate) * up)


class Block(nn.Module):
    """Pre-norm decoder block."""

    def __init__(self, config: Glm4vConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.self_attention = SelfAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.mlp = Mlp(config)

    def forward(
        self, x: Tensor, table: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """[1, num_tokens, hidden_size] -> the same, and the block's keys and values."""
        attended, present = self.self_attention(self.input_layernorm(x), table, past)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), present


class Encoder(nn.Module):
    """All blocks and the last norm."""

    def __init__(self, config: Glm4vConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon)

    def forward(self, x: Tensor, table: Tensor, past: Past | None) -> tuple[Tensor, Past]:
        """[1, num_tokens, hidden_size] -> the same, and every block's keys and values."""
        presents = []
        for i, layer in enumerate(self.layers):
            x, present = layer(x, table, past[i] if past else None)
            presents.append(present)
        return self.final_layernorm(x), presents


class OriginalGlm4v(nn.Module):
    """The whole model, answering one request at a time."""

    def __init__(self, config: Glm4vConfig) -> None:
        super().__init__()
        assert config.vision, "the text model has no tower to measure"
        self.config, self.side = config, config.vision.image_size
        words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.transformer = nn.ModuleDict(
            {
                "embedding": nn.ModuleDict({"word_embeddings": words}),
                "encoder": Encoder(config),
                "output_layer": nn.Linear(config.hidden_size, config.vocab_size, bias=False),
                "vision": Vision(config, config.vision),
            }
        )

    def image_features(self, pixels: Tensor) -> Tensor:
        """[1, 3, height, width], normalised -> [1, num_image_tokens, hidden_size]."""
        return self.transformer["vision"](pixels)

    def prefill(self, ids: Sequence[int], features: Tensor) -> tuple[Tensor, Past]:
        """The prompt with its picture as three ids -> logits [1, 1, vocab_size] of the last."""
        begin, end = ids.index(self.config.boi_token_id), ids.index(self.config.eoi_token_id)
        words, positions = self._embed(ids), torch.arange(len(ids))
        # All patches stand at the position of the id between begin and end.
        patches = positions[begin + 1].repeat(features.shape[1] - 2)
        x = torch.cat((words[:, :begin], features, words[:, end + 1 :]), dim=1)
        positions = torch.cat((positions[: begin + 1], patches, positions[end:]))
        return self._forward(x, positions, None)

    def decode(
        self, token_id: int, index: int, ids: Sequence[int], past: Past
    ) -> tuple[Tensor, Past]:
        """The answer's token number `index` -> logits [1, 1, vocab_size] of the next."""
        return self._forward(self._embed([token_id]), torch.tensor([len(ids) + index]), past)

    def _embed(self, ids: Sequence[int]) -> Tensor:
        return self.transformer["embedding"].get_submodule("word_embeddings")(torch.tensor([ids]))

    def _forward(self, x: Tensor, positions: Tensor, past: Past | None) -> tuple[Tensor, Past]:
        # The whole table, in every step.
        table = rotary_table(
            self.config.seq_length,
            self.config.head_dim // 2,
            10000 * self.config.rope_ratio,
            x.dtype,
        )
        hidden, past = self.transformer["encoder"](x, table[positions], past)
        return self.transformer["output_layer"](hidden[:, -1:]), past

"""The text decoder and the embedding: static, batch-free, with every state an argument and a result.

Letters: C tokens of a chunk, D hidden, F feed-forward width, V vocabulary. Projections that read the same
input stay apart: a stacked matrix saves one call but its result must be split, which copies (docs/LOG.md).
Modules accept leading batch dimensions, which only training uses.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.model.config import FULL, TextConfig
from export.model.operators import ops

Context = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""cos, sin [C, rotary_dim/2], start int32 [1], valid int32 [1] or None when every row is real."""

L2_EPS = 1e-6
"""The eps that transformers' `l2norm` (as FLA) adds to the sum of squares of DeltaNet's q and k."""


def weight(*shape: int) -> nn.Parameter:
    """A parameter to be filled later. Uninitialised on purpose: tracing runs on the meta device."""
    return nn.Parameter(torch.empty(*shape), requires_grad=False)


class Linear(nn.Module):
    """x [..., K] -> x·weightᵀ [..., N], weight [N, K]; the node that weight quantisation replaces."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = weight(outputs, inputs)
        self.bias = weight(outputs) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """Root-mean-square norm; `weight` is the effective factor (1 + the published zero-centred one)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = weight(width)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class GatedDeltaNet(nn.Module):
    """Linear attention with a recurrent state: conv over q, k, v, then the gated delta rule."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        heads = config.linear_num_value_heads
        self.qkv = Linear(config.hidden_size, config.conv_dim)
        self.z = Linear(config.hidden_size, config.linear_value_dim)
        self.b = Linear(config.hidden_size, heads)
        self.a = Linear(config.hidden_size, heads)
        self.conv_weight = weight(config.conv_dim, config.linear_conv_kernel_dim)
        self.decay_scale = weight(heads)
        self.dt_bias = weight(heads)
        self.norm_weight = weight(config.linear_value_head_dim)
        self.out = Linear(config.linear_value_dim, config.hidden_size)

    def forward(
        self, x: Tensor, context: Context, conv: Tensor, recurrent: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x [C, D], conv [Ch, K-1], recurrent [Hv, Dk, Dv] -> y [C, D] and the two new states."""
        config, valid = self.config, context[3]
        lead = x.shape[:-1]
        qkv, conv = ops.causal_conv(self.qkv(x), self.conv_weight, conv, valid)
        q, k, v = qkv.split([config.linear_key_dim, config.linear_key_dim, config.linear_value_dim], dim=-1)
        keys = (*lead, config.linear_num_key_heads, config.linear_key_head_dim)
        values = (*lead, config.linear_num_value_heads, config.linear_value_head_dim)
        q = ops.l2_norm(q.reshape(keys), L2_EPS, config.linear_key_head_dim**-0.5)
        k = ops.l2_norm(k.reshape(keys), L2_EPS, 1.0)
        g, beta = ops.delta_gates(self.a(x), self.b(x), self.decay_scale, self.dt_bias, valid)
        rule = ops.gated_delta_step if valid is None else ops.gated_delta_chunk
        y, recurrent = rule(q, k, v.reshape(values), g, beta, recurrent)
        y = ops.gated_rms_norm(y, self.norm_weight, self.z(x).reshape(values), config.rms_norm_eps)
        return self.out(y.reshape(*lead, config.linear_value_dim)), (conv, recurrent)


class GatedAttention(nn.Module):
    """Grouped-query attention over a static KV cache, its output gated by a sigmoid of the input."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.query_dim = config.num_attention_heads * config.head_dim
        self.key_dim = config.num_key_value_heads * config.head_dim
        self.q = Linear(config.hidden_size, self.query_dim)
        self.k = Linear(config.hidden_size, self.key_dim)
        self.v = Linear(config.hidden_size, self.key_dim)
        self.gate = Linear(config.hidden_size, self.query_dim)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.out = Linear(self.query_dim, config.hidden_size)

    def forward(
        self, x: Tensor, context: Context, key: Tensor, value: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x [C, D], key and value caches [Hkv, L, Dh] -> y [C, D] and the two new caches."""
        config = self.config
        cos, sin, start, _ = context
        lead = x.shape[:-1]
        queries = (*lead, config.num_attention_heads, config.head_dim)
        keys = (*lead, config.num_key_value_heads, config.head_dim)
        q = ops.rotary(self.q_norm(self.q(x).reshape(queries)), cos, sin)
        k = ops.rotary(self.k_norm(self.k(x).reshape(keys)), cos, sin)
        y, key, value = ops.cached_attention(
            q, k, self.v(x).reshape(keys), key, value, start, config.head_dim**-0.5
        )
        return self.out(y.reshape(*lead, self.query_dim) * self.gate(x).sigmoid()), (key, value)


class MLP(nn.Module):
    """down(silu(gate(x)) · up(x))."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.gate = Linear(config.hidden_size, config.intermediate_size)
        self.up = Linear(config.hidden_size, config.intermediate_size)
        self.down = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    """Pre-norm residual layer: token mixer (DeltaNet or attention), then MLP."""

    def __init__(self, config: TextConfig, kind: str) -> None:
        super().__init__()
        self.input_norm = RMSNorm(config.hidden_size, config.stream_eps)
        self.mixer = GatedAttention(config) if kind == FULL else GatedDeltaNet(config)
        self.post_norm = RMSNorm(config.hidden_size, config.stream_eps)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, context: Context, first: Tensor, second: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """`first`, `second`: conv and recurrent state, or key and value cache, of this layer."""
        y, states = self.mixer(self.input_norm(x), context, first, second)
        x = x + y
        return x + self.mlp(self.post_norm(x)), states


class Decoder(nn.Module):
    """All layers, or a range of them for a runtime that wants its decoder in several stages.

    The first range turns positions into rotary tables itself, as does every later one: they are cheap and
    stages then need nothing but hidden states from each other. The last range holds the final norm, a matrix
    before a tied head of a rotated stream (see `export.quantize.conditioned`), and the head.
    """

    def __init__(self, config: TextConfig, layers: range | None = None, head: bool = True) -> None:
        super().__init__()
        self.config = config
        self.indices = layers if layers is not None else range(config.num_hidden_layers)
        self.layers = nn.ModuleDict({str(i): Layer(config, config.layer_types[i]) for i in self.indices})
        self.norm = RMSNorm(config.hidden_size, config.stream_eps) if head else None
        self.basis = Linear(config.hidden_size, config.hidden_size) if head and config.head_basis else None
        self.head = Linear(config.hidden_size, config.vocab_size) if head else None

    def forward(
        self,
        x: Tensor,
        position_ids: Tensor,
        start: Tensor,
        valid: Tensor | None,
        states: list[Tensor],
        all_rows: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """One chunk (or, with `valid` None, one token).

        Args:
            x: [C, D]; position_ids: int32 [3, C]; start: int32 [1]; valid: int32 [1] or None;
            states: two tensors per layer, in the order of `export.model.state.layout`;
            all_rows: logits of every row instead of the last valid one (training and teacher forcing).

        Returns:
            logits [1, V] (or the hidden rows [C, D] of a range without head) and the new states.
        """
        config = self.config
        cos, sin = ops.rotary_table(
            position_ids, config.rope_theta, config.rotary_dim, list(config.mrope_section), x.dtype
        )
        context = (cos, sin, start, valid)
        if valid is not None and self.indices.start == 0:
            x = ops.real_rows(x, valid)
        if config.stream_scale != 1.0 and self.indices.start == 0:
            x = x * config.stream_scale
        new: list[Tensor] = []
        for place, layer in enumerate(self.layers.values()):
            x, pair = layer(x, context, states[2 * place], states[2 * place + 1])
            new.extend(pair)
        if self.head is None or self.norm is None:
            return x, new
        if valid is not None and not all_rows:
            x = ops.last_valid(x, valid)
        return self.head(self.scored(self.norm(x))), new

    def scored(self, x: Tensor) -> Tensor:
        """Normed rows [..., D] as the head wants them."""
        return x if self.basis is None else self.basis(x)


class Embedding(nn.Module):
    """Token ids int [...] -> rows [..., D] of the embedding matrix [V, D]."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.weight = weight(config.vocab_size, config.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        return F.embedding(input_ids, self.weight)

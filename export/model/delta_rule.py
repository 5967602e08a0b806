"""The gated delta rule of Gated DeltaNet, one token at a time and by chunks.

Letters: C tokens, Hk key heads, Hv value heads (a multiple of Hk), Dk and Dv head widths. With state
S [Hv, Dk, Dv], decay exp(g_t) and write strength beta_t, one token is (Yang et al. 2024,
arXiv:2412.06464, eq. 10):

    S <- exp(g_t) S;   S <- S + k_t (beta_t (v_t - S^T k_t))^T;   o_t = S^T q_t

Tensors may carry leading batch dimensions. q and k are already normalised (and q scaled).
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 64
"""Tokens solved together. 64 keeps the C×C matrices small beside the state and fp16 stable."""


def expand_heads(x: Tensor, heads: int) -> Tensor:
    """[..., C, Hk, D] -> [..., heads, C, D]: key head h serves heads/Hk consecutive value heads."""
    return x.transpose(-3, -2).repeat_interleave(heads // x.shape[-2], dim=-3)


def step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token. Shapes as in `chunked` with C = 1; the plain form of the formula above."""
    heads = v.shape[-2]
    q, k = expand_heads(q, heads), expand_heads(k, heads)  # [..., Hv, 1, Dk]
    v = v.transpose(-3, -2)  # [..., Hv, 1, Dv]
    beta = beta.transpose(-2, -1).unsqueeze(-1)  # [..., Hv, 1, 1]
    state = state * g.transpose(-2, -1).unsqueeze(-1).exp()
    state = state + k.transpose(-2, -1) @ ((v - k @ state) * beta)
    return (q @ state).transpose(-3, -2), state


def unit_lower_inverse(lower: Tensor) -> Tensor:
    """Inverse of I + L for strictly lower triangular L [..., C, C], by block doubling.

    Diagonal blocks of size 1 are their own inverse; two inverted neighbours of size s merge into one of
    size 2s with X <- X - (X (L o M_s)) X, where M_s keeps the block below the diagonal of each pair. It is
    exact after log2(C) steps. The product form (I - L)(I + L²)(I + L⁴)… squares L and overflows when keys
    are correlated; see `runtime_tests/test_delta_rule.py` for both on the same data.
    """
    size = lower.shape[-1]
    index = torch.arange(size, device=lower.device)
    inverse = torch.eye(size, dtype=lower.dtype, device=lower.device).expand(lower.shape)
    block = 1
    while block < size:
        row, column = index[:, None] // block, index[None, :] // block
        below = (row % 2 == 1) & (column == row - 1)
        inverse = inverse - (inverse @ (lower * below)) @ inverse
        block *= 2
    return inverse


def chunked(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """C tokens, `CHUNK` at a time, each chunk by matrix products only.

    Args:
        q, k: [..., C, Hk, Dk]; v: [..., C, Hv, Dv]; g (log decay, <= 0), beta: [..., C, Hv];
        state: [..., Hv, Dk, Dv].

    Returns:
        outputs [..., C, Hv, Dv] and the state after the last token. A token with g = 0 and beta = 0
        leaves the state exactly as it was.
    """
    heads, tokens = v.shape[-2], v.shape[-3]
    q, k = expand_heads(q, heads), expand_heads(k, heads)
    v = v.transpose(-3, -2)
    g, beta = g.transpose(-2, -1), beta.transpose(-2, -1)
    outputs = []
    for first in range(0, tokens, CHUNK):
        part = slice(first, min(first + CHUNK, tokens))
        output, state = _chunk(
            q[..., part, :], k[..., part, :], v[..., part, :], g[..., part], beta[..., part], state
        )
        outputs.append(output)
    return torch.cat(outputs, dim=-2).transpose(-3, -2), state


def _chunk(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One chunk; q, k [..., H, C, Dk], v [..., H, C, Dv], g, beta [..., H, C]."""
    size = q.shape[-2]
    causal = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    total = g.cumsum(-1)  # log decay from the chunk's start up to and with each token
    between = total.unsqueeze(-1) - total.unsqueeze(-2)
    decay = between.masked_fill(~causal, float("-inf")).exp()  # [..., H, C, C], row = later token
    weighted = k * beta.unsqueeze(-1)
    lower = (weighted @ k.transpose(-2, -1)) * decay.tril(-1)
    inverse = unit_lower_inverse(lower)
    from_start = total.exp().unsqueeze(-1)
    # What each token writes, after what its predecessors in the chunk and the old state already hold.
    writes = inverse @ (v * beta.unsqueeze(-1) - (weighted * from_start) @ state)
    output = (q * from_start) @ state + ((q @ k.transpose(-2, -1)) * decay) @ writes
    to_end = (total[..., -1:] - total).exp().unsqueeze(-1)
    state = state * total[..., -1:].exp().unsqueeze(-1) + (k * to_end).transpose(-2, -1) @ writes
    return output, state

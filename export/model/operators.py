"""The steps that stay whole in a traced program, each with its plain PyTorch reference.

A runtime with a fused kernel maps one node to it; another expands the reference into what it is good at.
All are registered under `torch.ops.mobile`. Letters: C tokens of a chunk, D hidden, H heads, Hkv key/value
heads, L rows of the KV cache, Ch convolution channels, K convolution width. References accept leading
batch dimensions and are differentiable, so that training runs on the same modules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from export.model import delta_rule

NAMESPACE = "mobile"
_library = torch.library.Library(NAMESPACE, "DEF")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) · weight over the last dimension. `weight` is the effective factor: 1 + the stored one."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def gated_rms_norm(x: Tensor, weight: Tensor, gate: Tensor, eps: float) -> Tensor:
    """rms_norm(x) · silu(gate); DeltaNet's output norm, gate [..., C, H, D] shaped like x."""
    return rms_norm(x, weight, eps) * F.silu(gate)


def l2_norm(x: Tensor, eps: float, scale: float) -> Tensor:
    """x · scale / sqrt(sum(x²) + eps) over the last dimension, the eps inside the root as in FLA."""
    return x * (torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + eps) * scale)


def causal_conv(x: Tensor, weight: Tensor, state: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """silu of a depthwise causal convolution that starts from remembered inputs.

    Args:
        x: [..., C, Ch]; weight: [Ch, K]; state: [..., Ch, K-1], the inputs before the chunk, oldest first;
        valid: int32 [1], how many rows of x are real (None: all).

    Returns:
        y [..., C, Ch] and the last K-1 real inputs [..., Ch, K-1].
    """
    channels, width = weight.shape
    series = torch.cat([state, x.transpose(-2, -1)], dim=-1)  # [..., Ch, K-1+C]
    flat = series.reshape(-1, channels, series.shape[-1])
    y = F.silu(F.conv1d(flat, weight.unsqueeze(1), groups=channels))
    first = x.shape[-2] if valid is None else valid.to(torch.int64)
    keep = torch.arange(width - 1, device=x.device) + first
    return y.reshape(*x.shape[:-2], channels, x.shape[-2]).transpose(-2, -1), series.index_select(-1, keep)


def delta_gates(
    a: Tensor, b: Tensor, decay_scale: Tensor, dt_bias: Tensor, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Log decay g = decay_scale · softplus(a + dt_bias) and write strength beta = sigmoid(b).

    Args:
        a, b: [..., C, Hv]; decay_scale: [Hv], -exp(A_log); dt_bias: [Hv]; valid: int32 [1] or None.

    Returns:
        g, beta [..., C, Hv]; both exactly 0 from row `valid` on, which leaves the recurrent state alone.
    """
    g, beta = decay_scale * F.softplus(a + dt_bias), b.sigmoid()
    if valid is not None:
        real = (torch.arange(a.shape[-2], device=a.device) < valid).to(a.dtype).unsqueeze(-1)
        g, beta = g * real, beta * real
    return g, beta


def rotary_table(
    position_ids: Tensor, theta: float, dim: int, sections: list[int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin [..., C, dim/2] of interleaved M-RoPE for position_ids int32 [..., 3, C].

    Frequency j takes its position from height where j % 3 == 1 and j < 3·sections[1], from width where
    j % 3 == 2 and j < 3·sections[2], else from time (transformers, `recomposition_frequencies`).
    """
    index = torch.arange(dim // 2, device=position_ids.device)
    frequency = 1.0 / (theta ** (index.to(torch.float32) * 2 / dim))
    height = (index % 3 == 1) & (index < 3 * sections[1])
    width = (index % 3 == 2) & (index < 3 * sections[2])
    positions = position_ids.to(torch.float32).unsqueeze(-1)  # [..., 3, C, 1]
    time = positions.select(-3, 0)
    angle = torch.where(
        height, positions.select(-3, 1), torch.where(width, positions.select(-3, 2), time)
    ) * frequency
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first 2·cos.shape[-1] dimensions of x [..., C, H, D] as two halves; the rest passes."""
    half = cos.shape[-1]
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    first, second = x[..., :half], x[..., half : 2 * half]
    return torch.cat(
        [first * cos - second * sin, second * cos + first * sin, x[..., 2 * half :]], dim=-1
    )


def cached_attention(
    q: Tensor, k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, start: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal grouped-query attention over a static KV cache.

    Args:
        q: [..., C, H, Dh]; k, v: [..., C, Hkv, Dh]; caches: [..., Hkv, L, Dh]; start: int32 [1].

    Returns:
        attention [..., C, H, Dh] and the caches with rows start…start+C-1 written. Token c sees rows
        0…start+c only, so that whatever later rows hold is never read.
    """
    rows = torch.arange(q.shape[-3], device=q.device) + start.to(torch.int64)
    key_cache = key_cache.index_copy(-2, rows, k.transpose(-3, -2))
    value_cache = value_cache.index_copy(-2, rows, v.transpose(-3, -2))
    group = q.shape[-2] // k.shape[-2]
    seen = torch.arange(key_cache.shape[-2], device=q.device) <= rows.unsqueeze(-1)  # [C, L]
    keys = key_cache.repeat_interleave(group, dim=-3)
    values = value_cache.repeat_interleave(group, dim=-3)
    scores = (q.transpose(-3, -2) @ keys.transpose(-2, -1)) * scale
    scores = scores.masked_fill(~seen, float("-inf"))
    # A row never written may hold anything, NaN included; 0·NaN would leak it into the sum.
    values = values.masked_fill(~seen[-1].unsqueeze(-1), 0.0)
    return (scores.softmax(-1) @ values).transpose(-3, -2), key_cache, value_cache


def real_rows(x: Tensor, valid: Tensor) -> Tensor:
    """x [..., C, D] with rows from `valid` on set to zero, whatever they hold: NaN times zero would stay NaN."""
    real = torch.arange(x.shape[-2], device=x.device) < valid
    return torch.where(real.unsqueeze(-1), x, torch.zeros((), dtype=x.dtype, device=x.device))


def last_valid(x: Tensor, valid: Tensor) -> Tensor:
    """Row valid-1 of x [..., C, D] as [..., 1, D]: the only token whose logits are wanted."""
    return x.index_select(-2, valid.to(torch.int64) - 1)


def normalize_image(image: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """image [..., 3, H, W] in 0…1 -> (image - mean) / std per colour."""
    scale = torch.tensor([1.0 / s for s in std], device=image.device)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=image.device)
    return image * scale[:, None, None] + shift[:, None, None]


def patchify(image: Tensor, patch: int, merge: int) -> Tensor:
    """image [..., 3, H, W] -> patches [..., N, 3·patch²], the merge×merge patches of a token adjacent.

    Order of tokens and of patches inside one as in transformers' Qwen2VLImageProcessor; pixels of a patch
    are channel, row, column.
    """
    *batch, channels, height, width = image.shape
    rows, columns = height // patch // merge, width // patch // merge
    x = image.reshape(*batch, channels, rows, merge, patch, columns, merge, patch)
    n = len(batch)
    order = [*range(n), n + 1, n + 4, n + 2, n + 5, n, n + 3, n + 6]
    return x.permute(order).reshape(*batch, rows * columns * merge * merge, channels * patch * patch)


def _patch_grid(rows: int, columns: int, merge: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column [N] of each patch of a rows×columns grid, in the order of `patchify`."""
    row = torch.arange(rows, device=device).unsqueeze(1).expand(rows, columns)
    column = torch.arange(columns, device=device).unsqueeze(0).expand(rows, columns)

    def order(x: Tensor) -> Tensor:
        return x.reshape(rows // merge, merge, columns // merge, merge).transpose(1, 2).reshape(-1)

    return order(row), order(column)


def resample_positions(table: Tensor, rows: int, columns: int, merge: int) -> Tensor:
    """Learned square position table [S², D] bilinearly resampled to a rows×columns grid: [N, D].

    Corners align, as in transformers' get_vision_interpolation_indices_and_weights.
    """
    side = int(table.shape[0] ** 0.5)
    row, column = _patch_grid(rows, columns, merge, table.device)

    def taps(index: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        place = index.to(torch.float32) * ((side - 1) / max(count - 1, 1))
        low = place.floor().to(torch.int64)
        return low, (low + 1).clamp(max=side - 1), place - low

    (top, bottom, down), (left, right, across) = taps(row, rows), taps(column, columns)
    result = torch.zeros(row.shape[0], table.shape[1], dtype=table.dtype, device=table.device)
    for r, weight_r in ((top, 1 - down), (bottom, down)):
        for c, weight_c in ((left, 1 - across), (right, across)):
            result = result + table[r * side + c] * (weight_r * weight_c).unsqueeze(-1)
    return result


def grid_rotary_table(
    rows: int, columns: int, merge: int, dim: int, theta: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin [N, dim/2] of the vision encoder: half of the angles from the row, half from the column."""
    row, column = _patch_grid(rows, columns, merge, device)
    quarter = dim // 4
    frequency = 1.0 / (theta ** (torch.arange(quarter, device=device, dtype=torch.float32) / quarter))
    angle = torch.cat([row.unsqueeze(-1) * frequency, column.unsqueeze(-1) * frequency], dim=-1)
    return angle.cos(), angle.sin()


def grid_rotary(x: Tensor, rows: int, columns: int, merge: int, theta: float) -> Tensor:
    """Two-dimensional rotary embedding of x [..., N, H, D] over a static rows×columns grid of patches."""
    cos, sin = grid_rotary_table(rows, columns, merge, x.shape[-1], theta, x.device)
    return rotary(x, cos.to(x.dtype), sin.to(x.dtype))


def _define(schema: str, reference: Callable[..., Any]) -> None:
    """Register an operator that torch.export keeps whole and autograd sees through."""
    name = schema.split("(", 1)[0]
    _library.define(schema)
    _library.impl(name, reference, "CompositeImplicitAutograd")


def _define_opaque(schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register an operator whose reference loops over C, which tracing with a symbolic C must not enter.

    The gradient is that of the reference, recomputed in the backward pass.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema)
    _library.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)

    def setup(ctx: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            outputs = reference(*inputs)
        return torch.autograd.grad(outputs, inputs, grads, allow_unused=True)

    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup, lib=_library)


def _fake_delta(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(v), torch.empty_like(state)


_define("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", rms_norm)
_define("gated_rms_norm(Tensor x, Tensor weight, Tensor gate, float eps) -> Tensor", gated_rms_norm)
_define("l2_norm(Tensor x, float eps, float scale) -> Tensor", l2_norm)
_define(
    "causal_conv(Tensor x, Tensor weight, Tensor state, Tensor? valid) -> (Tensor, Tensor)", causal_conv
)
_define(
    "delta_gates(Tensor a, Tensor b, Tensor decay_scale, Tensor dt_bias, Tensor? valid) -> (Tensor, Tensor)",
    delta_gates,
)
_define_opaque(
    "gated_delta_step(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor state) -> (Tensor, Tensor)",
    delta_rule.step,
    _fake_delta,
)
_define_opaque(
    "gated_delta_chunk(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor state) -> (Tensor, Tensor)",
    delta_rule.chunked,
    _fake_delta,
)
_define(
    "rotary_table(Tensor position_ids, float theta, int dim, int[] sections, ScalarType dtype)"
    " -> (Tensor, Tensor)",
    rotary_table,
)
_define("rotary(Tensor x, Tensor cos, Tensor sin) -> Tensor", rotary)
_define(
    "cached_attention(Tensor q, Tensor k, Tensor v, Tensor key_cache, Tensor value_cache, Tensor start,"
    " float scale) -> (Tensor, Tensor, Tensor)",
    cached_attention,
)
_define("real_rows(Tensor x, Tensor valid) -> Tensor", real_rows)
_define("last_valid(Tensor x, Tensor valid) -> Tensor", last_valid)
_define("normalize_image(Tensor image, float[] mean, float[] std) -> Tensor", normalize_image)
_define("patchify(Tensor image, int patch, int merge) -> Tensor", patchify)
_define("resample_positions(Tensor table, int rows, int columns, int merge) -> Tensor", resample_positions)
_define("grid_rotary(Tensor x, int rows, int columns, int merge, float theta) -> Tensor", grid_rotary)

ops = torch.ops.mobile

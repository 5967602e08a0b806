"""Causal convolution and the gated delta rule as MIL builder calls: one token, and chunks of tokens.

The formulas are those of `export.model.delta_rule`, with the same letters. They run in the dtype of the recurrent
state: float16, or float32 where the caller holds it. In float16 a decay between two tokens is the exponential of
the sum of what lies between them, never of a difference of two long sums, whose rounding would swamp it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import types
from torch.fx import Node

from export.model.delta_rule import CHUNK
from targets.to_coreml.lowering import Lowering, Value, ints, operands, shape_of
from targets.to_coreml.norms import half, single


def causal_conv(low: Lowering, node: Node) -> None:
    """Depthwise over past and present inputs, then silu. The state is the last inputs, oldest first."""
    x, weight, state, valid = operands(node)
    rows = low.rows(x)
    tokens = shape_of(x)[0]
    channels, width = shape_of(weight)
    past = low.states.read(low, state)
    history = past.shape[low.tokens]
    series = mb.concat(values=[past, rows], axis=low.tokens)
    low.results[node, 0] = Value(mb.silu(x=_taps(low, series, weight, history - (width - 1), tokens)))
    size = list(low.row_shape(history, channels))
    if valid is None:
        begin: Any = [0] * len(size)
        begin[low.tokens] = 1
    else:
        zeros = [ints(0)] * (len(size) - 1)
        begin = mb.concat(values=[*zeros[: low.tokens], low.valid, *zeros[low.tokens :]], axis=0)
    low.results[node, 1] = Value(mb.slice_by_size(x=series, begin=begin, size=size))


def _taps(low: Lowering, series: Any, weight: Node, skip: int, tokens: int) -> Any:
    """Σ_k w_k · series[skip + k + c] for every token c, as rows [C]."""
    channels, width = shape_of(weight)
    if skip:
        begin = [0] * series.rank
        begin[low.tokens] = skip
        size = low.row_shape(width - 1 + tokens, channels)
        series = mb.slice_by_size(x=series, begin=begin, size=list(size))
    if low.profile.convolutions:
        return mb.conv(x=series, weight=low.kept(weight, (channels, 1, 1, width)), groups=channels, pad_type="valid")
    if tokens == 1:
        product = mb.mul(x=series, y=low.kept(weight, (1, width, channels), transposed=True))
        return mb.reduce_sum(x=product, axes=[1], keep_dims=True)
    apart = low.transpose(series, (0, 2, 1))
    filtered = mb.conv(x=apart, weight=low.kept(weight, (channels, 1, width)), groups=channels, pad_type="valid")
    return low.transpose(filtered, (0, 2, 1))


def gates(low: Lowering, node: Node) -> None:
    """Log decay and write strength; both exactly 0 from row `valid` on."""
    a, b, decay_scale, dt_bias, valid = operands(node)
    tokens = shape_of(a)[0]
    x = mb.add(x=low.rows(a), y=low.over_features(dt_bias))
    if low.profile.float32:
        decay = half(mb.mul(x=mb.softplus(x=single(x)), y=single(low.over_features(decay_scale))))
    else:
        decay = mb.mul(x=_softplus(x), y=low.over_features(decay_scale))
    strength = mb.sigmoid(x=low.rows(b))
    for place, gate in enumerate((decay, strength)):
        if valid is not None:
            zero = low.constant("zero", np.float16(0))
            gate = mb.select(cond=low.real(low.row_shape(tokens, 1)), a=gate, b=zero)
        low.results[node, place] = Value(gate)


def _softplus(x: Any) -> Any:
    """log(1 + exp(x)) in float16, as max(x, 0) + log1p(e) with e = exp(-|x|).

    The Neural Engine's own gives 0 above 10.4 (coremltools issue 2687), and the logarithm of a rounded 1 + e loses
    small e, which is the decay of a long memory: log1p(e) = 2 atanh(z), z = e/(2 + e) <= 1/3, whose series after
    four terms is off by 2e-5.
    """
    small = mb.exp(x=mb.mul(x=mb.abs(x=x), y=np.float16(-1)))
    z = mb.real_div(x=small, y=mb.add(x=small, y=np.float16(2)))
    square = mb.mul(x=z, y=z)
    series = mb.add(x=mb.mul(x=square, y=np.float16(2 / 7)), y=np.float16(2 / 5))
    for term in (2 / 3, 2):
        series = mb.add(x=mb.mul(x=square, y=series), y=np.float16(term))
    return mb.add(x=mb.maximum(x=x, y=np.float16(0)), y=mb.mul(x=z, y=series))


def _operands(low: Lowering, node: Node) -> tuple[list[Any], Any]:
    """q, k, v, g and beta [1, Hv, C, …] and the state [1, Hv, Dk, Dv], in the state's dtype."""
    q, k, v, g, beta, state = operands(node)
    heads = shape_of(v)[1]
    count = shape_of(k)[1]
    values = [_repeat(low, low.heads(x, count), heads // count) for x in (q, k)]
    values += [low.heads(v, heads), low.heads(g, heads), low.heads(beta, heads)]
    old = low.states.read(low, state)
    if old.dtype == types.fp32:
        values = [single(x) for x in values]
    return values, old


def _repeat(low: Lowering, x: Any, times: int) -> Any:
    """Each head `times` times in a row: key head h serves consecutive value heads."""
    if times == 1:
        return x
    _, heads, tokens, width = x.shape
    apart = mb.tile(x=low.reshape(x, (heads, 1, tokens, width)), reps=[1, times, 1, 1])
    return low.reshape(apart, (1, heads * times, tokens, width))


def step(low: Lowering, node: Node) -> None:
    """One token. With a = exp(g), kS = kᵀS, qS = qᵀS: d = beta (v - a kS), S' = a S + k dᵀ, o = qᵀ S'."""
    (q, k, v, g, beta), old = _operands(low, node)
    decayed = mb.mul(x=old, y=mb.exp(x=g))
    write = mb.mul(x=mb.sub(x=v, y=mb.matmul(x=k, y=decayed)), y=beta)
    new = mb.add(x=decayed, y=mb.matmul(x=k, y=write, transpose_x=True))
    output = mb.matmul(x=q, y=new)
    low.results[node, 0] = Value(output if output.dtype == types.fp16 else half(output), v.shape[1])
    low.results[node, 1] = Value(new)


def chunked(low: Lowering, node: Node) -> None:
    """C tokens, `CHUNK` at a time; what needs no state is computed for all full chunks at once."""
    values, state = _operands(low, node)
    tokens = values[0].shape[2]
    full = tokens // CHUNK * CHUNK
    cuts = [count for count in (full, tokens - full) if count]
    parts = [[x] if len(cuts) == 1 else mb.split(x=x, split_sizes=cuts, axis=2) for x in values]
    outputs = []
    for part in zip(*parts, strict=True):
        found, state = _chunks(low, part, state)
        outputs += found
    joined = outputs[0] if len(outputs) == 1 else mb.concat(values=outputs, axis=2)
    low.results[node, 0] = Value(joined if joined.dtype == types.fp16 else half(joined), values[2].shape[1])
    low.results[node, 1] = Value(state)


def _chunks(low: Lowering, values: tuple[Any, ...], state: Any) -> tuple[list[Any], Any]:
    """N chunks of C tokens; q, k [1, H, N·C, Dk], v [1, H, N·C, Dv], g, beta [1, H, N·C, 1]."""
    tokens = values[0].shape[2]
    size = min(tokens, CHUNK)
    count = tokens // size
    q, k, v, g, beta = (_apart(low, x, count, size) for x in values)
    dtype = np.float32 if state.dtype == types.fp32 else np.float16
    name = np.dtype(dtype).name
    until = low.constant(f"until_{size}_{name}", np.tril(np.ones((size, size), dtype))[None, None])
    strict = low.constant(f"before_{size}_{name}", np.tril(np.ones((size, size), dtype), -1)[None, None])
    after = low.constant(f"after_{size}_{name}", np.triu(np.ones((size, size), dtype), 1)[None, None])
    # Row i, column j: the sum of g over the tokens after j up to and with i; nothing where i is not after j.
    decay = mb.exp(x=mb.matmul(x=until, y=mb.mul(x=strict, y=g)))
    from_start = mb.exp(x=mb.matmul(x=until, y=g))
    to_end = mb.mul(x=k, y=mb.exp(x=mb.matmul(x=after, y=g)))
    total = mb.exp(x=mb.reduce_sum(x=g, axes=[2], keep_dims=True))
    weighted = mb.mul(x=k, y=beta)
    lower = mb.mul(x=mb.matmul(x=weighted, y=k, transpose_y=True), y=mb.mul(x=decay, y=strict))
    scores = mb.mul(x=mb.matmul(x=q, y=k, transpose_y=True), y=mb.mul(x=decay, y=until))
    # Both are multiplied by the state: one product does it for both.
    readers = mb.mul(x=mb.concat(values=[weighted, q], axis=2), y=mb.concat(values=[from_start, from_start], axis=2))
    inverse = _unit_lower_inverse(low, lower, dtype)
    wanted = mb.mul(x=v, y=beta)
    outputs = []
    arrays = (readers, wanted, inverse, scores, to_end, total)
    for reader, want, solve, score, end, decayed in zip(*(_each(x) for x in arrays), strict=True):
        held, read = mb.split(x=mb.matmul(x=reader, y=state), num_splits=2, axis=2)
        # The difference first: of two solved ones, each would carry the rounding of larger numbers.
        writes = mb.matmul(x=solve, y=mb.sub(x=want, y=held))
        outputs.append(mb.add(x=read, y=mb.matmul(x=score, y=writes)))
        added = mb.matmul(x=end, y=writes, transpose_x=True)
        state = mb.add(x=mb.mul(x=state, y=decayed), y=added)
    return outputs, state


def _apart(low: Lowering, x: Any, count: int, size: int) -> Any:
    """[1, H, N·C, D] -> [N, H, C, D]."""
    _, heads, _, width = x.shape
    if count == 1:
        return x
    return low.transpose(low.reshape(x, (heads, count, size, width)), (1, 0, 2, 3))


def _each(x: Any) -> list[Any]:
    """[N, …] as N of [1, …]."""
    return [x] if x.shape[0] == 1 else list(mb.split(x=x, num_splits=x.shape[0], axis=0))


def _unit_lower_inverse(low: Lowering, lower: Any, dtype: Any) -> Any:
    """Inverse of I + L for strictly lower triangular L [N, H, C, C], by block doubling (`export.model.delta_rule`)."""
    size = lower.shape[3]
    index = np.arange(size)
    identity = low.constant(f"identity_{size}_{np.dtype(dtype).name}", np.eye(size, dtype=dtype)[None, None])
    inverse: Any = None
    block = 1
    while block < size:
        row, column = index[:, None] // block, index[None, :] // block
        below = ((row % 2 == 1) & (column == row - 1)).astype(dtype)[None, None]
        masked = mb.mul(x=lower, y=low.constant(f"below_{size}_{block}_{np.dtype(dtype).name}", below))
        if inverse is None:  # I L I is L
            inverse = mb.sub(x=identity, y=masked)
        else:
            inverse = mb.sub(x=inverse, y=mb.matmul(x=mb.matmul(x=inverse, y=masked), y=inverse))
        block *= 2
    return inverse if inverse is not None else mb.add(x=lower, y=identity)

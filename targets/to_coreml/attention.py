"""Rotary embeddings and attention: over a static KV cache in the decoder, over all patches in the vision encoder."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from coremltools.converters.mil.mil import Builder as mb
from torch.fx import Node

from export.model.operators import grid_rotary_table
from targets.to_coreml.lowering import Lowering, Value, operands, shape_of
from targets.to_coreml.norms import half, scaled, single

UNSEEN = np.float16(-3e4)
"""Added to the score of a row that a token must not see: exp of it is 0 in any precision, and it is finite."""


def rotary_table(low: Lowering, node: Node) -> None:
    """cos and sin [1, 1, C, dim/2]. The angle is float32: float16 holds whole positions up to 2,048 only.

    Each frequency takes its position from one of the three axes; the other two are multiplied by zero.
    """
    positions, theta, dim, sections, _ = operands(node)
    index = np.arange(int(dim) // 2)
    axis = np.zeros(index.size, np.int64)
    axis[(index % 3 == 1) & (index < 3 * sections[1])] = 1
    axis[(index % 3 == 2) & (index < 3 * sections[2])] = 2
    exponent = torch.arange(index.size, dtype=torch.float32) * 2 / dim
    chosen = np.zeros((1, 3, 1, index.size), np.float32)
    chosen[0, axis, 0, index] = (1.0 / (theta**exponent)).numpy()
    places = single(low.reshape(low.values[positions].var, (1, 3, shape_of(positions)[1], 1)))
    angle = mb.reduce_sum(x=mb.mul(x=places, y=chosen), axes=[1], keep_dims=True)
    for place, build in enumerate((mb.cos, mb.sin)):
        low.results[node, place] = Value(half(build(x=angle)))


def rotary(low: Lowering, node: Node) -> None:
    source, cos, sin = operands(node)
    x = low.heads(source, shape_of(source)[1])
    table = low.values[cos].var, low.values[sin].var

    keep, swap = low.once(f"rotary {x.shape[3]}", lambda: _wide(*table, x.shape[3]))
    low.define(node, _rotate(x, keep, swap, table[0].shape[3]), x.shape[1])


def _wide(cos: Any, sin: Any, width: int) -> tuple[Any, Any]:
    """[1, 1, C, D] each: (cos, cos, 1) for x and (-sin, sin, 0) for x with its halves swapped."""
    tokens, rest = cos.shape[2], width - 2 * cos.shape[3]
    ones, zeros = (np.full((1, 1, tokens, rest), value, np.float16) for value in (1, 0))
    minus = mb.mul(x=sin, y=np.float16(-1))
    keep = mb.concat(values=[cos, cos, *([ones] if rest else [])], axis=3)
    swap = mb.concat(values=[minus, sin, *([zeros] if rest else [])], axis=3)
    return keep, swap


def _rotate(x: Any, keep: Any, swap: Any, half_width: int) -> Any:
    """x [1, H, C, D] rotated in its first dimensions, as two halves; the rest passes."""
    rest = x.shape[3] - 2 * half_width
    parts = mb.split(x=x, split_sizes=[half_width, half_width, *([rest] if rest else [])], axis=3)
    swapped = mb.concat(values=[parts[1], parts[0], *parts[2:]], axis=3)
    return mb.add(x=mb.mul(x=x, y=keep), y=mb.mul(x=swapped, y=swap))


def grid_rotary(low: Lowering, node: Node) -> None:
    source, rows, columns, merge, theta = operands(node)
    x = low.heads(source, shape_of(source)[1])
    cos, sin = grid_rotary_table(rows, columns, merge, x.shape[3], theta, torch.device("cpu"))

    def tables() -> tuple[Any, Any]:
        keep = torch.cat([cos, cos], dim=-1).numpy()[None, None]
        swap = torch.cat([-sin, sin], dim=-1).numpy()[None, None]
        return half(low.constant("grid_cosines", keep)), half(low.constant("grid_sines", swap))

    kept, swapped = low.once("grid", tables)
    low.define(node, _rotate(x, kept, swapped, cos.shape[-1]), x.shape[1])


def cached(low: Lowering, node: Node) -> None:
    """Writes the chunk's rows into the caches, then attends over all rows. The query heads that share a key head
    are rows of one product, so that no cache is repeated.
    """
    q, k, v, key_cache, value_cache, _, scale = operands(node)
    tokens, count, width = shape_of(q)
    keys_count = shape_of(k)[1]
    groups = count // keys_count
    caches = []
    for place, (rows, cache) in enumerate(((k, key_cache), (v, value_cache)), start=1):
        written = low.states.write_rows(low, cache, low.heads(rows, keys_count))
        low.results[node, place] = Value(written)
        caches.append(written)
    keys, values = caches
    query = low.reshape(low.heads(q, count), (1, keys_count, groups * tokens, width))
    mask = low.once("mask", lambda: _mask(low, tokens, groups, keys.shape[2]))
    result = attend(low, query, keys, values, scale, mask)
    low.results[node, 0] = Value(low.reshape(result, (1, count, tokens, width)), count)


def _mask(low: Lowering, tokens: int, groups: int, rows: int) -> Any:
    """[1, 1, groups·C, L]: 0 where a token may look, `UNSEEN` elsewhere."""
    last = mb.add(x=np.arange(tokens, dtype=np.int32).reshape(1, 1, tokens, 1), y=low.start)
    later = mb.greater(x=np.arange(rows, dtype=np.int32).reshape(1, 1, 1, rows), y=last)
    mask = mb.mul(x=half(later), y=UNSEEN)
    return mask if groups == 1 else mb.tile(x=mask, reps=[1, 1, groups, 1])


def attend(low: Lowering, q: Any, k: Any, v: Any, scale: float, mask: Any = None) -> Any:
    """softmax(q kᵀ scale + mask) v."""
    plain = q.shape[3] ** -0.5
    if low.profile.fused_attention and abs(scale - plain) < 1e-12:  # the scale that the operation has built in
        return mb.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=mask)
    scores = mb.matmul(x=scaled(q, scale), y=k, transpose_y=True)
    if mask is not None:
        scores = mb.add(x=scores, y=mask)
    return mb.matmul(x=mb.softmax(x=scores, axis=-1), y=v)


def full(low: Lowering, node: Node) -> None:
    """All patches see each other; operands [H, N, D]."""
    count, _, width = shape_of(operands(node)[0])
    q, k, v = (low.heads(arg, count) for arg in operands(node)[:3])
    low.define(node, attend(low, q, k, v, width**-0.5), count)

"""The gated delta rule in XNNPACK nodes: one token, and chunks of tokens.

The formulas are those of `export.model.delta_rule`, with the same letters, regrouped for few passes over memory:
one product reads the state in a step, and everything in a chunk that does not need the state is computed for
all chunks at once. The node that writes the new state is the last one that reads the old state or what was
made of it, so that both may be one buffer.
"""

from __future__ import annotations

import numpy as np

from export.model.delta_rule import CHUNK
from targets.to_executorch import nodes
from targets.to_executorch.program import Method
from targets.to_executorch.xnnpack import Filter, Tensor


def _repeat(m: Method, x: Tensor, times: int, axis: int) -> Tensor:
    """Each entry of an axis `times` times in a row: key head h serves consecutive value heads."""
    if times == 1:
        return x
    shape = list(x.shape)
    apart = nodes.reshape(m, x, (*shape[: axis + 1], 1, *shape[axis + 1 :]))
    together = nodes.concat(m, [apart] * times, axis + 1)
    shape[axis] *= times
    return nodes.reshape(m, together, shape)


Tokens = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""q, k, v, g and beta of some tokens."""


def step(m: Method, tokens: Tokens, state: Tensor, ones: Filter) -> tuple[Tensor, Tensor]:
    """One token: q, k [Hk, 1, Dk], v [Hv, 1, Dv], g, beta [1, Hv], state [Hv, Dk, Dv]; `ones` [1, Dk].

    With a = exp(g), kS = kᵀS and qS = qᵀS: d = beta (v - a kS), o = a qS + (q·k) d, S' = a S + k dᵀ.
    """
    q, k, v, g, beta = tokens
    heads, width = v.shape[0], k.shape[2]
    q, k = (_repeat(m, x, heads // x.shape[0], 0) for x in (q, k))
    decay = nodes.reshape(m, nodes.unary(m, "Exp", g), (heads, 1, 1))
    beta = nodes.reshape(m, beta, (heads, 1, 1))
    both = nodes.multiply(m, nodes.matmul(m, nodes.concat(m, [k, q], 1), state), decay)
    held, read = nodes.cut(m, both, 1, 0, 1), nodes.cut(m, both, 1, 1, 1)
    write = nodes.multiply(m, nodes.subtract(m, v, held), beta)
    overlap = nodes.linear(m, nodes.multiply(m, q, k), ones)
    output = nodes.add(m, read, nodes.multiply(m, write, overlap))
    outer = nodes.multiply(m, nodes.reshape(m, k, (heads, width, 1)), write)
    new = nodes.add(m, nodes.multiply(m, state, decay), outer)
    return output, new


def chunked(m: Method, tokens: Tokens, state: Tensor, sums: dict[int, Filter]) -> tuple[Tensor, Tensor]:
    """C tokens: q, k [C, Hk, Dk], v [C, Hv, Dv], g, beta [C, Hv], state [Hv, Dk, Dv].

    `sums` holds for each chunk size a linear that sums a row up to each entry.
    """
    count, heads, width = tokens[2].shape
    outputs = []
    for first, chunks, size in groups(count):
        q, k, v, g, beta = (nodes.cut(m, x, 0, first, chunks * size) for x in tokens)
        output, state = _group(m, (q, k, v, g, beta), state, chunks, size, sums[size])
        outputs.append(output)
    return nodes.reshape(m, nodes.concat(m, outputs, 0), (count, heads, width)), state


def groups(tokens: int) -> list[tuple[int, int, int]]:
    """(first token, number of chunks, tokens of each) that cover so many tokens: full chunks, then the rest."""
    full = tokens // CHUNK
    found = [(0, full, CHUNK)] if full else []
    if tokens % CHUNK:
        found.append((full * CHUNK, 1, tokens % CHUNK))
    return found


def _group(
    m: Method, tokens: Tokens, state: Tensor, count: int, size: int, sums: Filter
) -> tuple[Tensor, Tensor]:
    """`count` chunks of `size` tokens; returns [count·size, Hv·Dv] and the state after them. N count, C size."""
    q, k, v, g, beta = tokens
    heads, width = v.shape[1:]
    repeats = heads // k.shape[1]

    def by_head(x: Tensor) -> Tensor:
        """[N·C, H, D] -> [N, H, C, D]."""
        apart = nodes.reshape(m, x, (count, size, *x.shape[1:]))
        return nodes.transpose(m, apart, (0, 2, 1, 3))

    def gate(x: Tensor) -> Tensor:
        """[N·C, H] -> [N, H, C]."""
        return nodes.transpose(m, nodes.reshape(m, x, (count, size, heads)), (0, 2, 1))

    q, k = (_repeat(m, by_head(x), repeats, 1) for x in (q, k))
    v = by_head(v)
    total = nodes.linear(m, gate(g), sums)  # log decay from the chunk's start up to and with each token
    column, row = (nodes.reshape(m, total, (count, heads, *pair)) for pair in ((size, 1), (1, size)))
    strength = nodes.reshape(m, gate(beta), (count, heads, size, 1))
    lower = m.constant(np.tril(np.ones((size, size), np.float32))[None, None])
    strict = m.constant(np.tril(np.ones((size, size), np.float32), -1)[None, None])
    # Above the diagonal the difference is positive and could overflow before the mask removes it.
    between = nodes.unary(m, "Exp", nodes.clamp(m, nodes.subtract(m, column, row), -np.inf, 0.0))
    weighted = nodes.multiply(m, k, strength)
    keys = nodes.multiply(m, nodes.matmul(m, weighted, k, transpose_b=True), nodes.multiply(m, between, strict))
    inverse = _unit_lower_inverse(m, keys)
    from_start = nodes.unary(m, "Exp", column)
    values = nodes.matmul(m, inverse, nodes.multiply(m, v, strength))
    erased = nodes.matmul(m, inverse, nodes.multiply(m, weighted, from_start))
    scores = nodes.multiply(m, nodes.matmul(m, q, k, transpose_b=True), nodes.multiply(m, between, lower))
    queries = nodes.multiply(m, q, from_start)
    last = nodes.cut(m, column, 2, size - 1, 1)
    to_end = nodes.multiply(m, k, nodes.unary(m, "Exp", nodes.subtract(m, last, column)))
    to_end = nodes.transpose(m, to_end, (0, 1, 3, 2))
    decay = nodes.unary(m, "Exp", last)
    outputs = []
    for chunk in range(count):

        def of(x: Tensor, chunk: int = chunk) -> Tensor:
            return nodes.reshape(m, nodes.cut(m, x, 0, chunk, 1), x.shape[1:])

        # Both products read the state: one does it for both.
        read = nodes.matmul(m, nodes.concat(m, [of(erased), of(queries)], 1), state)
        writes = nodes.subtract(m, of(values), nodes.cut(m, read, 1, 0, size))
        inside = nodes.matmul(m, of(scores), writes)
        outputs.append(nodes.add(m, nodes.cut(m, read, 1, size, size), inside))
        added = nodes.matmul(m, of(to_end), writes)
        state = nodes.add(m, nodes.multiply(m, state, of(decay)), added)
    by_token = [nodes.transpose(m, output, (1, 0, 2)) for output in outputs]
    return nodes.reshape(m, nodes.concat(m, by_token, 0), (count * size, heads * width)), state


def _unit_lower_inverse(m: Method, lower: Tensor) -> Tensor:
    """Inverse of I + L for strictly lower triangular L [N, H, C, C], by block doubling (`export.model.delta_rule`)."""
    size = lower.shape[-1]
    index = np.arange(size)
    identity = m.constant(np.eye(size, dtype=np.float32)[None, None])
    inverse: Tensor | None = None
    block = 1
    while block < size:
        row, column = index[:, None] // block, index[None, :] // block
        below = m.constant(((row % 2 == 1) & (column == row - 1)).astype(np.float32)[None, None])
        masked = nodes.multiply(m, lower, below)
        if inverse is None:  # I L I is L
            inverse = nodes.subtract(m, identity, masked)
        else:
            inverse = nodes.subtract(m, inverse, nodes.matmul(m, nodes.matmul(m, inverse, masked), inverse))
        block *= 2
    return inverse if inverse is not None else nodes.add(m, lower, identity)

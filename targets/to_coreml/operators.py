"""The table: one emitter per operator of a traced program, as MIL builder calls.

An emitter reads its operands in the form it wants (`lowering.Value`) and defines the value of its node.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from coremltools.converters.mil.mil import Builder as mb
from torch.fx import Node

from export.model.operators import resample_positions
from export.model.trace import Program
from targets.to_coreml import attention, delta_rule, norms
from targets.to_coreml.lowering import Lowering, Value, identifier, ints, operands, shape_of
from targets.to_coreml.norms import half

Emitter = Callable[[Lowering, Node], None]
STREAM = "stream_"
"""Begins the name of an operation that writes into a residual stream; see `lint_streams`."""


def _getitem(low: Lowering, node: Node) -> None:
    source, index = operands(node)
    low.values[node] = low.results[source, index]


def _reshape(low: Lowering, node: Node) -> None:
    """Heads apart or together cost nothing; the merge of neighbouring patches moves tokens into the width."""
    source = operands(node)[0]
    before, after = shape_of(source), shape_of(node)
    if len(before) == 2 and len(after) == 2 and before != after:
        low.define(node, _merge(low, low.rows(source), after[0], before[0] // after[0]))
    else:
        low.values[node] = low.values[source]


def _merge(low: Lowering, x: Any, tokens: int, count: int) -> Any:
    """Rows of `count` neighbouring tokens as one row each."""
    width = x.shape[low.features]
    if low.profile.convolutions:
        x = low.transpose(low.reshape(x, (1, width, tokens, count)), (0, 3, 1, 2))
    return low.reshape(x, low.row_shape(tokens, width * count))


def _same(low: Lowering, node: Node) -> None:
    low.values[node] = low.values[operands(node)[0]]


def _binary(build: Callable[..., Any]) -> Emitter:
    def emit(low: Lowering, node: Node) -> None:
        a, b = operands(node)
        y = low.rows(b) if isinstance(b, Node) else _number(b)
        low.define(node, build(x=low.rows(a), y=y))

    return emit


def _add(low: Lowering, node: Node) -> None:
    """Every sum of the model writes into a residual stream. It is named after its writer, for who looks at values."""
    a, b = operands(node)
    (*_, (path, _)) = b.meta["nn_module_stack"].values()
    low.define(node, mb.add(x=low.rows(a), y=low.rows(b), name=STREAM + identifier(path)))


def _number(value: float) -> Any:
    """A factor of the traced program, which float16 must hold: the scale of a residual stream is a power of two."""
    number = np.float16(value)
    if float(number) != value:
        raise ValueError(f"coreml cannot multiply by {value!r}: float16 holds {float(number)!r} in its place")
    return number


def _unary(build: Callable[..., Any]) -> Emitter:
    def emit(low: Lowering, node: Node) -> None:
        low.define(node, build(x=low.rows(operands(node)[0])))

    return emit


def _gelu(low: Lowering, node: Node) -> None:
    mode = "EXACT" if node.kwargs.get("approximate", "none") == "none" else "TANH_APPROXIMATION"
    low.define(node, mb.gelu(x=low.rows(operands(node)[0]), mode=mode))


def _split(low: Lowering, node: Node) -> None:
    source, sizes = operands(node)[0], list(operands(node)[1])
    parts = mb.split(x=low.rows(source), split_sizes=sizes, axis=low.features)
    for index, part in enumerate(parts):
        low.results[node, index] = Value(part)


def _linear(low: Lowering, node: Node) -> None:
    source, weight = operands(node)[:2]
    bias = operands(node)[2] if len(operands(node)) > 2 else None
    constant = None if bias is None else low.kept(bias, shape_of(bias))
    if source in low.patch:
        low.define(node, _patches(low, source, low.kept(weight, _kernel(low, source, weight)), constant))
        return
    x = low.rows(source)
    results = [project(low, x, matrix, constant) for matrix in low.matrices(low.parameter(weight))]
    low.define(node, results[0])
    low.last = results  # the head's, which is the last one, may come in pieces


def _kernel(low: Lowering, source: Node, weight: Node) -> tuple[int, ...]:
    patch, _ = low.patch[source]
    return (shape_of(weight)[0], 3, patch, patch)


def _patches(low: Lowering, source: Node, kernel: Any, bias: Any) -> Any:
    """Patch embedding as a convolution, its grid put into the order of tokens: merge×merge patches adjacent."""
    patch, merge = low.patch[source]
    grid = mb.conv(x=low.values[source].var, weight=kernel, bias=bias, strides=[patch, patch], pad_type="valid")
    _, width, rows, columns = grid.shape
    apart = low.reshape(grid, (width, rows // merge, merge, columns // merge, merge))
    if low.profile.convolutions:
        return low.reshape(low.transpose(apart, (0, 1, 3, 2, 4)), (1, width, 1, rows * columns))
    return low.reshape(low.transpose(apart, (1, 3, 2, 4, 0)), (1, rows * columns, width))


def project(low: Lowering, x: Any, matrix: Any, bias: Any = None) -> Any:
    """Rows times a matrix [N, K]."""
    build = mb.conv if low.profile.convolutions else mb.linear
    return build(x=x, weight=matrix) if bias is None else build(x=x, weight=matrix, bias=bias)


def _real_rows(low: Lowering, node: Node) -> None:
    """Padding may hold NaN, which no product removes."""
    x = low.rows(operands(node)[0])
    zero = low.constant("zero", np.float16(0))
    low.define(node, mb.select(cond=low.real(low.row_shape(shape_of(node)[0], 1)), a=x, b=zero))


def _last_valid(low: Lowering, node: Node) -> None:
    x = low.rows(operands(node)[0])
    last = mb.sub(x=low.valid, y=ints(1))
    zeros = [ints(0)] * (x.rank - 1)
    begin = mb.concat(values=[*zeros[: low.tokens], last, *zeros[low.tokens :]], axis=0)
    size = low.row_shape(1, x.shape[low.features])
    low.define(node, mb.slice_by_size(x=x, begin=begin, size=list(size)))


def _normalize_image(low: Lowering, node: Node) -> None:
    x, mean, std = operands(node)
    factor = 1.0 / np.asarray(std, np.float64)
    shift = -np.asarray(mean, np.float64) * factor
    scaled = mb.mul(x=low.values[x].var, y=factor.astype(np.float32).reshape(1, 3, 1, 1))
    low.define(node, half(mb.add(x=scaled, y=shift.astype(np.float32).reshape(1, 3, 1, 1))))


def _patchify(low: Lowering, node: Node) -> None:
    """Its reader, the patch embedding, is a convolution of the picture: seven axes are more than runtimes take."""
    low.values[node] = low.values[operands(node)[0]]
    low.patch[node] = operands(node)[1:]


def _resample_positions(low: Lowering, node: Node) -> None:
    """Depends on a weight only: computed here, once per image size."""
    table, rows, columns, merge = operands(node)
    name = low.parameter(table)
    quantizer = low.weights.quantizer
    vision = quantizer.weights.config.vision
    side = vision.patch_size if vision is not None else 1
    positions = resample_positions(quantizer.weights.tensor(name), rows, columns, merge).numpy()
    title = identifier(f"{name}@{rows * side}x{columns * side}")
    array = positions.T[None, :, None] if low.profile.convolutions else positions[None]
    # In float32, as rotary tables are: then nothing but storage in float16 tells a run from PyTorch.
    low.define(node, half(low.constant(title, np.ascontiguousarray(array))))


EMITTERS: dict[str, Emitter] = {
    "getitem": _getitem,
    "aten.reshape.default": _reshape,
    "aten.squeeze.dim": _same,
    "aten.unsqueeze.default": _same,
    "aten.transpose.int": _same,
    "aten.add.Tensor": _add,
    "aten.mul.Tensor": _binary(mb.mul),
    "aten.sigmoid.default": _unary(mb.sigmoid),
    "aten.silu.default": _unary(mb.silu),
    "aten.gelu.default": _gelu,
    "aten.split_with_sizes.default": _split,
    "aten.linear.default": _linear,
    "aten.layer_norm.default": norms.layer_norm,
    "aten.scaled_dot_product_attention.default": attention.full,
    "mobile.rms_norm.default": norms.rms_norm,
    "mobile.gated_rms_norm.default": norms.gated_rms_norm,
    "mobile.l2_norm.default": norms.l2_norm,
    "mobile.causal_conv.default": delta_rule.causal_conv,
    "mobile.delta_gates.default": delta_rule.gates,
    "mobile.gated_delta_step.default": delta_rule.step,
    "mobile.gated_delta_chunk.default": delta_rule.chunked,
    "mobile.rotary_table.default": attention.rotary_table,
    "mobile.rotary.default": attention.rotary,
    "mobile.grid_rotary.default": attention.grid_rotary,
    "mobile.cached_attention.default": attention.cached,
    "mobile.real_rows.default": _real_rows,
    "mobile.last_valid.default": _last_valid,
    "mobile.normalize_image.default": _normalize_image,
    "mobile.patchify.default": _patchify,
    "mobile.resample_positions.default": _resample_positions,
}


def needed(program: Program) -> set[Node]:
    """Nodes that a result of the program depends on."""
    order = list(program.exported.graph.nodes)
    wanted = {order[-1]}
    for node in reversed(order):
        if node in wanted:
            wanted.update(node.all_input_nodes)
    return wanted


def walk(low: Lowering) -> None:
    """Emit every node that a result depends on; placeholders already have values.

    Raises:
        ValueError: an operator outside the table.
    """
    wanted = needed(low.program)
    for node in low.program.exported.graph.nodes:
        if node.op != "call_function" or node not in wanted:
            continue
        name = "getitem" if node.target is operator.getitem else str(node.target)
        if name not in EMITTERS:
            raise ValueError(f"coreml has no emitter for operator {name}; add one to the table")
        EMITTERS[name](low, node)

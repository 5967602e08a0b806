"""The table: one emitter per operator of a traced program, in XNNPACK nodes and a few kernels of the runtime.

Everything but the kernels in `KERNELS` runs inside delegates. An emitter reads its operands as tensors of the
method under construction and defines the value of its node; reshapes of the traced program are made on demand.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from export.model.config import VisionConfig
from export.model.operators import grid_rotary_table, resample_positions
from export.model.trace import Program
from targets.to_executorch import delta_rule, nodes
from targets.to_executorch.pack import WeightTable
from targets.to_executorch.program import Method, Slot
from targets.to_executorch.xnnpack import Shape, Tensor

KERNELS: dict[str, str] = {
    "aten::_local_scalar_dense": "the cache kernels take `start` as a number",
    "aten::_to_copy.out": "XNNPACK reads floats only: positions and `valid` are integers",
    "aten::lt.Tensor_out": "XNNPACK has no comparison: which rows of a chunk are real",
    "aten::where.self_out": "padding may hold NaN, which no product removes; once a call",
    "llama::update_cache.out": "XNNPACK cannot write at a place known only at run time",
    "llama::custom_sdpa.out": "reads only the rows in use; XNNPACK's product packs the whole cache every call",
}
"""Kernels of the runtime that a method may call, each with the reason."""


class Lowering:
    """State of one walk: fx node -> tensor of the method, and where weights come from."""

    def __init__(self, method: Method, program: Program, weights: WeightTable) -> None:
        self.method = method
        self.program = program
        self.weights = weights
        self.values: dict[Node, Tensor] = {}
        self.results: dict[tuple[Node, int], Tensor] = {}
        self.buffers: dict[Node, Tensor] = {}
        """States that the method keeps itself, by their placeholder."""
        self._shared: dict[str, Any] = {}
        self._reshaped: dict[tuple[Tensor, Shape], Tensor] = {}

    # -- operands ---------------------------------------------------------------------------------
    def value(self, node: Any, shape: Shape | None = None) -> Tensor:
        """The value of a node under its traced shape, or another of the same size."""
        return self.view(self.values[node], shape if shape is not None else shape_of(node))

    def view(self, tensor: Tensor, shape: Shape) -> Tensor:
        """A tensor under another shape; the copy is made once."""
        if tensor.shape == shape:
            return tensor
        key = (tensor, shape)
        known = self._reshaped.get(key)
        # A copy made in an earlier delegate would have to be carried over: making it again is cheaper.
        if known is None or known.delegate is not self.method.delegate:
            self._reshaped[key] = nodes.reshape(self.method, tensor, shape)
        return self._reshaped[key]

    def define(self, node: Node, tensor: Tensor) -> None:
        self.values[node] = tensor

    def name(self, node: Node) -> str:
        """Name of the model's parameter behind a placeholder."""
        name = self.program.parameter(node.name) if node.op == "placeholder" else None
        if name is None:
            raise TypeError(f"{node.name} is not a parameter of the model")
        return name

    def constant(self, array: Any) -> Tensor:
        return self.method.constant(np.ascontiguousarray(array, np.float32))

    def kept(self, node: Node) -> Tensor:
        """A parameter that is read by elementwise nodes: a constant of the program."""
        name = self.name(node)
        return self.method.constant(self.weights.kept(name), name)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """Something all layers of the method share."""
        if name not in self._shared:
            self._shared[name] = make()
        return self._shared[name]

    # -- kernels ----------------------------------------------------------------------------------
    def kernel(self, name: str, arguments: Sequence[Tensor | Slot], shape: Shape, dtype: str = "float32") -> Tensor:
        """Call a kernel that writes one new tensor."""
        result = Tensor(shape, dtype)
        self.method.kernel(name, arguments, [result])
        return result

    def as_float(self, tensor: Tensor) -> Tensor:
        null, no = self.method.scalar(None), self.method.scalar(False)
        return self.kernel("aten::_to_copy.out", [tensor, no, null], tensor.shape)

    def positions(self, node: Node) -> Tensor:
        """`position_ids` as float32 [3, C]."""
        tensor: Tensor = self.once("positions", lambda: self.as_float(self.values[node]))
        return tensor

    def start(self, node: Node) -> Slot:
        """`start` as a number for kernels."""
        number: Slot = self.once("start", lambda: _start(self, node))
        return number

    def valid(self, node: Node) -> Tensor:
        """`valid` as float32 [1]."""
        tensor: Tensor = self.once("valid", lambda: self.as_float(self.values[node]))
        return tensor

    def real(self, node: Node, rows: int) -> Tensor:
        """1 for rows before `valid`, 0 for padding: [C, 1], by arithmetic that is exact for whole numbers."""

        def make() -> Tensor:
            index = self.constant(np.arange(rows).reshape(rows, 1))
            return nodes.clamp(self.method, nodes.subtract(self.method, self.valid(node), index), 0.0, 1.0)

        tensor: Tensor = self.once("real", make)
        return tensor

    @property
    def vision(self) -> VisionConfig:
        vision = self.weights.quantizer.weights.config.vision
        if vision is None:
            raise ValueError("the model has no vision encoder")
        return vision


Emitter = Callable[[Lowering, Node], None]


def shape_of(node: Node) -> Shape:
    """Traced shape of a node's tensor."""
    return tuple(int(extent) for extent in node.meta["val"].shape)


def operands(node: Node) -> tuple[Any, ...]:
    """Arguments of a node: nodes, numbers, lists; their types are those of the operator's schema."""
    return node.args


def _getitem(low: Lowering, node: Node) -> None:
    source, index = operands(node)
    low.define(node, low.results[source, index])


def _reshape(low: Lowering, node: Node) -> None:
    low.define(node, low.values[operands(node)[0]])


def _transpose(low: Lowering, node: Node) -> None:
    source, a, b = operands(node)
    order = list(range(len(shape_of(node))))
    order[a], order[b] = order[b], order[a]
    low.define(node, nodes.transpose(low.method, low.value(source), order))


def _binary(kind: str) -> Emitter:
    def emit(low: Lowering, node: Node) -> None:
        a, b = (low.value(arg) for arg in operands(node))
        low.define(node, nodes.binary(low.method, kind, a, b))

    return emit


def _sigmoid(low: Lowering, node: Node) -> None:
    low.define(node, nodes.unary(low.method, "Sigmoid", low.value(operands(node)[0])))


def _silu(low: Lowering, node: Node) -> None:
    low.define(node, nodes.silu(low.method, low.value(operands(node)[0])))


def _gelu(low: Lowering, node: Node) -> None:
    """XNNPACK's own is the exact form. The other is x/2 (1 + tanh u) = x sigmoid(2u) with
    2u = 2 sqrt(2/pi) (x + 0.044715 x³).
    """
    m, x = low.method, low.value(operands(node)[0])
    if node.kwargs.get("approximate", "none") == "none":
        low.define(node, nodes.unary(m, "Gelu", x))
        return
    factor = 2 * (2 / np.pi) ** 0.5
    inner = nodes.add(m, nodes.scale(m, nodes.unary(m, "Square", x), factor * 0.044715), low.constant([factor]))
    low.define(node, nodes.multiply(m, x, nodes.unary(m, "Sigmoid", nodes.multiply(m, x, inner))))


def _split(low: Lowering, node: Node) -> None:
    source, sizes = operands(node)[0], list(operands(node)[1])
    x, first = low.values[source], 0  # whatever its other axes are
    for index, size in enumerate(sizes):
        low.results[node, index] = nodes.cut(low.method, x, -1, first, size)
        first += size


def _linear(low: Lowering, node: Node) -> None:
    source, weight = operands(node)[:2]
    bias = operands(node)[2] if len(operands(node)) > 2 else _bias_of_gates(node)
    filters = low.weights.linear(low.name(weight)), low.weights.bias(low.name(bias)) if bias else None
    low.define(node, nodes.linear(low.method, low.value(source), *filters))


def _bias_of_gates(node: Node) -> Node | None:
    """What `delta_gates`, the only reader of a projection, would add to it first: the projection's bias does it."""
    users = list(node.users)
    fits = len(users) == 1 and str(users[0].target) == "mobile.delta_gates.default" and users[0].args[0] is node
    bias = users[0].args[3] if fits else None
    return bias if isinstance(bias, Node) else None


def by_head(tokens: int, heads: int, width: int) -> Shape:
    """[C, H, D], or for one token [H, 1, D]: the form that products over heads want."""
    return (heads, 1, width) if tokens == 1 else (tokens, heads, width)


def _inverse_root(low: Lowering, x: Tensor, factor: float, eps: float) -> Tensor:
    """1 / sqrt(factor · sum of squares + eps) over the last axis, which keeps extent 1."""
    m, weights = low.method, low.weights
    total = nodes.linear(m, nodes.unary(m, "Square", x), weights.row(x.shape[-1], factor), weights.number(eps))
    return nodes.unary(m, "ReciprocalSquareRoot", total)


def _rms(low: Lowering, x: Tensor, weight: Node, eps: float) -> Tensor:
    m = low.method
    return nodes.multiply(m, nodes.multiply(m, x, _inverse_root(low, x, 1 / x.shape[-1], eps)), low.kept(weight))


def _rms_norm(low: Lowering, node: Node) -> None:
    source, weight, eps = operands(node)
    low.define(node, _rms(low, low.value(source), weight, eps))


def _gated_rms_norm(low: Lowering, node: Node) -> None:
    x, weight, gate, eps = operands(node)
    normed = _rms(low, low.value(x, by_head(*shape_of(x))), weight, eps)
    flat = low.values[gate].shape  # the gate comes flat from its projection, and the result is wanted flat
    low.define(node, nodes.multiply(low.method, low.view(normed, flat), nodes.silu(low.method, low.values[gate])))


def _l2_norm(low: Lowering, node: Node) -> None:
    """scale / sqrt(sum + eps) is 1 / sqrt(sum / scale² + eps / scale²)."""
    source, eps, factor = operands(node)
    tokens, heads, width = shape_of(node)
    x = low.value(source, by_head(tokens, heads, width))
    low.define(node, nodes.multiply(low.method, x, _inverse_root(low, x, factor**-2, eps * factor**-2)))


def _rotary_table(low: Lowering, node: Node) -> None:
    """Rows of cos and sin that `_rotary` multiplies whole heads with: [C, dim/2] each.

    A linear with one frequency per output picks the axis of each angle; its other products are exact zeros.
    """
    positions, theta, dim, sections, _ = operands(node)
    half = int(dim) // 2
    index = np.arange(half)
    axis = np.zeros(half, np.int64)
    axis[(index % 3 == 1) & (index < 3 * sections[1])] = 1
    axis[(index % 3 == 2) & (index < 3 * sections[2])] = 2
    exponent = torch.arange(half, dtype=torch.float32) * 2 / dim
    frequency = (1.0 / (theta**exponent)).numpy()
    chosen = np.zeros((half, 3), np.float32)
    chosen[index, axis] = frequency
    rows, m = low.positions(positions), low.method
    angle = nodes.linear(m, nodes.transpose(m, rows, (1, 0)), low.weights.small("rotary", chosen))
    for place, kind in enumerate(("Cos", "Sin")):  # within 7e-7 up to position 262,144 (docs/LOG.md)
        low.results[node, place] = nodes.unary(m, kind, angle)


def _rotary(low: Lowering, node: Node) -> None:
    x, cos, sin = operands(node)
    low.define(node, _rotate(low, low.value(x), low.values[cos], low.values[sin], str(cos.name)))


def _rotate(low: Lowering, x: Tensor, cos: Tensor, sin: Tensor, name: str) -> Tensor:
    """x [C, H, D] rotated in its first dimensions, as two halves: x · (cos, cos, 1) + swapped x · (-sin, sin, 0)."""
    m = low.method
    rows, half = cos.shape
    rest = x.shape[-1] - 2 * half

    def tables() -> tuple[Tensor, Tensor]:
        ones, zeros = (low.constant(np.full((rows, rest), value)) for value in (1, 0))
        minus = nodes.scale(m, sin, -1.0)
        keep = nodes.concat(m, [cos, cos, *([ones] if rest else [])], -1)
        swap = nodes.concat(m, [minus, sin, *([zeros] if rest else [])], -1)
        wide = (rows, 1, x.shape[-1])
        return nodes.reshape(m, keep, wide), nodes.reshape(m, swap, wide)

    keep, swap = low.once(f"{name} {x.shape[-1]}", tables)
    parts = [nodes.cut(m, x, -1, half, half), nodes.cut(m, x, -1, 0, half)]
    parts += [nodes.cut(m, x, -1, 2 * half, rest)] if rest else []
    return nodes.add(m, nodes.multiply(m, x, keep), nodes.multiply(m, nodes.concat(m, parts, -1), swap))


def _grid_rotary(low: Lowering, node: Node) -> None:
    x, rows, columns, merge, theta = operands(node)
    source = low.value(x)
    cos, sin = grid_rotary_table(rows, columns, merge, source.shape[-1], theta, torch.device("cpu"))
    low.define(node, _rotate(low, source, low.constant(cos.numpy()), low.constant(sin.numpy()), "grid"))


def _causal_conv(low: Lowering, node: Node) -> None:
    """Depthwise over the rows of past and present; states are [K-1, Ch], oldest first."""
    x, weight, state, valid = operands(node)
    m = low.method
    name = low.name(weight)
    width = low.weights.quantizer.weights.parameter(name).shape[1]
    rows = shape_of(x)[0]
    series = nodes.concat(m, [low.values[state], low.value(x)], 0)
    low.results[node, 0] = nodes.silu(m, nodes.depthwise(m, series, low.weights.taps(name)))
    if valid is None:
        last = nodes.cut(m, series, 0, rows, width - 1)
    else:
        last = nodes.matmul(m, low.once("conv rows", lambda: _conv_rows(low, valid, rows, width)), series)
    low.results[node, 1] = last


def _conv_rows(low: Lowering, valid: Node, rows: int, width: int) -> Tensor:
    """[K-1, K-1+C] that picks rows valid … valid+K-2 of a series: 1 - |column - row - valid|, at least 0."""
    column, row = np.arange(rows + width - 1), np.arange(width - 1).reshape(-1, 1)
    return _picks(low, low.constant(column - row), low.valid(valid))


def _picks(low: Lowering, index: Tensor, place: Tensor) -> Tensor:
    """1 where index equals place, else 0; whole numbers."""
    m = low.method
    distance = nodes.unary(m, "Abs", nodes.subtract(m, index, place))
    return nodes.clamp(m, nodes.subtract(m, low.constant([1.0]), distance), 0.0, 1.0)


def _delta_gates(low: Lowering, node: Node) -> None:
    """softplus(x) = max(x, 0) - log(sigmoid(|x|)), which overflows nowhere; x = a + dt_bias is there already."""
    a, b, decay_scale, _, valid = operands(node)
    m = low.method
    x = low.value(a)
    log = nodes.unary(m, "Log", nodes.unary(m, "Sigmoid", nodes.unary(m, "Abs", x)))
    softplus = nodes.subtract(m, nodes.clamp(m, x, 0.0, np.inf), log)
    gates = [nodes.multiply(m, softplus, low.kept(decay_scale)), nodes.unary(m, "Sigmoid", low.value(b))]
    for place, gate in enumerate(gates):
        if valid is not None:
            gate = nodes.multiply(m, gate, low.real(valid, shape_of(a)[0]))
        low.results[node, place] = gate


def _gated_delta(low: Lowering, node: Node) -> None:
    q, k, v, g, beta, state = operands(node)
    tokens, _, width = shape_of(q)
    by_heads = [low.value(x, by_head(*shape_of(x))) for x in (q, k, v)]
    rows = (by_heads[0], by_heads[1], by_heads[2], low.value(g), low.value(beta))
    if "step" in str(node.target):
        result = delta_rule.step(low.method, rows, low.values[state], low.weights.row(width, 1.0))
    else:
        sums = {size: low.weights.sums(size) for _, _, size in delta_rule.groups(tokens)}
        result = delta_rule.chunked(low.method, rows, low.values[state], sums)
    low.results[node, 0], low.results[node, 1] = result


def _cached_attention(low: Lowering, node: Node) -> None:
    """The new rows go into the caches, which the caller holds, and are handed out for it to keep."""
    q, k, v, key_cache, value_cache, start, scale = operands(node)
    m = low.method
    query = low.value(q, (1, *shape_of(q)))
    rows = [low.value(x, (1, *shape_of(x))) for x in (k, v)]
    first = low.start(start)
    caches = low.values[key_cache], low.values[value_cache]
    for row, cache in zip(rows, caches, strict=True):
        m.kernel("llama::update_cache.out", [row, cache, first], [Tensor((1,))])
    null, none, causal = m.scalar(None), m.scalar(0.0), m.scalar(True)
    arguments: list[Tensor | Slot] = [query, *caches, first, null, none, causal, m.scalar(scale)]
    low.results[node, 0] = low.kernel("llama::custom_sdpa.out", arguments, query.shape)
    low.results[node, 1], low.results[node, 2] = rows


def _start(low: Lowering, start: Node) -> Slot:
    number = low.method.scalar(0)
    low.method.kernel("aten::_local_scalar_dense", [low.values[start]], [number])
    return number


def _real_rows(low: Lowering, node: Node) -> None:
    x, valid = operands(node)
    m, count = low.method, shape_of(x)[0]
    rows = low.values[x]  # as the caller gives them: a reshape would be a delegate of its own
    low.valid(valid)  # here, at the start: a kernel called within a layer would cut its delegate
    index = m.constant(np.arange(count, dtype=np.int32).reshape(-1, 1))
    real = low.kernel("aten::lt.Tensor_out", (index, low.values[valid]), (count, 1), "bool")
    zero = m.constant(np.zeros((1, 1), np.float32))
    low.define(node, low.kernel("aten::where.self_out", [real, rows, zero], rows.shape))


def _last_valid(low: Lowering, node: Node) -> None:
    x, valid = operands(node)
    m = low.method
    rows = low.value(x)
    index = low.constant(np.arange(1, rows.shape[0] + 1).reshape(1, -1))
    low.define(node, nodes.matmul(m, _picks(low, index, low.valid(valid)), rows))


def _attention(low: Lowering, node: Node) -> None:
    """Full attention over all patches; operands [H, N, D]."""
    m = low.method
    q, k, v = (low.value(arg) for arg in operands(node)[:3])
    scores = nodes.matmul(m, nodes.scale(m, q, q.shape[-1] ** -0.5), k, transpose_b=True)
    low.define(node, nodes.matmul(m, nodes.unary(m, "Softmax", scores), v))


def _layer_norm(low: Lowering, node: Node) -> None:
    x, _, weight, bias, eps = operands(node)[:5]
    m, rows = low.method, low.value(x)
    width = rows.shape[-1]
    centred = nodes.subtract(m, rows, nodes.linear(m, rows, low.weights.row(width, 1 / width)))
    normed = nodes.multiply(m, centred, _inverse_root(low, centred, 1 / width, eps))
    low.define(node, nodes.add(m, nodes.multiply(m, normed, low.kept(weight)), low.kept(bias)))


def _normalize_image(low: Lowering, node: Node) -> None:
    x, mean, std = operands(node)
    m = low.method
    factor = 1.0 / np.asarray(std, np.float64)
    shift = -np.asarray(mean, np.float64) * factor
    picture = low.value(x)
    scaled = nodes.multiply(m, picture, low.constant(factor.reshape(3, 1, 1)))
    low.define(node, nodes.add(m, scaled, low.constant(shift.reshape(3, 1, 1))))


def _patchify(low: Lowering, node: Node) -> None:
    """In two steps, because XNNPACK has six dimensions: tokens first, then the patches inside each."""
    x, patch, merge = operands(node)
    m, picture = low.method, low.value(x)
    _, height, width = picture.shape
    side = patch * merge
    rows, columns = height // side, width // side
    tokens = nodes.transpose(m, low.view(picture, (3, rows, side, columns, side)), (1, 3, 0, 2, 4))
    inside = low.view(tokens, (rows * columns, 3, merge, patch, merge, patch))
    low.define(node, nodes.transpose(m, inside, (0, 2, 4, 1, 3, 5)))


def _resample_positions(low: Lowering, node: Node) -> None:
    """Depends on a weight only: computed here, once per image size."""
    table, rows, columns, merge = operands(node)
    name, side = low.name(table), low.vision.patch_size
    positions = resample_positions(torch.from_numpy(low.weights.kept(name)), rows, columns, merge).numpy()
    low.define(node, low.method.constant(positions, f"{name}@{rows * side}x{columns * side}"))


EMITTERS: dict[str, Emitter] = {
    "getitem": _getitem,
    "aten.reshape.default": _reshape,
    "aten.squeeze.dim": _reshape,
    "aten.unsqueeze.default": _reshape,
    "aten.transpose.int": _transpose,
    "aten.add.Tensor": _binary("Add"),
    "aten.mul.Tensor": _binary("Multiply"),
    "aten.sigmoid.default": _sigmoid,
    "aten.silu.default": _silu,
    "aten.gelu.default": _gelu,
    "aten.split_with_sizes.default": _split,
    "aten.linear.default": _linear,
    "aten.layer_norm.default": _layer_norm,
    "aten.scaled_dot_product_attention.default": _attention,
    "mobile.rms_norm.default": _rms_norm,
    "mobile.gated_rms_norm.default": _gated_rms_norm,
    "mobile.l2_norm.default": _l2_norm,
    "mobile.causal_conv.default": _causal_conv,
    "mobile.delta_gates.default": _delta_gates,
    "mobile.gated_delta_step.default": _gated_delta,
    "mobile.gated_delta_chunk.default": _gated_delta,
    "mobile.rotary_table.default": _rotary_table,
    "mobile.rotary.default": _rotary,
    "mobile.grid_rotary.default": _grid_rotary,
    "mobile.cached_attention.default": _cached_attention,
    "mobile.real_rows.default": _real_rows,
    "mobile.last_valid.default": _last_valid,
    "mobile.normalize_image.default": _normalize_image,
    "mobile.patchify.default": _patchify,
    "mobile.resample_positions.default": _resample_positions,
}


def _ordered(program: Program) -> list[Node]:
    """Calls that a result depends on. The rotary tables come where they are first read, if at all: the kernels that
    zero padded rows run before every delegate then, and cut none.
    """
    order = list(program.exported.graph.nodes)
    wanted = {order[-1]}
    for node in reversed(order):
        if node in wanted:
            wanted.update(node.all_input_nodes)
    calls = [node for node in order if node in wanted and node.op == "call_function"]
    tables = [node for node in calls if str(node.target) == "mobile.rotary_table.default"]
    tables += [node for node in calls if node.all_input_nodes and node.all_input_nodes[0] in tables]
    rest = [node for node in calls if node not in tables]
    first = next((i for i, node in enumerate(rest) if set(node.all_input_nodes) & set(tables)), 0)
    return [*rest[:first], *tables, *rest[first:]]


def walk(low: Lowering) -> None:
    """Emit every node of the program whose placeholders already have values.

    Raises:
        ValueError: an operator outside the table.
    """
    calls = _ordered(low.program)
    for table in calls:
        if str(table.target) == "mobile.rotary_table.default":
            low.positions(operands(table)[0])  # a kernel: before the first delegate, not within it
    for node in calls:
        name = "getitem" if node.target is operator.getitem else str(node.target)
        if name not in EMITTERS:
            raise ValueError(f"executorch has no emitter for operator {name}; add one to the table")
        EMITTERS[name](low, node)

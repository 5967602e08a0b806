"""The table: one emitter per operator of a traced program.

Attributes follow the kernels of onnxruntime 1.32 (com.microsoft contrib operators). An emitter reads its
operands as values of the graph under construction and defines the value of its node. Reshapes of the traced
program are views made on demand, because the fused kernels want heads packed in the last axis.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from onnx import TensorProto
from torch.fx import Node

from export.model.config import VisionConfig
from export.model.operators import grid_rotary_table, resample_positions
from export.model.trace import Program
from export.quantize.quantizer import Quantizer
from targets.to_onnx import pack
from targets.to_onnx.graph import MICROSOFT, Graph, Shape

ACCURACY_LEVEL = 4
"""MatMulNBits quantises activations to int8 per block: the fast kernels on x86 and ARM."""


class Lowering:
    """State of one walk: fx node -> (value name, logical shape), and where weights come from."""

    def __init__(
        self,
        graph: Graph,
        program: Program,
        quantizer: Quantizer,
        advance: Callable[[int], None],
        image_sizes: tuple[tuple[int, int], ...] = (),
    ):
        self.graph = graph
        self.image_sizes = image_sizes
        self.program = program
        self.quantizer = quantizer
        self.advance = advance
        self.values: dict[Node, str] = {}
        self.results: dict[tuple[Node, int], str] = {}
        self.pending_sums: dict[Node, tuple[str, str]] = {}
        self.shared: dict[str, str] = {}
        """Values computed once per call, such as the row mask of a padded chunk."""

    # -- operands ---------------------------------------------------------------------------------
    def value(self, node: Any, shape: Shape | None = None) -> str:
        """The value of a node, under its traced shape or another of the same size."""
        return self.graph.view(self.values[node], shape if shape is not None else shape_of(node))

    def parameter(self, node: Node) -> str | None:
        return self.program.parameter(node.name) if node.op == "placeholder" else None

    def parameter_name(self, node: Node) -> str:
        name = self.parameter(node)
        if name is None:
            raise TypeError(f"{node.name} is not a parameter of the model")
        return name

    def float_weight(self, node: Node, shape: tuple[int, ...] | None = None) -> str:
        """A parameter kept in float32, written to the weight file on first use."""
        return self.float_parameter(self.parameter_name(node), shape)

    def float_parameter(self, name: str, shape: tuple[int, ...] | None = None) -> str:
        parameter = self.quantizer.weights.parameter(name)
        key, written = pack.store_float(self.graph.weights, self.quantizer, parameter)
        self.advance(written)
        return self.graph.stored(key, shape or parameter.shape)

    def define(self, node: Node, name: str) -> None:
        self.values[node] = name

    def linear(self, x: str, weight: Node, bias: Node | None) -> str:
        """x […, K] times a weight [N, K]: MatMulNBits when the recipe quantises it, else FusedMatMul or Gemm."""
        name = self.parameter_name(weight)
        parameter = self.quantizer.weights.parameter(name)
        setting = self.quantizer.setting(name)
        rows, columns = parameter.shape
        shape = (*self.graph.shapes[x][:-1], rows)
        if setting is None and bias:
            return self.graph.apply("Gemm", [x, self.float_weight(weight), self.float_weight(bias)], shape, transB=1)
        if setting is None:
            return self.graph.apply("FusedMatMul", [x, self.float_weight(weight)], shape, domain=MICROSOFT, transB=1)
        packed, written = pack.store_linear(self.graph.weights, self.quantizer, parameter, setting)
        self.advance(written)
        blocks = columns // packed.block
        inputs = [
            x,
            self.graph.stored(packed.codes, (rows, blocks, packed.block * packed.bits // 8)),
            self.graph.stored(packed.scales, (rows, blocks)),
        ]
        zero_bytes = (blocks * packed.bits + 7) // 8
        inputs.append(self.graph.stored(packed.zero_points, (rows, zero_bytes)) if packed.zero_points else "")
        inputs += ["", self.float_weight(bias) if bias else ""]
        while not inputs[-1]:
            inputs.pop()
        return self.graph.apply(
            "MatMulNBits",
            inputs,
            shape,
            domain=MICROSOFT,
            N=rows,
            K=columns,
            bits=packed.bits,
            block_size=packed.block,
            accuracy_level=ACCURACY_LEVEL,
        )

    # -- pictures: one graph serves every size -------------------------------------------------------
    def patch_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of patches of a picture of (height, width) pixels."""
        vision = self.vision
        return size[0] // vision.patch_size, size[1] // vision.patch_size

    @property
    def vision(self) -> VisionConfig:
        vision = self.quantizer.weights.config.vision
        if vision is None:
            raise ValueError("the model has no vision encoder")
        return vision

    def image_grid(self) -> tuple[str, str]:
        """Rows and columns of image tokens of this call's picture, int64 [1] each."""
        side = self.graph.constant([self.vision.pixels_per_token], np.int64)

        def count(axis: int) -> str:
            pixels = self.graph.apply("Shape", ["image"], (1,), start=axis, end=axis + 1)
            return self.graph.apply("Div", [pixels, side], (1,))

        return self.once("image_rows", lambda: count(2)), self.once("image_columns", lambda: count(3))

    def of_this_size(self, tables: str, rows: int | str) -> str:
        """From tables [sum of N, D] of all image sizes, one after the other, the one of this call [N, D]."""
        graph, side = self.graph, self.vision.pixels_per_token
        counts = [rows * columns for rows, columns in map(self.patch_grid, self.image_sizes)]
        starts = np.cumsum([0, *counts[:-1]])

        def chosen() -> str:
            grid = graph.apply("Concat", list(self.image_grid()), (2,), axis=0)
            known = graph.constant([[h // side, w // side] for h, w in self.image_sizes], np.int64)
            equal = graph.apply("Cast", [graph.apply("Equal", [known, grid], (len(counts), 2))], (len(counts), 2), to=1)
            both = graph.apply("ReduceSum", [equal, graph.constant([1], np.int64)], (len(counts),), keepdims=0)
            return graph.apply("ArgMax", [both], (1,), axis=0, keepdims=1)

        which = self.once("image_size", chosen)
        ends = (graph.constant(bounds, np.int64) for bounds in (starts, starts + counts))
        begin, end = (graph.apply("Gather", [bounds, which], (1,), axis=0) for bounds in ends)
        axis = graph.constant([0], np.int64)
        return graph.apply("Slice", [tables, begin, end, axis], (rows, *graph.shapes[tables][1:]))

    def once(self, name: str, make: Callable[[], str]) -> str:
        """A value shared by all layers of the graph."""
        if name not in self.shared:
            self.shared[name] = make()
        return self.shared[name]


Emitter = Callable[[Lowering, Node], None]


def shape_of(node: Node) -> Shape:
    """Traced shape of a node's tensor; a symbolic extent becomes the string "C"."""
    return dims(node.meta["val"].shape)


def operands(node: Node) -> tuple[Any, ...]:
    """Arguments of a node: nodes, numbers, lists; their types are those of the operator's schema."""
    return node.args


def dims(shape: Any) -> Shape:
    """Rows of tokens [C, …] get the batch axis [1, C, …] that most kernels want: no reshapes on the way.

    The one symbol of a text program is C; sizes of pictures are expressions of two.
    """
    expressions = [d if isinstance(d, int) else d.node.expr for d in shape]
    named = tuple(
        d if isinstance(d, int) else int(d) if d.is_number else "C" if d.is_symbol else str(d) for d in expressions
    )
    return (1, *named) if named and named[0] == "C" else named


def flat_heads(shape: Shape) -> Shape:
    """[1, C, H, D] or, without tokens of text, [N, H, D] -> [1, N, H·D], as the attention kernels take it."""
    return (1, shape[-3], int(shape[-2]) * int(shape[-1]))


def _getitem(low: Lowering, node: Node) -> None:
    source, index = operands(node)
    low.define(node, low.results[source, index])


def _reshape(low: Lowering, node: Node) -> None:
    low.define(node, low.values[operands(node)[0]])


def _transpose(low: Lowering, node: Node) -> None:
    """Only the exchange of heads and tokens around attention, whose kernel takes packed heads."""
    low.define(node, low.values[operands(node)[0]])
    attention = "aten.scaled_dot_product_attention.default"
    source = operands(node)[0]
    users = {str(user.target) for user in node.users}
    if str(source.target) != attention and users != {attention}:
        raise ValueError(f"onnx lowers transpose only around attention; {node.name} feeds {sorted(users)}")


def _add(low: Lowering, node: Node) -> None:
    left, right = operands(node)[0], operands(node)[1]
    a, b = low.value(left), low.value(right)
    if any(str(user.target) == "mobile.rms_norm.default" for user in node.users):
        low.pending_sums[node] = (a, b)  # the norm's kernel adds, and hands the sum on
        return
    low.define(node, low.graph.apply("Add", [a, b], shape_of(node)))


def _binary(op: str) -> Emitter:
    def emit(low: Lowering, node: Node) -> None:
        inputs = [low.value(arg) for arg in operands(node)]
        low.define(node, low.graph.apply(op, inputs, shape_of(node)))

    return emit


def _unary(op: str, domain: str = "", **attributes: Any) -> Emitter:
    def emit(low: Lowering, node: Node) -> None:
        x = low.value(operands(node)[0])
        low.define(node, low.graph.apply(op, [x], shape_of(node), domain=domain, **attributes))

    return emit


def _gelu(low: Lowering, node: Node) -> None:
    approximate = node.kwargs.get("approximate", "none")
    x = low.value(operands(node)[0])
    low.define(node, low.graph.apply("Gelu", [x], shape_of(node), approximate=approximate))


def _split(low: Lowering, node: Node) -> None:
    source, sizes = operands(node)[0], list(operands(node)[1])
    x = low.value(source)
    lead = low.graph.shapes[x][:-1]
    names = low.graph.node(
        "Split",
        [x, low.graph.constant(sizes, np.int64)],
        [(*lead, size) for size in sizes],
        axis=-1,
    )
    for index, name in enumerate(names):
        low.results[node, index] = name


def _linear(low: Lowering, node: Node) -> None:
    weight = operands(node)[1]
    bias = operands(node)[2] if len(operands(node)) > 2 else None
    low.define(node, low.linear(low.value(operands(node)[0]), weight, bias))


def _simplified(low: Lowering, x: str, weight: str, eps: float) -> str:
    return low.graph.apply(
        "SimplifiedLayerNormalization", [x, weight], low.graph.shapes[x], axis=-1, epsilon=eps, stash_type=1
    )


def _rms_norm(low: Lowering, node: Node) -> None:
    source, weight, eps = operands(node)
    gamma = low.float_weight(weight)
    if source not in low.pending_sums:
        low.define(node, _simplified(low, low.value(source), gamma, eps))
        return
    a, b = low.pending_sums.pop(source)
    shape = shape_of(node)
    normed, _, _, total = low.graph.node(
        "SkipSimplifiedLayerNormalization", [a, b, gamma], [shape, None, None, shape], domain=MICROSOFT, epsilon=eps
    )
    low.define(node, normed)
    low.define(source, total)


def _silu_of(low: Lowering, x: str) -> str:
    return low.graph.apply("QuickGelu", [x], low.graph.shapes[x], domain=MICROSOFT, alpha=1.0)


def _gated_rms_norm(low: Lowering, node: Node) -> None:
    x, weight, gate, eps = operands(node)
    normed = _simplified(low, low.value(x), low.float_weight(weight), eps)
    flat = flat_heads(shape_of(node))
    silu = _silu_of(low, low.value(gate, flat))
    low.define(node, low.graph.apply("Mul", [low.graph.view(normed, flat), silu], flat))


def _l2_norm(low: Lowering, node: Node) -> None:
    """An RMS norm in disguise: sum = width · mean, so eps / width and scale / sqrt(width) are exact."""
    x, eps, scale = operands(node)
    width = int(shape_of(node)[-1])
    weight = low.graph.constant(np.full(width, float(scale) * width**-0.5), np.float32)
    low.define(node, _simplified(low, low.value(x), weight, float(eps) / width))


def _rotary_table(low: Lowering, node: Node) -> None:
    positions, theta, dim, sections, _ = operands(node)
    half = int(dim) // 2
    index = np.arange(half)
    axis = np.zeros(half, np.int64)
    axis[(index % 3 == 1) & (index < 3 * sections[1])] = 1
    axis[(index % 3 == 2) & (index < 3 * sections[2])] = 2
    exponent = torch.arange(half, dtype=torch.float32) * 2 / dim
    frequency = (1.0 / (theta**exponent)).reshape(half, 1).numpy()
    graph, x = low.graph, low.value(positions)
    tokens = graph.shapes[x][-1]
    as_float = graph.apply("Cast", [x], graph.shapes[x], to=TensorProto.FLOAT)
    chosen = graph.apply("Gather", [as_float, graph.constant(axis, np.int64)], (half, tokens), axis=0)
    angle = graph.apply("Mul", [chosen, graph.constant(frequency, np.float32)], (half, tokens))
    angle = graph.view(graph.apply("Transpose", [angle], (tokens, half), perm=[1, 0]), (1, tokens, half))
    for place, op in enumerate(("Cos", "Sin")):
        low.results[node, place] = graph.apply(op, [angle], (1, tokens, half))


def _rotate(low: Lowering, x: str, cos: str, sin: str, heads: int, width: int) -> str:
    return low.graph.apply(
        "RotaryEmbedding",
        [x, cos, sin],
        low.graph.shapes[x],
        num_heads=heads,
        rotary_embedding_dim=0 if width == 2 * int(low.graph.shapes[cos][-1]) else 2 * int(low.graph.shapes[cos][-1]),
        interleaved=0,
    )


def _rotary(low: Lowering, node: Node) -> None:
    x, cos, sin = operands(node)
    shape = shape_of(node)
    packed = low.value(x, flat_heads(shape))
    low.define(node, _rotate(low, packed, low.values[cos], low.values[sin], int(shape[-2]), int(shape[-1])))


def _grid_rotary(low: Lowering, node: Node) -> None:
    x, _, _, merge, theta = operands(node)
    shape = shape_of(node)
    grids = [low.patch_grid(size) for size in low.image_sizes]

    def table(place: int) -> str:
        tables = [grid_rotary_table(*grid, merge, int(shape[2]), theta, torch.device("cpu"))[place] for grid in grids]
        every = low.graph.constant(torch.cat(tables).numpy(), np.float32)
        chosen = low.of_this_size(every, shape[0])
        return low.graph.view(chosen, (1, *low.graph.shapes[chosen]))

    cos = low.once("grid_cos", lambda: table(0))
    sin = low.once("grid_sin", lambda: table(1))
    packed = low.value(x, flat_heads(shape))
    low.define(node, _rotate(low, packed, cos, sin, int(shape[1]), int(shape[2])))


def _causal_conv(low: Lowering, node: Node) -> None:
    """A sum of shifted products. CausalConvWithState is 3 to 4 times slower (docs/LOG.md) and its new state is
    the tail of the chunk with its padding, where the last *valid* rows are wanted.
    """
    x, weight, state, valid = operands(node)
    graph = low.graph
    name = low.parameter_name(weight)
    channels, width = low.quantizer.weights.parameter(name).shape
    shape = (1, shape_of(x)[1], channels)
    rows, past = low.value(x, shape), low.values[state]
    series = graph.apply("Concat", [past, rows], (1, "series", channels), axis=1)
    taps = low.quantizer.weights.tensor(name)
    axis, far = graph.constant([1], np.int64), np.iinfo(np.int32).max
    terms = []
    for tap in range(width):
        key = f"{pack.storage_key(low.quantizer.weights.parameter(name), None)}|tap{tap}"
        if key not in graph.weights:
            graph.weights.write(key, np.dtype(np.float32), [np.ascontiguousarray(taps[:, tap].numpy())])
            low.advance(channels)
        shifted = rows
        if tap < width - 1:
            begin, end = graph.constant([tap], np.int64), graph.constant([tap + 1 - width], np.int64)
            shifted = graph.apply("Slice", [series, begin, end, axis], shape)
        terms.append(graph.apply("Mul", [shifted, graph.stored(key, (channels,))], shape))
    total = terms[0]
    for term in terms[1:]:
        total = graph.apply("Add", [total, term], shape)
    low.results[node, 0] = _silu_of(low, total)
    if valid is None:
        begin, end = graph.constant([1 - width], np.int64), graph.constant([far], np.int64)
    else:
        begin = low.once("valid64", lambda: graph.apply("Cast", [low.values[valid]], (1,), to=TensorProto.INT64))
        keep = graph.constant([width - 1], np.int64)
        end = low.once(f"valid_plus_{width - 1}", lambda: graph.apply("Add", [begin, keep], (1,)))
    low.results[node, 1] = graph.apply("Slice", [series, begin, end, axis], (1, width - 1, channels))


def _delta_gates(low: Lowering, node: Node) -> None:
    a, b, decay_scale, dt_bias, valid = operands(node)
    graph = low.graph
    shape = shape_of(a)
    gates = graph.node(
        "LinearAttentionGate",
        [
            low.value(a, shape),
            low.float_weight(dt_bias),
            low.float_weight(decay_scale),
            low.value(b, shape),
        ],
        [shape, shape],
        domain=MICROSOFT,
    )
    for place, gate in enumerate(gates):
        if valid is not None:
            gate = graph.apply("Mul", [gate, low.once("real", lambda: _real_factor(low, valid, shape[1]))], shape)
        low.results[node, place] = gate


def _real(low: Lowering, valid: Node, tokens: int | str) -> str:
    """True for rows before `valid`, False for padding: [1, C, 1]."""
    graph = low.graph

    def make() -> str:
        bounds = [graph.constant(0, np.int32), graph.view(_tokens(low), ()), graph.constant(1, np.int32)]
        index = graph.apply("Range", bounds, (tokens,))
        return graph.view(graph.apply("Less", [index, low.values[valid]], (tokens,)), (1, tokens, 1))

    return low.once("is_real", make)


def _real_factor(low: Lowering, valid: Node, tokens: int | str) -> str:
    """1.0 for rows before `valid`, 0.0 for padding: [1, C, 1]."""
    return low.graph.apply("Cast", [_real(low, valid, tokens)], (1, tokens, 1), to=TensorProto.FLOAT)


def _real_rows(low: Lowering, node: Node) -> None:
    x, valid = operands(node)
    shape = shape_of(x)
    zero = low.graph.constant(0, np.float32)
    inputs = [_real(low, valid, shape[-2]), low.value(x, (1, *shape)), zero]
    low.define(node, low.graph.apply("Where", inputs, (1, *shape)))


def _tokens(low: Lowering) -> str:
    """Number of rows C of this call as int32 [1]."""
    graph = low.graph

    def make() -> str:
        count = graph.apply("Shape", ["embeddings"], (1,), start=1, end=2)
        return graph.apply("Cast", [count], (1,), to=TensorProto.INT32)

    return low.once("tokens", make)


def _gated_delta(low: Lowering, node: Node) -> None:
    q, k, v, g, beta, state = operands(node)
    keys, values = shape_of(q), shape_of(v)
    outputs = low.graph.node(
        "LinearAttention",
        [
            low.value(q, flat_heads(keys)),
            low.value(k, flat_heads(keys)),
            low.value(v, flat_heads(values)),
            low.values[state],
            low.value(g),
            low.value(beta),
        ],
        [flat_heads(values), (1, values[-2], keys[-1], values[-1])],
        domain=MICROSOFT,
        update_rule="gated_delta",
        q_num_heads=keys[-2],
        kv_num_heads=values[-2],
        scale=1.0,
    )
    low.results[node, 0], low.results[node, 1] = outputs


def _cached_attention(low: Lowering, node: Node) -> None:
    q, k, v, key_cache, value_cache, start, scale = operands(node)
    graph = low.graph
    queries, keys = shape_of(q), shape_of(k)
    caches = [low.values[key_cache], low.values[value_cache]]

    def total() -> str:
        return graph.apply("Add", [low.values[start], _tokens(low)], (1,))

    after = low.once("total", total)
    last = low.once("last", lambda: graph.apply("Sub", [after, graph.constant([1], np.int32)], (1,)))
    outputs = graph.node(
        "GroupQueryAttention",
        [
            low.value(q, flat_heads(queries)),
            low.value(k, flat_heads(keys)),
            low.value(v, flat_heads(keys)),
            *caches,
            last,
            graph.view(after, ()),
        ],
        [flat_heads(queries), graph.shapes[caches[0]], graph.shapes[caches[1]]],
        domain=MICROSOFT,
        num_heads=queries[-2],
        kv_num_heads=keys[-2],
        scale=scale,
    )
    for place, name in enumerate(outputs):
        low.results[node, place] = name


def _last_valid(low: Lowering, node: Node) -> None:
    x, valid = operands(node)
    graph = low.graph
    row = graph.apply("Sub", [low.values[valid], graph.constant([1], np.int32)], (1,))
    gathered = graph.apply("Gather", [low.value(x), row], (1, *shape_of(node)), axis=1)
    low.define(node, graph.view(gathered, shape_of(node)))


def _attention(low: Lowering, node: Node) -> None:
    """Full attention over all patches; operands are [H, N, D] views of packed [1, N, H·D] values."""
    heads, tokens, width = shape_of(node)
    packed = (1, tokens, int(heads) * int(width))
    inputs = [low.value(arg, packed) for arg in operands(node)[:3]]
    low.define(
        node,
        low.graph.apply("MultiHeadAttention", inputs, packed, domain=MICROSOFT, num_heads=heads),
    )


def _layer_norm(low: Lowering, node: Node) -> None:
    x, _, weight, bias, eps = operands(node)[:5]
    inputs = [low.value(x), low.float_weight(weight), low.float_weight(bias)]
    low.define(
        node, low.graph.apply("LayerNormalization", inputs, shape_of(node), axis=-1, epsilon=eps)
    )


def _normalize_image(low: Lowering, node: Node) -> None:
    x, mean, std = operands(node)
    scale = 1.0 / np.asarray(std, np.float64)
    shift = -np.asarray(mean, np.float64) * scale
    graph, picture = low.graph, low.values[x]
    shape = graph.shapes[picture]
    scaled = graph.apply("Mul", [picture, graph.constant(scale.reshape(3, 1, 1), np.float32)], shape)
    low.define(node, graph.apply("Add", [scaled, graph.constant(shift.reshape(3, 1, 1), np.float32)], shape))


def _patchify(low: Lowering, node: Node) -> None:
    x, patch, merge = operands(node)
    graph = low.graph
    rows, columns = low.image_grid()
    fixed = [graph.constant([n], np.int64) for n in (3, merge, patch)]
    target = [fixed[0], rows, fixed[1], fixed[2], columns, fixed[1], fixed[2]]
    shape = (3, "rows", merge, patch, "columns", merge, patch)
    split = graph.apply("Reshape", [low.values[x], graph.apply("Concat", target, (7,), axis=0)], shape)
    order = [1, 4, 2, 5, 0, 3, 6]
    low.define(node, graph.apply("Transpose", [split], tuple(shape[i] for i in order), perm=order))


def _resample_positions(low: Lowering, node: Node) -> None:
    """Depends on a weight only: computed here, one table per image size, one after the other."""
    table, _, _, merge = operands(node)
    parameter = low.parameter_name(table)
    grids = [low.patch_grid(size) for size in low.image_sizes]
    key = f"{parameter}|" + ",".join(f"{rows}x{columns}" for rows, columns in grids)
    if key not in low.graph.weights:
        learned = low.quantizer.weights.tensor(parameter)
        tables = [resample_positions(learned, *grid, merge).numpy() for grid in grids]
        low.graph.weights.write(key, np.dtype(np.float32), tables)
    count = sum(rows * columns for rows, columns in grids)
    every = low.graph.stored(key, (count, int(shape_of(node)[1])))
    low.define(node, low.of_this_size(every, shape_of(node)[0]))


def _embedding(low: Lowering, node: Node) -> None:
    weight, ids = operands(node)
    low.define(node, embed_rows(low, low.parameter_name(weight), low.value(ids), shape_of(node)))


def embed_rows(low: Lowering, name: str, ids: str, shape: Shape) -> str:
    """Rows of an embedding matrix: gathered and dequantised in one kernel where it is quantised."""
    parameter, setting = low.quantizer.weights.parameter(name), low.quantizer.setting(name)
    graph = low.graph
    if setting is None:
        return graph.apply("Gather", [low.float_parameter(name), ids], shape, axis=0)
    packed, written = pack.store_linear(graph.weights, low.quantizer, parameter, setting)
    low.advance(written)
    rows, blocks = packed.rows, packed.columns // packed.block
    inputs = [
        graph.stored(packed.codes, (rows, packed.columns * packed.bits // 8)),
        ids,
        graph.stored(packed.scales, (rows, blocks)),
    ]
    if packed.zero_points:
        inputs.append(graph.stored(packed.zero_points, (rows, (blocks * packed.bits + 7) // 8)))
    return graph.apply(
        "GatherBlockQuantized",
        inputs,
        shape,
        domain=MICROSOFT,
        bits=packed.bits,
        block_size=packed.block,
        gather_axis=0,
        quantize_axis=1,
    )


EMITTERS: dict[str, Emitter] = {
    "getitem": _getitem,
    "aten.reshape.default": _reshape,
    "aten.squeeze.dim": _reshape,
    "aten.unsqueeze.default": _reshape,
    "aten.transpose.int": _transpose,
    "aten.add.Tensor": _add,
    "aten.mul.Tensor": _binary("Mul"),
    "aten.sigmoid.default": _unary("Sigmoid"),
    "aten.silu.default": _unary("QuickGelu", MICROSOFT, alpha=1.0),
    "aten.gelu.default": _gelu,
    "aten.split_with_sizes.default": _split,
    "aten.linear.default": _linear,
    "aten.layer_norm.default": _layer_norm,
    "aten.embedding.default": _embedding,
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


def walk(low: Lowering) -> None:
    """Emit every node of the program whose placeholders already have values.

    Raises:
        ValueError: an operator outside the table.
    """
    for node in low.program.exported.graph.nodes:
        if node.op != "call_function" or isinstance(node.meta.get("val"), int | torch.SymInt):
            continue  # symbolic sizes live in shapes, not in values
        name = "getitem" if node.target is operator.getitem else str(node.target)
        if name not in EMITTERS:
            raise ValueError(f"onnx has no emitter for operator {name}; add one to the table")
        EMITTERS[name](low, node)

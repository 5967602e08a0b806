"""The second opinion's table: MIL operations of iOS 18 as ONNX nodes, by the definitions in coremltools' documentation.

It has the operations that our lowering emits, with the parameters that it gives them; anything else is refused.
"""

from __future__ import annotations

import math

import numpy as np

from targets.to_coreml.second_opinion_graph import TYPES, Call, Emitter


def _unary(kind: str) -> Emitter:
    return lambda call: call.node(kind, call.wide("x"))


def _binary(kind: str) -> Emitter:
    return lambda call: call.node(kind, call.wide("x"), call.wide("y"))


def _silu(call: Call) -> str:
    x = call.wide("x")
    return call.node("Mul", x, call.node("Sigmoid", x))


def _gelu(call: Call) -> str:
    forms = {"EXACT": "none", "TANH_APPROXIMATION": "tanh"}
    return call.node("Gelu", call.wide("x"), approximate=forms[call.text("mode", *forms)])


def _rsqrt(call: Call) -> str:
    """1 / √(x + epsilon)."""
    total = call.node("Add", call.wide("x"), call.constant(call.number("epsilon"), "float32"))
    return call.node("Reciprocal", call.node("Sqrt", total))


def _select(call: Call) -> str:
    return call.node("Where", call.tensor("cond"), call.wide("a"), call.wide("b"))


def _reduce(kind: str) -> Emitter:
    def emit(call: Call) -> str:
        axes = call.constant(call.numbers("axes"), "int64")
        return call.node(kind, call.wide("x"), axes, keepdims=int(call.number("keep_dims")))

    return emit


def _softmax(call: Call) -> str:
    return call.node("Softmax", call.wide("x"), axis=call.number("axis"))


def _turned(call: Call, x: str, rank: int) -> str:
    """The last two axes swapped."""
    return call.node("Transpose", x, perm=[*range(rank - 2), rank - 1, rank - 2])


def _linear(call: Call) -> str:
    """x [..., K] · weight [N, K]ᵀ + bias [N]."""
    product = call.node("MatMul", call.wide("x"), _turned(call, call.wide("weight"), 2))
    return call.node("Add", product, call.wide("bias"))


def _matmul(call: Call) -> str:
    sides = [
        _turned(call, call.wide(side), len(call.shape(side))) if call.number(f"transpose_{side}") else call.wide(side)
        for side in ("x", "y")
    ]
    return call.node("MatMul", *sides)


def _attention(call: Call) -> str:
    """softmax(query · keyᵀ / √E + mask) · value."""
    *_, width = call.shape("query")
    keys = _turned(call, call.wide("key"), len(call.shape("key")))
    scores = call.node("MatMul", call.wide("query"), keys)
    scores = call.node("Mul", scores, call.constant(1 / math.sqrt(width), "float32"))
    if call.has("attn_mask"):
        if call.type("attn_mask").dtype == "bool":
            raise call.refuse("attn_mask is boolean; known are masks that are added")
        scores = call.node("Add", scores, call.wide("attn_mask"))
    return call.node("MatMul", call.node("Softmax", scores, axis=-1), call.wide("value"))


def _conv(call: Call) -> str:
    """MIL has the pads of an axis side by side, ONNX all first ones and then all last ones."""
    pads, space = call.numbers("pad"), len(call.shape("weight")) - 2
    if call.text("pad_type", "valid", "custom") == "valid":
        pads = [0] * 2 * space
    inputs = [call.wide(name) for name in ("x", "weight", "bias") if name != "bias" or call.has(name)]
    return call.node(
        "Conv", *inputs, pads=pads[::2] + pads[1::2], strides=call.numbers("strides"),
        dilations=call.numbers("dilations"), group=call.number("groups"),
    )  # fmt: skip


def _tile(call: Call) -> str:
    return call.node("Tile", call.wide("x"), call.constant(call.numbers("reps"), "int64"))


def _cast(call: Call) -> str:
    dtypes = {"fp16": "float16", "fp32": "float32", "int32": "int32", "bool": "bool"}
    return call.node("Cast", call.tensor("x"), to=TYPES[dtypes[call.text("dtype", *dtypes)]])


def _reshape(call: Call) -> str:
    shape = call.numbers("shape")
    if 0 in shape:
        raise call.refuse(f"shape {shape} copies a dimension; known are shapes without zeros")
    return call.node("Reshape", call.tensor("x"), call.constant(shape, "int64"))


def _transpose(call: Call) -> str:
    rank = len(call.shape("x"))
    return call.node("Transpose", call.tensor("x"), perm=[axis % rank for axis in call.numbers("perm")])


def _concat(call: Call) -> str:
    if call.number("interleave"):
        raise call.refuse("it interleaves; known are plain concatenations")
    return call.node("Concat", *call.tensors("values"), axis=call.number("axis"))


def _split(call: Call) -> list[str]:
    """By the sizes of the parts or, even, by their number."""
    x, axis = call.tensor("x"), call.number("axis")
    if call.has("split_sizes"):
        sizes = call.numbers("split_sizes")
    else:
        count = call.number("num_splits")
        sizes = [call.shape("x")[axis] // count] * count
    return call.nodes("Split", len(sizes), x, call.constant(sizes, "int64"), axis=axis)


def _slice_by_size(call: Call) -> str:
    size, begin = call.numbers("size"), call.tensor("begin")
    if min(size) < 0:
        raise call.refuse(f"size {size} leaves a dimension open; known are whole sizes")
    return call.node("Slice", call.tensor("x"), begin, call.node("Add", begin, call.constant(size, "int32")))


def _slice_update(call: Call) -> str:
    """The slice of x's own positions says where in x, laid out flat, the update goes. A slice of another size than the
    update fails at run time.
    """
    shape, flat = call.shape("x"), call.constant([-1], "int64")
    end = call.node(
        "Where", call.constant(call.array("end_mask"), "bool"), call.constant(shape, "int32"), call.tensor("end")
    )
    positions = call.constant(np.arange(math.prod(shape)).reshape(shape), "int32")
    chosen = call.node("Slice", positions, call.tensor("begin"), end)
    x, indices, update = (
        call.node("Reshape", one, flat) for one in (call.tensor("x"), chosen, call.tensor("update"))
    )
    return call.node("Reshape", call.node("ScatterElements", x, indices, update), call.constant(shape, "int64"))


COMPUTED: dict[str, Emitter] = {
    "abs": _unary("Abs"), "cos": _unary("Cos"), "exp": _unary("Exp"), "sigmoid": _unary("Sigmoid"),
    "sin": _unary("Sin"), "softplus": _unary("Softplus"), "silu": _silu, "gelu": _gelu, "rsqrt": _rsqrt,
    "add": _binary("Add"), "sub": _binary("Sub"), "mul": _binary("Mul"), "real_div": _binary("Div"),
    "maximum": _binary("Max"), "greater": _binary("Greater"), "less": _binary("Less"),
    "less_equal": _binary("LessOrEqual"), "select": _select,
    "reduce_max": _reduce("ReduceMax"), "reduce_mean": _reduce("ReduceMean"), "reduce_sum": _reduce("ReduceSum"),
    "reduce_sum_square": _reduce("ReduceSumSquare"), "softmax": _softmax, "linear": _linear, "matmul": _matmul,
    "scaled_dot_product_attention": _attention, "conv": _conv, "tile": _tile,
}  # fmt: skip
"""Written in float32; a result that the program declares as float16 is rounded once."""

MOVED: dict[str, Emitter] = {
    "cast": _cast, "reshape": _reshape, "transpose": _transpose, "concat": _concat, "split": _split,
    "slice_by_size": _slice_by_size, "slice_update": _slice_update,
}  # fmt: skip
"""Written in the dtype of their operands, for which onnxruntime has kernels."""

"""The method `forward` for ExecuTorch's own TextLLMRunner: token ids and a place in, logits out, states inside.

That runner passes two tensors and takes one (extension/llm/runner/text_decoder_runner.cpp, `step`), so here the
states are buffers of the method. Only this method touches them, so that they are right under every loader. It
holds an embedding of its own, because a kernel cannot read the weights of a delegate, and takes one token at
a time: text only, at equal positions of time, height and width.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.model.trace import Program
from export.quantize.quantizer import Quantizer
from targets.to_executorch.operators import Lowering
from targets.to_executorch.program import Method, Slot, aligned
from targets.to_executorch.xnnpack import Tensor

NAME = "forward"
KERNELS: dict[str, str] = {
    "quantized_decomposed::embedding_4bit.out": "XNNPACK has no gather",
    "quantized_decomposed::embedding_byte.out": "XNNPACK has no gather",
    "aten::embedding.out": "XNNPACK has no gather",
    "aten::expand_copy.out": "one place for all three axes of positions",
    "executorch_prim::eq.Scalar": "does a conversation begin?",
    "aten::fill.Scalar_out": "then its states are zeros",
}
"""Kernels that this method calls beside those of `operators.KERNELS`."""
CODES, SCALES = "!codes", "!scales"
"""What the constants of a quantised embedding are called, behind the parameter's name."""


def define_inputs(low: Lowering, free: list[Any], program: Program, offset: int, shapes: list[tuple[int, ...]]) -> None:
    """Give the placeholders of a traced decode step their values.

    Args:
        free: placeholders of embeddings, position_ids, start and each state. offset: where in the arena of states
            the buffers may begin. shapes: those of the states in the runtime.
    """
    method = low.method
    tokens, start = method.input((1, 1), "int64"), method.input((1,), "int64")
    hidden = int(free[0].meta["val"].shape[-1])
    low.define(free[0], _embed(method, low.weights.quantizer, tokens, (1, 1, hidden)))
    sizes, implicit = method.scalar([3, 1]), method.scalar(False)
    low.define(free[1], low.kernel("aten::expand_copy.out", [start, sizes, implicit], (3, 1), "int64"))
    low.define(free[2], start)
    whole = []
    for node, state, shape in zip(free[3:], program.states, shapes, strict=True):
        buffer = low.buffers[node] = method.buffer(shape, offset)
        offset += aligned(4 * math.prod(shape))
        low.define(node, buffer)
        if state.kind in ("conv", "recurrent"):  # rows of a cache are written before they are read
            whole.append(buffer)
    # A conversation begins at place 0: whatever an earlier one left, NaN included, is overwritten there.
    first = method.scalar(False)
    method.kernel("executorch_prim::eq.Scalar", [low.start(free[2]), method.scalar(0)], [first])
    zero = method.scalar(0)

    def clear() -> None:
        for buffer in whole:
            method.kernel("aten::fill.Scalar_out", [buffer, zero], [buffer])

    method.only_if(first, clear)


def _embed(method: Method, quantizer: Quantizer, tokens: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Rows of the embedding, dequantised by the kernel that its setting calls for."""
    name, setting = "embedding.weight", quantizer.setting("embedding.weight")
    rows, columns = quantizer.weights.parameter(name).shape
    result, null = Tensor(shape), method.scalar(None)
    if setting is None:
        weight = method.constant(quantizer.weights.tensor(name).numpy(), name)
        no = method.scalar(False)
        method.kernel("aten::embedding.out", [weight, tokens, method.scalar(-1), no, no], [result])
        return result
    codes = np.empty((rows, columns * setting.bits // 8), np.int8 if setting.bits == 8 else np.uint8)
    scales = np.empty((rows, columns // (setting.group_size or columns)), np.float32)
    for start, block in quantizer.blocks(name):
        stop = start + len(block.codes)
        codes[start:stop] = _packed(block.codes.numpy(), setting.bits)
        scales[start:stop] = block.scales.numpy()
    low, high = -(1 << (setting.bits - 1)), (1 << (setting.bits - 1)) - 1
    kernel = "embedding_byte" if setting.bits == 8 else "embedding_4bit"
    table = method.constant(codes, f"{name}{CODES}"), method.constant(scales, f"{name}{SCALES}")
    arguments: list[Tensor | Slot] = [*table, null, method.scalar(low), method.scalar(high), tokens]
    method.kernel(f"quantized_decomposed::{kernel}.out", arguments, [result])
    return result


def _packed(codes: NDArray[np.int8], bits: int) -> NDArray[Any]:
    """int8 as it is; 4 bits as code + 8, the first of two in the high nibble, as the kernel reads them."""
    if bits == 8:
        return codes
    unsigned = (codes + np.int8(8)).view(np.uint8)
    return np.asarray((unsigned[:, 0::2] << np.uint8(4)) | unsigned[:, 1::2])

"""Layout of weights in the ONNX bundle: MatMulNBits blocks for integer codes, plain rows for floats.

Nothing is re-quantised here: codes and scales come from the quantiser and only change their place. An int8
weight has one scale per output channel; the runtime wants a scale per block, so the same one is repeated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.checkpoint.weights import Parameter
from export.quantize.quantizer import Quantizer
from export.quantize.recipe import Setting
from export.quantize.tensor import QuantizedBlock
from export.spec import UsageError
from targets.to_onnx.graph import WeightFile

BLOCKS = (128, 64, 32, 16)
"""Block sizes of MatMulNBits; larger ones read fewer scales and run faster."""


@dataclass(frozen=True)
class PackedLinear:
    """Keys of a packed weight [N, K] in the weight file."""

    rows: int
    columns: int
    bits: int
    block: int
    codes: str
    scales: str
    zero_points: str | None


def storage_key(parameter: Parameter, setting: Setting | None) -> str:
    """Same source rows under the same setting are stored once: a tied head and embedding share."""
    rows = "+".join(f"{s.tensor}[{s.start}:{s.stop}]" for s in _merged(parameter))
    if len(rows) > 80:
        rows = parameter.name
    how = "float32" if setting is None else f"int{setting.bits}g{setting.group_size}"
    if setting is not None and not setting.symmetric:
        how += "a"
    if setting is not None and setting.scales != "search":
        how += setting.scales
    return f"{rows}|{parameter.transform}|{how}"


def _merged(parameter: Parameter) -> list[Any]:
    return list(parameter.segments)


def block_size(parameter: Parameter, setting: Setting) -> int:
    """The runtime's block: the recipe's group, or for one scale per channel the largest that divides K."""
    columns = parameter.shape[1]
    if setting.group_size is not None:
        return setting.group_size
    for block in BLOCKS:
        if columns % block == 0:
            return block
    raise UsageError(
        f"onnx cannot lower {parameter.name} with {columns} input features: MatMulNBits needs a multiple "
        f"of one of {BLOCKS}; use recipe fp32 for role {parameter.role!r}"
    )


def store_float(weights: WeightFile, quantizer: Quantizer, parameter: Parameter) -> tuple[str, int]:
    """Write a float32 parameter once; returns its key and how many weights were newly written."""
    key = storage_key(parameter, None)
    if key in weights:
        return key, 0
    blocks = (block.numpy() for _, block in quantizer.weights.blocks(parameter.name))
    return key, weights.write(key, np.dtype(np.float32), blocks).count


def store_linear(
    weights: WeightFile, quantizer: Quantizer, parameter: Parameter, setting: Setting
) -> tuple[PackedLinear, int]:
    """Quantise and write a weight once; returns where it is and how many weights were newly written."""
    key = storage_key(parameter, setting)
    rows, columns = parameter.shape
    block = block_size(parameter, setting)
    packed = PackedLinear(
        rows,
        columns,
        setting.bits,
        block,
        f"{key}|codes",
        f"{key}|scales",
        None if setting.symmetric else f"{key}|zeros",
    )
    names = [packed.codes, packed.scales] + ([packed.zero_points] if packed.zero_points else [])
    if all(name in weights for name in names):
        return packed, 0
    # Allocated once: small arrays kept between large short-lived blocks would pin the heap below them, and
    # resident memory would grow by the whole float32 tensor.
    scales = np.empty((rows, columns // block), np.float32)
    zeros = np.empty((rows, 0 if setting.symmetric else -(-(columns // block) * setting.bits // 8)), np.uint8)

    def codes() -> Iterator[NDArray[np.uint8]]:
        for start, quantized in quantizer.blocks(parameter.name):
            stop = start + len(quantized.codes)
            scales[start:stop] = _per_block(quantized.scales.numpy(), columns // block)
            if quantized.zero_points is not None:
                zeros[start:stop] = pack_bits(quantized.zero_points.numpy(), setting.bits)
            yield pack_codes(quantized, setting.bits)

    if packed.codes in weights:  # resumed between codes and scales: only the rest is missing
        for _ in codes():
            pass
    else:
        weights.write(packed.codes, np.dtype(np.uint8), codes())
    if packed.scales not in weights:
        weights.write(packed.scales, np.dtype(np.float32), [scales])
    if packed.zero_points is not None and packed.zero_points not in weights:
        weights.write(packed.zero_points, np.dtype(np.uint8), [zeros])
    return packed, rows * columns


def pack_codes(quantized: QuantizedBlock, bits: int) -> NDArray[np.uint8]:
    """Codes [r, K] as the runtime's unsigned bytes: symmetric codes get the implied zero point 2^(bits-1)."""
    codes = quantized.codes.numpy()
    if quantized.zero_points is None:
        unsigned = (codes.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
    else:
        unsigned = codes.view(np.uint8)
    return pack_bits(unsigned, bits)


def pack_bits(values: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """[r, n] -> [r, ceil(n·bits/8)], the first of two 4-bit values in the low nibble."""
    if bits == 8:
        return values
    if values.shape[1] % 2:
        values = np.pad(values, ((0, 0), (0, 1)))
    return values[:, 0::2] | (values[:, 1::2] << np.uint8(4))


def _per_block(scales: NDArray[np.float32], blocks: int) -> NDArray[np.float32]:
    """[r, G] -> [r, blocks]; G is 1 for one scale per channel, else already one per block."""
    return np.repeat(scales, blocks // scales.shape[1], axis=1) if scales.shape[1] != blocks else scales

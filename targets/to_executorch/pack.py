"""Weights as XNNPACK's named data, shared by all methods of a file.

Nothing is re-quantised: 4-bit codes become unsigned nibbles and their scales bfloat16, which holds them exactly;
8-bit codes stay as they are, with one float32 scale per row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from export.quantize.quantizer import Quantizer
from export.quantize.tensor import QuantizedBlock
from targets.to_executorch.file import Weight
from targets.to_executorch.xnnpack import Filter

SMALL = "small:"
"""Marks weights that are no parameter of the model: rows of ones, frequencies, the eps of norms."""


class WeightTable:
    """Filters by the parameter they are made of, and what it takes to write them; in the order of first use.

    Args:
        quantizer: of the export. advance: told how many weights were just written.
    """

    def __init__(self, quantizer: Quantizer, advance: Callable[[int], None]) -> None:
        self.quantizer = quantizer
        self.weights: dict[str, Weight] = {}
        self._advance = advance
        self._kept: dict[str, NDArray[np.float32]] = {}

    def linear(self, name: str) -> Filter:
        """Filter of a matrix [N, K], as the recipe stores it."""
        parameter = self.quantizer.weights.parameter(name)
        setting = self.quantizer.setting(name)
        shape = (parameter.shape[0], parameter.shape[1])
        if setting is None:
            self._add(name, {name: 4 * shape[0] * shape[1]}, lambda: self._plain(name))
            return Filter(shape, name)
        group = setting.group_size or 0
        count = shape[0] * shape[1] // group if group else shape[0]
        scales = f"{name}.scales"
        sizes = {name: shape[0] * shape[1] * setting.bits // 8, scales: count * (2 if group else 4)}
        self._add(name, sizes, lambda: self._quantised(name, scales))
        return Filter(shape, name, setting.bits, scales, group)

    def bias(self, name: str) -> Filter:
        """A bias [N] of a linear."""
        count = self.quantizer.weights.parameter(name).shape[0]
        self._add(name, {name: 4 * count}, lambda: self._plain(name))
        return Filter((count,), name)

    def taps(self, name: str) -> Filter:
        """Weight [Ch, K] of a depthwise convolution along rows, channels last: [1, K, 1, Ch]."""
        channels, width = self.quantizer.weights.parameter(name).shape

        def read() -> Iterator[tuple[str, bytes]]:
            taps = self.quantizer.weights.tensor(name)
            self._advance(taps.numel())
            yield name, np.ascontiguousarray(taps.numpy().T).tobytes()

        self._add(name, {name: 4 * channels * width}, read)
        return Filter((1, width, 1, channels), name)

    def kept(self, name: str) -> NDArray[np.float32]:
        """A small float32 parameter that goes into the program's constants."""
        if name not in self._kept:
            tensor = self.quantizer.weights.tensor(name)
            self._advance(tensor.numel())
            self._kept[name] = tensor.numpy()
        return self._kept[name]

    def small(self, title: str, array: NDArray[np.float32]) -> Filter:
        """A filter of our own making."""
        name = f"{SMALL}{title}"
        data = np.ascontiguousarray(array, np.float32).tobytes()
        self._add(name, {name: len(data)}, lambda: iter([(name, data)]))
        return Filter(array.shape, name)

    def row(self, width: int, value: float) -> Filter:
        """[1, width] of one value: a linear with it sums."""
        return self.small(f"row {width} {value!r}", np.full((1, width), value, np.float32))

    def number(self, value: float) -> Filter:
        """A bias of one number."""
        return self.small(f"number {value!r}", np.full((1,), value, np.float32))

    def sums(self, size: int) -> Filter:
        """[size, size]: a linear with it sums a row up to each entry."""
        return self.small(f"sums {size}", np.tril(np.ones((size, size), np.float32)))

    def _add(self, name: str, sizes: dict[str, int], read: Callable[[], Iterator[tuple[str, bytes]]]) -> None:
        if name not in self.weights:
            self.weights[name] = Weight(name, sizes, read)

    def _plain(self, name: str) -> Iterator[tuple[str, bytes]]:
        for _, block in self.quantizer.weights.blocks(name):
            self._advance(block.numel())
            yield name, np.ascontiguousarray(block.numpy()).tobytes()

    def _quantised(self, name: str, scales: str) -> Iterator[tuple[str, bytes]]:
        setting = self.quantizer.setting(name)
        if setting is None:
            raise ValueError(f"{name} is not quantised")
        also = table_scales(name) in self.weights[name].sizes
        for _, block in self.quantizer.blocks(name):
            self._advance(block.codes.numel())
            yield name, pack_codes(block, setting.bits).tobytes()
            yield scales, pack_scales(block, setting.bits).tobytes()
            if also:
                yield table_scales(name), block.scales.numpy().astype(np.float16).tobytes()

    def add_table_scales(self, name: str) -> None:
        """The matrix is also read as a `table` stage, which has no bfloat16: at 4 bits, its scales in float16 too."""
        setting = self.quantizer.setting(name)
        if setting is not None and setting.bits == 4:
            weight = self.weights[name]
            sizes = {**weight.sizes, table_scales(name): weight.sizes[f"{name}.scales"]}
            self.weights[name] = Weight(name, sizes, weight.read)

    def scales_of(self, name: str) -> str | None:
        """Which piece of a matrix a table's scales are; None without quantisation."""
        setting = self.quantizer.setting(name)
        if setting is None:
            return None
        return table_scales(name) if setting.bits == 4 else f"{name}.scales"


def table_scales(name: str) -> str:
    """Piece that holds the scales of a matrix once more, as float16."""
    return f"{name}.float16"


def pack_codes(block: QuantizedBlock, bits: int) -> NDArray[Any]:
    """int8 [r, K], or uint8 [r, K/2] with code + 8, the first of two in the low nibble."""
    codes = block.codes.numpy()
    if bits == 8:
        return codes
    unsigned = (codes + np.int8(8)).view(np.uint8)
    return np.asarray(unsigned[:, 0::2] | (unsigned[:, 1::2] << np.uint8(4)))


def pack_scales(block: QuantizedBlock, bits: int) -> NDArray[Any]:
    """float32 [r], or bfloat16 [r, G] as uint16; the quantiser made them exact in both."""
    if bits == 8:
        return block.scales.numpy()
    return block.scales.to(torch.bfloat16).view(torch.int16).numpy()

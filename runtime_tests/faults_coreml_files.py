"""Faults of what writes weights into a Core ML package, and the check of L2 that must fail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from export.quantize.recipe import Recipe, Setting, load_recipe
from runtime_tests.faults import Patcher, first_answer, replaced
from runtime_tests.faults_coreml import (
    GATES,
    PIECES,
    Fault,
    absent_bias,
    constants,
    fault,
    reversed_taps,
    row_early,
    transform,
    within,
)
from targets.to_coreml import lower, operators, weights
from targets.to_coreml.lowering import Lowering
from targets.to_coreml.weights import Matrix, WeightFile


def part(
    kind: str,
    change: Callable[[Any], Any],
    dtypes: tuple[str, ...] = ("int4", "uint4", "int8"),
    wanted: Callable[[Matrix], bool] = lambda matrix: True,
) -> Patcher:
    """Other values, scales, offsets or palettes of matrices whose codes are of some types; rows as numpy has them."""

    def make(right: Any) -> Any:
        def wrong(self: WeightFile, name: str, matrix: Any) -> Any:
            for region, start, data in right(self, name, matrix):
                if region is getattr(matrix, kind) and matrix.values.dtype in dtypes and wanted(matrix):
                    halves = kind in ("scales", "palettes")
                    rows = np.frombuffer(data, np.float16 if halves else np.uint8)
                    count = len(data) * 8 // region.row_bits
                    changed = change(rows.reshape(count, -1)).tobytes()
                    assert len(changed) == len(data)
                    yield region, start, changed
                else:
                    yield region, start, data

        return wrong

    return replaced(WeightFile, "_blocks", make)


def over_one_palette(matrix: Matrix) -> bool:
    """Whether the codes are indices into the palette that all matrices share; those of a tied head have offsets."""
    return matrix.values.dtype == "uint4" and matrix.scales is not None and matrix.offsets is None


def codes(change: Callable[[Any], Any]) -> Patcher:
    """Other 4-bit codes in the file."""

    def make(right: Any) -> Any:
        def wrong(block: Any, setting: Any, dtype: str) -> bytes:
            data: bytes = right(block, setting, dtype)
            return data if setting.bits == 8 else change(np.frombuffer(data, np.uint8)).tobytes()

        return wrong

    return replaced(weights, "pack_codes", make)


def one_more(packed: Any) -> Any:
    """Both codes of every byte, plus one."""
    return ((packed & 15) + 1 & 15) | ((packed >> 4) + 1 & 15) << 4


def neighbours(rows: Any) -> Any:
    return np.roll(rows, 1, axis=-1)


def other_palette(rows: Any) -> Any:
    return np.roll(rows.reshape(len(rows), -1, 16), 1, axis=1)


def in_bfloat16(rows: Any) -> Any:
    return (rows.astype(np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)


def without_offsets(right: Any) -> Any:
    """The head's codes are stored for the table, which knows that they are code + 8, and the program does not."""
    return lambda self, name, pieces, form="signed": right(self, name, pieces, "table" if form == "offset" else form)


def pieces_exchanged(right: Any) -> Any:
    """Pieces of the head read each other's rows."""
    return lambda self, name, pieces, form="signed": right(self, name, pieces, form)[::-1]


def piece_late(right: Any) -> Any:
    """Pieces of the head but the first one begin a row late."""

    def wrong(self: WeightFile, path: Path) -> None:
        self._records = [(place, region, first + bool(first), rows) for place, region, first, rows in self._records]
        right(self, path)

    return wrong


def other_constants(right: Any) -> Any:
    """The constants of one function are not those of the others."""

    def wrong(self: Lowering, node: Any, *rest: Any, **options: Any) -> Any:
        if self.program.signature == "decode":
            name = self.parameter(node)
            self.once(f"parameter {name}", lambda: self.weights.quantizer.weights.tensor(name) + 1)
        return right(self, node, *rest, **options)

    return wrong


def exchanged_places(right: Any) -> Any:
    """Two matrices of one size, each where the other belongs."""

    def wrong(path: Path, functions: Any, weights: WeightFile, *rest: Any) -> Any:
        k, v = (f"decoder_layers_1_mixer_{name}_weight" for name in "kv")
        for kind in ("codes", "scales"):
            a, b = f"{k}_{kind}", f"{v}_{kind}"
            if a in weights.places:
                weights.places[a], weights.places[b] = weights.places[b], weights.places[a]
        return right(path, functions, weights, *rest)

    return wrong


INT4 = load_recipe("int4", 32)
PALETTES: dict[str, Any] = {"palettes": True, "profile": "ane"}
ONE_PALETTE: dict[str, Any] = {"palettes": True, "profile": "gpu"}
ASYMMETRIC: dict[str, Any] = {
    "recipe": Recipe("asymmetric", {**INT4.roles, "decoder": Setting(4, 32, symmetric=False)})
}
WRONG, MISSING = "mismatches", "missing"

L2: dict[str, Fault] = {
    "nibbles exchanged": fault(codes(lambda packed: (packed << 4) | (packed >> 4)), WRONG, quick=True),
    "zero point 7 for 8": fault(part("offsets", lambda rows: rows - np.uint8(0x11)), WRONG),
    "offsets of a tied head missing": fault(replaced(WeightFile, "matrix", without_offsets), WRONG, quick=True),
    "codes one too large": fault(codes(one_more), WRONG),
    "index into a palette off by one": fault(codes(one_more), WRONG, quick=True, **PALETTES),
    "palette of the neighbour group": fault(part("palettes", other_palette), WRONG, **PALETTES),
    "palette turned round": fault(part("palettes", lambda rows: rows[:, ::-1]), WRONG, **PALETTES),
    "index into the one palette off by one": fault(
        part("values", one_more, wanted=over_one_palette), WRONG, quick=True, **ONE_PALETTE
    ),
    "scale of the neighbour group over the one palette": fault(
        part("scales", neighbours, wanted=over_one_palette), WRONG, **ONE_PALETTE
    ),
    "the one palette turned round": fault(
        constants(lambda name, array: array[..., ::-1, :] if name == "palette" else array), WRONG, **ONE_PALETTE
    ),
    "zero point of the neighbour group": fault(
        part("offsets", lambda rows: np.roll(rows, 1, axis=-1)), WRONG, **ASYMMETRIC
    ),
    "scales of another row": fault(part("scales", lambda rows: rows[::-1]), WRONG),
    "scales transposed": fault(part("scales", lambda rows: rows.T.reshape(rows.shape)), WRONG),
    "scale of the neighbour group": fault(part("scales", neighbours), WRONG, quick=True),
    "scales in bfloat16": fault(part("scales", in_bfloat16), WRONG),
    "8-bit scales of another row": fault(part("scales", lambda rows: rows[::-1], ("int8",)), WRONG),
    "embedding off by one row": fault(row_early("data_offset", 64), WRONG),
    "scales of the embedding off by one row": fault(row_early("scale_offset", 8), WRONG),
    "pieces of the head exchanged in the file": fault(
        replaced(WeightFile, "matrix", pieces_exchanged), WRONG, quick=True, **PIECES
    ),
    "a piece of the head begins a row late": fault(replaced(WeightFile, "write", piece_late), WRONG, **PIECES),
    "taps of the convolution reversed": fault(constants(reversed_taps), WRONG),
    "zero-centred norm without one": fault(transform("plus_one", "none"), WRONG),
    "positions of another image size": fault(replaced(operators, "resample_positions", first_answer), WRONG),
    "kernel of the patches transposed": fault(
        constants(lambda name, array: array.swapaxes(2, 3) if name == "vision_patch_weight" else array), WRONG
    ),
    "dt bias left out": fault(within(GATES, (Lowering, "constant", absent_bias)), MISSING),
    "norms of another model in one function": fault(replaced(Lowering, "kept", other_constants), WRONG),
    "keys and values exchanged in the file": fault(replaced(lower, "write_package", exchanged_places), WRONG),
}

"""Checks of the linter on numbers: weights as they are stored, and what a run showed of activations."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from export.spec import ExportError
from targets.to_coreml.blob import BlobTensor
from targets.to_coreml.constants import EXPAND, Weight, compressed, stored
from targets.to_coreml.lint_observe import Extremes
from targets.to_coreml.lint_view import Hit, Subject, View, references
from targets.to_coreml.program import Operation, Reference

Stored: TypeAlias = "NDArray[Any] | BlobTensor"
"""A constant as the program has it."""

LARGEST = 65504.0
"""Of float16."""
LARGE_WEIGHT, LARGE_ACTIVATION = LARGEST / 4, LARGEST / 2
BLOCK = 1 << 24
"""Elements looked at together."""
INFINITE, SMALLEST_NORMAL, MAGNITUDE = 0x7C00, 0x0400, 0x7FFF
"""Of float16's bits: infinity, 6.1e-5, everything but the sign."""
CODES = {"int4": 8.0, "uint4": 15.0, "int8": 128.0, "uint8": 255.0}
"""The largest magnitude of a code; of code minus offset, twice that at most."""
MASKING = 1e4
"""A constant number of this magnitude marks what must not be seen; see `attention.UNSEEN`."""
CARRIES_A_MASK = ("add", "mul", "select", "tile", "reshape", "transpose", "expand_dims", "concat", "cast")


def weights(subject: Subject) -> Iterator[Hit]:
    """Constants of float16, scales, and the largest that compressed weights can become; each once."""
    seen: set[Hashable] = set()
    for view in subject.views:
        plain: dict[str, Stored] = {}
        known: dict[str, Weight] = {}
        for operation in view.operations:
            if operation.type == "const":
                value = operation.inputs["val"][0]
                if isinstance(value, np.ndarray | BlobTensor):
                    name, kind = operation.outputs[0]
                    plain[name], known[name] = value, stored(value)
                    if kind.dtype == "float16" and math.prod(value.shape) > 1 and _is_new(value, seen):
                        yield from _plain(operation.name, value, view)
            elif operation.type in EXPAND:
                try:
                    weight = compressed(operation, known, view.function.name)
                except (KeyError, ValueError, ExportError) as error:
                    text = f"cannot be expanded ({error}): export the package again"
                    yield Hit("readable", operation.name, text, view.function.name)
                    continue
                known[operation.outputs[0][0]] = weight
                if "scale" in operation.inputs and (weight.key is None or weight.key not in seen):
                    seen.add(weight.key)
                    yield from _scaled(operation, weight, plain, view)


def _is_new(value: Stored, seen: set[Hashable]) -> bool:
    """Tensors of the weight file are looked at once, small ones inside the program every time."""
    if not isinstance(value, BlobTensor):
        return True
    new = value.key not in seen
    seen.add(value.key)
    return new


def _blocks(value: Stored) -> Iterator[NDArray[np.uint16]]:
    """The bits of float16 elements without their sign."""
    count = math.prod(value.shape)
    for start in range(0, count, BLOCK):
        stop = min(start + BLOCK, count)
        part = value.flat(start, stop) if isinstance(value, BlobTensor) else value.reshape(-1)[start:stop]
        yield np.ascontiguousarray(part, np.float16).view(np.uint16) & np.uint16(MAGNITUDE)


def _number(bits: int) -> float:
    return float(np.uint16(bits).view(np.float16))


def _plain(name: str, value: Stored, view: View) -> Iterator[Hit]:
    most, broken = 0, 0
    for bits in _blocks(value):
        most = max(most, int(bits.max(initial=0)))
        broken += int((bits >= INFINITE).sum())
    if broken:
        count = math.prod(value.shape)
        text = f"has {broken} of {count} elements that are infinite or not a number: repair the checkpoint"
        yield Hit("weight-finite", name, text, view.function.name)
    elif _number(most) > LARGE_WEIGHT:
        yield Hit("weight-range", name, _too_large(_number(most)), view.function.name)


def _too_large(value: float) -> str:
    return f"reaches {value:.0f}, more than a quarter of float16's {LARGEST:.0f}: rescale it with what reads it"


def _scaled(operation: Operation, weight: Weight, plain: Mapping[str, Stored], view: View) -> Iterator[Hit]:
    scale = _part(operation, "scale", plain)
    if scale is None or str(scale.dtype) != "float16":
        return
    lost, broken, most = 0, 0, 0
    for bits in _blocks(scale):
        lost += int((bits < SMALLEST_NORMAL).sum())
        broken += int((bits >= INFINITE).sum())
        most = max(most, int(bits.max(initial=0)))
    if broken:
        text = f"has {broken} of {math.prod(scale.shape)} scales that are infinite or not a number: quantise it again"
        yield Hit("weight-finite", operation.name, text, view.function.name)
        return
    if lost:
        count = math.prod(scale.shape)
        text = f"has {lost} of {count} scales below float16's normal range (6.1e-5): clamp them when quantising"
        yield Hit("scale-range", operation.name, text, view.function.name)
    if 2 * _largest_code(operation, plain, view) * _number(most) <= LARGE_WEIGHT:
        return
    largest = _largest(weight)
    if not largest <= LARGEST:
        text = "gives weights beyond float16: quantise it again, or repair the checkpoint"
        yield Hit("weight-finite", operation.name, text, view.function.name)
    elif largest > LARGE_WEIGHT:
        yield Hit("weight-range", operation.name, _too_large(largest), view.function.name)


def _part(operation: Operation, name: str, plain: Mapping[str, Stored]) -> Stored | None:
    """An input of a `constexpr_*` operation, if it is stored as it is."""
    value: Any = operation.inputs[name][0]
    found = plain.get(value.name) if isinstance(value, Reference) else value
    return found if isinstance(found, np.ndarray | BlobTensor) else None


def _largest_code(operation: Operation, plain: Mapping[str, Stored], view: View) -> float:
    """At least as large as every magnitude that the scales of an operation are multiplied with."""
    data = _part(operation, "data", plain)
    if data is not None:
        return CODES.get(str(data.dtype), LARGEST)
    maker = view.makers.get(references(operation.inputs["data"])[0])
    table = None if maker is None or "lut" not in maker.inputs else _part(maker, "lut", plain)
    if table is None or str(table.dtype) != "float16":
        return LARGEST
    return max(_number(int(bits.max(initial=0))) for bits in _blocks(table))


def _largest(weight: Weight) -> float:
    """The largest magnitude of an expanded weight; infinite or NaN if one is."""
    rows = weight.shape[0]
    step = max(1, BLOCK // max(1, math.prod(weight.shape[1:])))
    found = [float(weight.rows(start, min(start + step, rows)).float().abs().max()) for start in range(0, rows, step)]
    return float(np.max(found))


def activations(view: View, extremes: Mapping[str, Extremes]) -> Iterator[Hit]:
    """What a run showed."""
    for operation, seen, largest in reached(view, extremes):
        if seen.broken:
            text = (
                f"({operation.type}) gave {seen.broken} infinite or undefined values in a run: "
                "scale its operands down, or compute it in float32"
            )
            yield Hit("activation-finite", operation.name, text)
            continue
        if seen.half and largest > LARGE_ACTIVATION:
            text = (
                f"({operation.type}) reached {largest:.0f} in a run, more than half of float16's {LARGEST:.0f}: "
                "scale its operands down"
            )
            yield Hit("activation-range", operation.name, text)


def reached(view: View, extremes: Mapping[str, Extremes]) -> Iterator[tuple[Operation, Extremes, float]]:
    """Each operation that was seen, with the largest magnitude of what it gave and was finite. Where a mask is carried,
    large negative values are meant and do not count.
    """
    masked = _masked(view)
    for operation in view.running:
        seen = extremes.get(operation.name)
        if seen is not None:
            yield operation, seen, seen.highest if operation.name in masked else max(seen.highest, -seen.lowest)


def _masked(view: View) -> set[str]:
    """Operations whose results hold a mask: a large negative number, and what is made of it before a softmax."""
    values: set[str] = set()
    operations: set[str] = set()
    for operation in view.operations:
        if operation.type == "const":
            value = operation.inputs["val"][0]
            if not isinstance(value, np.ndarray) or value.size != 1 or value.dtype.kind != "f":
                continue
            if value.item() <= -MASKING:
                values.add(operation.outputs[0][0])
        elif operation.type in CARRIES_A_MASK and any(
            name in values for given in operation.inputs.values() for name in references(given)
        ):
            values.update(name for name, _ in operation.outputs)
            operations.add(operation.name)
    return operations


CHECKS = (weights,)

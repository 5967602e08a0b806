"""A saved program read as if float16 were float32: what is left of its distance to PyTorch is no rounding.

Weights keep the values they have in the package. Everything else, constants included, is computed and kept in
float32. It tells a wrong lowering, which is off by much, from storage in float16, which is off by a thousandth at
every step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from targets.to_coreml.program import Function, Operation, Package, TensorType

NAMES = {"fp16": "fp32"}
"""Parameter of `cast`."""


class ExactPackage(Package):
    """A package whose functions have no float16."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.functions = {name: _ExactFunction(function) for name, function in self.functions.items()}


class _ExactFunction(Function):
    def __init__(self, function: Function) -> None:
        self.name, self.opset = function.name, function.opset
        self.inputs = {name: _wide(kind) for name, kind in function.inputs.items()}
        self.states = {name: _wide(kind) for name, kind in function.states.items()}
        self.operations = [_operation(operation) for operation in function.operations]
        self.outputs = {name: _wide(kind) for name, kind in function.outputs.items()}


def _wide(kind: TensorType) -> TensorType:
    return TensorType(kind.shape, "float32") if kind.dtype == "float16" else kind


def _operation(operation: Operation) -> Operation:
    # The parts of a compressed constant say how to expand it; only what comes out is wider. A constant in a file is
    # widened when it is read, once for all functions: its type says so.
    packed = operation.type.startswith("constexpr_")
    inputs = operation.inputs if packed else {k: tuple(map(_value, v)) for k, v in operation.inputs.items()}
    outputs = tuple((name, _wide(kind)) for name, kind in operation.outputs)
    return Operation(operation.name, operation.type, inputs, outputs)


def _value(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.dtype == np.float16:
        return value.astype(np.float32)
    return NAMES.get(value, value) if isinstance(value, str) else value

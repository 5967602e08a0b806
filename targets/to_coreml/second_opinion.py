"""A second opinion on saved packages: their programs, translated to ONNX and run by onnxruntime.

For small models. It reads the package as the interpreter does and shares nothing else with it: where both agree, what
a program means does not rest on one reading of Core ML's operations. Neither is a device.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from export.spec import ExportError
from targets.base import Arrays
from targets.contract import CallError
from targets.to_coreml.blob import DTYPES, BlobTensor
from targets.to_coreml.program import Function, Operation, Package, Reference, TensorType
from targets.to_coreml.second_opinion_graph import EXPAND, TYPES, Call, Untranslatable, Values
from targets.to_coreml.second_opinion_operators import COMPUTED, MOVED

AFTER = "/after"
"""Ends the name of the output that holds a state after the call."""


def translate(package: Package, function: str) -> onnx.ModelProto:
    """A function of a saved program as an ONNX model.

    Inputs and outputs keep names, shapes and dtypes. A state `s` is an input `s` and an output `s/after`.

    Raises:
        BundleError: no such function, or a damaged one. Untranslatable: an operation, or a parameter of one, that is
        not in the table; or more constants than an ONNX file holds.
    """
    found = package.function(function)
    values = Values(function, types={**found.inputs, **found.states})
    values.tensors = {name: name for name in found.inputs}
    states = {name: name for name in found.states}
    for operation in found.operations:
        values.types |= dict(operation.outputs)
        if operation.type == "read_state":
            values.tensors[operation.outputs[0][0]] = states[_state(operation, found)]
        elif operation.type == "write_state":
            call = Call(operation, values)
            states[_state(operation, found)] = call.tensor("data")
        else:
            _add(operation, values)
    outputs = dict(found.outputs)
    for name in found.outputs:
        if name not in values.tensors:
            raise Untranslatable(f"{function} returns {name!r}, a constant; known are outputs that are computed")
        values.graph.rename(values.tensors[name], name)
    for name, source in states.items():
        values.graph.rename(source, name + AFTER)
        outputs[name + AFTER] = found.states[name]
    return values.graph.model({**found.inputs, **found.states}, outputs)


def _state(operation: Operation, function: Function) -> str:
    (argument,) = operation.inputs["input"]
    if not isinstance(argument, Reference) or argument.name not in function.states:
        raise Untranslatable(f"{operation.name} ({operation.type}) of {function.name} names no state")
    return argument.name


def _add(operation: Operation, values: Values) -> None:
    """A constant or an operation."""
    (name, kind), *_ = operation.outputs
    call = Call(operation, values)
    if operation.type == "const":
        (value,) = operation.inputs["val"]
        if isinstance(value, BlobTensor):
            value = value.array().astype(DTYPES[kind.dtype])  # `exact` declares float32 for float16 of the file
        if not isinstance(value, Reference):
            values.constants[name] = value
    elif operation.type in EXPAND:
        # Rounded once, to what the program declares.
        values.constants[name] = EXPAND[operation.type](call).astype(DTYPES[kind.dtype])
        call.finish()
    elif operation.type in COMPUTED or operation.type in MOVED:
        results = (COMPUTED | MOVED)[operation.type](call)
        call.finish()
        named = [results] if isinstance(results, str) else results
        if operation.type in COMPUTED and kind.dtype == "float16":
            named = [call.node("Cast", one, to=TYPES["float16"]) for one in named]
        values.tensors |= dict(zip((output for output, _ in operation.outputs), named, strict=True))
    else:
        known = ", ".join(sorted(EXPAND.keys() | COMPUTED.keys() | MOVED.keys()))
        raise call.refuse(f"the second opinion does not know this operation; it knows {known}")


class Opinion:
    """Runs functions of one package by onnxruntime."""

    def __init__(self, package: Package) -> None:
        self._package = package
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}

    def new_states(self) -> Arrays:
        """Zeros for every state of the package."""
        functions = self._package.functions.values()
        declared = {name: kind for function in functions for name, kind in function.states.items()}
        return {name: np.zeros(kind.shape, DTYPES[kind.dtype]) for name, kind in declared.items()}

    def run(self, function: str, inputs: Mapping[str, NDArray[Any]], states: Arrays) -> Arrays:
        """Call a function.

        Args:
            inputs: exactly those that the function declares. states: those of the function at least; the call
                replaces them.

        Returns:
            Outputs by name, in the dtypes that the function declares.

        Raises:
            CallError: an input or state is missing, unknown, or of another shape or dtype.
            ExportError: onnxruntime refuses the program, or fails on these values.
        """
        declared = self._package.function(function)
        kept = {name: states[name] for name in declared.states if name in states}
        given = {**inputs, **kept}
        _check(function, {**declared.inputs, **declared.states}, given)
        try:
            results = self._session(function).run(None, given)
        except _failures() as error:
            raise ExportError(f"onnxruntime cannot run {function}: {error}") from error
        for array, (name, kind) in zip(results, [*declared.outputs.items(), *declared.states.items()], strict=True):
            if array.shape != kind.shape:  # slices beyond an end give what is there
                raise ExportError(f"{function} gives {name!r} as {list(array.shape)}; the program declares {kind}")
        count = len(declared.outputs)
        states |= dict(zip(declared.states, results[count:], strict=True))
        return dict(zip(declared.outputs, results[:count], strict=True))

    def _session(self, function: str) -> onnxruntime.InferenceSession:
        if function not in self._sessions:
            model = translate(self._package, function)
            self._sessions[function] = onnxruntime.InferenceSession(
                model.SerializeToString(), session_options()
            )
        return self._sessions[function]


def session_options() -> onnxruntime.SessionOptions:
    """Nothing rewritten, one thread, errors only."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    return options


def _failures() -> tuple[type[Exception], ...]:
    """What onnxruntime raises: classes without a common base of their own."""
    state = onnxruntime.capi.onnxruntime_pybind11_state
    return state.Fail, state.InvalidArgument, state.InvalidGraph, state.NotImplemented, state.RuntimeException


def _check(function: str, declared: Mapping[str, TensorType], given: Mapping[str, NDArray[Any]]) -> None:
    for name in sorted(declared.keys() | given.keys()):
        if name not in declared or name not in given:
            raise CallError(f"{function} takes {sorted(declared)}; got {sorted(given)}")
        kind, array = declared[name], given[name]
        if array.shape != kind.shape or str(array.dtype) != kind.dtype:
            raise CallError(
                f"{function} input {name!r} is {array.dtype} {list(array.shape)}; it declares {kind}"
            )

"""An emulated Core ML backend: runs the functions of a saved package on the CPU, with Core ML's storage semantics.

Every float16 result is rounded to float16, whatever lies beyond its range is infinite, states keep what was written.
Arithmetic inside one operation is float32. What a device does inside an operation (the Neural Engine sums in float16)
is not modelled: results are emulated, never a device's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.bundle.manifest import BundleError
from targets.contract import CallError
from targets.to_coreml import WEIGHT_BYTES
from targets.to_coreml.compile import FAILURES, Compiled, Slots, check_results, compile_function, failed
from targets.to_coreml.constants import TORCH, Budget, Constants, as_tensor
from targets.to_coreml.program import Package, TensorType

Observer = Callable[[str, str, Tensor], None]
"""Is given the name and type of an operation and its result; for each result if there are several."""


def _ignore(name: str, kind: str, value: Tensor) -> None:
    """Sees nothing."""


class Interpreter:
    """Runs functions of one package; weights are expanded once for all of them."""

    def __init__(
        self,
        package: Package,
        accumulate: Literal["float32", "float16"] = "float32",
        observe: Observer | None = None,
        budget: Budget | None = None,
    ) -> None:
        """Nothing is compiled or read before the first run.

        Args:
            accumulate: "float16" is the stress mode: sums are rounded to float16 as they grow, and so is every step
                inside norms and attention (see `kernels_sums`).
            observe: sees the result of every operation that runs: not of constants, and not of states that are read.
            budget: of the memory for weights, shared with other packages; `WEIGHT_BYTES` for this one by default.
        """
        self._package = package
        self._half_sums = accumulate == "float16"
        self._observe = observe
        self._constants = Constants(budget or Budget(WEIGHT_BYTES))
        self._compiled: dict[str, Compiled] = {}
        self._checked: set[str] = set()

    def load(self, functions: Iterable[str] | None = None) -> None:
        """Compile functions, which reads their weights; all of them by default.

        Raises:
            BundleError: no such function, or one that cannot be read. UnsupportedOperation: one that cannot be run.
        """
        for name in self._package.functions if functions is None else functions:
            self._function(name)

    def _function(self, name: str) -> Compiled:
        if name not in self._compiled:
            function = self._package.function(name)
            with torch.no_grad():
                self._compiled[name] = compile_function(function, self._constants, self._half_sums)
        return self._compiled[name]

    def new_states(self, functions: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Zeros for every state of some functions; of all by default.

        Raises:
            BundleError: two functions declare one state differently.
        """
        declared: dict[str, TensorType] = {}
        for function in self._package.functions if functions is None else functions:
            for name, kind in self._package.function(function).states.items():
                if declared.setdefault(name, kind) != kind:
                    raise BundleError(
                        f"state {name!r} is {kind} in {function}, {declared[name]} elsewhere; export the package again"
                    )
        return {name: torch.zeros(kind.shape, dtype=TORCH[kind.dtype]) for name, kind in declared.items()}

    def run(
        self, function: str, inputs: Mapping[str, NDArray[Any]], states: dict[str, Tensor]
    ) -> dict[str, NDArray[Any]]:
        """Call a function.

        Args:
            inputs: exactly those that the function declares. They are not written to.
            states: those of the function at least. They belong to the interpreter: the call replaces or overwrites
                tensors, so that whoever wants to keep a state clones it. After an error they are undefined.

        Returns:
            Outputs in the dtypes that the function declares, in memory of their own.

        Raises:
            CallError: an input or state is missing, unknown, or of another shape or dtype.
            ExportError: an operation fails on these values, or gives what the program does not declare.
        """
        compiled = self._function(function)
        declared = self._package.function(function)
        slots = compiled.slots.copy()
        self._check_names(function, declared.inputs, inputs)
        for name, slot in compiled.inputs.items():
            slots[slot] = _input(function, name, declared.inputs[name], inputs[name])
        for name, (slot, _) in compiled.states.items():
            slots[slot] = _state(function, name, declared.states[name], states)
        with torch.no_grad():
            self._steps(function, compiled, slots)
        for name, (_, slot) in compiled.states.items():
            value: Tensor = slots[slot]
            states[name] = value.clone() if name in compiled.copied_states else value.contiguous()
        outputs = {}
        for name, slot in compiled.outputs.items():
            array = slots[slot].numpy()
            array = array.astype(np.uint16) if declared.outputs[name].dtype == "uint16" else array
            fresh = name not in compiled.copied_outputs and array.flags.c_contiguous
            outputs[name] = array if fresh else array.copy()
        return outputs

    def _steps(self, function: str, compiled: Compiled, slots: Slots) -> None:
        """The first run of a function is checked step by step, as shapes do not change later."""
        observe = self._observe or (None if function in self._checked else _ignore)
        try:
            for step in compiled.steps:
                step.apply(slots)
                if observe is not None:
                    values = [slots[slot] for slot in step.results]
                    check_results(step.operation, values, function)
                    for value in values:
                        observe(step.operation.name, step.operation.type, value)
                for slot in step.dead:
                    slots[slot] = None
        except FAILURES as error:
            raise failed(step.operation, function, error) from error
        self._checked.add(function)

    @staticmethod
    def _check_names(function: str, declared: Mapping[str, TensorType], inputs: Mapping[str, NDArray[Any]]) -> None:
        for name in declared:
            if name not in inputs:
                raise CallError(f"{function} needs input {name!r}; got {sorted(inputs)}")
        for name in inputs:
            if name not in declared:
                raise CallError(f"{function} has no input {name!r}; it has {sorted(declared)}")


def _input(function: str, name: str, kind: TensorType, array: NDArray[Any]) -> Tensor:
    if array.shape != kind.shape or str(array.dtype) != kind.dtype:
        raise CallError(f"{function} input {name!r} is {array.dtype} {list(array.shape)}; the program declares {kind}")
    # torch reads arrays in place, but not with steps backwards, and warns where it may not write.
    return as_tensor(array if array.flags.c_contiguous and array.flags.writeable else array.copy())


def _state(function: str, name: str, kind: TensorType, states: Mapping[str, Tensor]) -> Tensor:
    if name not in states:
        raise CallError(f"{function} needs state {name!r}; got {sorted(states)}: begin with new_states()")
    found = states[name]
    if found.shape != kind.shape or found.dtype != TORCH[kind.dtype]:
        raise CallError(
            f"{function} state {name!r} is {str(found.dtype).removeprefix('torch.')} {list(found.shape)}; "
            f"the program declares {kind}"
        )
    return found

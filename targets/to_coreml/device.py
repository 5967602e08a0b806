"""A package on Core ML itself, on a Mac: implements `session.Backend` by means of coremltools.

Its Python bridge takes arrays as float32 or int32, in order and writable: float16 is widened on the way in, exactly,
and what comes out is given the dtype that the function declares.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.spec import ExportError
from targets.base import Arrays
from targets.contract import CallError
from targets.quiet import quiet_imports
from targets.to_coreml.program import Package, TensorType

UNITS = {
    "all": "ALL", "cpuOnly": "CPU_ONLY", "cpuAndGPU": "CPU_AND_GPU", "cpuAndNeuralEngine": "CPU_AND_NE",
}  # fmt: skip
"""Swift's name of `MLComputeUnits`, as manifests have it → coremltools' name."""
UNLOADED = "You will not be able to run predict"
"""How coremltools' warning begins that Core ML refused a model; it raises nothing before the first prediction."""


class Device:
    """One package, loaded function by function; all of them share one MLState."""

    def __init__(self, path: Path, compute_units: str) -> None:
        """Core ML is not asked for anything before the first `load` or `run`.

        Args:
            path: the .mlpackage. compute_units: one of `UNITS`.

        Raises:
            ExportError: unknown compute units. BundleError: no package, or a damaged one.
        """
        if compute_units not in UNITS:
            raise ExportError(f"Core ML has no compute units {compute_units!r}; choose one of: {', '.join(UNITS)}")
        self._package = Package(path)
        self._units = compute_units
        self._models: dict[str, Any] = {}
        self._state: Any = None
        """The MLState; made when it is first needed."""
        self._kept = {
            name: kind for function in self._package.functions.values() for name, kind in function.states.items()
        }

    def load(self, function: str) -> None:
        """Compile a function for the compute units.

        Raises:
            BundleError: no such function. ExportError: Core ML cannot load it, or coremltools is not there.
        """
        self._model(function)

    def run(self, function: str, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """Call a function; its states are updated.

        Returns:
            Outputs by name, in the dtypes that the function declares.

        Raises:
            CallError: an input is missing, unknown, or of another shape or dtype. ExportError: Core ML fails.
        """
        declared = self._package.function(function)
        _check(function, declared.inputs, inputs)
        model = self._model(function)
        given = {name: _passed(array) for name, array in inputs.items()}
        try:
            results = model.predict(given, state=self._live()) if declared.states else model.predict(given)
        except Exception as error:  # the bridge raises bare exceptions
            raise ExportError(f"Core ML fails in {function} of {self._package.path.name}: {error}") from error
        return {name: _returned(results[name], kind) for name, kind in declared.outputs.items()}

    def states(self) -> Arrays:
        """A copy of every state, in its declared dtype."""
        return {name: _returned(self._live().read_state(name), kind) for name, kind in self._kept.items()}

    def restore(self, states: Arrays | None) -> None:
        """Set every state; None: to zeros, as a new MLState has them.

        Raises:
            CallError: a state is missing, unknown, or of another shape or dtype.
        """
        if states is None:
            self._state = None
            return
        _check("restore", self._kept, states)
        for name, array in states.items():
            self._live().write_state(name, _passed(array))

    def _live(self) -> Any:
        """The MLState. Functions of a package declare the same states, so that one function's serves all."""
        if self._state is None:
            owners = [name for name, function in self._package.functions.items() if function.states]
            loaded = [name for name in owners if name in self._models]
            self._state = self._model((loaded or owners)[0]).make_state()
        return self._state

    def _model(self, function: str) -> Any:
        if function not in self._models:
            self._package.function(function)  # says what there is, where it is unknown
            with quiet_imports():
                import coremltools as ct
            units = getattr(ct.ComputeUnit, UNITS[self._units])
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("error", UNLOADED)
                    self._models[function] = ct.models.MLModel(
                        str(self._package.path), function_name=function, compute_units=units
                    )
            except (RuntimeWarning, RuntimeError, ValueError) as error:
                raise ExportError(
                    f"Core ML cannot load {function} of {self._package.path.name} for {self._units}: {error}"
                ) from error
        return self._models[function]


def _check(what: str, declared: Mapping[str, TensorType], given: Mapping[str, NDArray[Any]]) -> None:
    if declared.keys() != given.keys():
        raise CallError(f"{what} takes {sorted(declared)}; got {sorted(given)}")
    for name, kind in declared.items():
        array = given[name]
        if array.shape != kind.shape or str(array.dtype) != kind.dtype:
            raise CallError(f"{what} {name!r} is {array.dtype} {list(array.shape)}; the program declares {kind}")


def _passed(array: NDArray[Any]) -> NDArray[Any]:
    """A copy that the bridge takes: it knows no float16 and reads memory in order."""
    return np.array(array, np.float32 if array.dtype == np.float16 else array.dtype, order="C")


def _returned(value: Any, kind: TensorType) -> NDArray[Any]:
    """A copy in the declared dtype: the bridge gives float16 as float32."""
    return np.array(value, kind.dtype, order="C")

"""A bundle on Core ML, driven by its manifest alone.

On a Mac the packages run on Core ML itself. Everywhere else the saved packages run on the interpreter: an emulation,
whose numbers are never a device's.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from targets.base import Arrays
from targets.contract import CallError, check_call
from targets.table import Table
from targets.to_coreml import WEIGHT_BYTES
from targets.to_coreml.constants import Budget
from targets.to_coreml.exact import ExactPackage
from targets.to_coreml.interpreter import Interpreter
from targets.to_coreml.program import Package


class Backend(Protocol):
    """One package, loaded, with the states that the runtime keeps for it."""

    def load(self, function: str) -> None: ...

    def run(self, function: str, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """Outputs by name; states are updated."""
        ...

    def states(self) -> Arrays:
        """A copy of every state."""
        ...

    def restore(self, states: Arrays | None) -> None:
        """Set every state; None: to zeros."""
        ...


class Emulated:
    """A package on the interpreter.

    Args:
        budget: of the memory for weights. exact: with float32 in place of float16; see `exact`.
        options: of `Interpreter`.
    """

    def __init__(self, path: Path, budget: Budget, exact: bool = False, **options: Any) -> None:
        package = ExactPackage(path) if exact else Package(path)
        self._exact = exact
        self._interpreter = Interpreter(package, budget=budget, **options)
        self._states = self._interpreter.new_states()

    def load(self, function: str) -> None:
        self._interpreter.load([function])

    def run(self, function: str, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        if self._exact:
            half = [name for name, array in inputs.items() if array.dtype == np.float16]
            inputs = {**inputs, **{name: inputs[name].astype(np.float32) for name in half}}
        return self._interpreter.run(function, inputs, self._states)

    def states(self) -> Arrays:
        return {name: tensor.numpy().copy() for name, tensor in self._states.items()}

    def restore(self, states: Arrays | None) -> None:
        if states is None:
            self._states = self._interpreter.new_states()
        else:
            self._states = {name: torch.from_numpy(array.copy()) for name, array in states.items()}


class CoreMLSession:
    """Implements `targets.base.Session` for packages of ML programs.

    Args:
        options: of `Emulated`: an exact run, the stress mode, an observer. With any, a Mac emulates too.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any], threads: int, **options: Any) -> None:
        self._folder = folder
        self._manifest = manifest
        self._options = options
        self._budget = Budget(WEIGHT_BYTES)
        self.load_seconds = 0.0
        self._before = torch.get_num_threads()
        torch.set_num_threads(threads)
        self._backends: dict[str, Backend] = {}
        self._tables: dict[str, Table] = {}
        self._explicit: dict[str, NDArray[Any]] = {}
        self._saved: dict[str, Arrays] | None = None
        """States of packages that are not loaded yet, after `restore`."""
        self._failed = False
        self._kept = {state["name"]: state for state in manifest["states"]}
        self.reset()

    def load(self, signatures: Iterable[str]) -> None:
        for signature in signatures:
            for stage in self._manifest["signatures"][signature]["stages"]:
                if stage["kind"] == "graph":
                    begin = time.perf_counter()
                    self._backend(stage["file"]).load(stage["entry"])
                    self.load_seconds += time.perf_counter() - begin

    def _backend(self, file: str) -> Backend:
        if file not in self._backends:
            path = self._folder / file
            if sys.platform == "darwin" and not self._options:
                from targets.to_coreml.device import Device

                units = self._manifest["session_options"]["computeUnits"]
                self._backends[file] = Device(path, units)
            else:
                self._backends[file] = Emulated(path, self._budget, **self._options)
            if self._saved is not None and file in self._saved:
                self._backends[file].restore(self._saved[file])
        return self._backends[file]

    def run(self, signature: str, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        entry = check_call(self._manifest, signature, inputs)
        if "start" in inputs:
            self._require_states()
        self.load([signature])  # all of it, because after a stage has run its states are new
        values: dict[str, NDArray[Any]] = dict(inputs)
        try:
            self._run_stages(signature, entry, values)
        except BaseException:
            if "start" in inputs:
                self._failed = True  # states of earlier stages are new, the others old
            raise
        return {tensor["name"]: values[tensor["name"]] for tensor in entry["outputs"]}

    def _run_stages(self, signature: str, entry: Mapping[str, Any], values: dict[str, NDArray[Any]]) -> None:
        """Add the outputs of every stage to the values, which have the inputs."""
        dtypes = {tensor["name"]: tensor["dtype"] for tensor in entry["outputs"]}
        for stage in entry["stages"]:
            if stage["kind"] == "table":
                if signature not in self._tables:
                    self._tables[signature] = Table(self._folder, stage)
                table = self._tables[signature]
                ((source, _),) = stage["inputs"].items()
                ((result, _),) = stage["outputs"].items()
                values[result] = table.of(values[source]).astype(dtypes[result])
            else:
                self._run_graph(stage, values)

    def _run_graph(self, stage: Mapping[str, Any], values: dict[str, NDArray[Any]]) -> None:
        given = {runtime: values[name] for name, runtime in stage["inputs"].items()}
        explicit = {name: how for name, how in stage.get("states", {}).items() if how != "internal"}
        given |= {how["input"]: self._explicit[name] for name, how in explicit.items()}
        results = self._backend(stage["file"]).run(stage["entry"], given)
        for name, runtime in stage["outputs"].items():
            values[name] = results[runtime]
        self._explicit |= {name: results[how["output"]] for name, how in explicit.items()}

    def _require_states(self) -> None:
        if self._failed:
            raise CallError("an earlier call failed and left no states; reset the session, or restore a snapshot")

    def reset(self) -> None:
        self._saved, self._failed = None, False
        for backend in self._backends.values():
            backend.restore(None)
        self._explicit = {
            name: np.zeros(state["shape"], state["dtype"])
            for name, state in self._kept.items()
            if state["dtype"] == "float32"
        }

    def snapshot(self) -> tuple[dict[str, Arrays], Arrays]:
        self._require_states()
        states = {file: backend.states() for file, backend in self._backends.items()}
        return states, {name: array.copy() for name, array in self._explicit.items()}

    def restore(self, snapshot: tuple[dict[str, Arrays], Arrays]) -> None:
        (self._saved, explicit), self._failed = snapshot, False
        for file, backend in self._backends.items():
            backend.restore(self._saved.get(file))
        self._explicit = {name: array.copy() for name, array in explicit.items()}

    def states(self) -> Arrays:
        """One array per layer, in the shapes of `export.model.state`, whatever layout the packages have."""
        found: Arrays = {}
        arrays = {name: array for backend in self._backends.values() for name, array in backend.states().items()}
        for name, state in self._kept.items():
            array = arrays.get(name, self._explicit.get(name))
            if array is None:  # its package is not loaded yet
                array = np.zeros(state["shape"], state["dtype"])
            layers = state["layer"] if isinstance(state["layer"], list) else [state["layer"]]
            for index, layer in enumerate(layers):
                found[f"{state['kind']}_{layer}"] = self._plain(state["kind"], array[index])
        return found

    def _plain(self, kind: str, array: NDArray[Any]) -> NDArray[Any]:
        """One layer's state without a batch: inputs of a convolution as [Ch, K-1], the last ones of its history."""
        if kind != "conv":
            return array
        return array[:, 0] if self._manifest["target"]["profile"] == "ane" else array.T

    def runner_logits(self, ids: Sequence[int]) -> NDArray[Any] | None:
        return None

    def close(self) -> None:
        self._backends.clear()
        torch.set_num_threads(self._before)

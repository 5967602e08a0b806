"""A bundle on onnxruntime, driven by its manifest alone.

States are numpy buffers bound to the runtime without copies. One buffer serves as past and present where
the manifest says `in_place`; the others keep two and swap after each call.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from export.spec import ExportError
from targets.base import Arrays


class CallError(ExportError):
    """A signature was called against its contract."""


@dataclass
class _Buffers:
    """One state: the current buffer first; the second is the same one when updated in place."""

    arrays: list[NDArray[Any]]
    values: list[Any]


class OnnxSession:
    """Implements `targets.base.Session` for onnxruntime on the CPU."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any], threads: int) -> None:
        self._folder = folder
        self._manifest = manifest
        self._threads = threads
        self._sessions: dict[str, ort.InferenceSession] = {}
        self._buffers: dict[str, _Buffers] = {}
        self._turn = 0
        self.load_seconds = 0.0
        in_place = self._in_place()
        for state in manifest["states"]:
            count = 1 if in_place.get(state["name"], False) else 2
            arrays = [np.zeros(state["shape"], state["dtype"]) for _ in range(count)] * (3 - count)
            values = [ort.OrtValue.ortvalue_from_numpy(array) for array in arrays]
            self._buffers[state["name"]] = _Buffers(arrays, values)
        self._bindings: dict[tuple[str, int], Any] = {}
        self._inputs: dict[str, dict[str, NDArray[Any]]] = {}
        self._outputs: dict[str, dict[str, NDArray[Any]]] = {}

    def _in_place(self) -> dict[str, bool]:
        return {
            name: bool(binding.get("in_place", False))
            for signature in self._manifest["signatures"].values()
            for stage in signature["stages"]
            for name, binding in stage.get("states", {}).items()
        }

    def _open(self, file: str) -> ort.InferenceSession:
        if file not in self._sessions:
            options = ort.SessionOptions()
            options.intra_op_num_threads = self._threads
            options.inter_op_num_threads = 1
            options.log_severity_level = 3
            options.enable_mem_pattern = False
            begin = time.perf_counter()
            try:
                self._sessions[file] = ort.InferenceSession(
                    str(self._folder / file), options, providers=["CPUExecutionProvider"]
                )
            except Exception as error:
                raise ExportError(
                    f"onnxruntime {ort.__version__} cannot load {file}: {str(error).splitlines()[0]}; "
                    f"the bundle needs onnxruntime >= {self._manifest['target']['min_version']}"
                ) from error
            self.load_seconds += time.perf_counter() - begin
        return self._sessions[file]

    def run(self, signature: str, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        entry = self._manifest["signatures"].get(signature)
        if entry is None:
            known = ", ".join(sorted(self._manifest["signatures"]))
            raise CallError(f"the bundle has no signature {signature!r}; it has {known}")
        self._check(signature, entry, inputs)
        stage = entry["stages"][0]
        if not stage.get("states"):
            session = self._open(stage["file"])
            names = stage["outputs"]
            feed = {runtime: inputs[contract] for contract, runtime in stage["inputs"].items()}
            return dict(zip(names, session.run(list(names.values()), feed), strict=True))
        session = self._open(stage["file"])
        binding = self._bind(signature, entry, stage, session)
        for name, array in self._inputs[signature].items():
            array[...] = inputs[name]
        session.run_with_iobinding(binding)
        self._turn ^= 1
        return {name: array.copy() for name, array in self._outputs[signature].items()}

    def _bind(
        self, signature: str, entry: Mapping[str, Any], stage: Mapping[str, Any], session: ort.InferenceSession
    ) -> Any:
        """The binding of a signature for the present turn; made on first use, then reused."""
        key = (signature, self._turn)
        if key in self._bindings:
            return self._bindings[key]
        if signature not in self._inputs:
            self._inputs[signature] = {t["name"]: np.zeros(t["shape"], t["dtype"]) for t in entry["inputs"]}
            self._outputs[signature] = {t["name"]: np.zeros(t["shape"], t["dtype"]) for t in entry["outputs"]}
        binding = session.io_binding()
        for name, runtime in stage["inputs"].items():
            binding.bind_ortvalue_input(
                runtime, ort.OrtValue.ortvalue_from_numpy(self._inputs[signature][name])
            )
        for name, runtime in stage["outputs"].items():
            binding.bind_ortvalue_output(
                runtime, ort.OrtValue.ortvalue_from_numpy(self._outputs[signature][name])
            )
        for name, names in stage["states"].items():
            values = self._buffers[name].values
            binding.bind_ortvalue_input(names["input"], values[self._turn])
            binding.bind_ortvalue_output(names["output"], values[1 - self._turn])
        self._bindings[key] = binding
        return binding

    def _check(self, signature: str, entry: Mapping[str, Any], inputs: Mapping[str, NDArray[Any]]) -> None:
        for tensor in entry["inputs"]:
            array = inputs.get(tensor["name"])
            if array is None:
                raise CallError(f"{signature} needs input {tensor['name']!r}; got {sorted(inputs)}")
            fits = len(array.shape) == len(tensor["shape"]) and all(
                isinstance(want, str) or want == got for want, got in zip(tensor["shape"], array.shape, strict=True)
            )
            if not fits or str(array.dtype) != tensor["dtype"]:
                raise CallError(
                    f"{signature} input {tensor['name']!r} is {array.dtype} {list(array.shape)}; "
                    f"the manifest declares {tensor['dtype']} {tensor['shape']}"
                )
        if "start" in inputs:
            start = int(inputs["start"][0])
            valid = int(inputs["valid"][0]) if "valid" in inputs else 1
            context = self._manifest["context_length"]
            rows = entry["inputs"][0]["shape"][1]
            if not 1 <= valid <= rows or start < 0 or start + valid > context:
                raise CallError(
                    f"{signature} at start {start} with valid {valid}: valid must be 1 to {rows} and "
                    f"start + valid at most the context_length {context}; start a new conversation"
                )

    def reset(self) -> None:
        for buffers in self._buffers.values():
            for array in buffers.arrays:
                array[...] = 0

    def snapshot(self) -> Arrays:
        return {name: array.copy() for name, array in self.states().items()}

    def restore(self, snapshot: Arrays) -> None:
        for name, array in self.states().items():
            array[...] = snapshot[name]

    def states(self) -> Arrays:
        return {name: buffers.arrays[self._turn] for name, buffers in self._buffers.items()}

    def close(self) -> None:
        self._bindings.clear()
        self._sessions.clear()

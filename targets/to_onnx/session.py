"""A bundle on onnxruntime, driven by its manifest alone.

States are numpy buffers bound to the runtime without copies: one buffer serves as past and present, as the
manifest allows with `in_place`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from export.spec import ExportError
from targets.base import Arrays
from targets.contract import check_call


class OnnxSession:
    """Implements `targets.base.Session` for onnxruntime on the CPU."""

    def __init__(
        self, folder: Path, manifest: Mapping[str, Any], threads: int, trace: Path | None = None
    ) -> None:
        self._folder = folder
        self._trace = trace
        self._manifest = manifest
        self._threads = threads
        self._sessions: dict[str, ort.InferenceSession] = {}
        self._states = {state["name"]: np.zeros(state["shape"], state["dtype"]) for state in manifest["states"]}
        self._bindings: dict[str, Any] = {}
        self._inputs: dict[str, dict[str, NDArray[Any]]] = {}
        self.load_seconds = 0.0

    def _open(self, file: str) -> ort.InferenceSession:
        if file not in self._sessions:
            options = ort.SessionOptions()
            options.intra_op_num_threads = self._threads
            options.inter_op_num_threads = 1
            options.log_severity_level = 3
            options.enable_mem_pattern = False
            if self._trace is not None:
                options.enable_profiling = True
                options.profile_file_prefix = str(self._trace / Path(file).stem)
            for key, value in self._manifest.get("session_options", {}).items():
                options.add_session_config_entry(key, value)
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

    def load(self, signatures: Iterable[str]) -> None:
        for signature in signatures:
            for stage in self._manifest["signatures"][signature]["stages"]:
                self._open(stage["file"])

    def run(self, signature: str, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        entry = check_call(self._manifest, signature, inputs)
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
        # New arrays for every call: the runtime writes into them, and the caller may keep them, without a copy.
        outputs = {t["name"]: np.empty(t["shape"], t["dtype"]) for t in entry["outputs"]}
        for name, runtime in stage["outputs"].items():
            binding.bind_ortvalue_output(runtime, ort.OrtValue.ortvalue_from_numpy(outputs[name]))
        session.run_with_iobinding(binding)
        return outputs

    def _bind(
        self, signature: str, entry: Mapping[str, Any], stage: Mapping[str, Any], session: ort.InferenceSession
    ) -> Any:
        """Inputs and states of a signature; bound on first use, then reused."""
        if signature in self._bindings:
            return self._bindings[signature]
        self._inputs[signature] = {t["name"]: np.zeros(t["shape"], t["dtype"]) for t in entry["inputs"]}
        binding = session.io_binding()
        for name, runtime in stage["inputs"].items():
            binding.bind_ortvalue_input(
                runtime, ort.OrtValue.ortvalue_from_numpy(self._inputs[signature][name])
            )
        for name, names in stage["states"].items():
            if not names.get("in_place"):
                raise ExportError(f"{signature} does not update state {name} in place; export the bundle anew")
            value = ort.OrtValue.ortvalue_from_numpy(self._states[name])
            binding.bind_ortvalue_input(names["input"], value)
            binding.bind_ortvalue_output(names["output"], value)
        self._bindings[signature] = binding
        return binding

    def reset(self) -> None:
        for array in self._states.values():
            array[...] = 0

    def snapshot(self) -> Arrays:
        return {name: array.copy() for name, array in self._states.items()}

    def restore(self, snapshot: Arrays) -> None:
        for name, array in self._states.items():
            array[...] = snapshot[name]

    def states(self) -> Arrays:
        return dict(self._states)

    def runner_logits(self, ids: Sequence[int]) -> NDArray[Any] | None:
        return None  # genai.onnx is another runtime's

    def traces(self) -> list[Path]:
        """Files in which the runtime's profiler wrote what it saw; it stops there."""
        return [Path(session.end_profiling()) for session in self._sessions.values()]

    def close(self) -> None:
        self._bindings.clear()
        self._sessions.clear()

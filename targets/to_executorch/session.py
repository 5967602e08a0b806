"""A bundle on the ExecuTorch runtime, driven by its manifest alone.

States are torch tensors. Those that a method writes whole are passed on as they lie in the runtime's memory; the
rows of the KV cache that a call hands out are written into the session's own buffers.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from targets.base import Arrays
from targets.contract import CallError, check_call
from targets.table import Table
from targets.to_executorch import runtime, text_runner
from targets.to_executorch.weight_cache import share_packed_weights


class ExecuTorchSession:
    """Implements `targets.base.Session` for ExecuTorch with XNNPACK on the CPU."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any], threads: int, trace: bool = False) -> None:
        self._folder = folder
        self._trace = trace
        self._manifest = manifest
        runtime.check_version(manifest)
        runtime.use_threads(threads, self)
        share_packed_weights()
        self._programs: dict[str, Any] = {}
        self._methods: dict[tuple[str, str], Any] = {}
        self._tables: dict[str, Table] = {}
        self._zeros = {s["name"]: torch.zeros(s["shape"], dtype=getattr(torch, s["dtype"])) for s in manifest["states"]}
        self._states: dict[str, torch.Tensor] = {}
        self.load_seconds = 0.0
        self.reset()

    def load(self, signatures: Iterable[str]) -> None:
        for signature in signatures:
            for stage in self._manifest["signatures"][signature]["stages"]:
                if stage["kind"] == "graph":
                    self._method(stage)

    def _method(self, stage: Mapping[str, Any]) -> Any:
        key = (stage["file"], stage["entry"])
        if key not in self._methods:
            program = self._program(stage["file"])
            begin = time.perf_counter()
            self._methods[key] = runtime.load_method(program, *key)
            self.load_seconds += time.perf_counter() - begin
        return self._methods[key]

    def _program(self, file: str) -> Any:
        if file not in self._programs:
            path = self._folder / file
            runtime.check_program(path)  # ours, so not in the time that loading takes
            begin = time.perf_counter()
            self._programs[file] = runtime.load_program(path, self._trace)
            self.load_seconds += time.perf_counter() - begin
        return self._programs[file]

    def run(self, signature: str, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        entry = check_call(self._manifest, signature, inputs)
        if "start" in inputs and not self._states:
            raise CallError("an earlier call failed and left no states; reset the session, or restore a snapshot")
        values: dict[str, Any] = {
            name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in inputs.items()
        }
        start = int(inputs["start"][0]) if "start" in inputs else 0
        valid = int(inputs["valid"][0]) if "valid" in inputs else 1
        try:
            for stage in entry["stages"]:
                if stage["kind"] == "table":
                    table = self._table(signature, stage)
                    ((source, _),) = stage["inputs"].items()
                    ((result, _),) = stage["outputs"].items()
                    values[result] = torch.from_numpy(table.of(inputs[source]))
                else:
                    self._run_graph(stage, values, start, valid)
        except BaseException:
            if "start" in inputs:  # a picture touches no state
                self._states = {}  # those of earlier stages are new, the others old
            raise
        return {tensor["name"]: values[tensor["name"]].numpy().copy() for tensor in entry["outputs"]}

    def _table(self, signature: str, stage: Mapping[str, Any]) -> Table:
        if signature not in self._tables:
            self._tables[signature] = Table(self._folder, stage)
        return self._tables[signature]

    def _run_graph(self, stage: Mapping[str, Any], values: dict[str, Any], start: int, valid: int) -> None:
        states = stage.get("states", {})
        arguments: dict[int, torch.Tensor] = {int(place): values[name] for name, place in stage["inputs"].items()}
        arguments |= {int(binding["input"]): self._states[name] for name, binding in states.items()}
        method = self._method(stage)
        results = runtime.call(method, [arguments[place] for place in range(len(arguments))], stage["entry"])
        for name, place in stage["outputs"].items():
            values[name] = results[int(place)]
        for name, binding in states.items():
            new = results[int(binding["output"])]
            if binding.get("update") == "rows":
                axis = binding["axis"]
                self._states[name].narrow(axis, start, valid).copy_(new.narrow(axis, 0, valid))
            else:
                self._states[name] = new

    def reset(self) -> None:
        # Fresh buffers: the present ones may lie in the runtime's memory, or be written by a later call.
        self.restore(self._zeros)

    def snapshot(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self._states.items()}

    def restore(self, snapshot: Mapping[str, torch.Tensor]) -> None:
        self._states = {name: tensor.clone() for name, tensor in snapshot.items()}

    def states(self) -> Arrays:
        return {name: tensor.numpy() for name, tensor in self._states.items()}

    def runner_logits(self, ids: Sequence[int]) -> NDArray[Any] | None:
        file = self._manifest["signatures"]["decode"]["stages"][-1]["file"]
        program = self._program(file)
        if text_runner.NAME not in {program.get_method_name(i) for i in range(program.num_methods())}:
            return None
        method = runtime.load_method(program, file, text_runner.NAME)
        rows = []
        for place, token in enumerate(ids):
            inputs = [torch.tensor([[token]]), torch.tensor([place])]
            rows.append(runtime.call(method, inputs, text_runner.NAME)[0].numpy()[0].copy())
        return np.stack(rows)

    def traces(self, folder: Path) -> list[Path]:
        """Write what the runtime's tracer saw, one file per program."""
        paths = []
        for name, program in self._programs.items():
            paths.append(folder / f"{name}.etdump")
            program.write_etdump_result_to_file(str(paths[-1]), "")
        return paths

    def close(self) -> None:
        self._states = {}
        self._methods.clear()
        self._programs.clear()
        runtime.release_threads(self)

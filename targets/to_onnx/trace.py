"""Where the time of a call goes, by onnxruntime's profiler."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from targets.base import OperatorTime
from targets.to_onnx.session import OnnxSession

RUNS = 10


def operator_times(
    folder: Path, manifest: Mapping[str, Any], threads: int, signature: str, inputs: Mapping[str, NDArray[Any]]
) -> list[OperatorTime]:
    """See `targets.base.Target`; the mean of the runs after the first."""
    seconds: dict[str, float] = {}
    calls: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as place:
        session = OnnxSession(folder, manifest, threads, trace=Path(place))
        for _ in range(RUNS + 1):
            session.run(signature, inputs)
        for path in session.traces():
            seen: dict[str, int] = {}
            for event in json.loads(path.read_text()):
                if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
                    continue
                seen[event["name"]] = seen.get(event["name"], 0) + 1
                if seen[event["name"]] > 1:
                    kind = event["args"]["op_name"]
                    seconds[kind] = seconds.get(kind, 0.0) + event["dur"] / 1e6 / RUNS
                    calls[kind] = calls.get(kind, 0) + 1
        session.close()
    found = [OperatorTime(kind, calls[kind] // RUNS, seconds[kind]) for kind in seconds]
    return sorted(found, key=lambda each: -each.seconds)

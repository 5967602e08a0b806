"""Where the time of a call goes, by ExecuTorch's event tracer: nodes of XNNPACK and kernels of the runtime."""

from __future__ import annotations

import re
import statistics
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from targets.base import OperatorTime
from targets.quiet import quiet_imports
from targets.to_executorch.session import ExecuTorchSession

RUNS = 10
WHOLE = {"DELEGATE_CALL", "OPERATOR_CALL", "Method::execute"}
"""Events that hold others."""


def operator_times(
    folder: Path, manifest: Mapping[str, Any], threads: int, signature: str, inputs: Mapping[str, NDArray[Any]]
) -> list[OperatorTime]:
    """See `targets.base.Target`. Nodes faster than a microsecond read as 0: the tracer counts whole ones."""
    with quiet_imports():
        from executorch.devtools import Inspector
    session = ExecuTorchSession(folder, manifest, threads, trace=True)
    for _ in range(RUNS):
        session.run(signature, inputs)
    seconds: dict[str, float] = {}
    calls: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tensors' contents, which were not asked for
        for path in session.traces(Path(place)):
            for block in Inspector(etdump_path=str(path)).event_blocks:
                for event in block.events if block.name == "Execute" else ():
                    name = re.sub(r" #\d+$", "", event.name).removeprefix("native_call_")
                    if name in WHOLE or event.perf_data is None:
                        continue
                    seconds[name] = seconds.get(name, 0.0) + statistics.median(event.perf_data.raw) / 1e3
                    calls[name] = calls.get(name, 0) + 1
    session.close()
    found = [OperatorTime(name, calls[name], seconds[name]) for name in seconds]
    return sorted(found, key=lambda each: -each.seconds)

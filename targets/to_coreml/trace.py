"""Where the time of an emulated call goes. It says what the interpreter spends, nothing of a phone."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from numpy.typing import NDArray

from targets.base import OperatorTime
from targets.to_coreml.session import CoreMLSession

RUNS = 3


class _Clock:
    """Gives each operation the time since the one before it ended."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}
        self._last = 0.0

    def start(self) -> None:
        self.seconds, self.calls = {}, {}
        self._last = time.perf_counter()

    def __call__(self, name: str, kind: str, value: object) -> None:
        now = time.perf_counter()
        self.seconds[kind] = self.seconds.get(kind, 0.0) + now - self._last
        self.calls[kind] = self.calls.get(kind, 0) + 1
        self._last = time.perf_counter()


def operator_times(
    folder: Path, manifest: Mapping[str, Any], threads: int, signature: str, inputs: Mapping[str, NDArray[Any]]
) -> list[OperatorTime]:
    """See `targets.base.Target`; the median of the runs after the first, on the interpreter even on a Mac."""
    clock = _Clock()
    session = CoreMLSession(folder, manifest, threads, observe=clock)
    session.run(signature, inputs)
    runs = []
    for _ in range(RUNS):
        clock.start()
        session.run(signature, inputs)
        runs.append(clock.seconds)
    session.close()
    found = [OperatorTime(kind, clock.calls[kind], median(run[kind] for run in runs)) for kind in clock.calls]
    return sorted(found, key=lambda each: -each.seconds)

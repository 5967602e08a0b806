"""Telling the user what happens: bars on a terminal, lines elsewhere, JSON lines for machines, or nothing.

All of it goes to stderr, so that stdout carries only results. Whatever is shown, wall time and peak memory of
every stage are recorded for the table at the end of an export.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import psutil

from export.pace import Pace

SAMPLE_SECONDS = 0.1


@dataclass(frozen=True)
class StageRecord:
    """One finished stage: wall time, and peak resident memory summed over child processes."""

    name: str
    seconds: float
    peak_bytes: int


class MemorySampler(threading.Thread):
    """Samples the resident memory of this process and its children while a stage runs.

    `start_bytes` is what they held when it was made.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._peak = 0
        self._done = threading.Event()
        self._process = psutil.Process()
        self._before = _lifetime_peak()
        self._sample()
        self.start_bytes = self._peak

    def run(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self._sample()

    def _sample(self) -> None:
        total = 0
        for process in [self._process, *self._process.children(recursive=True)]:
            try:
                total += process.memory_info().rss
            except psutil.Error:
                continue  # a child that has just ended
        self._peak = max(self._peak, total)

    def stop(self) -> int:
        """Peak in bytes since the start."""
        self._done.set()
        self.join()
        self._sample()
        # The kernel's own maximum sees a spike between two samples, if this stage is the one that raised it.
        after = _lifetime_peak()
        return max(self._peak, after) if after > self._before else self._peak


def _lifetime_peak() -> int:
    """Most resident memory this process ever had, in bytes; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def remaining(pace: Pace) -> str:
    """The rest in words: "about 1:20 left", and nothing before it is known."""
    rest = pace.remaining
    if rest is None:
        return ""
    minutes, seconds = divmod(math.ceil(rest), 60)
    return f"about {minutes}:{seconds:02} left"


def quiet_libraries() -> None:
    """Silence transformers' advice to install GPU kernels: here it is only the reference, and meant to be slow.

    The levels survive the later imports; warnings of all other loggers still show.
    """
    logging.getLogger("transformers.integrations.hub_kernels").setLevel(logging.ERROR)
    # torchao, which comes with executorch, announces at import the GPU kernels it could not load.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


class Reporter:
    """Progress of one command; `quiet` shows nothing but still records, `json_lines` is for machines."""

    def __init__(self, quiet: bool = False, json_lines: bool = False) -> None:
        self.quiet = quiet
        self.json_lines = json_lines
        self.stages: list[StageRecord] = []
        self.notices: list[str] = []
        quiet_libraries()

    @contextmanager
    def stage(self, name: str, total: float | None = None) -> Iterator[Pace]:
        """A stage of the work, in parts or with a `total` in the units that `advance` counts."""
        sampler, begin = MemorySampler(), time.perf_counter()
        sampler.start()
        self._event("start", stage=name, total=total)
        pace = Pace()
        try:
            with self._shown(name, pace), pace.part(name, total) if total is not None else nullcontext():
                yield pace
        finally:
            record = StageRecord(name, time.perf_counter() - begin, sampler.stop())
            self.stages.append(record)
            self._event("end", stage=name, seconds=round(record.seconds, 3), peak_bytes=record.peak_bytes)

    def notice(self, text: str) -> None:
        """Something the user should know that is no error."""
        self.notices.append(text)
        self._event("notice", text=text)
        if not self.quiet and not self.json_lines:
            sys.stderr.write(f"note: {text}\n")

    def _event(self, event: str, **fields: Any) -> None:
        if self.json_lines and not self.quiet:
            sys.stderr.write(json.dumps({"event": event, **fields}) + "\n")
            sys.stderr.flush()

    @contextmanager
    def _shown(self, name: str, pace: Pace) -> Iterator[None]:
        """A bar with the remaining time on a terminal, elsewhere one line."""
        if self.quiet or self.json_lines:
            yield
            return
        if not sys.stderr.isatty():
            sys.stderr.write(f"{name} …\n")
            yield
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
        from rich.text import Text

        class Rest(ProgressColumn):
            """Asked several times a second, and whenever the part moves on."""

            def render(self, task: Task) -> Text:
                share = pace.share
                if not task.finished and share is not None:
                    display.update(task.id, total=1.0, completed=min(share, 0.999))
                return Text(remaining(pace) if not task.finished else "")

        columns = (TextColumn("{task.description:<14}"), BarColumn(), TimeElapsedColumn(), Rest())
        with Progress(*columns, console=Console(stderr=True)) as display:
            task = display.add_task(name, total=None)
            yield
            display.update(task, total=1.0, completed=1.0)

    def table(self) -> str:
        """Time and peak memory of every stage, for the end of an export."""
        lines = [f"{'stage':<16}{'seconds':>9}{'peak memory':>14}"]
        for stage in self.stages:
            lines.append(f"{stage.name:<16}{stage.seconds:>9.1f}{stage.peak_bytes / 2**30:>10.2f} GiB")
        seconds = sum(stage.seconds for stage in self.stages)
        peak = max((stage.peak_bytes for stage in self.stages), default=0)
        lines.append(f"{'all':<16}{seconds:>9.1f}{peak / 2**30:>10.2f} GiB")
        return "\n".join(lines)

    def as_json(self) -> list[dict[str, Any]]:
        """The recorded stages."""
        return [{"stage": s.name, "seconds": s.seconds, "peak_bytes": s.peak_bytes} for s in self.stages]

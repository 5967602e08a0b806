"""Telling the user what happens: bars on a terminal, nothing when quiet, and a table of time and memory.

Bars go to stderr, so that stdout carries only results.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import psutil

SAMPLE_SECONDS = 0.1


class Bar(Protocol):
    def advance(self, count: int) -> None: ...


@dataclass(frozen=True)
class StageRecord:
    """One finished stage: wall time, and peak resident memory summed over child processes."""

    name: str
    seconds: float
    peak_bytes: int


class _Silent:
    def advance(self, count: int) -> None:
        pass


class _Sampler(threading.Thread):
    """Samples the resident memory of this process and its children while a stage runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self._done = threading.Event()
        self._process = psutil.Process()

    def run(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self.sample()

    def sample(self) -> None:
        total = 0
        for process in [self._process, *self._process.children(recursive=True)]:
            try:
                total += process.memory_info().rss
            except psutil.Error:
                continue  # a child that has just ended
        self.peak = max(self.peak, total)

    def stop(self) -> int:
        self._done.set()
        self.join()
        self.sample()
        return self.peak


class Reporter:
    """Progress of one command; `quiet` shows nothing but still records."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.stages: list[StageRecord] = []
        self.notices: list[str] = []

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Bar]:
        sampler, begin = _Sampler(), time.perf_counter()
        sampler.start()
        try:
            with self._bar(name, total) as bar:
                yield bar
        finally:
            peak = sampler.stop()
            self.stages.append(StageRecord(name, time.perf_counter() - begin, peak))

    def notice(self, text: str) -> None:
        self.notices.append(text)
        if not self.quiet:
            sys.stderr.write(f"note: {text}\n")

    @contextmanager
    def _bar(self, name: str, total: int | None) -> Iterator[Bar]:
        if self.quiet:
            yield _Silent()
            return
        if not sys.stderr.isatty():
            sys.stderr.write(f"{name} …\n")
            yield _Silent()
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns: list[Any] = [TextColumn("{task.description:<14}"), BarColumn(), TimeElapsedColumn()]
        with Progress(*columns, console=Console(stderr=True)) as display:
            task = display.add_task(name, total=total)

            class Live:
                def advance(self, count: int) -> None:
                    display.advance(task, count)

            yield Live()

    def table(self) -> str:
        """Time and peak memory of every stage, for the end of an export."""
        lines = [f"{'stage':<16}{'seconds':>9}{'peak memory':>14}"]
        for stage in self.stages:
            lines.append(f"{stage.name:<16}{stage.seconds:>9.1f}{stage.peak_bytes / 2**30:>10.2f} GiB")
        return "\n".join(lines)

    def as_json(self) -> list[dict[str, Any]]:
        return [{"stage": s.name, "seconds": s.seconds, "peak_bytes": s.peak_bytes} for s in self.stages]

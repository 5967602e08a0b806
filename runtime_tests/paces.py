"""Whether what a rung announces for its remaining time is what it does: every part, each counted to its end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest

from export import progress
from export.pace import Pace


class Watched(Pace):
    """Remembers what was announced, what ran, and how much of each part was told."""

    def __init__(self) -> None:
        super().__init__()
        self.announced: dict[str, float] = {}
        self.left_out: set[str] = set()
        self.ran: dict[str, float] = {}

    def expect(self, costs: Mapping[str, float]) -> None:
        self.announced |= costs
        super().expect(costs)

    def leave_out(self, name: str) -> None:
        self.left_out.add(name)
        super().leave_out(name)

    @contextmanager
    def part(self, name: str, total: float) -> Iterator[None]:
        assert name not in self.ran, f"{name} runs twice"
        with super().part(name, total):
            yield
            self.ran[name] = self._done / total


def watch(patch: pytest.MonkeyPatch) -> list[Watched]:
    """The paces of all stages of the next command, in order."""
    made: list[Watched] = []

    def make() -> Watched:
        made.append(Watched())
        return made[-1]

    patch.setattr(progress, "Pace", make)
    return made


def hold(paces: list[Watched], *parts: str) -> None:
    """Those of the rungs among them announced these parts, and every rung ran just what it announced."""
    rungs = [pace for pace in paces if pace.announced]
    assert len(rungs) == 4
    for pace in rungs:
        assert set(pace.announced) - pace.left_out == set(pace.ran)
        assert min(pace.announced.values()) > 0
        assert {name: share for name, share in pace.ran.items() if share != 1} == {}
    assert {name for pace in rungs for name in pace.ran} >= set(parts)

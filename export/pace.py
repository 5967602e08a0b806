"""How far a stage is, and how long the rest will take: said only once it was measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager


class Pace:
    """Work in parts, one after the other, each with an expected cost.

    The rest of a part takes the time that its beginning took. A part that has not begun takes its cost times what the
    others took for theirs, so that costs need a ratio and no unit.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ahead: dict[str, float] = {}
        self._paid, self._cost = 0.0, 0.0
        """Seconds of the parts that are over, and what was expected of those."""
        self._begun: float | None = None
        self._expected, self._total, self._done = 0.0, 0.0, 0.0
        self._advanced = 0.0
        """When the part last advanced."""

    def expect(self, costs: Mapping[str, float]) -> None:
        """Announce parts; a part that nobody announced counts while it runs."""
        self._ahead |= costs

    def leave_out(self, name: str) -> None:
        """A part that was announced is not needed after all."""
        self._ahead.pop(name, None)

    @contextmanager
    def part(self, name: str, total: float) -> Iterator[None]:
        """Run a part, of `total` units that `advance` counts."""
        self._expected = self._ahead.pop(name, 0.0)
        self._total, self._done = total, 0.0
        self._begun = self._advanced = self._clock()
        try:
            yield
        finally:
            if self._expected:
                self._paid += self._clock() - self._begun
                self._cost += self._expected
            self._begun = None

    def advance(self, count: float = 1) -> None:
        """`count` more units of the part that runs are done."""
        self._done += count
        self._advanced = self._clock()

    @property
    def share(self) -> float | None:
        """Of the time of all parts, what is over; None where the rest is not known."""
        rest = self.remaining
        if rest is None:
            return None
        over = self._paid + (0.0 if self._begun is None else self._clock() - self._begun)
        return over / (over + rest) if over + rest else 0.0

    @property
    def remaining(self) -> float | None:
        """Seconds; None before anything was measured."""
        paid, cost, rest = self._paid, self._cost, 0.0
        if self._begun is not None:
            spent = self._clock() - self._begun
            if self._done:
                share = min(1.0, self._done / self._total)
                whole = (self._advanced - self._begun) / share
                if self._expected:
                    paid, cost = paid + share * whole, cost + share * self._expected
            elif cost and self._expected:
                whole = self._expected * paid / cost
            else:
                return None
            rest = max(0.0, whole - spent)
        if not cost:
            return None if self._ahead or self._begun is None else rest
        return rest + sum(self._ahead.values()) * paid / cost

"""How long the rest takes, on a clock that the tests turn."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from export import progress
from export.__main__ import main
from export.pace import Pace
from export.progress import Reporter, remaining
from export.validate import judge
from export.validate.amounts import Amounts


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def work(self, pace: Pace, seconds: float, count: float) -> None:
        self.now += seconds
        pace.advance(count)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pace(clock: Clock) -> Pace:
    return Pace(clock)


def test_nothing_is_said_before_anything_was_measured(clock: Clock, pace: Pace) -> None:
    pace.expect({"a": 1, "b": 3})
    assert pace.remaining is None and pace.share is None and remaining(pace) == ""
    with pace.part("a", 4):
        clock.now += 5
        assert pace.remaining is None, "a part of unknown speed"
        pace.advance()
        assert pace.remaining == pytest.approx(3 * 5 + 3 * 20)


def test_the_rest_of_a_part_takes_what_its_beginning_took_and_is_counted_down(clock: Clock, pace: Pace) -> None:
    with pace.part("only", 10):
        clock.work(pace, 6, 2)
        assert pace.remaining == pytest.approx(24)
        assert pace.share == pytest.approx(0.2)
        clock.now += 4
        assert pace.remaining == pytest.approx(20), "between two steps"
        clock.now += 100
        assert pace.remaining == 0, "never below nothing"
        clock.work(pace, 0, 3)
        assert pace.remaining == pytest.approx(110), "and the truth when it is known"
        clock.work(pace, 0, 5)
        assert pace.remaining == 0


def test_parts_ahead_take_their_cost_at_the_speed_that_was_measured(clock: Clock, pace: Pace) -> None:
    """Costs are ratios: this machine takes 10 seconds for one of them."""
    pace.expect({"a": 2, "b": 5, "c": 1})
    with pace.part("a", 1):
        clock.work(pace, 20, 1)
    assert pace.remaining == pytest.approx(60)
    assert pace.share == pytest.approx(0.25)
    with pace.part("b", 10):
        assert pace.remaining == pytest.approx(60), "as expected, until its own speed shows"
        clock.now += 5
        assert pace.remaining == pytest.approx(55)
        clock.work(pace, 5, 1)  # twice as long as expected
        speed = (20 + 10) / (2 + 0.5)
        assert pace.remaining == pytest.approx(9 * 10 + 1 * speed)
        for _ in range(9):
            clock.work(pace, 10, 1)
    pace.leave_out("c")
    assert pace.remaining == 0 and pace.share == 1


def test_a_part_that_nobody_announced_changes_no_other(clock: Clock, pace: Pace) -> None:
    pace.expect({"a": 1, "b": 1})
    with pace.part("a", 1):
        clock.work(pace, 10, 1)
    with pace.part("surprise", 2):
        clock.now += 1
        assert pace.remaining is None
        clock.work(pace, 999, 1)
        assert pace.remaining == pytest.approx(1000 + 10)
    assert pace.remaining == pytest.approx(10)


def test_an_interrupted_part_is_over(clock: Clock, pace: Pace) -> None:
    pace.expect({"a": 1})
    with pytest.raises(KeyboardInterrupt), pace.part("a", 4):
        clock.work(pace, 3, 1)
        raise KeyboardInterrupt
    assert pace.remaining == 0


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.2, "about 0:01 left"), (59.4, "about 1:00 left"), (754, "about 12:34 left")]
)
def test_the_rest_in_words(seconds: float, said: str, clock: Clock, pace: Pace) -> None:
    with pace.part("only", 2):
        clock.work(pace, seconds, 1)
        assert remaining(pace) == said


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def slow_stage(reporter: Reporter) -> None:
    with reporter.stage("validate L0") as pace:
        pace.expect({"truth": 1, "ours": 1})
        with pace.part("truth", 1):
            time.sleep(0.3)
            pace.advance()
        time.sleep(0.3)


def test_the_remaining_time_is_shown_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    slow_stage(Reporter())
    assert "validate L0" in screen.getvalue() and "about 0:01 left" in screen.getvalue()
    for reporter, file in ((Reporter(quiet=True), Terminal()), (Reporter(), io.StringIO())):
        monkeypatch.setattr(sys, "stderr", file)
        slow_stage(reporter)
        assert "left" not in file.getvalue()
        assert reporter.stages[0].seconds > 0.5


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


@pytest.mark.usefixtures("one_thread", "small_buffer")
def test_a_rung_runs_what_it_announces_and_counts_it_to_its_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The first layers of the shipped checkpoint, with text, pictures, conversations and decode steps."""
    made: list[Watched] = []

    def make() -> Watched:
        made.append(Watched())
        return made[-1]

    monkeypatch.setattr(progress, "Pace", make)
    amounts = Amounts(probe=24, drift=8, chats=3, positions=9, steps=8)
    monkeypatch.setattr(judge, "amounts_for", lambda weights: amounts)
    words = ["--target", "onnx", "--size", "tiny", "--num-layers", "4", "--context-length", "128"]
    words += ["--prefill-lengths", "64", "--image-sizes", "64x96", "--quiet", "--threads", "1"]
    assert main([*words, "-o", str(tmp_path / "bundle")]) in (0, 3), "four of its layers fail the gates of answers"
    rungs = [pace for pace in made if pace.announced]
    assert len(rungs) == 5, "and the measurement of speed"
    for pace in rungs:
        assert set(pace.ran) <= set(pace.announced) <= set(pace.ran) | pace.left_out
        assert min(pace.announced.values()) > 0
    ran = {name: share for pace in made for name, share in pace.ran.items()}
    assert ran.keys() >= {"lower", "truth", "pictures", "weights", "text", "drift", "given", "read given", "along"}
    counted = {name: share for name, share in ran.items() if name not in {"lower", "weights"} and share}
    assert set(counted.values()) == {1} and len(counted) >= 10, "the others are one call: nothing before its end"
    assert 0.7 < ran["lower"] < 1.3 and 0.7 < ran["weights"] < 1.3, "of a tied matrix more or less"

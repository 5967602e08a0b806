"""Numbers of two arrays: what they say of small, large and broken ones."""

from __future__ import annotations

import numpy as np
import pytest

from export.validate import metrics


def test_the_relative_error_is_that_of_the_whole_array(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    one = random.normal(size=(7, 33)).astype(np.float32)
    other = one + random.normal(size=one.shape).astype(np.float32) * np.float32(1e-3)
    wide, narrow = one.astype(np.float64), other.astype(np.float64)
    expected = np.abs(wide - narrow).max() / np.abs(wide).max()
    assert metrics.relative(one, other) == metrics.relative(one.T, other.T) == expected
    monkeypatch.setattr(metrics, "BLOCK_VALUES", 10)
    assert metrics.relative(one, other) == expected, "in blocks, none of which holds both maxima"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_not_finite_is_infinitely_wrong_on_either_side(bad: float, side: int) -> None:
    pair = [np.ones((2, 5), np.float32), np.ones((2, 5), np.float32)]
    assert metrics.relative(*pair) == 0
    pair[side][1, 4] = bad
    assert metrics.relative(*pair) == float("inf")


def test_shapes_must_agree_and_nothing_is_no_error() -> None:
    assert metrics.relative(np.ones((2, 3)), np.ones((3, 2))) == float("inf")
    assert metrics.relative(np.ones((0, 3)), np.ones((0, 3))) == 0
    assert metrics.relative(np.zeros(3), np.zeros(3)) == 0
    assert metrics.relative(np.zeros(3), np.full(3, 1e-9)) == float("inf")

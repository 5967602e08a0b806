"""States of Core ML packages over calls that fail, spoil them, or begin anew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.bundle.manifest import BundleError
from export.quantize.recipe import Recipe
from export.validate.replay import replay
from runtime_tests.conftest import build
from targets.contract import CallError
from targets.to_coreml.session import CoreMLSession

NAME = "coreml"
PLAN = [(16, 16), *[(None, 1)] * 4]
POSITIONS = np.tile(np.arange(20, dtype=np.int32), (3, 1))


def rows() -> Any:
    return np.random.default_rng(0).standard_normal((20, 128)).astype(np.float16)


def overflowing(rows: Any) -> Any:
    """A conversation in which the model breaks down: from NaN in two tokens on."""
    rows[[3, 17]] = np.nan
    return rows


@pytest.mark.parametrize("layout", ["separate", "stacked"])
@pytest.mark.parametrize("profile", ["gpu", "ane"])
def test_a_call_from_the_start_begins_from_zeros(small: Any, profile: str, layout: str, tmp_path: Path) -> None:
    """Nothing is left of an earlier conversation in states that the runtime keeps, not even of NaN in all of them."""
    _, manifest, _ = build(
        small, tmp_path, Recipe.unquantised(), NAME, lengths=(16,), profile=profile, state_layout=layout
    )
    session = CoreMLSession(tmp_path, manifest, 1)
    expected = replay(session, rows(), POSITIONS, PLAN, junk=0.0)
    broken = replay(session, overflowing(rows()), POSITIONS, PLAN, junk=0.0)
    assert np.isnan(broken[-1]).all()
    caches = {name: array for name, array in session.states().items() if name[:3] in ("key", "val")}
    assert caches and all(np.isfinite(array).all() for array in caches.values())
    again = replay(session, rows(), POSITIONS, PLAN, junk=0.0, reset=False)
    assert all(np.array_equal(a, b) for a, b in zip(expected, again, strict=True))


def decode(session: CoreMLSession) -> Any:
    """One token from the start; its logits."""
    found = session.run(
        "decode",
        {
            "embeddings": rows()[None, :1],
            "position_ids": np.zeros((3, 1), np.int32),
            "start": np.zeros(1, np.int32),
        },
    )
    return found["logits"]


@pytest.fixture
def stages(small: Any, tmp_path: Path) -> tuple[Path, Any]:
    _, manifest, _ = build(small, tmp_path, Recipe.unquantised(), NAME, lengths=(16,), max_file_layers=2)
    return tmp_path, manifest


def test_states_of_packages_that_nobody_called_are_zeros(stages: tuple[Path, Any]) -> None:
    session = CoreMLSession(*stages, 1)
    fresh = session.states()
    decode(session)
    used = session.states()
    assert {name: array.shape for name, array in fresh.items()} == {n: a.shape for n, a in used.items()}
    assert not any(array.any() for array in fresh.values()) and any(array.any() for array in used.values())


def test_a_damaged_package_is_noticed_before_any_state_is_new(stages: tuple[Path, Any]) -> None:
    folder, manifest = stages
    weights = folder / "decoder_1.mlpackage/Data/com.apple.CoreML/weights/weight.bin"
    weights.write_bytes(weights.read_bytes()[:1000])
    session = CoreMLSession(folder, manifest, 1)
    with pytest.raises(BundleError, match=r"weight\.bin"):
        decode(session)
    assert not any(array.any() for array in session.states().values())


def test_a_call_that_failed_leaves_no_states_to_go_on_with(
    stages: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = CoreMLSession(*stages, 1)
    expected = decode(session)
    kept = session.snapshot()
    last = session._backends["decoder_1.mlpackage"]

    def failing(function: str, inputs: Any) -> Any:
        raise RuntimeError("the runtime stopped")

    with monkeypatch.context() as patch:
        patch.setattr(last, "run", failing)
        with pytest.raises(RuntimeError, match="the runtime stopped"):
            decode(session)
    with pytest.raises(CallError, match="an earlier call failed and left no states; reset the session, or restore"):
        decode(session)
    go_on: list[Callable[[], None]] = [session.reset, lambda: session.restore(kept)]
    for remedy in go_on:
        session._failed = True
        remedy()
        assert np.array_equal(decode(session), expected)

"""States of Core ML packages over calls that fail, spoil them, or begin anew."""

from __future__ import annotations

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

pytestmark = pytest.mark.usefixtures("traced_once")

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
    session = opened(tmp_path, manifest)
    expected = replay(session, rows(), POSITIONS, PLAN, junk=0.0)
    broken = replay(session, overflowing(rows()), POSITIONS, PLAN, junk=0.0)
    assert np.isnan(broken[-1]).all()
    caches = {name: array for name, array in session.states().items() if name[:3] in ("key", "val")}
    assert caches and all(np.isfinite(array).all() for array in caches.values())
    again = replay(session, rows(), POSITIONS, PLAN, junk=0.0, reset=False)
    assert all(np.array_equal(a, b) for a, b in zip(expected, again, strict=True))


def opened(folder: Path, manifest: Any) -> CoreMLSession:
    """Emulated, on a Mac too, as it is if an option is given."""
    return CoreMLSession(folder, manifest, 1, accumulate="float32")


def decode(session: CoreMLSession, start: int = 0) -> Any:
    """One token; its logits."""
    found = session.run(
        "decode",
        {
            "embeddings": rows()[None, start : start + 1],
            "position_ids": np.full((3, 1), start, np.int32),
            "start": np.asarray([start], np.int32),
        },
    )
    return found["logits"]


@pytest.fixture
def stages(small: Any, tmp_path: Path) -> tuple[Path, Any]:
    _, manifest, _ = build(small, tmp_path, Recipe.unquantised(), NAME, lengths=(16,), max_file_layers=2)
    return tmp_path, manifest


def test_states_of_packages_that_nobody_called_are_zeros(stages: tuple[Path, Any]) -> None:
    session = opened(*stages)
    fresh = session.states()
    decode(session)
    used = session.states()
    assert {name: array.shape for name, array in fresh.items()} == {n: a.shape for n, a in used.items()}
    assert not any(array.any() for array in fresh.values()) and any(array.any() for array in used.values())


def test_a_damaged_package_is_noticed_before_any_state_is_new(stages: tuple[Path, Any]) -> None:
    folder, manifest = stages
    weights = folder / "decoder_1.mlpackage/Data/com.apple.CoreML/weights/weight.bin"
    weights.write_bytes(weights.read_bytes()[:1000])
    session = opened(folder, manifest)
    with pytest.raises(BundleError, match=r"weight\.bin"):
        decode(session)
    assert not any(array.any() for array in session.states().values())


def test_a_call_that_failed_leaves_no_states_to_go_on_with(
    stages: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = opened(*stages)
    first = decode(session)
    kept = session.snapshot()
    second = decode(session, 1)

    def failing(function: str, inputs: Any) -> Any:
        raise RuntimeError("the runtime stopped")

    def fail() -> None:
        """In the second package, when the states of the first one are new already."""
        with monkeypatch.context() as patch:
            patch.setattr(session._backends["decoder_1.mlpackage"], "run", failing)
            with pytest.raises(RuntimeError, match="the runtime stopped"):
                decode(session, 1)

    session.restore(kept)
    fail()
    for go_on in (lambda: decode(session, 1), session.snapshot):
        with pytest.raises(CallError, match="an earlier call failed and left no states; reset the session, or restore"):
            go_on()
    session.restore(kept)
    assert np.array_equal(decode(session, 1), second)
    session.restore(kept)
    fail()
    session.reset()
    assert np.array_equal(decode(session), first) and np.array_equal(decode(session, 1), second)


def test_a_picture_that_fails_costs_no_conversation(
    stages: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = opened(*stages)
    decode(session)
    kept = session.snapshot()
    second = decode(session, 1)
    session.restore(kept)
    name = next(name for name in stages[1]["signatures"] if name.startswith("vision_"))
    (image,) = stages[1]["signatures"][name]["inputs"]
    session.load([name])

    def failing(function: str, inputs: Any) -> Any:
        raise RuntimeError("no memory for a picture")

    with monkeypatch.context() as patch:
        patch.setattr(session._backends["vision.mlpackage"], "run", failing)
        with pytest.raises(RuntimeError, match="no memory for a picture"):
            session.run(name, {"image": np.zeros(image["shape"], np.float32)})
    assert np.array_equal(decode(session, 1), second)

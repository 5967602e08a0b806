"""L0 and L1 count roundings: the unit is rounding alone, right models are near it and faults far."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from export.checkpoint.weights import Weights
from export.model import decoder, operators
from export.quantize.quantizer import Quantizer
from export.quantize.recipe import Recipe, load_recipe
from export.validate import metrics, reference, rounding
from export.validate.case import Case
from export.validate.gates import FLOOR
from export.validate.ladder import l0
from export.validate.probe import make_probe
from export.validate.replay import state_noise
from runtime_tests.conftest import SIZES, MemoryCheckpoint, variant
from runtime_tests.test_faults_host import L0
from targets import load_target

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("L0.logits", "L0.states", "L0.vision")


@pytest.fixture(scope="module")
def model() -> MemoryCheckpoint:
    return MemoryCheckpoint(variant(num_hidden_layers=4))


def shares(checkpoint: MemoryCheckpoint, known: dict[tuple[object, ...], object] | None = None) -> dict[str, float]:
    """Every gated value of L0 that counts roundings, as a share of its limit."""
    manifest = {"image_sizes": [list(s) for s in SIZES], "prefill_lengths": [16], "context_length": 64}
    target = load_target("onnx")
    case = Case(checkpoint, checkpoint.model_config, Recipe.unquantised(), target, Path("none"), manifest, 1, 64)
    if known is not None:
        case.known = {key: value for key, value in known.items() if key[0] != "L0"}
    rung = l0(case)
    if known is not None:
        known |= case.known
    assert {c.name: c.status for c in rung.checks}["L0.rounding"] == "PASS"
    return {c.name: c.value / c.limit for c in rung.checks if c.name in NAMES and c.limit}


def test_right_models_of_eight_seeds_pass_and_every_fault_fails(model: MemoryCheckpoint) -> None:
    """The margin is printed: `pytest -s`."""
    right = [shares(MemoryCheckpoint(variant(num_hidden_layers=5), seed)) for seed in range(8)]
    most = max(max(each.values()) for each in right)
    known: dict[tuple[object, ...], object] = {}
    assert max(shares(model, known).values()) < 1
    faults = {}
    for name, fault in L0.items():
        with pytest.MonkeyPatch.context() as patch:
            fault(patch)
            faults[name] = max(shares(model, known).values())
    least = min(faults, key=faults.__getitem__)
    print(f"\nright models reach {most:.2f} of a limit, the least fault {faults[least]:.0f} limits: {least}")  # noqa: T201
    assert most < 0.7
    assert faults[least] > 10


def test_the_unit_is_the_same_whether_the_modules_are_right(model: MemoryCheckpoint) -> None:
    weights = Weights(model, model.model_config)
    probe = make_probe(model.model_config, 48, ())
    rows = reference.embed(model, probe.ids)
    right = rounding.measure(weights, rows, probe.positions)
    for name, fault in L0.items():
        with pytest.MonkeyPatch.context() as patch:
            fault(patch)
            wrong = rounding.measure(weights, rows, probe.positions)
        assert wrong.largest < 4 * right.largest, name
        assert wrong.logits < 4 * max(right.logits, FLOOR), name


def test_a_loss_of_precision_is_no_unit(model: MemoryCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums that lose half of their digits in float32 alone make the unit large, and L0.rounding fails."""

    def lossy(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        found = operators.rms_norm(x, weight, eps)
        return found if x.dtype == torch.float64 else (found + 4096) - 4096

    class Lossy:
        def __getattr__(self, name: str) -> Callable[..., object]:
            return lossy if name == "rms_norm" else getattr(operators.ops, name)

    monkeypatch.setattr(decoder, "ops", Lossy())
    manifest = {"image_sizes": [], "prefill_lengths": [16], "context_length": 48}
    config = model.model_config.without_vision()
    case = Case(model, config, Recipe.unquantised(), load_target("onnx"), Path("none"), manifest, 1, 48)
    assert {c.name: c.status for c in l0(case).checks}["L0.rounding"] == "FAIL"


def test_our_modules_really_compute_in_float64(model: MemoryCheckpoint) -> None:
    """By chunks and by steps they differ as float64 does, nine digits beyond float32."""
    weights = Weights(model, model.model_config)
    probe = make_probe(model.model_config, 80, ())
    rows = reference.embed(model, probe.ids)
    plans: list[list[tuple[int | None, int]]] = [[(80, 80)], [(16, 16)] * 4 + [(None, 1)] * 16]

    def apart(dtype: torch.dtype) -> dict[str, float]:
        one, two = (reference.own_sequence(weights, rows, probe.positions, p, 160, dtype)[1] for p in plans)
        return {name: float(np.abs(one[name] - two[name]).max() / np.abs(one[name]).max()) for name in one}

    single, double = apart(torch.float32), apart(torch.float64)
    assert 1e-7 < max(single.values()) < 1e-4
    assert max(double.values()) < 1e-12
    picture = make_probe(model.model_config, 80, SIZES).images[0]
    assert 1e-8 < rounding.of_pictures(weights, [picture], reference.own_vision(weights, [picture])) < 5e-6
    assert rounding.of_pictures(weights, [], []) == 0


def test_the_worst_state_is_that_with_most_roundings() -> None:
    unit = rounding.Rounding(1e-6, {"a": 1e-5, "b": 1e-6, "c": 0.0})
    assert unit.worst({"a": 3e-5, "b": 4e-6, "c": 1e-7}, FLOOR) == (4e-6, 1e-6)
    assert unit.worst({"a": 3e-5, "b": 4e-6, "c": 5e-6}, FLOOR) == (5e-6, 0.0)
    found = unit.worst({"a": float("nan"), "b": 4e-6, "c": 5e-6}, FLOOR)
    assert np.isnan(found[0]) and found[1] == 1e-5
    assert unit.largest == 1e-5


def test_the_noise_of_weights_is_that_of_the_recipe(model: MemoryCheckpoint) -> None:
    weights = Weights(model, model.model_config)

    def noise(recipe: str) -> float:
        return rounding.of_weights(Quantizer(weights, load_recipe(recipe)))

    assert noise("fp32") == 0
    assert 2e-5 < noise("int8") < 1e-4
    assert 5e-3 < noise("int4") < 2e-2
    assert 5 * noise("int8") < noise("int4-mlp") < noise("int4-careful") < noise("int4")


def test_noise_is_a_share_of_power() -> None:
    three = np.asarray([0.0, 3.0, 4.0])
    assert metrics.noise(three, three) == 0
    assert metrics.noise(three, np.asarray([0.0, 3.0, 2.0])) == pytest.approx(4 / 25)
    assert metrics.noise(0 * three, 0 * three) == 0
    for wrong in (three * np.nan, three[:2], np.ones(3)):
        assert metrics.noise(0 * three, wrong) == float("inf")


def test_rows_of_a_cache_that_nothing_was_written_to_do_not_count() -> None:
    truth = {"key_0": np.ones((2, 5, 4)), "conv_0": np.ones((6, 3))}
    found = {name: array.copy() for name, array in truth.items()}
    found["key_0"][:, 3:] = 7
    assert state_noise(truth, found, 3) == {"key_0": 0, "conv_0": 0}
    found["conv_0"][:, 2] = 0
    assert state_noise(truth, found, 4) == {"key_0": pytest.approx(36 / 4), "conv_0": pytest.approx(1 / 3)}

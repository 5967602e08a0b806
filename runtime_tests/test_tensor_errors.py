"""What storage leaves of every tensor: L2 measures it, and a tensor that was lost fails."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from export.checkpoint.weights import Weights
from export.quantize.quantizer import Quantizer
from export.quantize.recipe import load_recipe
from export.validate.case import Case, Rung
from export.validate.ladder import l2
from runtime_tests.conftest import MemoryCheckpoint, build, variant
from targets import load_target

pytestmark = pytest.mark.usefixtures("one_thread", "traced_once", "hints_once")

NAME = "decoder.layers.0.mlp.down.weight"


def faint(std: float) -> MemoryCheckpoint:
    """One layer, and one matrix of weights near `std`."""
    checkpoint = MemoryCheckpoint(variant(num_hidden_layers=1, vision={"depth": 1}))
    weight = checkpoint.tensors["model.language_model.layers.0.mlp.down_proj.weight"]
    weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)) * std)
    return checkpoint


@pytest.fixture(scope="module")
def checkpoint() -> MemoryCheckpoint:
    return faint(1e-5)


def climbed(checkpoint: MemoryCheckpoint, target: str, recipe: str, folder: Path) -> Rung:
    """L2 of a bundle."""
    chosen = load_recipe(recipe, 32 if recipe == "int4" else None)
    _, manifest, _ = build(checkpoint, folder, chosen, target)
    return l2(Case(checkpoint, checkpoint.model_config, chosen, load_target(target), folder, manifest, 1))


def check(rung: Rung, name: str) -> tuple[float, str]:
    return next((c.value, c.status) for c in rung.checks if c.name == name)


@pytest.mark.parametrize("target", ["onnx", "executorch"])
def test_weights_near_1e_minus_5_are_kept(target: str, checkpoint: MemoryCheckpoint, tmp_path: Path) -> None:
    rung = climbed(checkpoint, target, "int4", tmp_path)
    assert rung.status == "PASS"
    errors = rung.series["tensor_errors"]
    assert list(errors.values()) == sorted(errors.values(), reverse=True), "the worst first"
    assert 0.02 < errors[NAME] < 0.12
    assert check(rung, "L2.tensor_error") == (max(errors.values()), "PASS")
    assert check(rung, "L2.tensor_error")[0] < 0.2
    assert {"vision.blocks.0.qkv.weight", "decoder.layers.0.mixer.qkv.weight"} < set(errors)
    assert "decoder.norm.weight" not in errors, "it is stored as it is"


def test_where_no_scale_reaches_them_they_are_refused(checkpoint: MemoryCheckpoint, tmp_path: Path) -> None:
    rung = climbed(checkpoint, "coreml", "int4", tmp_path)
    assert [c.name for c in rung.checks if c.status == "FAIL"] == ["L2.tensor_error"], "bit for bit, but lost"
    assert next(iter(rung.series["tensor_errors"])) == NAME
    error, status = check(rung, "L2.tensor_error")
    assert error == pytest.approx(0.995, abs=0.006) and status == "FAIL"
    assert rung.notes == [
        f"{NAME} was lost in storage: its error is 100% of its own size. Store its role with more bits, or scale the "
        "tensor up in the checkpoint, and down what reads it."
    ]


@pytest.mark.parametrize(
    ("recipe", "floats", "smallest", "error"),
    [
        ("int8", "float32", 2.0**-24, 0.013),
        ("int4", "float32", 2.0**-24, 0.13),
        ("int8", "float32", 2.0**-14, 1.0),
        ("fp32", "float16", 2.0**-14, 0.002),
        ("fp32", "float32", 2.0**-24, None),
    ],
)
def test_what_is_left_of_weights_near_1e_minus_5(
    recipe: str, floats: str, smallest: float, error: float | None, checkpoint: MemoryCheckpoint
) -> None:
    quantizer = Quantizer(Weights(checkpoint, checkpoint.model_config), load_recipe(recipe), smallest)
    for start in range(0, 128, 32):
        quantizer.reference_rows(NAME, start, start + 32, floats)
    found = quantizer.relative_errors().get(NAME)
    assert found == (None if error is None else pytest.approx(error, rel=0.3))

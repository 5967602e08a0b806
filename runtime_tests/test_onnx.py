"""The ONNX target on small random models: L1 in fp32, L2 bit for bit, sessions, files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from export.bundle.manifest import BundleError
from export.checkpoint.weights import Weights
from export.quantize.recipe import Recipe, load_recipe
from export.validate.case import Case
from export.validate.ladder import l2
from runtime_tests.conftest import VARIANTS, MemoryCheckpoint, build, climb_l1, variant
from targets import load_target

pytestmark = pytest.mark.usefixtures("traced_once", "compared_once")


def test_l1_holds_for_every_config(checkpoint: Any, tmp_path: Path) -> None:
    rung = climb_l1(checkpoint, tmp_path)
    assert rung.status == "PASS", [c for c in rung.checks if c.status == "FAIL"]
    assert {c.name for c in rung.checks} >= {"L1.logits", "L1.states", "L1.padding", "L1.embed", "L1.vision"}


RECIPES = ["fp32", "int8", "int4", "int4-mixed", "int4-asym"]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("tied", [True, False])
def test_l2_every_stored_weight_equals_the_quantiser(recipe: str, tied: bool, tmp_path: Path) -> None:
    checkpoint = MemoryCheckpoint(variant(tied=tied, num_hidden_layers=4, vision={"hidden_size": 64}))
    group = 32 if recipe.startswith("int4") else None
    chosen = load_recipe(recipe, group)
    _, manifest, _ = build(checkpoint, tmp_path, chosen)
    case = Case(checkpoint, checkpoint.model_config, chosen, load_target("onnx"), tmp_path, manifest, 1)
    rung = l2(case)
    assert rung.status == "PASS", rung.series
    weights = Weights(checkpoint, checkpoint.model_config)
    stored = sum(np.prod(p.shape) for p in weights.parameters.values() if not p.name.endswith("position_weight"))
    shared = np.prod(weights.parameter("embedding.weight").shape) if tied else 0
    values = {c.name: c.value for c in rung.checks}
    assert values["L2.weights"] >= stored - shared
    assert values["L2.missing"] == 0


@pytest.mark.parametrize("offset", [0, 1000])
def test_l2_notices_one_flipped_nibble(offset: int, small: Any, tmp_path: Path) -> None:
    recipe = load_recipe("int4", 32)
    _, manifest, _ = build(small, tmp_path, recipe)
    graph = onnx.load(tmp_path / "decoder.onnx", load_external_data=False).graph
    codes = next(t for t in graph.initializer if "|codes" in t.name)
    place = int({e.key: e.value for e in codes.external_data}["offset"]) + offset
    with open(tmp_path / "weights.bin", "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))
    rung = l2(Case(small, small.model_config, recipe, load_target("onnx"), tmp_path, manifest, 1))
    assert rung.status == "FAIL"
    assert rung.checks[0].value in (1, 2), "one weight, counted once per graph that reads it"


@pytest.mark.parametrize(
    "tensor", ["input_layernorm", "conv1d.weight[0:256]|flatten|float32|tap2", "A_log", "norm1.bias", "position_weight"]
)
def test_l2_notices_a_changed_tensor_that_is_no_matrix(tensor: str, small: Any, tmp_path: Path) -> None:
    recipe = load_recipe("int4", 32)
    _, manifest, _ = build(small, tmp_path, recipe)
    graphs = [onnx.load(tmp_path / f, load_external_data=False).graph for f in ("decoder.onnx", "vision.onnx")]
    found = next(t for g in graphs for t in g.initializer if tensor in t.name and t.external_data)
    with open(tmp_path / "weights.bin", "r+b") as file:
        file.seek(int({e.key: e.value for e in found.external_data}["offset"]))
        file.write(np.float32(0.123).tobytes())
    rung = l2(Case(small, small.model_config, recipe, load_target("onnx"), tmp_path, manifest, 1))
    assert rung.checks[0].value == 1
    assert len(rung.series["wrong"]) == 1


def test_l2_notices_a_parameter_that_no_graph_reads(small: Any, tmp_path: Path) -> None:
    recipe = load_recipe("int4", 32)
    _, manifest, _ = build(small, tmp_path, recipe)
    (tmp_path / "vision.onnx").unlink()
    rung = l2(Case(small, small.model_config, recipe, load_target("onnx"), tmp_path, manifest, 1))
    missing = rung.series["missing"]
    assert rung.status == "FAIL"
    assert "vision.patch.weight" in missing
    assert any(name.startswith("vision.position_weight@") for name in missing)
    assert not any(name.startswith("decoder") for name in missing)


def test_weights_outside_the_bundle_are_refused(small: Any, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    _, manifest, _ = build(small, folder, Recipe.unquantised())
    model = onnx.load(folder / "decoder.onnx", load_external_data=False)
    shutil.copy(folder / "weights.bin", tmp_path / "outside.bin")
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../outside.bin"
    (folder / "decoder.onnx").write_bytes(model.SerializeToString())
    case = Case(small, small.model_config, Recipe.unquantised(), load_target("onnx"), folder, manifest, 1)
    with pytest.raises(BundleError, match=r"lies in '\.\./outside\.bin', which the manifest does not list"):
        l2(case)


def test_a_tied_matrix_is_stored_once_and_aligned(small: Any, tmp_path: Path) -> None:
    build(small, tmp_path, load_recipe("int4", 32))
    graphs = [onnx.load(tmp_path / f, load_external_data=False).graph for f in ("decoder.onnx", "embed.onnx")]
    found = []
    for graph in graphs:
        for tensor in graph.initializer:
            entries = {e.key: e.value for e in tensor.external_data}
            if entries:
                assert int(entries["offset"]) % 256 == 0
                if "embed_tokens" in tensor.name and "|codes" in tensor.name:
                    found.append(entries["offset"])
    assert len(found) == 2
    assert found[0] == found[1]


def test_variants_cover_what_the_demand_names() -> None:
    texts = [v["text_config"] for v in VARIANTS.values()]
    assert {t["linear_num_value_heads"] // t["linear_num_key_heads"] for t in texts} >= {1, 2}
    assert {t["tie_word_embeddings"] for t in texts} == {True, False}
    assert any(t["num_hidden_layers"] % 4 for t in texts)
    assert len({t["head_dim"] for t in texts}) >= 3

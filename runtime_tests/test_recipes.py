"""Recipes that name parts of roles, some layers and scales that clip nothing: what every weight follows, end to end."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from export import plan
from export.bundle.manifest import SCHEMA, BundleError
from export.checkpoint.random import RandomCheckpoint
from export.checkpoint.weights import Weights, parameters
from export.model.config import FULL, ModelConfig
from export.pipeline import check_request, describe
from export.quantize.quantizer import Quantizer
from export.quantize.recipe import LAYERED, PARTS, ROLES, Recipe, Setting, general, layer_of, load_recipe
from export.quantize.rtn import quantize_block
from export.report import card
from export.sizes import SIZES
from export.spec import ExportSpec, UsageError
from export.validate.case import Case, Rung
from export.validate.ladder import l2, quality
from runtime_tests.conftest import MemoryCheckpoint, build, variant
from targets import load_target
from targets.base import Lowered

INT4, INT8, FLOAT = Setting(4, 32), Setting(8), Setting(32)
FIVE = {"decoder": INT4, "linear_attention": INT4, "lm_head": INT8, "embedding": INT4, "vision": INT8}
LAYERS = 4
"""Of the small model; the last has full attention."""

FINE = """
[fine]
decoder              = { bits = 32 }
attention            = { bits = 8 }
attention_out        = { bits = 4, group_size = 64 }
mlp                  = { bits = 4, group_size = 32 }
mlp_down             = { bits = 4, group_size = 64, scales = "absmax" }
linear_attention     = { bits = 4, group_size = 32 }
linear_attention_out = { bits = 8 }
lm_head              = { bits = 8, scales = "absmax" }
embedding            = { bits = 4, group_size = 32, scales = "absmax" }
vision               = { bits = 8 }
vision_merger        = { bits = 32 }

[fine.layers.first-1]
decoder              = { bits = 8 }

[fine.layers.last-2]
mlp_down             = { bits = 8 }
linear_attention_out = { bits = 4, group_size = 64 }
"""


@pytest.fixture
def fine(tmp_path: Path) -> Recipe:
    return _load(tmp_path, FINE)


@pytest.fixture(scope="module")
def weights() -> Weights:
    config = variant(num_hidden_layers=LAYERS, vision={"hidden_size": 64})
    return Weights(RandomCheckpoint(config, seed=1), ModelConfig.from_dict(config))


def _load(folder: Path, text: str, group_size: int | None = None) -> Recipe:
    file = folder / "mine.toml"
    file.write_text(text)
    return load_recipe(str(file), group_size)


def _settings(weights: Weights, recipe: Recipe) -> dict[str, Setting | None]:
    quantizer = Quantizer(weights, recipe)
    return {name: quantizer.setting(name) for name in weights.parameters}


# --- recipes of five roles ------------------------------------------------------------------------------------

BEFORE = {
    r"decoder\.layers\.\d+\.mlp\.(gate|up|down)\.weight": "decoder",
    r"decoder\.layers\.\d+\.mixer\.(q|k|v|gate)\.weight": "decoder",
    r"decoder\.layers\.\d+\.mixer\.(qkv|z)\.weight": "linear_attention",
    r"decoder\.head\.weight|embedding\.weight": "lm_head",  # the small model is tied
    r"vision\.(blocks\.\d+\.(qkv|out|up|down)|merger_up|merger_down)\.weight": "vision",
}
"""Names of weights -> their role when there were five; all others but the mixer's `out` were never quantised."""


@pytest.mark.parametrize("name", ["fp32", "int8", "int4", "int4-mixed", "int4-careful", "int4-asym"])
def test_recipes_of_five_roles_store_every_weight_as_before(name: str, weights: Weights) -> None:
    recipe = load_recipe(name)
    kinds = weights.config.text.layer_types
    found = _settings(weights, recipe)
    for parameter, setting in found.items():
        role = next((role for pattern, role in BEFORE.items() if re.fullmatch(pattern, parameter)), None)
        if out := re.fullmatch(r"decoder\.layers\.(\d+)\.mixer\.out\.weight", parameter):
            role = "decoder" if kinds[int(out[1])] == FULL else "linear_attention"
        before = recipe.roles[role] if role else FLOAT
        assert (setting or FLOAT) == before, parameter
    assert sum(setting is not None for setting in found.values()) == (0 if name == "fp32" else 38)
    entries = recipe.for_model(tied=True, num_layers=LAYERS).as_manifest()
    assert entries.keys() - {"conditioning"} == {"recipe", "roles"} and entries["roles"].keys() == set(ROLES)
    assert all(entry.keys() == {"bits", "group_size", "symmetric", "method"} for entry in entries["roles"].values())


def test_gates_convolution_and_norms_are_never_quantised(weights: Weights, tmp_path: Path) -> None:
    """FACTS: in_proj_a, in_proj_b and the convolution stay as they are."""
    roles = "".join(f"{role} = {{ bits = 4, group_size = 32 }}\n" for role in (*ROLES, *PARTS))
    found = _settings(weights, _load(tmp_path, f"[four]\n{roles}"))
    kept = {name for name, setting in found.items() if setting is None}
    linear = {f"decoder.layers.{i}.mixer.{part}" for i in range(3) for part in ("a.weight", "b.weight", "conv_weight")}
    assert linear <= kept
    assert all(re.search(r"norm|bias|conv_weight|decay_scale|\.[ab]\.weight$|patch|position", name) for name in kept)
    for published in ("in_proj_a", "in_proj_b", "conv1d"):
        name = f"model.language_model.layers.0.linear_attn.{published}.weight"
        assert plan.role_of(name, True) == "kept"
        assert plan.entry_of(name, load_recipe("int4"), True) == ("kept", FLOAT)


# --- parts and layers -----------------------------------------------------------------------------------------


def test_parts_have_the_setting_of_what_they_are_parts_of() -> None:
    recipe = Recipe("r", {**FIVE, "attention": INT8})
    assert recipe.entry("attention_out") == ("attention", INT8)
    assert recipe.entry("mlp_down") == recipe.entry("mlp") == ("decoder", INT4)
    assert recipe.entry("linear_attention_out") == ("linear_attention", INT4)
    assert recipe.entry("vision_merger") == ("vision", INT8)
    assert replace(recipe, roles={**recipe.roles, "mlp": FLOAT}).entry("mlp_down") == ("mlp", FLOAT)
    assert [general(role) for role in PARTS] == ["decoder"] * 4 + ["linear_attention", "vision"]
    assert set(LAYERED) == {*PARTS, "decoder", "linear_attention"} - {"vision_merger"}
    with pytest.raises(ValueError, match=r"recipe r has no setting for role 'ears'"):
        recipe.entry("ears")


def test_every_weight_follows_the_nearest_entry(fine: Recipe, weights: Weights) -> None:
    found = _settings(weights, fine)
    layer = "decoder.layers.{}".format
    expected = {
        f"{layer(0)}.mlp.up.weight": INT8,  # the layer's decoder, before the mlp of all layers
        f"{layer(0)}.mlp.down.weight": INT8,
        f"{layer(0)}.mixer.qkv.weight": INT4,
        f"{layer(0)}.mixer.out.weight": INT8,
        f"{layer(1)}.mlp.gate.weight": INT4,
        f"{layer(1)}.mlp.down.weight": Setting(4, 64, scales="absmax"),
        f"{layer(1)}.mixer.out.weight": INT8,
        f"{layer(2)}.mlp.up.weight": INT4,
        f"{layer(2)}.mlp.down.weight": INT8,
        f"{layer(2)}.mixer.out.weight": Setting(4, 64),
        f"{layer(2)}.mixer.z.weight": INT4,
        f"{layer(3)}.mlp.down.weight": INT8,
        f"{layer(3)}.mixer.q.weight": INT8,
        f"{layer(3)}.mixer.gate.weight": INT8,
        f"{layer(3)}.mixer.out.weight": Setting(4, 64),
        "decoder.head.weight": Setting(8, scales="absmax"),
        "embedding.weight": Setting(8, scales="absmax"),
        "vision.blocks.0.qkv.weight": INT8,
        "vision.merger_up.weight": None,
        "vision.merger_down.weight": None,
    }
    assert {name: found[name] for name in expected} == expected
    for name in ("model.language_model.layers.12.mlp.up_proj.weight", "decoder.layers.12.mlp.up.weight"):
        assert layer_of(name) == 12
    assert layer_of("vision.blocks.3.up.weight") is None


@pytest.mark.parametrize(
    ("name", "layers"), [("first-3", [0, 1, 2]), ("last-2", [22, 23]), ("4-7", [4, 5, 6, 7]), ("9", [9])]
)
def test_layers_are_named_from_both_ends_by_range_or_number(name: str, layers: list[int], tmp_path: Path) -> None:
    text = "[mine]\n" + "".join(f"{role} = {{ bits = 8 }}\n" for role in ROLES)
    recipe = _load(tmp_path, f"{text}[mine.layers.{name}]\nmlp = {{ bits = 4, group_size = 32 }}")
    made = recipe.for_model(tied=True, num_layers=24)
    assert [i for i in range(24) if made.setting("mlp", i) == INT4] == layers
    assert made.entry("mlp_down", layers[0]) == (f"layers.{name}.mlp", INT4)
    assert made.setting("attention", layers[0]) == made.setting("mlp") == INT8
    assert made.for_model(tied=True, num_layers=24) == made
    if name == "last-2":
        with pytest.raises(ValueError, match=r"recipe mine: where layers.last-2 is only for_model can tell"):
            recipe.setting("mlp", 3)


@pytest.mark.parametrize(
    ("tables", "layers", "message"),
    [
        ("4-11", 8, r"recipe mine: layers.4-11 does not fit a model of 8 layers, which are 0 to 7; name fewer"),
        ("first-9", 8, r"layers.first-9 does not fit a model of 8 layers"),
        ("last-9", 8, r"layers.last-9 does not fit a model of 8 layers"),
        ("last-2 first-3", 4, r"layers.first-3 and layers.last-2 both hold layer 2 of 4; give each layer to one of"),
        ("2-3 3", 8, r"layers.2-3 and layers.3 both hold layer 3 of 8"),
    ],
)
def test_layers_must_fit_the_model(tables: str, layers: int, message: str, tmp_path: Path) -> None:
    text = "[mine]\n" + "".join(f"{role} = {{ bits = 8 }}\n" for role in ROLES)
    text += "".join(f"[mine.layers.{name}]\nmlp = {{ bits = 32 }}\n" for name in tables.split())
    recipe = _load(tmp_path, text)
    if tables != "2-3 3":
        recipe.for_model(tied=False, num_layers=24)
    with pytest.raises(UsageError, match=message):
        recipe.for_model(tied=False, num_layers=layers)


BASE = "[mine]\n" + "".join(f"{role} = {{ bits = 8 }}\n" for role in ROLES)
WRONG = {
    "part without bits": ("attention = {}", r"recipe mine: role 'attention' has no bits; choose 4, 8 or 32"),
    "no setting": ("mlp = 8", r"recipe mine: role 'mlp' is 8; write \{ bits = 8 \} or so"),
    "role": ("head = { bits = 8 }", r"unknown role 'head'; the roles are decoder, .*, and as parts of them attent"),
    "scales": ("mlp = { bits = 8, scales = 'best' }", r"role 'mlp' has scales 'best'; choose search or absmax"),
    "scales of floats": (
        "mlp = { bits = 32, scales = 'absmax' }",
        r"32 bits with groups, zero points or scales; .*leave out group_size, symmetric and scales",
    ),
    "layers no table": ("layers = 4", r"recipe mine: layers is 4; write a table \[mine.layers.first-4\] with a line"),
    "layers empty": ("[mine.layers.first-4]", r"recipe mine: layers.first-4 sets no role; give a line such as mlp"),
    "layers no roles": ("layers.first-4 = 8", r"recipe mine: layers.first-4 sets no role"),
    "layers' role": (
        "[mine.layers.first-4]\nlm_head = { bits = 8 }",
        r"layers.first-4 has 'lm_head'; the roles of a decoder layer are decoder, linear_attention, attention, ",
    ),
    "layers' vision": ("[mine.layers.7]\nvision_merger = { bits = 8 }", r"layers.7 has 'vision_merger'; the roles of"),
    "layers' setting": (
        "[mine.layers.last-2]\nmlp = { bits = 3 }",
        r"role 'layers.last-2.mlp' has bits 3; choose 4, 8 or 32",
    ),
    **{
        f"layers {name}": (f"[mine.layers.{name}]\nmlp = {{ bits = 8 }}", rf"recipe mine: '{name}' names no layers; wr")
        for name in ("first", "first-0", "last-0", "7-4", "-1", "4_11", "all", "first-2-3")
    },
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_part_or_table_of_layers_is_a_usage_error(case: str, tmp_path: Path) -> None:
    text, message = WRONG[case]
    with pytest.raises(UsageError, match=message):
        _load(tmp_path, BASE + text)


def test_group_size_changes_the_groups_of_layers_too(tmp_path: Path) -> None:
    recipe = _load(tmp_path, FINE, group_size=128)
    groups = {entry: setting.group_size for entry, setting in recipe.entries() if setting.bits == 4}
    assert set(groups) == {
        "attention_out", "mlp", "mlp_down", "linear_attention", "embedding", "layers.last-2.linear_attention_out",
    }  # fmt: skip
    assert set(groups.values()) == {128}
    assert recipe.name == "fine-g128" and dict(recipe.entries())["layers.last-2.mlp_down"] == INT8


def test_refusals_name_the_entry(fine: Recipe, weights: Weights) -> None:
    recipe = fine.for_model(tied=True, num_layers=LAYERS)
    with pytest.raises(UsageError, match=r"group_size 64: layers.2.mixer.out has 96 .*, not a multiple of 64; use 32$"):
        recipe.check([("layers.2.mixer.out", "linear_attention_out", 96)])
    with pytest.raises(UsageError, match=r"use 8 or 32 bits for role 'layers.last-2.linear_attention_out'"):
        recipe.check([("layers.2.mixer.out", "linear_attention_out", 2000)])
    able = load_target("executorch").capabilities
    wrong = replace(fine.layers[0], roles={"mlp": Setting(4, 32, symmetric=False)})
    spec = ExportSpec("executorch", "tiny")
    able.check("executorch", spec, fine)
    with pytest.raises(UsageError, match=r"executorch has no zero points at 4 bits; recipe fine needs them"):
        able.check("executorch", spec, replace(fine, layers=(wrong,)))
    wrong = replace(wrong, roles={"mlp": Setting(4, 16)})
    with pytest.raises(UsageError, match=r"executorch cannot store role 'layers.first-1.mlp' in groups of 16"):
        able.check("executorch", spec, replace(fine, layers=(wrong,)))
    wrong = replace(wrong, last=LAYERS, roles={"mlp": INT8})
    with pytest.raises(UsageError, match=rf"layers.first-1 does not fit a model of {LAYERS} layers"):
        check_request(spec, load_target("executorch"), weights, replace(fine, layers=(wrong,)))


# --- who reads recipes ----------------------------------------------------------------------------------------


def _manifest(recipe: Recipe, weights: Weights) -> dict[str, Any]:
    text = weights.config.text
    made = recipe.for_model(text.tie_word_embeddings, text.num_hidden_layers)
    spec = ExportSpec("onnx", "tiny", checkpoint="random")
    return describe(spec, weights.checkpoint, weights, made, load_target("onnx"), Lowered({}, [], {}), {})


def test_the_manifest_says_what_every_weight_follows(fine: Recipe, weights: Weights) -> None:
    quantization = _manifest(fine, weights)["quantization"]
    document = json.loads(SCHEMA.read_text())
    schema = {"$defs": document["$defs"], **document["properties"]["quantization"]}
    jsonschema.validate(quantization, schema)
    assert set(quantization["roles"]) == {*ROLES, *PARTS}
    assert quantization["roles"]["lm_head"] == {
        "bits": 8, "group_size": None, "symmetric": True, "method": "rtn", "scales": "absmax", "activations": "int8",
    }  # fmt: skip
    assert [(table["first"], table["last"], sorted(table["roles"])) for table in quantization["layers"]] == [
        (0, 0, ["decoder"]), (2, 3, ["linear_attention_out", "mlp_down"]),
    ]  # fmt: skip
    again = Recipe.from_manifest(json.loads(json.dumps(quantization)))
    assert [table.name for table in again.layers] == ["0", "2-3"]
    assert _settings(weights, again) == _settings(weights, fine)
    for broken in (
        {**quantization, "layers": [{"first": 0, "roles": {}}]},
        {**quantization, "layers": [{"first": 0, "last": 1, "roles": {"mlp": {"bits": 5}}}]},
        {**quantization, "roles": {**quantization["roles"], "mlp": {}}},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, schema)
    sightless = replace(weights.config, vision=None)
    without = _manifest(fine, Weights(weights.checkpoint, sightless))["quantization"]
    assert set(quantization["roles"]) - set(without["roles"]) == {"vision", "vision_merger"}


def test_the_card_lists_parts_and_layers(fine: Recipe, weights: Weights) -> None:
    text = card.render({**_manifest(fine, weights), "reports": {}}, None, "load it")
    assert "| mlp | 4 | 32 |\n| mlp_down | 4 | 64 |" in text
    assert "| decoder in layers 0 to 0 | 8 | channel |\n| linear_attention_out in layers 2 to 3 | 4 | 64 |" in text
    plain = card.render({**_manifest(load_recipe("int8"), weights), "reports": {}}, None, "load it")
    assert "in layers" not in plain and plain.count("| 8 | channel |\n") == 5


def test_the_gates_are_those_of_the_narrowest_weights_there_are(weights: Weights) -> None:
    target = load_target("onnx")

    def row(roles: dict[str, Setting], role: str | None = None, config: ModelConfig = weights.config) -> str:
        recipe = Recipe("r", {**dict.fromkeys(ROLES, INT8), **roles})
        return quality(Case(weights.checkpoint, config, recipe, target, Path(), {}, 1), role)

    assert row({"decoder": INT4}) == row({"mlp_down": INT4}) == "int4"
    assert row({"decoder": INT4, "attention": INT8, "mlp": INT8}) == "int8", "no weight has the decoder's own setting"
    assert row({"embedding": INT4}) == "int8", "a tied one has the head's"
    assert row({"vision_merger": INT4}, "vision") == "int4" and row({"mlp": INT4}, "vision") == "int8"
    floats = dict.fromkeys(ROLES, FLOAT)
    assert row({**floats, "vision": INT8}) == "int8" and row(floats) == "fp32"
    assert row({**floats, "vision": INT8}, config=replace(weights.config, vision=None)) == "fp32"


def test_the_plan_counts_each_entry(fine: Recipe, tmp_path: Path) -> None:
    (tmp_path / "fine.toml").write_text(FINE)
    spec = ExportSpec("onnx", "0.8b", checkpoint="random", recipe=str(tmp_path / "fine.toml"))
    made = plan.make(spec)
    config = ModelConfig.from_dict(SIZES["0.8b"].config or {})
    recipe = fine.for_model(tied=True, num_layers=config.text.num_hidden_layers)
    counts: dict[str, int] = {}
    for parameter in parameters(config).values():
        if parameter.role not in ("kept", "embedding"):
            entry, _ = recipe.entry(parameter.role, layer_of(parameter.name))
            counts[entry] = counts.get(entry, 0) + parameter.shape[0] * parameter.shape[1]
    assert {role.role: role.parameters for role in made.roles if role.role != "kept"} == counts
    assert set(counts) == {
        "attention", "attention_out", "mlp", "mlp_down", "linear_attention", "linear_attention_out", "lm_head",
        "vision", "vision_merger", "layers.first-1.decoder", "layers.last-2.mlp_down",
        "layers.last-2.linear_attention_out",
    }  # fmt: skip
    assert counts["layers.first-1.decoder"] == 3 * 1024 * 3584 and counts["layers.last-2.mlp_down"] == 2 * 1024 * 3584
    down = next(role for role in made.roles if role.role == "mlp_down")
    assert down.size_bytes == down.parameters // 2 + 4 * down.parameters // 64
    assert "layers.last-2.linear_attention_out" in plan.render(made, as_json=False)
    with pytest.raises(UsageError, match=r"layers.first-1 and layers.last-2 both hold layer 0 of 2"):
        plan.make(replace(spec, num_layers=2))


@pytest.mark.parametrize("target", ["onnx", "executorch", "coreml"])
def test_l2_every_target_stores_what_the_recipe_says(target: str, fine: Recipe, tmp_path: Path) -> None:
    checkpoint = MemoryCheckpoint(variant(num_hidden_layers=LAYERS, vision={"hidden_size": 64}))
    folder = tmp_path / "bundle"
    folder.mkdir()
    _, manifest, _ = build(checkpoint, folder, fine, target, lengths=(16,))
    rung = l2(Case(checkpoint, checkpoint.model_config, fine, load_target(target), folder, manifest, 1))
    assert rung.status == "PASS", rung.series

    def judged(setting: Setting) -> Rung:
        """By another recipe. Only one layer, which has no table, follows it."""
        other = replace(fine, roles={**fine.roles, "mlp_down": setting})
        return l2(Case(checkpoint, checkpoint.model_config, other, load_target(target), folder, manifest, 1))

    name = "decoder.layers.1.mlp.down.weight"
    assert judged(Setting(4, 64)).series["wrong"] == [name], "files do not say how scales were chosen"
    for setting, told in ((Setting(8), "in 8 bits, one scale per output channel"), (Setting(32), "as floats")):
        message = f"stores {name} in 4 bits, groups of 64, recipe fine says {told}; a bundle is judged by the recipe"
        with pytest.raises(BundleError, match=rf"{re.escape(message)} .*: restore its manifest, or export it anew"):
            judged(setting)


# --- scales that clip nothing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_absmax_scales_clip_nothing(bits: int) -> None:
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(4, 16384, generator=generator)
    group = 64 if bits == 4 else None
    searched, plain = (quantize_block(weight, Setting(bits, group, scales=scales)) for scales in ("search", "absmax"))
    high = (1 << (bits - 1)) - 1
    groups = weight.reshape(4, -1, group or 16384)
    # The scale has 8 significant bits, so that the largest weight is met to 2^-8 of itself.
    torch.testing.assert_close(plain.scales, groups.abs().amax(2) / high, rtol=2**-8, atol=0)
    error = {name: (block.dequantize() - weight) for name, block in (("search", searched), ("absmax", plain))}
    assert (error["absmax"].abs().reshape(groups.shape) <= 0.52 * plain.scales.unsqueeze(2)).all()
    assert not (error["search"].abs().reshape(groups.shape) <= 0.52 * searched.scales.unsqueeze(2)).all(), "it clips"
    assert error["search"].norm() < error["absmax"].norm()


def test_absmax_keeps_the_whole_range_with_zero_points() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(8))
    block = quantize_block(weight, Setting(4, 64, symmetric=False, scales="absmax"))
    groups = weight.reshape(64, 4, 64)
    torch.testing.assert_close(block.scales, (groups.amax(2) - groups.amin(2)) / 15, rtol=2**-8, atol=0)
    # Half a step of the code, half of the zero point, and what rounding the scale moves the ends of 15 steps by.
    assert ((block.dequantize() - weight).abs().reshape(groups.shape) <= 1.06 * block.scales.unsqueeze(2)).all()

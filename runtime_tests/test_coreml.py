"""The Core ML target on small random models: L1 with and without float16, L2 bit for bit, cuts, states, packages."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export.checkpoint.weights import Weights
from export.model import delta_rule as reference_rule
from export.model.config import ModelConfig
from export.plan import state_bytes
from export.quantize.conditioned import weights_for
from export.quantize.quantizer import Quantizer
from export.quantize.recipe import Recipe, Setting, general, load_recipe
from export.sizes import SIZES
from export.spec import ExportSpec, UsageError
from export.validate import drift, metrics
from export.validate.case import Case
from export.validate.ladder import l2
from export.validate.lowered import l1
from runtime_tests import mil
from runtime_tests.conftest import CONTEXT, MemoryCheckpoint, build, climb_l1, variant
from runtime_tests.once import Memory
from targets import load_target
from targets.base import Job
from targets.table import Table
from targets.to_coreml import cut as cutting
from targets.to_coreml import delta_rule, stored
from targets.to_coreml.blob import BlobTensor
from targets.to_coreml.cut import MAX_BYTES, common_bytes, cut, head_bytes, head_pieces, layer_bytes
from targets.to_coreml.interpreter import Interpreter
from targets.to_coreml.program import Package

pytestmark = pytest.mark.usefixtures("traced_once", "compared_once")

NAME = "coreml"


def test_l1_holds_for_every_config(checkpoint: Any, tmp_path: Path) -> None:
    """80 tokens are a full chunk of the delta rule and a shorter one."""
    rung = climb_l1(checkpoint, tmp_path, NAME, lengths=(16, 80))
    assert rung.status == "PASS", [c for c in rung.checks if c.status == "FAIL"]
    assert {c.name for c in rung.checks} >= {"L1.exact.logits", "L1.exact.vision", "L1.float16.states"}


UNTIED = variant(linear_num_key_heads=4, linear_num_value_heads=4, tied=False, num_hidden_layers=5, vocab_size=400)


@pytest.mark.parametrize(
    ("profile", "layout"), [("ane", "separate"), ("gpu", "stacked"), ("gpu", "explicit"), ("ane", "stacked")]
)
def test_l1_holds_for_every_profile_and_layout_in_several_packages(
    profile: str, layout: str, tmp_path: Path
) -> None:
    """Five layers in packages of two, an untied head in four pieces of its own columns."""
    rung = climb_l1(
        MemoryCheckpoint(UNTIED),
        tmp_path,
        NAME,
        lengths=(80,),
        profile=profile,
        state_layout=layout,
        max_file_layers=2,
        max_head_columns=128,
    )
    assert rung.status == "PASS", [c for c in rung.checks if c.status == "FAIL"]
    assert sorted(path.name for path in tmp_path.glob("*.mlpackage")) == [
        "decoder_0.mlpackage",
        "decoder_1.mlpackage",
        "decoder_2.mlpackage",
        "vision.mlpackage",
    ]


@pytest.fixture(scope="module")
def heads() -> MemoryCheckpoint:
    """Four layers and a head of 400 rows, tied."""
    return MemoryCheckpoint(variant(num_hidden_layers=4, vocab_size=400, vision={"depth": 1}))


def case(checkpoint: MemoryCheckpoint, folder: Path, recipe: Recipe, **limits: Any) -> Case:
    _, manifest, _ = build(checkpoint, folder, recipe, NAME, lengths=(16,), **limits)
    return Case(checkpoint, checkpoint.model_config, recipe, load_target(NAME), folder, manifest, 1)


ASYMMETRIC = Recipe(
    "asymmetric",
    {
        role: Setting(4, 64, symmetric=False) if role != "vision" else Setting(8)
        for role in ("decoder", "linear_attention", "lm_head", "embedding", "vision")
    },
)
SYMMETRIC_HEAD = replace(ASYMMETRIC, roles={**ASYMMETRIC.roles, "lm_head": Setting(4, 32), "embedding": Setting(4, 32)})


@pytest.mark.parametrize(
    ("recipe", "tied", "limits"),
    [
        (load_recipe("int4", 32), True, {}),
        (load_recipe("int4", 32), True, {"palettes": True}),
        (load_recipe("int4", 32), False, {"palettes": True, "max_head_columns": 128}),
        (load_recipe("int4", 32), False, {"palettes": True, "profile": "ane"}),
        (ASYMMETRIC, True, {}),
        (load_recipe("int8"), True, {"profile": "ane"}),
        (load_recipe("fp32"), False, {}),
        (SYMMETRIC_HEAD, False, {"max_head_columns": 128, "max_file_bytes": 400_000}),
    ],
    ids=[
        "int4", "palettes", "palettes-pieces", "palettes-untied-ane", "asymmetric-tied", "int8-ane", "fp32-untied",
        "asymmetric-cut",
    ],
)
def test_l2_every_stored_weight_equals_the_quantiser(
    recipe: Recipe, tied: bool, limits: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks of fewer rows than any parameter has, as those of a 9B are read: its biases have more than a block."""
    monkeypatch.setattr(stored, "ROWS", 48)
    checkpoint = MemoryCheckpoint(variant(tied=tied, num_hidden_layers=4, vocab_size=400, vision={"hidden_size": 64}))
    rung = l2(case(checkpoint, tmp_path, recipe, **limits))
    assert rung.status == "PASS", rung.series


def weight_files(folder: Path) -> dict[str, int]:
    """Package of the decoder -> bytes of its weight file."""
    found = folder.glob("decoder*.mlpackage/Data/com.apple.CoreML/weights/weight.bin")
    return {path.parents[3].name: path.stat().st_size for path in found}


def least_limit(plan: Job) -> int:
    """The smallest --max-file-size that is not refused, found by following what the refusals say."""
    most = 1
    while True:
        try:
            cut(replace(plan, max_file_bytes=most))
        except UsageError as error:
            (least,) = re.findall(r"give at least (\d+)", str(error))
            assert int(least) > most
            most = int(least)
        else:
            return most


@pytest.mark.parametrize(
    ("recipe", "tied", "limits"),
    [
        ("int4", True, {"profile": "ane", "palettes": True, "max_head_columns": 384}),
        ("int4", True, {"profile": "gpu", "palettes": True, "max_head_columns": 384}),
        ("int4", False, {"profile": "ane", "palettes": True, "max_head_columns": 512, "state_layout": "stacked"}),
        ("int4", True, {"profile": "gpu", "max_head_columns": 512, "state_layout": "explicit"}),
        ("int4-asym", True, {"profile": "gpu", "max_head_columns": 512}),
        ("int8", False, {"profile": "ane", "max_head_columns": 512}),
        ("fp32", True, {"profile": "gpu", "max_head_columns": 512}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else str(value),
)
def test_no_weight_file_is_larger_than_the_limit(
    recipe: str, tied: bool, limits: dict[str, Any], tmp_path: Path
) -> None:
    """The smallest limit that is accepted, for 4 layers and a head that one package cannot hold."""
    checkpoint = MemoryCheckpoint(variant(tied=tied, num_hidden_layers=4, vocab_size=2900, vision={"depth": 1}))
    chosen = load_recipe(recipe, 32 if "int4" in recipe else None)
    weights = weights_for(checkpoint, checkpoint.model_config, chosen.conditioning)
    quantizer = Quantizer(weights, chosen)
    plan = Job(weights.config, quantizer, 128, (16, 80), (), tmp_path, **limits)
    most = least_limit(plan)
    build(checkpoint, tmp_path, chosen, NAME, lengths=(16, 80), max_file_bytes=most, **limits)
    files = weight_files(tmp_path)
    assert len(files) > 2
    # No constant is in every package, but room is left for all of them.
    assert most - common_bytes(plan) <= max(files.values()) <= most


@pytest.mark.parametrize("palettes", [False, True])
def test_files_are_hardly_smaller_than_planned(palettes: bool, tmp_path: Path) -> None:
    checkpoint = MemoryCheckpoint(variant(num_hidden_layers=4, vocab_size=400))
    limits: dict[str, Any] = {"palettes": palettes, "profile": "ane"}
    _, _, quantizer = build(checkpoint, tmp_path, load_recipe("int4", 32), NAME, lengths=(16,), **limits)
    plan = Job(checkpoint.model_config, quantizer, 128, (16,), (), tmp_path, **limits)
    planned = common_bytes(plan) + head_bytes(plan, [range(400)], tied=True)
    planned += sum(layer_bytes(plan, layer) for layer in range(4))
    (written,) = weight_files(tmp_path).values()
    assert 0.95 * planned <= written <= planned


@pytest.mark.parametrize("default", [False, True])
def test_a_package_that_was_planned_too_small_is_not_written(
    default: bool, small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a constant had been forgotten: what is planned is compared with the limit once more, exactly."""
    build(small, tmp_path, load_recipe("int4", 32), NAME, lengths=(16,))
    (size,) = weight_files(tmp_path).values()
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.setattr(cutting, "common_bytes", lambda job: 0)
    limits = {} if default else {"max_file_bytes": size - 1}
    if default:
        monkeypatch.setattr(cutting, "MAX_BYTES", size - 1)
    message = (
        rf"--max-file-size {size - 1}: the weights of decoder\.mlpackage would have {size} bytes; "
        rf"give at least {size}, or put fewer layers into a package with --max-file-layers"
    )
    with pytest.raises(UsageError, match=message):
        build(small, other, load_recipe("int4", 32), NAME, lengths=(16,), **limits)
    assert weight_files(other) == {}


def test_a_vision_encoder_that_is_too_large_is_refused_before_the_decoder(tmp_path: Path) -> None:
    checkpoint = MemoryCheckpoint(variant(num_hidden_layers=1, vision={"depth": 6}))
    limits = {"max_file_bytes": 600_000}
    message = (
        r"--max-file-size 600000: the weights of vision\.mlpackage would have (\d+) bytes; "
        r"give at least (\d+), or leave the vision encoder out with --no-vision: it is not cut"
    )
    with pytest.raises(UsageError, match=message) as refused:
        build(checkpoint, tmp_path, Recipe.unquantised(), NAME, lengths=(16,), **limits)
    assert list(tmp_path.iterdir()) == []
    found = re.search(message, str(refused.value))
    assert found is not None and found[1] == found[2]
    build(checkpoint, tmp_path, Recipe.unquantised(), NAME, lengths=(16,), max_file_bytes=int(found[1]))
    assert (tmp_path / "vision.mlpackage/Data/com.apple.CoreML/weights/weight.bin").stat().st_size == int(found[1])


def test_what_is_lowered_to_be_compared_has_no_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of the head that a package may hold quantised, and may not as L1 has them, in float16."""
    linear, full = "linear_attention", "full_attention"
    kinds = {"num_hidden_layers": 2, "layer_types": [linear, full], "vocab_size": 8192}
    checkpoint = MemoryCheckpoint(variant(**kinds, tied=False, vision={"depth": 1}))
    monkeypatch.setattr(cutting, "MAX_BYTES", 900_000)
    whole = case(checkpoint, tmp_path, load_recipe("int4", 32), max_head_columns=4096)
    whole.tokens = 32
    floats = Quantizer(whole.weights, Recipe.unquantised())
    with pytest.raises(UsageError, match="--max-file-size 900000: a piece of the head alone"):
        cut(Job(whole.config, floats, 32, (16,), (), tmp_path, max_head_columns=4096))
    rung = l1(whole)
    assert rung.status == "PASS", [c for c in rung.checks if c.status == "FAIL"]
    monkeypatch.setattr(cutting, "MAX_BYTES", 1000)
    with drift._in_layout(whole, "explicit", 32) as session:
        assert session.states()


@pytest.mark.parametrize(("profile", "layout"), [("gpu", None), ("ane", "stacked"), ("ane", "explicit")])
def test_the_plan_counts_every_state(
    profile: str, layout: str | None, heads: MemoryCheckpoint, tmp_path: Path
) -> None:
    """Caches are padded to 32 rows, and convolutions on the Neural Engine keep a longer history."""
    limits: dict[str, Any] = {"profile": profile, "state_layout": layout}
    _, manifest, _ = build(heads, tmp_path, load_recipe("int8"), NAME, lengths=(16,), **limits)
    spec = ExportSpec(NAME, "tiny", context_length=CONTEXT, prefill_lengths=(16,), profile=profile, state_layout=layout)
    written = sum(math.prod(s["shape"]) * np.dtype(s["dtype"]).itemsize for s in manifest["states"])
    assert state_bytes(heads.model_config, spec) == written


def test_l2_notices_one_changed_byte(small: Any, tmp_path: Path) -> None:
    whole = case(small, tmp_path, load_recipe("int4", 32))
    file = tmp_path / "decoder.mlpackage/Data/com.apple.CoreML/weights/weight.bin"
    package = Package(tmp_path / "decoder.mlpackage")
    operation = next(
        o for o in package.function("decode").operations if o.name == "decoder_layers_0_mlp_up_weight"
    )
    _, offset = operation.inputs["data"][0].key[:2]  # type: ignore[union-attr]
    with open(file, "r+b") as out:
        out.seek(offset + 64 + 5)
        byte = out.read(1)[0]
        out.seek(offset + 64 + 5)
        out.write(bytes([byte ^ 1]))
    rung = l2(whole)
    assert rung.checks[0].value == 1
    assert rung.series["wrong"] == ["decoder.layers.0.mlp.up.weight"]


def test_l2_notices_a_wrong_number_in_the_palette(heads: MemoryCheckpoint, tmp_path: Path) -> None:
    """All matrices that are indices share it; the tied head is none of them."""
    whole = case(heads, tmp_path, load_recipe("int4", 32), palettes=True)
    operations = Package(tmp_path / "decoder.mlpackage").function("decode").operations
    luts = [o.inputs["lut"][0] for o in operations if o.type == "constexpr_lut_to_dense"]
    lut = luts[0]
    assert isinstance(lut, BlobTensor) and lut.shape == (1, 1, 16, 1)
    assert {one.key for one in luts if isinstance(one, BlobTensor)} == {lut.key}
    np.testing.assert_array_equal(lut.array().reshape(-1), np.arange(-8, 8))
    with open(lut.file, "r+b") as out:
        out.seek(lut.offset + 64 + 2 * 11)  # behind the record
        out.write(np.float16(4).tobytes())  # where 3 belongs
    wrong = l2(whole).series["wrong"]
    parameters = Weights(heads, heads.model_config).parameters
    quantised = {n for n, p in parameters.items() if general(p.role) in ("decoder", "linear_attention")}
    assert set(wrong) == quantised


def test_a_tied_embedding_is_read_from_the_pieces_of_the_head(tmp_path: Path) -> None:
    """The pieces lie together in weight.bin, so that a table over them is the whole matrix."""
    checkpoint = MemoryCheckpoint(variant(num_hidden_layers=4, vocab_size=400))
    _, manifest, quantizer = build(
        checkpoint, tmp_path, load_recipe("int4", 32), NAME, lengths=(16,), max_head_columns=128
    )
    (stage,) = manifest["signatures"]["embed"]["stages"]
    assert stage["file"] == "decoder.mlpackage/Data/com.apple.CoreML/weights/weight.bin"
    assert [t["shape"] for t in manifest["signatures"]["decode"]["outputs"]] == [[1, 128], [1, 128], [1, 128], [1, 16]]
    table = Table(tmp_path, stage)
    assert np.array_equal(table[slice(0, 400)], quantizer.reference_rows("embedding.weight", 0, 400).numpy())


def job(size: str, folder: Path, recipe: str = "int4", **limits: Any) -> Job:
    """Of random weights in the true shapes; nothing is read for planning."""
    config = ModelConfig.from_dict(SIZES[size].config or {})
    quantizer = Quantizer(Weights(None, config), load_recipe(recipe))  # type: ignore[arg-type]
    return Job(config, quantizer, 1024, (64, 512), (), folder, **limits)


@pytest.mark.parametrize(("size", "recipe", "packages"), [("2b", "int4", 2), ("4b", "int8", 5), ("9b", "int4", 5)])
def test_real_sizes_are_cut_within_the_limits(size: str, recipe: str, packages: int, tmp_path: Path) -> None:
    plan = job(size, tmp_path, recipe)
    parts = cut(plan)
    assert len(parts) == packages
    layers = [layer for part in parts for layer in part.layers]
    assert layers == list(range(plan.config.text.num_hidden_layers))
    pieces = [piece for part in parts for piece in part.head]
    assert [row for piece in pieces for row in (piece.start, piece.stop)][1:-1:2] == [p.start for p in pieces[1:]]
    assert pieces[0].start == 0 and pieces[-1].stop == 248_320
    assert max(map(len, pieces)) < 65_536
    for part in parts:
        size_bytes = common_bytes(plan) + sum(layer_bytes(plan, layer) for layer in part.layers)
        assert size_bytes + (head_bytes(plan, list(part.head), tied=part.tied) if part.head else 0) <= MAX_BYTES


def test_limits_that_cannot_hold_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--max-file-size 1000000: layer 0 alone has \d+ bytes, \d+ .* is not cut"):
        cut(job("2b", tmp_path, max_file_bytes=1_000_000))
    with pytest.raises(UsageError, match="--max-head-columns 100: a piece of the head has a multiple of 128 columns"):
        head_pieces(400, 100)


ORIGIN: dict[str, Any] = {"license": "apache-2.0", "source": {"kind": "hub", "id": "Qwen/Q", "revision": "1a2b"}}
PIECES = {"max_file_layers": 2, "max_head_columns": 128}


@pytest.mark.parametrize(
    ("recipe", "limits", "packages"),
    [
        (load_recipe("int4", 32), {}, 2),
        (load_recipe("int8"), {"profile": "ane", **PIECES}, 3),
        (load_recipe("int4", 32), {"state_layout": "stacked", **PIECES}, 3),
        (load_recipe("int4", 32), {"profile": "ane", "state_layout": "explicit"}, 2),
        (load_recipe("int4", 32), {"palettes": True, **PIECES}, 3),
        (load_recipe("int4", 32), {"palettes": True, "profile": "ane"}, 2),
        (ASYMMETRIC, {"state_layout": "explicit", **PIECES}, 3),
        (Recipe.unquantised(), {}, 2),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else None,
)
def test_packages_open_in_coremltools_and_say_what_everything_is(
    recipe: Recipe, limits: dict[str, Any], packages: int, heads: MemoryCheckpoint, tmp_path: Path
) -> None:
    from coremltools.converters.mil.frontend.milproto.load import load

    build(heads, tmp_path, recipe, NAME, lengths=(16,), **limits, **ORIGIN)
    found = sorted(tmp_path.glob("*.mlpackage"))
    assert len(found) == packages
    for path in found:
        model = mil.ct.models.MLModel(str(path), skip_model_load=True)
        spec = model.get_spec()
        load(spec, spec.specificationVersion, model.weights_dir).validate()  # type inference of every operation
        about = spec.description
        assert spec.specificationVersion == 9
        assert about.metadata.author == "Qwen/Q at 1a2b, converted by qwen35-mobile"
        assert about.metadata.license == "apache-2.0"
        assert about.metadata.versionString == f"{version('qwen35-mobile')} {recipe.name}"
        assert re.match(r"Qwen3\.5, (decoder|vision), from Qwen/Q at 1a2b; the", about.metadata.shortDescription)
        for function in about.functions:
            assert about.metadata.userDefined[f"function {function.name}"]
            for feature in (*function.input, *function.output, *function.state):
                assert feature.shortDescription, feature.name


def test_the_same_export_gives_the_same_bytes_and_a_whole_package_is_kept(
    small: Any, memory: Memory, tmp_path: Path
) -> None:
    folders = tmp_path / "a", tmp_path / "b"
    for folder in folders:
        folder.mkdir()
        memory.forget()
        build(small, folder, load_recipe("int4", 32), NAME, lengths=(16,))
    first, second = ({p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in folders)
    assert first == second
    decoder, vision = (folders[1] / f"{name}.mlpackage" for name in ("decoder", "vision"))
    (vision / "Manifest.json").unlink()  # as an interrupt leaves it
    mark = decoder / "Data/com.apple.CoreML/weights/weight.bin"
    before = mark.stat().st_mtime_ns
    build(small, folders[1], load_recipe("int4", 32), NAME, lengths=(16,), resume=True)
    assert mark.stat().st_mtime_ns == before
    assert {p.relative_to(folders[1]): p.read_bytes() for p in folders[1].rglob("*") if p.is_file()} == first


@pytest.mark.parametrize("tokens", [64, 128])
@pytest.mark.parametrize("profile", ["gpu", "ane"])
def test_correlated_keys_stay_finite_in_float16(tokens: int, profile: str, tmp_path: Path) -> None:
    """Keys that hardly differ, written at full strength: the product form of the inverse overflows (FACTS 1)."""
    heads, width = 4, 32
    random = np.random.default_rng(0)
    key = random.standard_normal((1, heads, 1, width)) + 0.05 * random.standard_normal((1, heads, tokens, width))
    arrays = {
        "q": random.standard_normal((1, heads, tokens, width)) * width**-1,
        "k": key / np.linalg.norm(key, axis=-1, keepdims=True),
        "v": random.standard_normal((1, heads, tokens, width)),
        "g": -0.01 * random.random((1, heads, tokens, 1)),
        "beta": np.full((1, heads, tokens, 1), 0.999),
        "old": random.standard_normal((1, heads, width, width)),
    }
    half = {name: array.astype(np.float16) for name, array in arrays.items()}
    got = run_chunks(half, tmp_path / profile, profile)
    wide = {name: torch.from_numpy(array.astype(np.float64))[0] for name, array in half.items()}
    q, k, v = (wide[name].transpose(0, 1) for name in ("q", "k", "v"))
    g, beta = (wide[name][..., 0].T for name in ("g", "beta"))
    output, state = wide["v"].clone(), wide["old"]
    for place in range(tokens):
        one = slice(place, place + 1)
        result, state = reference_rule.step(q[one], k[one], v[one], g[one], beta[one], state)
        output[:, place] = result[0]
    assert np.isfinite(got["output"]).all() and np.isfinite(got["state"]).all()
    assert metrics.relative(output.numpy(), got["output"][0]) < 0.02
    assert metrics.relative(state.numpy(), got["state"][0]) < 0.02


def run_chunks(inputs: Mapping[str, Any], path: Path, profile: str) -> dict[str, Any]:
    """The chunked delta rule alone, as a saved package on the interpreter."""
    from targets.to_coreml.lowering import Lowering
    from targets.to_coreml.profiles import PROFILES

    def body(q: Any, k: Any, v: Any, g: Any, beta: Any, old: Any) -> list[Any]:
        low = Lowering(None, None, PROFILES[profile], None)  # type: ignore[arg-type]
        outputs, new = delta_rule._chunks(low, (q, k, v, g, beta), old)
        joined = outputs[0] if len(outputs) == 1 else mil.mb.concat(values=outputs, axis=2)
        return [mil.mb.identity(x=joined, name="output"), mil.mb.identity(x=new, name="new")]

    declared = {name: (array.shape, "float16") for name, array in inputs.items()}
    package = Package(mil.save(path.with_suffix(".mlpackage"), main=mil.function(body, declared)))
    found = Interpreter(package).run("main", inputs, {})
    return {"output": found["output"], "state": found["new"]}


def test_manifest_and_packages_agree_on_identifiers(small: Any, tmp_path: Path) -> None:
    build(small, tmp_path, Recipe.unquantised(), NAME, lengths=(16,))
    written = json.loads((tmp_path / "decoder.mlpackage/Manifest.json").read_text())
    assert written["itemInfoEntries"][written["rootModelIdentifier"]]["path"] == "com.apple.CoreML/model.mlmodel"



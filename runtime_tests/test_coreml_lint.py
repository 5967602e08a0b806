"""The linter of Core ML packages: each rule against a package that breaks it, and none against those that we write."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export.__main__ import main
from export.bundle.reader import Bundle
from export.chat.template import load_tokenizer
from export.model.config import ModelConfig
from export.quantize.recipe import load_recipe
from export.sizes import shipped_tiny
from export.spec import ExportError
from export.validate.examples import QUESTION, TEXT_TOKENS, examples
from runtime_tests.conftest import MemoryCheckpoint, build, variant
from runtime_tests.mil import function, mb, narrow, save
from targets import TARGETS, load_target
from targets.base import Finding, Session, refuse
from targets.to_coreml import lint_package
from targets.to_coreml.interpreter import Interpreter
from targets.to_coreml.lint import lint_bundle, observed_findings
from targets.to_coreml.lint_numbers import activations
from targets.to_coreml.lint_observe import Extremes, Observed, Observer, conversations, observe
from targets.to_coreml.lint_rules import RULES
from targets.to_coreml.lint_view import View
from targets.to_coreml.package import INSIDE, MODEL, WEIGHTS
from targets.to_coreml.profiles import PROFILES
from targets.to_coreml.program import Package

pytestmark = pytest.mark.usefixtures("traced_once")

FILE = "wrong.mlpackage"
HALF, WHOLE = "float16", "int32"
LENGTHS = (16,)
LICENCE: dict[str, Any] = {"license": "apache-2.0"}

Body = Callable[..., Any]
Damage = Callable[[Path, dict[str, Any]], None]


def manifest_of(profile: str, file: str = FILE) -> dict[str, Any]:
    """As much of a manifest as the linter reads, for a package of the function `main`."""
    stage = {"kind": "graph", "file": file, "entry": "main", "inputs": {}, "outputs": {}}
    return {
        "signatures": {"decode": {"inputs": [], "outputs": [], "stages": [stage]}},
        "target": {"profile": profile, "min_version": "iOS18"},
        "session_options": {"computeUnits": PROFILES[profile].compute_units},
    }


def change(package: Path, edit: Callable[[Any], None]) -> None:
    """Change the protobuf message of a package."""
    spec = Package(package).spec
    edit(spec)
    (package / INSIDE / MODEL).write_bytes(spec.SerializeToString())


def broken(findings: list[Finding], rule: str) -> list[Finding]:
    return [found for found in findings if found.rule == rule]


@pytest.fixture(scope="module", autouse=True)
def _few_objects() -> Iterator[None]:
    """coremltools collects garbage at every conversion, which takes longer than the conversion: leave it little."""
    gc.freeze()
    yield
    gc.unfreeze()


# -- packages that we write -----------------------------------------------------------------------
@pytest.fixture(scope="module")
def checkpoint() -> MemoryCheckpoint:
    return MemoryCheckpoint(variant(num_hidden_layers=4, vision={"depth": 1}))


@pytest.fixture(scope="module", params=list(PROFILES))
def ours(
    request: pytest.FixtureRequest, checkpoint: MemoryCheckpoint, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, dict[str, Any]]:
    """Profile, folder and manifest of a lowered int8 model."""
    folder = tmp_path_factory.mktemp(request.param)
    recipe = load_recipe("int8", None)
    _, manifest, _ = build(checkpoint, folder, recipe, "coreml", profile=request.param, lengths=LENGTHS, **LICENCE)
    manifest["model"] = LICENCE
    return request.param, folder, manifest


WARNINGS = {
    "gpu": set(),
    "ane": {
        "state-count", "ane-float32", "ane-integers", "ane-dynamic-slice", "ane-singleton", "ane-kernel-width",
    },
}  # fmt: skip
"""What our own packages live with: each is a warning, and none may join them unnoticed."""


def seen_of(folder: Path, manifest: dict[str, Any]) -> Observed:
    """What the linter looks at in a bundle without a tokenizer, and a picture of each size."""
    pictures = [np.full((3, *size), 0.5, np.float32) for size in manifest["image_sizes"]]
    return observe(folder, manifest, conversations(manifest, examples(folder, manifest), pictures))


def test_our_packages_have_no_errors(ours: tuple[str, Path, dict[str, Any]]) -> None:
    profile, folder, manifest = ours
    findings = [*lint_bundle(folder, manifest), *observed_findings(folder, manifest, seen_of(folder, manifest))]
    assert [f"{f.where}: {f.text}" for f in findings if f.severity == "error"] == []
    assert {found.rule for found in findings} <= WARNINGS[profile]
    refuse(findings)


OWN = (
    "{% for m in messages %}Ask: {% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' if c.type == 'image' else c.text }}{% endfor %}{% endif %}"
    "{% endfor %} Say:"
)
"""A template that is not the shipped one."""


def test_prompts_are_rendered_by_the_bundles_own_template(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(shipped_tiny() / name, tmp_path / name)
    (tmp_path / "chat_template.jinja").write_text(OWN)
    image = ModelConfig.from_dict(json.loads((shipped_tiny() / "config.json").read_text())).image_token_id
    tokenizer: dict[str, Any] = {"special_token_ids": {"image": image}, "stop_token_ids": [1]}
    manifest = {
        "context_length": 256,
        "prefill_lengths": [16],
        "image_sizes": [[64, 96]],
        "signatures": {"vision_64x96": {"outputs": [{"shape": [1, 6, 128]}]}},
        "tokenizer": tokenizer,
    }
    question, pictured = examples(tmp_path, manifest)
    decode = load_tokenizer(tmp_path).decode
    assert decode(question.ids) == f"Ask: {QUESTION} Say:" and question.images == []
    assert decode(pictured.ids) == f"Ask: <|vision_start|>{'<|image_pad|>' * 6}<|vision_end|>{QUESTION} Say:"
    assert [image.shape for image in pictured.images] == [(3, 64, 96)]
    text, *others = examples(tmp_path, manifest, passages=True)
    assert (len(text.ids), [prompt.ids for prompt in others]) == (TEXT_TOKENS, [question.ids, pictured.ids])
    assert examples(tmp_path, {**manifest, "context_length": 4}, passages=True)[0].ids == text.ids[:3]
    tokenizer["template"] = {"pictures": False}
    assert [prompt.ids for prompt in examples(tmp_path, manifest)] == [question.ids]
    (tmp_path / "chat_template.jinja").unlink()
    assert decode(examples(tmp_path, manifest)[0].ids) == QUESTION


def test_every_value_of_a_short_run_is_seen(ours: tuple[str, Path, dict[str, Any]]) -> None:
    _, folder, manifest = ours
    seen = seen_of(folder, manifest)
    functions = {(stage["file"], stage["entry"]) for entry in manifest["signatures"].values()
                 for stage in entry["stages"] if stage["kind"] == "graph"}  # fmt: skip
    assert seen.keys() == functions
    for (file, name), extremes in seen.items():
        computing = {
            operation.name
            for operation in View(Package(folder / file).function(name)).running
            if operation.type not in ("read_state", "write_state")
            and operation.outputs[0][1].dtype in ("float16", "float32")
        }
        assert computing == extremes.keys(), name


def test_values_beyond_float16_are_found(ours: tuple[str, Path, dict[str, Any]]) -> None:
    """Embeddings near the end of float16 overflow in the residual stream, or come close to it."""
    _, folder, manifest = ours

    def calls(session: Session) -> None:
        row = np.full((1, 1, 128), 60000, np.float16)
        places = np.zeros((3, 1), np.int32)
        session.run("decode", {"embeddings": row, "position_ids": places, "start": np.zeros(1, np.int32)})

    found = observed_findings(folder, manifest, observe(folder, manifest, calls))
    assert {each.rule for each in found} & {"activation-finite", "activation-range"}
    assert all(each.function == "decode" and each.file == "decoder.mlpackage" for each in found)


# -- programs that break a rule -------------------------------------------------------------------
@dataclass(frozen=True)
class Program:
    """A function `main` of MIL: body, inputs and states."""

    match: str
    body: Body
    inputs: dict[str, tuple[tuple[int, ...], str]]
    states: dict[str, tuple[int, ...]] | None = None
    profile: str = "ane"
    edit: Callable[[Any], None] | None = None


def codes(count: int = 16, columns: int = 64, dtype: str = "int4") -> Any:
    return narrow(np.ones((count, columns)), dtype)


def blockwise(x: Any, scale: Any, data: Any = None) -> Any:
    weight = mb.constexpr_blockwise_shift_scale(data=codes() if data is None else data, scale=scale)
    return mb.linear(x=x, weight=weight)


def scales(groups: int, value: float = 0.5) -> Any:
    return np.full((16, groups), value, np.float16)


def palette(groups: int = 1) -> Any:
    """One of 16 numbers for each group of inputs."""
    lut = np.linspace(-1, 1, 16, dtype=np.float16).reshape(1, 1, 16, 1).repeat(groups, axis=1)
    return mb.constexpr_lut_to_dense(indices=codes(dtype="uint4"), lut=lut)


def written_twice(x: Any, s: Any) -> Any:
    first = mb.coreml_update_state(state=s, value=mb.add(x=mb.read_state(input=s), y=x))
    second = mb.coreml_update_state(state=s, value=mb.add(x=first, y=x))
    return mb.mul(x=second, y=np.float16(2))


def write_and_return(x: Any, s: Any) -> Any:
    value = mb.add(x=mb.read_state(input=s), y=x)
    mb.coreml_update_state(state=s, value=mb.reshape(x=value, shape=[1, 2, 1, 32]))
    return value


def read_all(**given: Any) -> Any:
    total = given.pop("x")
    for state in given.values():
        total = mb.add(x=total, y=mb.read_state(input=state))
    return total


def unread(x: Any) -> Any:
    mb.square(x=x, name="nobody_reads_it")
    return mb.sqrt(x=x)


def twin(spec: Any) -> None:
    """Declare another tensor, t, beside the last input or state: coremltools itself would add a reader."""
    (main_function,) = spec.mlProgram.functions.values()
    for declared in (main_function.inputs, spec.description.state or spec.description.input):
        last = declared[-1]
        declared.add().CopyFrom(last)
        declared[-1].name = "t"


def float32_states(spec: Any) -> None:
    (main_function,) = spec.mlProgram.functions.values()
    for value in main_function.inputs:
        if value.type.HasField("stateType"):
            value.type.stateType.wrappedType.tensorType.dataType = 11
    for state in (*spec.description.state, *(s for f in spec.description.functions for s in f.state)):
        state.type.stateType.arrayType.dataType = 65568


def last_type(spec: Any) -> Any:
    """Type of the result of the last operation."""
    (main_function,) = spec.mlProgram.functions.values()
    (block,) = main_function.block_specializations.values()
    return block.operations[-2].outputs[0].type.tensorType


def open_shape(spec: Any) -> None:
    last_type(spec).dimensions[0].unknown.variadic = False


def six_axes(spec: Any) -> None:
    kind = last_type(spec)
    kind.rank = 6
    for _ in range(6 - len(kind.dimensions)):
        kind.dimensions.add().constant.size = 1


def no_outputs(spec: Any) -> None:
    (main_function,) = spec.mlProgram.functions.values()
    (block,) = main_function.block_specializations.values()
    del block.outputs[:]
    del spec.description.output[:]


ROW: dict[str, tuple[tuple[int, ...], str]] = {"x": ((1, 64), HALF)}
IMAGE: dict[str, tuple[tuple[int, ...], str]] = {"x": ((1, 3, 32, 32), HALF)}
STATE = (1, 2, 1, 32)
TWO: Body = lambda x: mb.sqrt(x=mb.square(x=x))  # noqa: E731


def constant(value: Any) -> Body:
    return lambda x: mb.add(x=x, y=np.asarray(value, np.float16))


def row(value: float) -> Any:
    return [[value, *[1.0] * 63]]


PROGRAMS: dict[str, Program] = {
    "state-dtype": Program(
        r"s: is float32 \[1, 2, 1, 32\]; a state must be float16: pass it as input and output",
        read_all, {"x": (STATE, HALF)}, {"s": STATE}, "gpu", float32_states,
    ),
    "state-alignment": Program(
        r"s: is float16 \[1, 3, 256, 270\]; its last axis must be a multiple of 32, not 270: pad it",
        read_all, {"x": ((1, 3, 256, 270), HALF)}, {"s": (1, 3, 256, 270)},
    ),
    "state-alignment-rows": Program(
        r"its second to last axis must be 1 or a multiple of 32, not 3: pad it",
        read_all, {"x": ((1, 3, 256), HALF)}, {"s": (1, 3, 256)},
    ),
    "state-count": Program(
        r"has 3 states; one package with 3 failed .*: call it once on the device; .* --max-file-layers 1 leaves 2",
        read_all, {"x": (STATE, HALF)}, {"s": STATE, "t": STATE, "u": STATE},
    ),
    "state-writes": Program(
        r"s: is written 2 times; once is what is known to work: join",
        written_twice, {"x": (STATE, HALF)}, {"s": STATE},
    ),
    "state-unused": Program(
        r"t: is neither read nor written; .*: drop the state",
        read_all, {"x": (STATE, HALF)}, {"s": STATE}, "gpu", twin,
    ),
    "state-is-output": Program(
        r"is an output and the value written into state s; a runtime crashes .*: return a value of its own",
        write_and_return, {"x": (STATE, HALF)}, {"s": STATE}, "gpu",
    ),
    "known-operations": Program(
        r"is a tan, which the interpreter does not run, so no test covers it: use others",
        lambda x: mb.tan(x=x), ROW, profile="gpu",
    ),
    "fixed-shapes": Program(
        r"is float16 \[-1, 64\]; all shapes must be fixed: export one function per shape", TWO, ROW,
        profile="gpu", edit=open_shape,
    ),
    "rank": Program(
        r"is float16 \[1, 64, 1, 1, 1, 1\]; Core ML takes at most 5 axes: merge some",
        TWO, ROW, profile="gpu", edit=six_axes,
    ),
    "dimension": Program(
        r"is float16 \[1, 70000\] \(and 1 more tensors\); no axis may have more than 65536 elements: cut it",
        lambda x: mb.square(x=x), {"x": ((1, 70000), HALF)},
    ),
    "dimension-gpu": Program(
        r"no axis may have more than 65536 elements: cut it \(the head: --max-head-columns\)",
        lambda x: mb.square(x=x), {"x": ((1, 70000), HALF)}, profile="gpu",
    ),
    "ane-old-chips": Program(
        r"at most 16384 elements on chips before the A17: cut it, or promise newer phones only",
        lambda x: mb.square(x=x), {"x": ((1, 4, 20000), HALF)},
    ),
    "no-output": Program(r"has no outputs; Core ML wants one at least", TWO, ROW, profile="gpu", edit=no_outputs),
    "unused": Program(r"t: is an input that nothing reads; .*: drop it", TWO, ROW, profile="gpu", edit=twin),
    "unused-result": Program(
        r"nobody_reads_it: 1 square with results that nothing reads: drop them", unread, ROW, profile="gpu"
    ),
    "ane-float32": Program(
        r"1 square, 1 sqrt in float32, which the Neural Engine does not compute in: scale them into float16",
        TWO, {"x": ((1, 64), "float32")},
    ),
    "ane-integers": Program(
        r"1 add with integers, which the Neural Engine does not compute with: take float16 masks",
        lambda x: mb.cast(x=mb.add(x=x, y=np.array([1], np.int32)), dtype="fp16"), {"x": ((4,), WHOLE)},
    ),
    "ane-cpu-operations": Program(
        r"1 gather without a form on the Neural Engine, so on the CPU: use products and masks",
        lambda x: mb.gather(x=x, indices=np.array([3, 1], np.int32), axis=1), ROW,
    ),
    "ane-dynamic-slice": Program(
        r"1 slice_by_size whose place the call decides; .* CPU: use products with masks",
        lambda x, begin: mb.slice_by_size(x=x, begin=begin, size=[1, 32]), {**ROW, "begin": ((2,), WHOLE)},
    ),
    "ane-linear": Program(
        r"1 linear where the Neural Engine has 1x1 convolutions: export the bundle again",
        lambda x: mb.linear(x=x, weight=np.ones((16, 64), np.float16)), ROW,
    ),
    "ane-attention": Program(
        r"1 scaled_dot_product_attention which the Neural Engine .* computes wrongly, .*: export the bundle again",
        lambda x: mb.scaled_dot_product_attention(query=x, key=x, value=x), {"x": ((1, 2, 32, 32), HALF)},
    ),
    "ane-singleton": Program(
        r"1 reduce_max with a last axis of 1, padded to 64 bytes on the Neural Engine: put tokens or channels last",
        lambda x: mb.reduce_max(x=x, axes=[3], keep_dims=True), IMAGE,
    ),
    "ane-kernel-width": Program(
        r"has a kernel \[8, 3, 16, 16\]; 13 is the widest: reshape patches, convolve 1x1",
        lambda x: mb.conv(x=x, weight=np.ones((8, 3, 16, 16), np.float16), strides=[16, 16], pad_type="valid"), IMAGE,
    ),
    "ane-blockwise": Program(
        r"several scales or palettes per output channel in 1 weights; .* run on the CPU .*: export with --recipe int8",
        lambda x: blockwise(x, scales(2)), ROW,
    ),
    "ane-blockwise-palettes": Program(
        r"several scales or palettes per output channel in 1 weights; .* run on the CPU .*: export with --recipe int8",
        lambda x: mb.linear(x=x, weight=palette(2)), ROW,
    ),
    "ane-softplus": Program(
        r"1 softplus, which gives 0 for inputs above 10.4 on the Neural Engine: lower it to max\(x, 0\) \+ log",
        lambda x: mb.softplus(x=x), ROW,
    ),
    "gpu-attention-batch": Program(
        r"attends over a batch of 10; the GPU is right up to 9: make it heads",
        lambda x: mb.scaled_dot_product_attention(query=x, key=x, value=x), {"x": ((10, 2, 4, 8), HALF)},
        profile="gpu",
    ),
    "palette-scale": Program(
        r"scales over palettes in 1 weights; .* rejects them while the app loads the model: .* --palettes",
        lambda x: blockwise(x, scales(1), palette()), ROW,
    ),
    "palette-unmeasured": Program(
        r"scales per group over palettes in 1 weights; .* one scale per output channel: try the package .* --palettes",
        lambda x: blockwise(x, scales(2), palette()), ROW, profile="gpu",
    ),
    "palette-stateful": Program(
        r"palettes of 16 in 1 weights beside 1 states; such packages crash .* calls: leave out --palettes",
        lambda x, s: mb.linear(x=mb.add(x=x, y=mb.read_state(input=s)), weight=palette()), ROW, {"s": (1, 64)},
    ),
    "weight-finite": Program(
        r"has 1 of 64 elements that are infinite or not a number: repair the checkpoint", constant(row(np.inf)), ROW
    ),
    "weight-finite-nan": Program(r"has 1 of 64 elements that are infinite", constant(row(np.nan)), ROW),
    "weight-finite-scale": Program(
        r"has 16 of 16 scales that are infinite or not a number: quantise it again",
        lambda x: blockwise(x, scales(1, np.inf)), ROW,
    ),
    "weight-finite-product": Program(
        r"gives weights beyond float16: quantise it again, or repair the checkpoint",
        lambda x: blockwise(x, scales(1, 60000), narrow(np.full((16, 64), 2), "int4")), ROW,
    ),
    "weight-range": Program(
        r"reaches 20000, more than a quarter of float16's 65504: rescale it with what", constant(row(-2e4)), ROW
    ),
    "weight-range-product": Program(r"reaches 30000, more than", lambda x: blockwise(x, scales(1, 30000)), ROW),
    "scale-range": Program(
        r"has 16 of 16 scales below float16's normal range \(6.1e-5\): clamp them when quantising",
        lambda x: blockwise(x, scales(1, 1e-5)), ROW,
    ),
}  # fmt: skip
"""Rule, or rule with what is special -> a program that breaks it."""


def rule_of(name: str) -> str:
    return max((rule for rule in RULES if name.startswith(rule)), key=len)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_wrong_program_is_found(name: str, tmp_path: Path) -> None:
    case, rule = PROGRAMS[name], rule_of(name)
    save(tmp_path / FILE, main=function(case.body, case.inputs, case.states))
    if case.edit is not None:
        change(tmp_path / FILE, case.edit)
    findings = broken(lint_bundle(tmp_path, manifest_of(case.profile)), rule)
    assert findings
    found = "\n".join(f"{each.item}: {each.text}" for each in findings)
    assert re.search(case.match, found), found
    assert {(each.severity, each.source) for each in findings} == {
        (RULES[rule].severity(case.profile), RULES[rule].source)
    }
    other = "gpu" if case.profile == "ane" else "ane"
    if RULES[rule].severity(other) is None:
        assert not broken(lint_bundle(tmp_path, manifest_of(other)), rule)


def test_a_right_program_breaks_nothing_but_its_descriptions(tmp_path: Path) -> None:
    """What the programs above have in common is not what is found in them."""
    save(tmp_path / FILE, main=function(TWO, ROW))
    manifest = manifest_of("ane")
    (stage,) = manifest["signatures"]["decode"]["stages"]
    stage |= {"inputs": {"x": "x"}, "outputs": {"y": next(iter(Package(tmp_path / FILE).function("main").outputs))}}
    assert {found.rule for found in lint_bundle(tmp_path, manifest)} == {"described"}


def test_one_layer_a_package_leaves_two_states(checkpoint: MemoryCheckpoint, tmp_path: Path) -> None:
    """As the remedy of `state-count` says."""
    recipe = load_recipe("int8", None)
    _, manifest, _ = build(checkpoint, tmp_path, recipe, "coreml", profile="ane", lengths=LENGTHS, max_file_layers=1)
    assert not broken(lint_bundle(tmp_path, manifest), "state-count")


def test_measured_scales_over_a_palette_are_not_warned_of(tmp_path: Path) -> None:
    """One per output channel, and scales per group without a palette."""
    save(tmp_path / FILE, main=function(lambda x: mb.add(x=blockwise(x, scales(1), palette()),
                                                         y=blockwise(x, scales(2))), ROW))  # fmt: skip
    assert not broken(lint_bundle(tmp_path, manifest_of("gpu")), "palette-unmeasured")


def test_palettes_are_warned_of(checkpoint: MemoryCheckpoint, tmp_path: Path) -> None:
    """On the Neural Engine they are grouped along the inputs as int4 is; on the GPU scales per group are over one."""
    for profile, rules in (("ane", {"ane-blockwise", "palette-stateful"}), ("gpu", {"palette-unmeasured"})):
        (tmp_path / profile).mkdir()
        limits: dict[str, Any] = {"palettes": True, "profile": profile, "lengths": LENGTHS}
        _, manifest, _ = build(checkpoint, tmp_path / profile, load_recipe("int4", 32), "coreml", **limits)
        findings = lint_bundle(tmp_path / profile, manifest)
        assert {found.rule for found in findings} - WARNINGS[profile] == rules
        assert not [found for found in findings if found.severity == "error"]


def test_functions_must_declare_the_same_states(tmp_path: Path) -> None:
    one = function(read_all, {"x": (STATE, HALF)}, {"s": STATE})
    two = function(read_all, {"x": ((1, 2, 1, 64), HALF)}, {"s": (1, 2, 1, 64)})
    save(tmp_path / FILE, one=one, two=two)
    (found,) = broken(lint_bundle(tmp_path, manifest_of("gpu")), "states-equal")
    assert re.search(r"float16 \[1, 2, 1, 32\] in one; float16 \[1, 2, 1, 64\] in two; all functions", found.text)
    assert (found.severity, found.item) == ("error", "s")


# -- packages that break a rule -------------------------------------------------------------------
def grown(size: int) -> Damage:
    """A weight file of so many bytes, most of them not on the disk."""
    return lambda package, manifest: os.truncate(package / INSIDE / WEIGHTS, size)


def edited_manifest(edit: Callable[[Any], None]) -> Damage:
    def damage(package: Path, manifest: dict[str, Any]) -> None:
        content = json.loads((package / "Manifest.json").read_text())
        edit(content)
        (package / "Manifest.json").write_text(json.dumps(content))

    return damage


def edited_spec(edit: Callable[[Any], None]) -> Damage:
    return lambda package, manifest: change(package, edit)


def first_entry(content: Any) -> Any:
    return next(iter(content["itemInfoEntries"].values()))


def as_list(content: Any) -> None:
    root = content["itemInfoEntries"][content["rootModelIdentifier"]]
    content.update(itemInfoEntries=[root], rootModelIdentifier=0)


def without_weights(content: Any) -> None:
    entries = content["itemInfoEntries"]
    content["itemInfoEntries"] = {key: e for key, e in entries.items() if e["name"] != "weights"}


def weights_elsewhere(spec: Any) -> None:
    for one in spec.mlProgram.functions.values():
        for block in one.block_specializations.values():
            for operation in block.operations:
                if "val" in operation.attributes and operation.attributes["val"].HasField("blobFileValue"):
                    operation.attributes["val"].blobFileValue.fileName = "@model_path/../../../secret.bin"


def cut_short(package: Path, manifest: dict[str, Any]) -> None:
    path = package / INSIDE / MODEL
    path.write_bytes(path.read_bytes()[:-5])


def stages(manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    return (s for e in manifest["signatures"].values() for s in e["stages"] if s["file"] == "decoder.mlpackage")


def renamed_input(package: Path, manifest: dict[str, Any]) -> None:
    for stage in stages(manifest):
        if stage["kind"] == "graph":
            stage["inputs"] = {"embeddings": "rows"}


def renamed_entry(package: Path, manifest: dict[str, Any]) -> None:
    for stage in stages(manifest):
        if stage["kind"] == "graph":
            stage["entry"] = "generate"


def set_target(key: str, value: Any) -> Damage:
    return lambda package, manifest: manifest["target"].update({key: value})


DAMAGES: dict[str, tuple[str, Damage]] = {
    "readable": (r"model.mlmodel is damaged or cut short .*; copy the package again", cut_short),
    "readable-weights": (
        r"names 'com.apple.CoreML/../../../secret.bin', which lies outside the package", edited_spec(weights_elsewhere)
    ),
    "package-manifest": (
        r"entry 'model.mlmodel' has no author; Core ML wants author, .*: write them",
        edited_manifest(lambda content: first_entry(content).pop("author")),
    ),
    "package-manifest-version": (
        r"has fileFormatVersion '2.0', Core ML reads '1.0.0': write the package again",
        edited_manifest(lambda content: content.update(fileFormatVersion="2.0")),
    ),
    "package-manifest-entry": (
        r"does not name 'com.apple.CoreML/weights/weight.bin'; .*: add one", edited_manifest(without_weights)
    ),
    "package-manifest-file": (
        r"names 'com.apple.CoreML/gone', which is not there: copy the package again",
        edited_manifest(lambda content: content["itemInfoEntries"].update(
            x={"author": "a", "description": "d", "name": "n", "path": "com.apple.CoreML/gone"})),
    ),
    "package-manifest-number": (
        r"entry 'model.mlmodel' has no author; Core ML wants author",
        edited_manifest(lambda content: first_entry(content).update(author=5)),
    ),
    "package-manifest-outside": (
        r"names '../../secret', which lies outside the package: do not use the package",
        edited_manifest(lambda content: content["itemInfoEntries"].update(
            x={"author": "a", "description": "d", "name": "n", "path": "../../secret"})),
    ),
    "readable-entries": (
        r"itemInfoEntries must be an object with texts as paths, .*; copy the package again", edited_manifest(as_list)
    ),
    "weights-limit": (
        r"weight.bin: has 2147483648 bytes, more than 2147483647: cut the decoder with --max-file-size", grown(1 << 31)
    ),
    "weights-phone": (r"has 1000000001 bytes, more than 1000000000: cut the decoder", grown(10**9 + 1)),
    "weights-ane-budget": (r"has 1500000000 bytes, more than 1400000000: cut the decoder", grown(1_500_000_000)),
    "ane-silent-failure": (r"more than 600000000: let the app make one call in a process that may", grown(7 * 10**8)),
    "deployment-target": (
        r"has specificationVersion 10, iOS18 is 9: build for it, or correct min_version",
        edited_spec(lambda spec: setattr(spec, "specificationVersion", 10)),
    ),
    "deployment-target-opset": (
        r"is written in opset CoreML8, iOS26 has CoreML9: build for iOS26", set_target("min_version", "iOS26")
    ),
    "deployment-target-unknown": (
        r"the manifest promises 'iOS12', of which the linter knows nothing; it knows iOS18",
        set_target("min_version", "iOS12"),
    ),
    "described": (
        r"has no license; a package says what it is, whose, and under which licence: add it",
        edited_spec(lambda spec: spec.description.metadata.ClearField("license")),
    ),
    "described-license": (
        r"has the licence 'see the README', model.license of the manifest is 'apache-2.0': export again",
        edited_spec(lambda spec: setattr(spec.description.metadata, "license", "see the README")),
    ),
    "described-license-blank": (
        r"has no license; .*: add it", edited_spec(lambda spec: setattr(spec.description.metadata, "license", " "))
    ),
    "described-version": (
        r"has the versionString 'int8', which begins with no version: export again",
        edited_spec(lambda spec: setattr(spec.description.metadata, "versionString", "int8")),
    ),
    "described-function": (
        r"has no text `function decode` in the package's metadata: add it",
        edited_spec(lambda spec: spec.description.metadata.userDefined.pop("function decode")),
    ),
    "described-input": (
        r"embeddings: is an input without a shortDescription: add one",
        edited_spec(lambda spec: spec.description.functions[0].input[0].ClearField("shortDescription")),
    ),
    "bindings": (r"rows: is input of signature decode, but not of the function: export again", renamed_input),
    "bindings-other": (r"start: is input of the function, but signature decode does not name it", renamed_input),
    "bindings-entry": (r"signature decode calls it; the package has decode, prefill_16: export again", renamed_entry),
    "bindings-function": (r"no signature of the manifest calls it: drop the function", renamed_entry),
    "compute-units": (
        r"session_options.computeUnits is 'all', profile ane is for 'cpuAndNeuralEngine': set that",
        lambda package, manifest: manifest["session_options"].update(computeUnits="all"),
    ),
    "compute-units-profile": (
        r"target.profile is 'npu', coreml has gpu, ane: export again", set_target("profile", "npu")
    ),
}  # fmt: skip
"""Rule, or rule with what is special -> match, and how to make a package of ours break it."""


@pytest.fixture(scope="module")
def decoder(checkpoint: MemoryCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Folder and manifest of a small model for the Neural Engine without its vision encoder."""
    folder = tmp_path_factory.mktemp("decoder")
    recipe = load_recipe("int8", None)
    _, manifest, _ = build(checkpoint, folder, recipe, "coreml", profile="ane", lengths=LENGTHS, **LICENCE)
    manifest["model"] = LICENCE
    manifest["signatures"] = {k: v for k, v in manifest["signatures"].items() if not k.startswith("vision")}
    shutil.rmtree(folder / "vision.mlpackage")
    return folder, manifest


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_package_is_found(name: str, decoder: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, manifest = tmp_path / "bundle", json.loads(json.dumps(decoder[1]))
    shutil.copytree(decoder[0], folder)
    match, damage = DAMAGES[name]
    damage(folder / "decoder.mlpackage", manifest)
    rule = rule_of(name)
    findings = broken(lint_bundle(folder, manifest), rule)
    found = "\n".join(f"{each.item}: {each.text}" for each in findings)
    assert re.search(match, found), found
    if manifest["target"]["profile"] in PROFILES:
        assert {each.severity for each in findings} == {RULES[rule].ane}


LIMITS = {"PROGRAM_LIMIT": "program-limit", "PROGRAM_LARGE": "program-size"}


@pytest.mark.parametrize(("constant_name", "rule"), LIMITS.items())
def test_a_large_program_is_found(
    constant_name: str, rule: str, decoder: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lint_package, constant_name, 1000)
    (found,) = broken(lint_bundle(*decoder), rule)
    assert re.search(r"model.mlmodel has \d+ bytes, more than 1000: move its constants", f"{found.item} {found.text}")


def test_every_rule_is_tested_and_has_a_source() -> None:
    tested = {rule_of(name) for name in (*PROGRAMS, *DAMAGES)}
    tested |= {"states-equal", *LIMITS.values(), "activation-finite", "activation-range"}
    assert tested == RULES.keys()
    assert all(rule.source and rule.reason and (rule.gpu or rule.ane) for rule in RULES.values())


# -- activations ----------------------------------------------------------------------------------
def extremes_of(tmp_path: Path, body: Body, x: Any) -> tuple[View, dict[str, Extremes]]:
    save(tmp_path / FILE, main=function(body, {"x": (x.shape, HALF)}))
    package, observer = Package(tmp_path / FILE), Observer()
    Interpreter(package, observe=observer).run("main", {"x": x}, {})
    return View(package.function("main")), observer.observed["", ""]


def test_overflow_and_near_overflow(tmp_path: Path) -> None:
    x = np.array([[200.0, -300.0]], np.float16)
    hits = list(activations(*extremes_of(tmp_path, lambda x: mb.square(x=mb.mul(x=x, y=np.float16(120))), x)))
    assert [hit.rule for hit in hits] == ["activation-range", "activation-finite"]
    assert re.search(r"\(mul\) reached 36000 in a run, more than half of float16's 65504", hits[0].text)
    assert re.search(r"\(square\) gave 2 infinite or undefined values in a run: scale", hits[1].text)


def test_masks_are_meant(tmp_path: Path) -> None:
    """Scores below what must not be seen go beyond the half of float16; the same without a mask is a finding."""
    x = np.array([[-5000.0, 1.0]], np.float16)

    def masked(x: Any) -> Any:
        hidden = mb.cast(x=mb.greater(x=x, y=np.array([[-1e4, 2]], np.float16)), dtype="fp16")
        return mb.softmax(x=mb.add(x=x, y=mb.mul(x=hidden, y=np.float16(-3e4))))

    assert list(activations(*extremes_of(tmp_path / "masked", masked, x))) == []
    (tmp_path / "plain").mkdir()
    plain = list(activations(*extremes_of(tmp_path / "plain", lambda x: mb.softmax(x=mb.mul(x=x, y=np.float16(7))), x)))
    assert [hit.rule for hit in plain] == ["activation-range"]


def test_the_observer_keeps_what_is_finite() -> None:
    observer = Observer()
    observer("op", "add", torch.tensor([1.0, float("nan"), -4.0, float("inf")], dtype=torch.float16))
    observer("op", "add", torch.tensor([2.0], dtype=torch.float16))
    observer("flags", "less", torch.tensor([True]))
    assert observer.observed == {("", ""): {"op": Extremes(True, -4.0, 2.0, 2)}}


# -- the command ----------------------------------------------------------------------------------
def lint(monkeypatch: pytest.MonkeyPatch, folder: Path, manifest: dict[str, Any], *words: str) -> int:
    """`python -m export lint`, where the bundle is not complete enough to be opened."""
    monkeypatch.setattr(Bundle, "open", lambda path, verify: Bundle(folder, manifest))
    return main(["lint", str(folder), "--quiet", *words])


def test_the_command_prints_findings(
    decoder: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, manifest = decoder[0], json.loads(json.dumps(decoder[1]))
    manifest["session_options"]["computeUnits"] = "all"
    assert lint(monkeypatch, folder, manifest) == 3
    out, err = capsys.readouterr()
    shown = r"^error +compute-units +manifest.json\n +session_options.*\n +source: https://github.com"
    assert re.search(shown, out, re.M)
    assert re.search(r"^warning +state-count +decoder.mlpackage$", out, re.M)
    assert re.search(r"^\d+ errors, \d+ warnings$", out, re.M)
    assert "error: the bundle breaks rules of the linter: " in err and "compute-units" in err
    assert lint(monkeypatch, folder, manifest, "--json") == 3
    listed = json.loads(capsys.readouterr().out)["findings"]
    assert {"rule", "severity", "file", "function", "item", "text", "source"} == listed[0].keys()


def test_warnings_alone_pass(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    warning = Finding("unused", "warning", "a.mlpackage", "decode", "x", "nothing reads it: drop it", "nobody")
    monkeypatch.setattr(type(load_target("coreml")), "lint", lambda *_, **__: [warning])
    assert lint(monkeypatch, tmp_path, {"target": {"name": "coreml"}}) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0].split() == ["warning", "unused", "a.mlpackage:", "decode:", "x"]
    assert out.splitlines()[-1] == "0 errors, 1 warnings" and err == ""


@pytest.mark.parametrize("target", [name for name in TARGETS if name != "coreml"])
def test_other_targets_say_that_they_have_no_linter(
    target: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lint(monkeypatch, tmp_path, {"target": {"name": target}}) == 2
    assert f"is for {target}, which has no linter; coreml bundles have one" in capsys.readouterr().err


def test_what_is_no_bundle_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lint", str(tmp_path)]) == 1
    assert "is not a bundle: it has no manifest.json" in capsys.readouterr().err


def test_errors_stop_a_build() -> None:
    error = Finding("rank", "error", "a.mlpackage", "decode", "x", "has six axes: merge some", "somebody")
    refuse([Finding("unused", "warning", "a.mlpackage", "", "", "a text", "nobody")])
    with pytest.raises(ExportError, match=r"found 1 error\(s\): a.mlpackage: decode: x: has six .* \[rank: somebody\]"):
        refuse([error])

"""Saved programs on the interpreter and, translated to ONNX, on onnxruntime: both agree, and what is wrong is noticed.

Each walk is a padded prefill from the start, one that goes on, and tokens one by one, each executor with states of
its own.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from export.bundle.manifest import BundleError
from export.quantize.recipe import Recipe, load_recipe
from export.spec import ExportError
from runtime_tests.conftest import VARIANTS, MemoryCheckpoint, build
from runtime_tests.mil import function, mb, save
from targets.contract import CallError
from targets.to_coreml import second_opinion_graph
from targets.to_coreml.blob import RECORD, BlobTensor
from targets.to_coreml.exact import ExactPackage
from targets.to_coreml.interpreter import Interpreter
from targets.to_coreml.kernel_call import Bound
from targets.to_coreml.kernels import KERNELS
from targets.to_coreml.profiles import PROFILES, STATE_LAYOUTS
from targets.to_coreml.program import Package
from targets.to_coreml.second_opinion import AFTER, Opinion, session_options, translate
from targets.to_coreml.second_opinion_graph import Untranslatable

pytestmark = pytest.mark.usefixtures("one_thread", "traced_once")

Array = NDArray[Any]

ROUNDED = 2e-2
"""‖a − b‖ / ‖b‖ of an output or a state. Two orders of a float32 sum, rounded to float16, differ by one unit of the
last place (2⁻¹¹ of the value) now and then; the layers that follow multiply that. Over all variants, profiles, layouts
and recipes the worst is 7.2e-3, in nine layers; 0.3 to 3e-3 is usual."""
EXACT = 5e-5
"""The same, where float16 is read as float32 and nothing is rounded; the worst is 6.6e-6."""

LENGTH = 80
"""Tokens of a prefill: one chunk of the delta rule and the beginning of a second one."""
CALLS = [(f"prefill_{LENGTH}", 0, 70), (f"prefill_{LENGTH}", 70, 9), *[("decode", 79 + i, 1) for i in range(3)]]
"""Function, first token, real tokens."""


@dataclass(frozen=True)
class Case:
    variant: str
    profile: str
    layout: str
    recipe: str
    group: int | None = None
    palettes: bool = False

    def __str__(self) -> str:
        group = f"-g{self.group}" if self.group else ""
        return f"{self.variant}-{self.profile}-{self.layout}-{self.recipe}{group}{'-palettes' * self.palettes}"

    def build(self, folder: Path) -> Path:
        recipe = Recipe.unquantised() if self.recipe == "fp32" else load_recipe(self.recipe, self.group)
        build(
            MemoryCheckpoint(VARIANTS[self.variant]), folder, recipe, "coreml", lengths=(LENGTH,),
            profile=self.profile, state_layout=self.layout, palettes=self.palettes,
        )  # fmt: skip
        return folder


CASES = [
    Case("base", "gpu", "separate", "fp32"),
    Case("no-gqa-6-layers", "ane", "stacked", "fp32"),
    Case("equal-heads-untied", "gpu", "explicit", "int4", 32),
    Case("base", "ane", "separate", "int4", 64, palettes=True),
]
ALL = [
    *(Case(v, p, layout, "fp32") for v in VARIANTS for p in PROFILES for layout in STATE_LAYOUTS),
    *(Case("base", p, "separate", r) for p in PROFILES for r in ("int8", "int4", "int4-mixed", "int4-asym")),
    *(Case("base", p, "separate", "int4", palettes=True) for p in PROFILES),
]


@pytest.fixture(scope="module")
def unquantised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return CASES[0].build(tmp_path_factory.mktemp("unquantised"))


@pytest.fixture(
    scope="module",
    params=[*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in ALL if case not in CASES)],
    ids=str,
)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, unquantised: Path) -> Path:
    return unquantised if request.param == CASES[0] else request.param.build(tmp_path_factory.mktemp("case"))


class Walk:
    """One executor with the states and explicit states that it carries from call to call."""

    def __init__(self, executor: Interpreter | Opinion) -> None:
        self.run: Callable[..., dict[str, Array]] = executor.run
        self.internal: dict[str, Any] = dict(executor.new_states())
        self.explicit: dict[str, Array] = {}

    def call(self, name: str, inputs: dict[str, Array]) -> dict[str, Array]:
        outputs = self.run(name, inputs | {k: v for k, v in self.explicit.items() if k not in inputs}, self.internal)
        self.explicit = {k.removesuffix("_new"): v for k, v in outputs.items() if k.endswith("_new")}
        return {k: v for k, v in outputs.items() if not k.endswith("_new")}

    def states(self) -> dict[str, Array]:
        arrays = {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in self.internal.items()}
        return arrays | self.explicit


def inputs_of(package: Package, name: str, start: int, valid: int, rng: np.random.Generator) -> dict[str, Array]:
    """Everything but the explicit states, which are zeros at the start."""
    found: dict[str, Array] = {}
    for key, kind in package.function(name).inputs.items():
        if key == "embeddings":
            found[key] = (rng.standard_normal(kind.shape) * 0.5).astype(np.float16).astype(kind.dtype)
        elif key == "position_ids":
            found[key] = (start + np.arange(kind.shape[1]) + np.array([[0], [1], [2]])).astype(np.int32)
        elif key in ("start", "valid"):
            found[key] = np.array([start if key == "start" else valid], np.int32)
        elif start == 0:
            found[key] = np.zeros(kind.shape, kind.dtype)
    return found


def walks(decoder: Package, other: Package | None = None) -> Iterator[tuple[str, float]]:
    """(what, relative distance) of every output and state after every call: `decoder` on the interpreter, `other`, or
    the same package, on onnxruntime.
    """
    rng = np.random.default_rng(0)
    first, second = Walk(Interpreter(decoder)), Walk(Opinion(other or decoder))
    for name, start, valid in CALLS:
        inputs = inputs_of(decoder, name, start, valid, rng)
        wanted, got = first.call(name, inputs), second.call(name, inputs)
        for one, two in ((wanted, got), (first.states(), second.states())):
            assert one.keys() == two.keys()
            yield from ((f"{key} of {name}", distance(two[key], one[key])) for key in one)


def distance(a: Array, b: Array) -> float:
    assert a.dtype == b.dtype
    assert np.isfinite(a).all()
    wide, norm = b.astype(float), np.linalg.norm(b.astype(float))
    assert norm > 0
    return float(np.linalg.norm(a.astype(float) - wide) / norm)


@pytest.mark.parametrize(("kind", "tolerance"), [(Package, ROUNDED), (ExactPackage, EXACT)], ids=["rounded", "exact"])
def test_both_executors_agree(folder: Path, kind: type[Package], tolerance: float) -> None:
    assert {what: far for what, far in walks(kind(folder / "decoder.mlpackage")) if far > tolerance} == {}
    vision, rng = kind(folder / "vision.mlpackage"), np.random.default_rng(0)
    for name, one in vision.functions.items():
        image = {"image": rng.random(one.inputs["image"].shape, np.float32)}
        got, want = (executor.run(name, image, {}) for executor in (Opinion(vision), Interpreter(vision)))
        assert distance(got["image_embeddings"], want["image_embeddings"]) < tolerance


# What is wrong is noticed. Rounding hides little mistakes, the comparison without rounding does not.


def changed(package: Path, folder: Path, change: Callable[[Package], None]) -> Package:
    """A copy of a package with another model message."""
    copy = Path(shutil.copytree(package, folder / package.name))
    found = Package(copy)
    change(found)
    (copy / "Data/com.apple.CoreML/model.mlmodel").write_bytes(found.spec.SerializeToString())
    return ExactPackage(copy)


def worst(decoder: Path, other: Package) -> float:
    return max(far for _, far in walks(ExactPackage(decoder), other))


def test_a_changed_constant_is_noticed(unquantised: Path, tmp_path: Path) -> None:
    """A hundredth more of one norm's weights."""

    def change(package: Package) -> None:
        (weight,) = (
            one.inputs["val"][0] for one in package.function("decode").operations
            if one.name == "decoder_layers_2_post_norm_weight"
        )  # fmt: skip
        assert isinstance(weight, BlobTensor)
        with open(weight.file, "r+b") as file:
            file.seek(weight.offset)
            file.seek(RECORD.unpack(file.read(RECORD.size))[3])
            file.write((weight.array() * np.float16(1.01)).astype("<f2").tobytes())

    decoder = unquantised / "decoder.mlpackage"
    assert worst(decoder, changed(decoder, tmp_path, change)) > 10 * EXACT


def test_a_changed_operation_is_noticed(unquantised: Path, tmp_path: Path) -> None:
    def change(package: Package) -> None:
        for one in package.spec.mlProgram.functions["decode"].block_specializations["CoreML8"].operations:
            one.type = "sin" if one.type == "cos" else one.type

    decoder = unquantised / "decoder.mlpackage"
    assert worst(decoder, changed(decoder, tmp_path, change)) > ROUNDED


def test_a_wrong_kernel_of_the_interpreter_is_noticed(unquantised: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KERNELS, "softplus", lambda _: Bound(lambda x: torch.relu(x) + 0.69, ("x",)))
    decoder = ExactPackage(unquantised / "decoder.mlpackage")
    assert max(far for _, far in walks(decoder)) > 10 * EXACT


# float16 is stored


def test_float16_is_rounded_after_every_operation(tmp_path: Path) -> None:
    """Above 2,048 float16 has whole even numbers; beyond 65,504 it is infinite. No operation may undo the rounding
    before it, whether onnxruntime has a float16 kernel for it or not.
    """

    def body(x: Any, flag: Any) -> list[Any]:
        big = mb.add(x=x, y=np.float16(2048))
        chosen = mb.select(cond=mb.greater(x=flag, y=np.int32(0)), a=big, b=np.float16(0))
        tiled = mb.tile(x=chosen, reps=[2])
        turned = mb.reshape(x=mb.concat(values=[tiled, big], axis=0), shape=[3, 4])
        back = mb.sub(x=turned, y=np.float16(2048), name="back")
        large = mb.mul(x=back, y=np.float16(3e4), name="large")
        return [back, large, mb.mul(x=mb.mul(x=x, y=np.float16(2**-14)), y=np.float16(2**-14), name="tiny")]

    made = function(body, {"x": ((4,), "float16"), "flag": ((4,), "int32")})
    package = Package(save(tmp_path / "rounding.mlpackage", main=made))
    x, flag = np.array([0.3, 1.2, 5.5, 2.9], np.float16), np.array([1, 1, 0, 1], np.int32)
    found = Opinion(package).run("main", {"x": x, "flag": flag}, {})
    big = x + np.float16(2048)
    chosen = np.where(flag > 0, big, np.float16(0))
    back = np.stack([chosen, chosen, big]) - np.float16(2048)
    assert set(back[2]) == {0, 2, 6}
    with np.errstate(over="ignore"):
        wanted = {"back": back, "large": back * np.float16(3e4), "tiny": x * np.float16(2**-14) * np.float16(2**-14)}
    for name, array in wanted.items():
        assert found[name].dtype == np.float16
        np.testing.assert_array_equal(found[name], array)
    assert np.isinf(found["large"]).any()


def test_onnxruntime_runs_the_casts_as_written(unquantised: Path, tmp_path: Path) -> None:
    """It adds casts around operations without a float16 kernel, and then takes away roundings before them. In a whole
    decoder there must be none such; only what begins as a bool may be cast once instead of twice.
    """
    model = translate(Package(unquantised / "decoder.mlpackage"), "decode")
    onnx.checker.check_model(model)
    options = session_options()
    options.optimized_model_filepath = str(tmp_path / "run.onnx")
    onnxruntime.InferenceSession(model.SerializeToString(), options)
    written, ran = (
        {node.output[0]: node for node in one.graph.node} for one in (model, onnx.load(tmp_path / "run.onnx"))
    )
    assert ran.keys() <= written.keys()
    bools = {name for name, node in written.items() if node.op_type in ("Greater", "Less")}
    lost = {name: node for name, node in written.items() if name not in ran}
    assert all(node.op_type == "Cast" and node.input[0] in bools for node in lost.values())
    assert sum(node.op_type == "Cast" for node in ran.values()) > 100


def test_states_are_inputs_and_outputs(unquantised: Path) -> None:
    package = Package(unquantised / "decoder.mlpackage")
    graph = translate(package, "decode").graph
    states = package.function("decode").states
    assert {one.name for one in graph.input} == {*package.function("decode").inputs, *states}
    assert {one.name for one in graph.output} == {"logits", *(name + AFTER for name in states)}


# Refusals


def single(path: Path, body: Callable[..., Any], **inputs: tuple[tuple[int, ...], str]) -> Package:
    return Package(save(path / "one.mlpackage", main=function(body, inputs)))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (lambda x: mb.erf(x=x, name="strange"), r"strange \(erf\) of main: .* not know this operation; it knows abs, "),
        (lambda x: mb.relu(x=mb.linear(x=x, weight=np.ones((2, 4), np.float16))), r"\(relu\) of main"),
        (lambda x: mb.slice_by_size(x=x, begin=[1], size=[-1]), r"size \[-1\] leaves a dimension open"),
        (lambda x: mb.reshape(x=x, shape=[1, 0]), r"shape \[1, 0\] copies a dimension"),
        (lambda x: mb.gelu(x=x, mode="SIGMOID_APPROXIMATION"), "mode is 'SIGMOID_APPROXIMATION'; known: EXACT, TANH"),
        (lambda x: mb.concat(values=[x, x], axis=0, interleave=True), "it interleaves"),
        (lambda x: [mb.exp(x=x), mb.const(val=np.ones(2, np.float16), name="two")], "main returns 'two', a constant"),
        (
            lambda x: mb.slice_update(x=x, update=x, begin=[0], end=[4], stride=[1], end_mask=[True]),
            "it has the input 'stride', which the second opinion does not know",
        ),
    ],
    ids=["operation", "inner", "size", "zero", "mode", "interleave", "constant", "stride"],
)
def test_what_is_not_in_the_table_is_refused(body: Callable[..., Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(Untranslatable, match=message):
        translate(single(tmp_path, body, x=((4,), "float16")), "main")


def test_wrong_calls_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = single(tmp_path, lambda x: mb.mul(x=x, y=np.arange(4, dtype=np.float16)), x=((4,), "float16"))
    opinion = Opinion(package)
    with pytest.raises(BundleError, match="no function 'decode'; it has main"):
        opinion.run("decode", {}, {})
    with pytest.raises(CallError, match=r"main takes \['x'\]; got \['y'\]"):
        opinion.run("main", {"y": np.zeros(4, np.float16)}, {})
    with pytest.raises(CallError, match=r"input 'x' is float32 \[4\]; it declares float16 \[4\]"):
        opinion.run("main", {"x": np.zeros(4, np.float32)}, {})
    monkeypatch.setattr(second_opinion_graph, "LARGEST", 7)
    with pytest.raises(Untranslatable, match="more than 7 bytes of constants: a second opinion is for small models"):
        translate(package, "main")


def test_a_slice_that_does_not_fit_its_update_fails(tmp_path: Path) -> None:
    """As on a device, where `end` counts too."""

    def body(x: Any, begin: Any, end: Any) -> Any:
        return mb.slice_update(x=x, update=np.ones(2, np.float16), begin=begin, end=end, end_mask=[False])

    vector = ((1,), "int32")
    opinion = Opinion(single(tmp_path, body, x=((4,), "float16"), begin=vector, end=vector))
    given: dict[str, Array] = {"x": np.zeros(4, np.float16), "begin": np.array([1], np.int32)}
    given["end"] = np.array([3], np.int32)
    (found,) = opinion.run("main", given, {}).values()
    np.testing.assert_array_equal(found, [0, 1, 1, 0])
    with pytest.raises(ExportError, match="onnxruntime cannot run main"):
        opinion.run("main", given | {"end": np.array([4], np.int32)}, {})


def test_a_slice_beyond_the_end_fails(tmp_path: Path) -> None:
    def body(x: Any, begin: Any) -> Any:
        return mb.slice_by_size(x=x, begin=begin, size=[2], name="part")

    opinion = Opinion(single(tmp_path, body, x=((4,), "float16"), begin=((1,), "int32")))
    x = np.arange(4, dtype=np.float16)
    np.testing.assert_array_equal(opinion.run("main", {"x": x, "begin": np.array([2], np.int32)}, {})["part"], x[2:])
    with pytest.raises(ExportError, match=r"main gives 'part' as \[1\]; the program declares float16 \[2\]"):
        opinion.run("main", {"x": x, "begin": np.array([3], np.int32)}, {})

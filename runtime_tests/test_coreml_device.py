"""The backend for Core ML itself. Off a Mac, coremltools' MLModel is stood in for by the interpreter, behind a bridge
that is as particular as the real one.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from export.bundle.manifest import BundleError
from export.quantize.recipe import Recipe
from export.spec import ExportError
from runtime_tests.conftest import MemoryCheckpoint, build
from runtime_tests.mil import ct, function, mb, save
from targets.contract import CallError
from targets.to_coreml.device import UNITS, Device
from targets.to_coreml.interpreter import Interpreter
from targets.to_coreml.profiles import PROFILES
from targets.to_coreml.program import Package

pytestmark = pytest.mark.usefixtures("traced_once")

Array = NDArray[Any]
ON_A_MAC = 5e-2
"""Relative; not measured yet. A device may sum in float16 and in an order of its own, while two executors that sum in
float32 differ by up to 7e-3 (test_coreml_second_opinion)."""


def bridged(array: Any) -> Array:
    """What coremltools' bridge takes (CoreMLPythonArray.mm): float32, float64 or int32, writable, no negative steps."""
    assert isinstance(array, np.ndarray)
    if array.dtype not in (np.float32, np.float64, np.int32):
        raise RuntimeError(f"Unsupported array type: {array.dtype}")
    assert array.flags.writeable
    assert array.flags.c_contiguous
    return array


class StandInState:
    """Of coremltools' MLState."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.written: list[str] = []

    def read_state(self, name: str) -> Array:
        return self.tensors[name].float().numpy()

    def write_state(self, name: str, value: Array) -> None:
        self.written.append(name)
        self.tensors[name] = torch.from_numpy(bridged(value).copy()).to(self.tensors[name].dtype)


class StandIn:
    """Of coremltools' MLModel."""

    made: ClassVar[list[StandIn]] = []
    states: ClassVar[list[StandInState]] = []

    def __init__(self, model: str, function_name: str | None = None, compute_units: Any = None) -> None:
        self.package = Package(Path(model))
        self.interpreter = Interpreter(self.package)
        assert function_name is not None
        self.function, self.units = function_name, compute_units
        StandIn.made.append(self)

    def make_state(self) -> StandInState:
        StandIn.states.append(StandInState(self.interpreter.new_states()))
        return StandIn.states[-1]

    def predict(self, data: dict[str, Any], state: StandInState | None = None) -> dict[str, Array]:
        declared = self.package.function(self.function).inputs
        inputs = {name: bridged(data[name]).astype(kind.dtype) for name, kind in declared.items()}
        results = self.interpreter.run(self.function, inputs, {} if state is None else state.tensors)
        return {
            name: array.astype(np.float32) if array.dtype == np.float16 else array
            for name, array in results.items()
        }


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    StandIn.made, StandIn.states = [], []
    monkeypatch.setattr(ct.models, "MLModel", StandIn)
    return StandIn


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`add` puts x into two sums, `plain` has no state."""

    def add(x: Any, total: Any, last: Any) -> list[Any]:
        grown = mb.coreml_update_state(state=total, value=mb.add(x=mb.read_state(input=total), y=x))
        mb.coreml_update_state(state=last, value=x)
        return [mb.identity(x=grown, name="sum")]

    def twice(x: Any, total: Any, last: Any) -> list[Any]:
        both = mb.add(x=mb.read_state(input=total), y=mb.read_state(input=last))
        mb.coreml_update_state(state=total, value=both)
        return [mb.cast(x=mb.mul(x=both, y=x), dtype="fp32", name="product")]

    sums = {"total": (4,), "last": (4,)}
    return save(
        tmp_path_factory.mktemp("device") / "sums.mlpackage",
        add=function(add, {"x": ((4,), "float16")}, sums),
        twice=function(twice, {"x": ((4,), "float16")}, sums),
        plain=function(lambda n: [mb.mul(x=n, y=np.int32(3), name="three")], {"n": ((2,), "int32")}),
    )


def ones(value: float = 1.0) -> Array:
    return np.full(4, value, np.float16)


def test_functions_share_one_state(package: Path, stand_in: type[StandIn]) -> None:
    device = Device(package, "cpuAndGPU")
    device.load("add")
    device.load("add")
    assert [one.function for one in stand_in.made] == ["add"]
    assert not stand_in.states
    first = device.run("add", {"x": ones(1.5)})
    assert first["sum"].dtype == np.float16
    np.testing.assert_array_equal(first["sum"], ones(1.5))
    product = device.run("twice", {"x": ones(2)})["product"]
    assert product.dtype == np.float32
    np.testing.assert_array_equal(product, ones(6))
    assert len(stand_in.states) == 1
    found = device.states()
    assert {name: array.dtype for name, array in found.items()} == dict.fromkeys(("last", "total"), np.float16)
    np.testing.assert_array_equal(found["total"], ones(3))
    np.testing.assert_array_equal(found["last"], ones(1.5))


def test_a_function_without_states_gets_none(package: Path, stand_in: type[StandIn]) -> None:
    found = Device(package, "all").run("plain", {"n": np.array([2, 5], np.int32)})
    np.testing.assert_array_equal(found["three"], np.array([6, 15], np.int32))
    assert found["three"].dtype == np.int32
    assert not stand_in.states


def test_restore_none_makes_a_new_state(package: Path, stand_in: type[StandIn]) -> None:
    device = Device(package, "cpuAndGPU")
    device.run("add", {"x": ones()})
    device.restore(None)
    np.testing.assert_array_equal(device.states()["total"], ones(0))
    assert len(stand_in.states) == 2


def test_restore_writes_every_state(package: Path, stand_in: type[StandIn]) -> None:
    device = Device(package, "cpuAndGPU")
    device.run("add", {"x": ones()})
    saved = device.states()
    device.run("add", {"x": ones(0.1)})
    device.restore(saved)
    assert sorted(stand_in.states[0].written) == ["last", "total"]
    np.testing.assert_array_equal(device.run("add", {"x": ones(7)})["sum"], ones(8))
    np.testing.assert_array_equal(saved["total"], ones())  # a copy: later calls leave it alone
    fresh = Device(package, "cpuAndGPU")  # before anything was loaded
    fresh.restore(saved)
    np.testing.assert_array_equal(fresh.states()["total"], ones())


def test_arrays_in_any_order_are_taken(package: Path, stand_in: type[StandIn]) -> None:
    x = np.arange(8, dtype=np.float16)[::-2]
    x.flags.writeable = False
    np.testing.assert_array_equal(Device(package, "cpuOnly").run("add", {"x": x})["sum"], [7, 5, 3, 1])


@pytest.mark.parametrize(
    ("units", "name"), [("cpuAndGPU", "CPU_AND_GPU"), ("cpuAndNeuralEngine", "CPU_AND_NE"), ("all", "ALL")]
)
def test_compute_units(package: Path, stand_in: type[StandIn], units: str, name: str) -> None:
    Device(package, units).load("plain")
    assert stand_in.made[0].units == getattr(ct.ComputeUnit, name)


def test_profiles_name_known_units() -> None:
    assert {profile.compute_units for profile in PROFILES.values()} <= UNITS.keys()
    assert all(hasattr(ct.ComputeUnit, name) for name in UNITS.values())


def test_errors_say_what_is_wrong(package: Path, stand_in: type[StandIn], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExportError, match="no compute units 'npu'; choose one of: all, cpuOnly"):
        Device(package, "npu")
    device = Device(package, "cpuAndGPU")
    with pytest.raises(BundleError, match="no function 'decode'; it has add, plain, twice"):
        device.load("decode")
    with pytest.raises(CallError, match=r"add takes \['x'\]; got \['y'\]"):
        device.run("add", {"y": ones()})
    with pytest.raises(CallError, match=r"add 'x' is float32 \[4\]; the program declares float16 \[4\]"):
        device.run("add", {"x": ones().astype(np.float32)})
    with pytest.raises(CallError, match=r"restore takes \['last', 'total'\]; got \['total'\]"):
        device.restore({"total": ones()})

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("Error binding one or more input features")

    monkeypatch.setattr(StandIn, "predict", fail)
    with pytest.raises(ExportError, match=r"Core ML fails in add of sums.mlpackage: Error binding"):
        device.run("add", {"x": ones()})


def test_a_package_that_core_ml_refuses(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """coremltools only warns, and fails at the first prediction."""

    def refused(*_: Any, **__: Any) -> Any:
        warnings.warn("You will not be able to run predict() on this Core ML model. E5RT", RuntimeWarning, stacklevel=1)

    monkeypatch.setattr(ct.models, "MLModel", refused)
    with pytest.raises(ExportError, match=r"cannot load add of sums.mlpackage for cpuAndNeuralEngine: .*E5RT"):
        Device(package, "cpuAndNeuralEngine").load("add")


def test_a_model_through_the_bridge(small: MemoryCheckpoint, tmp_path: Path, stand_in: type[StandIn]) -> None:
    assert disagreement("gpu", small, tmp_path) == 0


@pytest.mark.skipif(sys.platform != "darwin", reason="Core ML runs on macOS only")
@pytest.mark.parametrize("profile", PROFILES)
def test_core_ml_agrees_with_the_interpreter(profile: str, small: MemoryCheckpoint, tmp_path: Path) -> None:
    assert disagreement(profile, small, tmp_path) < ON_A_MAC


def disagreement(profile: str, small: MemoryCheckpoint, folder: Path) -> float:
    """The largest relative distance of logits and states after a padded prefill and two tokens."""
    build(small, folder, Recipe.unquantised(), "coreml", lengths=(16,), profile=profile)
    package = Package(folder / "decoder.mlpackage")
    device, interpreter = Device(package.path, PROFILES[profile].compute_units), Interpreter(package)
    states, rng = interpreter.new_states(), np.random.default_rng(0)
    found = []
    for name, start, tokens, valid in (("prefill_16", 0, 16, 11), ("decode", 11, 1, 1), ("decode", 12, 1, 1)):
        known: dict[str, Array] = {
            "position_ids": np.tile(np.arange(start, start + tokens, dtype=np.int32), (3, 1)),
            "start": np.array([start], np.int32),
            "valid": np.array([valid], np.int32),
            "embeddings": rng.standard_normal((1, tokens, 128)).astype(np.float16),
        }
        inputs = {key: known[key] for key in package.function(name).inputs}
        outputs, wanted = device.run(name, inputs), interpreter.run(name, inputs, states)
        found.append(distance(outputs["logits"], wanted["logits"]))
    return max(found + [distance(array, states[key].numpy()) for key, array in device.states().items()])


def distance(a: Array, b: Array) -> float:
    return float(np.linalg.norm(a.astype(float) - b.astype(float)) / np.linalg.norm(b.astype(float)))

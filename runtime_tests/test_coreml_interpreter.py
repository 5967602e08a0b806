"""The emulated Core ML backend beyond its single operations: states, memory that values share, compressed weights, and
what is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from export.bundle.manifest import BundleError
from export.spec import ExportError
from runtime_tests.mil import ct, function, mb, narrow, save
from targets.contract import CallError
from targets.to_coreml.constants import Budget, UnsupportedOperation, weights
from targets.to_coreml.exact import ExactPackage
from targets.to_coreml.interpreter import Interpreter
from targets.to_coreml.program import Package

RNG = np.random.default_rng(0)
Array = NDArray[Any]


def half(*shape: int, scale: float = 1.0) -> Array:
    return (RNG.standard_normal(shape) * scale).astype(np.float16)


# States


def test_states_are_read_written_and_shared_between_functions(tmp_path: Path) -> None:
    """A later read sees the write before it, an earlier one does not; the next function sees both."""

    def write(x: Any, cache: Any, last: Any) -> list[Any]:
        before = mb.read_state(input=cache)
        after = mb.coreml_update_state(state=cache, value=mb.add(x=before, y=x))
        mb.coreml_update_state(state=last, value=after)  # two states, one value
        again = mb.read_state(input=cache)
        return [mb.identity(x=before, name="before"), mb.identity(x=again, name="again")]

    def patch(x: Any, at: Any, cache: Any, last: Any) -> list[Any]:
        end = mb.add(x=at, y=np.array([1, 3], np.int32))
        new = mb.slice_update(x=mb.read_state(input=cache), update=x, begin=at, end=end)
        return [
            mb.identity(x=mb.coreml_update_state(state=cache, value=new), name="new"),
            mb.identity(x=mb.read_state(input=last), name="old"),
        ]

    states = {"cache": (2, 3), "last": (2, 3)}
    path = save(
        tmp_path / "states.mlpackage", write=function(write, {"x": ((2, 3), "float16")}, states),
        patch=function(patch, {"x": ((1, 3), "float16"), "at": ((2,), "int32")}, states),
    )  # fmt: skip
    interpreter = Interpreter(Package(path))
    held = interpreter.new_states()
    assert {name: (*one.shape, one.dtype) for name, one in held.items()} == dict.fromkeys(states, (2, 3, torch.float16))
    first, x = half(2, 3), half(1, 3)
    found = interpreter.run("write", {"x": first}, held)
    assert not found["before"].any()
    np.testing.assert_array_equal(found["again"], first)
    patched = interpreter.run("patch", {"x": x, "at": np.array([1, 0], np.int32)}, held)
    want = np.vstack([first[:1], x])
    np.testing.assert_array_equal(held["cache"].numpy(), want)
    np.testing.assert_array_equal(patched["new"], want)
    np.testing.assert_array_equal(patched["old"], first)  # the other state did not follow
    np.testing.assert_array_equal(held["last"].numpy(), first)
    np.testing.assert_array_equal(found["again"], first)  # nor did what was returned
    cache = held["cache"].data_ptr()
    interpreter.run("patch", {"x": x, "at": np.array([0, 0], np.int32)}, held)
    assert held["cache"].data_ptr() == cache, "a row of a cache is written in place"


def test_no_update_is_seen_by_another_value(tmp_path: Path) -> None:
    """Views of a state, an input, a constant, another update: each keeps what it had."""
    constant = half(3, 4)

    def body(x: Any, u: Any, cache: Any) -> list[Any]:
        def update(y: Any, row: int) -> Any:
            return mb.slice_update(x=y, update=u, begin=[row, 0], end=[row + 1, 4])

        held = mb.read_state(input=cache)
        turned = mb.transpose(x=held, perm=[1, 0])  # a view that outlives the update
        mb.coreml_update_state(state=cache, value=update(held, 0))
        sum_ = mb.add(x=x, y=x)
        flat = mb.reshape(x=sum_, shape=[12])
        part = mb.split(x=sum_, num_splits=2, axis=1)[1]
        first = update(sum_, 1)
        second = update(first, 2)  # in place of the first, which nobody reads
        row = mb.slice_by_index(x=second, begin=[1, 0], end=[2, 4])
        own = mb.slice_update(x=second, update=row, begin=[0, 0], end=[1, 4])
        return [
            mb.identity(x=turned, name="turned"), mb.identity(x=flat, name="flat"), mb.identity(x=part, name="part"),
            mb.identity(x=own, name="own"), mb.identity(x=update(x, 0), name="input"),
            mb.identity(x=update(constant, 0), name="constant"), mb.identity(x=x, name="same"),
        ]  # fmt: skip

    made = function(body, {"x": ((3, 4), "float16"), "u": ((1, 4), "float16")}, {"cache": (3, 4)})
    interpreter = Interpreter(Package(save(tmp_path / "views.mlpackage", main=made)))
    held, x, u = interpreter.new_states(), half(3, 4), half(1, 4)
    kept, previous = x.copy(), np.zeros((3, 4), np.float16)
    for _ in range(3):
        found = interpreter.run("main", {"x": x, "u": u}, held)
        found["same"][:] = 0  # what is returned is the caller's
        np.testing.assert_array_equal(x, kept)
        np.testing.assert_array_equal(found["turned"], previous.T)
        np.testing.assert_array_equal(found["flat"], (2 * x).reshape(-1))
        np.testing.assert_array_equal(found["part"], 2 * x[:, 2:])
        np.testing.assert_array_equal(found["own"], np.vstack([u, u, u]))
        np.testing.assert_array_equal(found["input"], np.vstack([u, x[1:]]))
        np.testing.assert_array_equal(found["constant"], np.vstack([u, constant[1:]]))
        previous = held["cache"].numpy().copy()
        np.testing.assert_array_equal(previous[:1], u)


STATES = ("a", "b")


def random_program(seed: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """A program of views, updates and states of shape [4, 4], and the same in numpy with a copy at every step."""
    rng = np.random.default_rng(seed)
    plan = [(str(rng.choice(["view", "view", "update", "update", "add", "read", "write", "swap"])),
             *rng.integers(0, 1 << 30, 4).tolist()) for _ in range(24)]  # fmt: skip

    def walk(values: list[Any], ops: Any) -> list[Any]:
        for kind, *numbers in plan:
            x, y, row = values[numbers[0] % len(values)], values[numbers[1] % len(values)], numbers[2] % 3
            state = STATES[numbers[3] % 2]
            if kind == "view":
                values.append(ops.view(x, row))
            elif kind == "update":
                values.append(ops.update(x, ops.rows(y, numbers[3] % 3), row))
            elif kind == "add":
                values.append(ops.add(x, y))
            elif kind == "read":
                values.append(ops.read(state))
            elif kind == "write":
                ops.write(state, x)
            else:
                one, other = (ops.read(name) for name in STATES)
                ops.write("a", other)
                ops.write("b", one)
        return values[-6:]

    class Mil:
        def __init__(self, states: dict[str, Any]) -> None:
            self.states = states

        def view(self, x: Any, kind: int) -> Any:
            if kind == 0:
                return mb.transpose(x=x, perm=[1, 0])
            if kind == 1:
                return mb.reshape(x=mb.reshape(x=x, shape=[2, 8]), shape=[4, 4])
            return mb.identity(x=x)

        def rows(self, x: Any, first: int) -> Any:
            return mb.slice_by_index(x=x, begin=[first, 0], end=[first + 2, 4])

        def update(self, x: Any, u: Any, row: int) -> Any:
            return mb.slice_update(x=x, update=u, begin=[row, 0], end=[row + 2, 4])

        def add(self, x: Any, y: Any) -> Any:
            return mb.add(x=x, y=y)

        def read(self, state: str) -> Any:
            return mb.read_state(input=self.states[state])

        def write(self, state: str, x: Any) -> None:
            mb.coreml_update_state(state=self.states[state], value=x)

    class Copies:
        def __init__(self, states: dict[str, Array]) -> None:
            self.states = states

        def view(self, x: Array, kind: int) -> Array:
            return x.T.copy() if kind == 0 else x.copy()

        def rows(self, x: Array, first: int) -> Array:
            return x[first : first + 2].copy()

        def update(self, x: Array, u: Array, row: int) -> Array:
            x = x.copy()
            x[row : row + 2] = u
            return x

        def add(self, x: Array, y: Array) -> Array:
            return x + y

        def read(self, state: str) -> Array:
            return self.states[state].copy()

        def write(self, state: str, x: Array) -> None:
            self.states[state] = x.copy()

    def body(x: Any, a: Any, b: Any) -> list[Any]:
        return [mb.identity(x=one, name=f"out_{place}") for place, one in enumerate(walk([x], Mil({"a": a, "b": b})))]

    return body, lambda x, states: walk([x], Copies(states))


def test_random_programs_of_views_and_updates_act_as_if_everything_were_copied(tmp_path: Path) -> None:
    pairs = [random_program(seed) for seed in range(40)]
    functions = {
        f"f{place}": function(body, {"x": ((4, 4), "float16")}, dict.fromkeys(STATES, (4, 4)))
        for place, (body, _) in enumerate(pairs)
    }
    interpreter = Interpreter(Package(save(tmp_path / "random.mlpackage", **functions)))
    held = interpreter.new_states()
    states: dict[str, Array] = {name: np.zeros((4, 4), np.float16) for name in STATES}
    for place, (_, copies) in [*enumerate(pairs)] * 2:
        x = half(4, 4, scale=1e-3)
        returned = interpreter.run(f"f{place}", {"x": x}, held)
        for number, want in enumerate(copies(x, states)):
            np.testing.assert_array_equal(returned[f"out_{number}"], want)
        for name in STATES:
            np.testing.assert_array_equal(held[name].numpy(), states[name])
            held[name].mul_(0.125)
            states[name] = states[name] * np.float16(0.125)


# Weights


def test_compressed_weights_are_what_coremltools_makes_of_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    cases: dict[str, tuple[Any, dict[str, Any]]] = {}
    for dtype, low, high in (("int4", -8, 8), ("uint4", 0, 16), ("int8", -128, 128), ("uint8", 0, 256)):
        for shape, groups in (((3, 7), (3, 1)), ((6, 64), (6, 2)), ((6, 8, 9), (3, 8, 3))):
            codes, offset = rng.integers(low, high, shape), rng.integers(max(low, -4), 4, groups)
            stored = [narrow(one, dtype) if dtype.endswith("4") else one.astype(dtype) for one in (codes, offset)]
            given = {"data": stored[0], "scale": (rng.random(groups) + 0.1).astype(np.float16)}
            cases[f"{dtype}_{len(cases)}"] = mb.constexpr_blockwise_shift_scale, given
            cases[f"{dtype}_{len(cases)}"] = mb.constexpr_blockwise_shift_scale, given | {"offset": stored[1]}
    for bits in (1, 2, 3, 4, 6, 8):
        codes = rng.integers(0, 1 << bits, (6, 11))
        for groups, vector, axis in (((1, 1), 1, None), ((3, 11), 1, None), ((2, 1), 3, 0), ((2, 1), 2, 1)):
            given = {
                "indices": narrow(codes, f"uint{bits}") if bits < 8 else codes.astype(np.uint8),
                "lut": rng.standard_normal((*groups, 1 << bits, vector)).astype(np.float16),
            }
            given |= {} if axis is None else {"vector_axis": axis}
            cases[f"palette{bits}_{groups[0]}_{groups[1]}_{axis}"] = mb.constexpr_lut_to_dense, given
    wanted: dict[str, Array] = {}

    def body(x: Any) -> list[Any]:
        outputs = []
        for name, (make, given) in cases.items():
            weight = make(**given)
            wanted[name] = weight.op.materialized_val_inference()
            outputs.append(mb.mul(x=weight, y=x, name=name))
        return outputs

    package = Package(save(tmp_path / "weights.mlpackage", main=function(body, {"x": ((1,), "float16")})))
    found = Interpreter(package).run("main", {"x": np.ones(1, np.float16)}, {})
    for name, want in wanted.items():
        np.testing.assert_array_equal(found[name], want.astype(np.float16), err_msg=name)


def test_functions_share_weights_and_the_budget_changes_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights beyond the budget are expanded at every use, in small blocks, with the same result and nothing kept."""
    codes, scale, plain, bias = narrow(RNG.integers(-8, 8, (48, 64)), "int4"), half(48, 2), half(64, 48), half(48)

    def body(x: Any) -> list[Any]:
        weight = mb.constexpr_blockwise_shift_scale(data=codes, scale=scale)
        hidden = mb.linear(x=x, weight=weight, bias=bias)
        rows = mb.gather(x=weight, indices=np.array([3, 1], np.int32), name="rows")
        return [mb.linear(x=hidden, weight=plain, name="out"), rows]

    descriptor = ct.utils.MultiFunctionDescriptor()
    for name, count in (("one", 1), ("four", 4)):
        made = function(body, {"x": ((count, 64), "float16")})
        descriptor.add_function(str(save(tmp_path / f"{name}.mlpackage", main=made)), "main", name)
    descriptor.default_function_name = "one"
    ct.utils.save_multifunction(descriptor, str(tmp_path / "shared.mlpackage"))
    package = Package(tmp_path / "shared.mlpackage")
    x = half(4, 64)
    wide = Interpreter(package)
    wide.load()
    linear = [step for step in wide._compiled["one"].steps if step.operation.type == "linear"]
    assert len(linear) == 2 and len(wide._constants._factors) == 2
    want = wide.run("four", {"x": x}, {})
    np.testing.assert_array_equal(wide.run("one", {"x": x[:1]}, {})["rows"], want["rows"])
    exact = Interpreter(ExactPackage(package.path))
    exact.load()
    assert len(exact._constants._factors) == 2  # read as float32, they are still one for both functions
    wider = exact.run("four", {"x": x.astype(np.float32)}, {})["out"]
    np.testing.assert_allclose(wider, want["out"].astype(float), rtol=1e-2, atol=0.5)
    monkeypatch.setattr("targets.to_coreml.constants.BLOCK", 100)
    monkeypatch.setattr("targets.to_coreml.constants.PART", 1000)
    for room, kept in ((0, 0), (4 * 48 * 64, 1)):
        tight = Interpreter(package, budget=Budget(room))
        found = tight.run("four", {"x": x}, {})
        assert sum(factor._kept is not None for factor in tight._constants._factors.values()) == kept
        np.testing.assert_array_equal(found["rows"], want["rows"])
        np.testing.assert_allclose(found["out"].astype(float), want["out"].astype(float), rtol=1e-3, atol=1e-2)


def test_weights_are_read_in_rows_by_name(tmp_path: Path) -> None:
    """As a check of the artifact reads them: in the declared dtype, whatever rows are asked for."""
    codes, scale = narrow(RNG.integers(-8, 8, (6, 64)), "int4"), half(3, 2)

    def body(x: Any) -> Any:
        return mb.linear(x=x, weight=mb.constexpr_blockwise_shift_scale(data=codes, scale=scale, name="w"), name="out")

    package = Package(save(tmp_path / "rows.mlpackage", main=function(body, {"x": ((1, 64), "float16")})))
    weight = weights(package.function("main"))["w"]
    want = (codes.astype(np.float32) * scale.astype(np.float32).repeat(2, 0).repeat(32, 1)).astype(np.float16)
    assert (weight.shape, weight.dtype) == ((6, 64), "float16")
    for start, stop in ((0, 6), (1, 4), (5, 6)):
        np.testing.assert_array_equal(weight.rows(start, stop).numpy(), want[start:stop])


def test_one_record_may_serve_tensors_of_two_shapes(tmp_path: Path) -> None:
    """Writers store equal bytes once; the shape is the program's."""
    table = half(2, 8)

    def body(x: Any) -> list[Any]:
        flat = mb.const(val=table.reshape(16) + np.float16(1), name="flat")
        return [mb.add(x=mb.const(val=table, name="table"), y=x, name="a"), mb.add(x=flat, y=x, name="b")]

    path = save(tmp_path / "shared.mlpackage", main=function(body, {"x": ((1,), "float16")}))
    package = Package(path)
    main = package.spec.mlProgram.functions["main"]
    values = [
        operation.attributes["val"].blobFileValue
        for operation in main.block_specializations[main.opset].operations
        if "val" in operation.attributes and operation.attributes["val"].WhichOneof("value") == "blobFileValue"
    ]
    assert len(values) == 2
    values[0].offset = values[1].offset
    (path / "Data/com.apple.CoreML/model.mlmodel").write_bytes(package.spec.SerializeToString())
    found = Interpreter(Package(path)).run("main", {"x": np.zeros(1, np.float16)}, {})
    assert found["a"].shape == (2, 8) and found["b"].shape == (16,)
    np.testing.assert_array_equal(found["a"].reshape(16), found["b"])


def test_constants_are_folded_and_operations_are_observed(tmp_path: Path) -> None:
    seen: list[tuple[str, str, tuple[int, ...]]] = []

    def body(x: Any) -> Any:
        table = mb.transpose(x=mb.fill(shape=[3, 2], value=np.float16(2)), perm=[1, 0])
        return mb.add(x=mb.mul(x=x, y=table, name="product"), y=np.float16(1), name="out")

    package = Package(save(tmp_path / "fold.mlpackage", main=function(body, {"x": ((2, 3), "float16")})))
    interpreter = Interpreter(package, observe=lambda name, kind, value: seen.append((name, kind, tuple(value.shape))))
    assert interpreter.run("main", {"x": np.ones((2, 3), np.float16)}, {})["out"].tolist() == [[3] * 3] * 2
    assert seen == [("product", "mul", (2, 3)), ("out", "add", (2, 3))]


# Refusals


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (lambda x: mb.acos(x=x), r"acos_0 of main is a acos, which the interpreter does not run; it runs abs, add, "),
        (lambda x: mb.reduce_prod(x=x, axes=[0]), r"reduce_prod_0 of main is a reduce_prod"),
        (lambda x: mb.conv(x=mb.reshape(x=x, shape=[1, 1, 9]), weight=half(1, 1, 4), pad_type="same"),
         r"conv_0 \(conv\) of main: pad_type 'same' with an odd padding of 3 is ambiguous; use 'custom'"),
        (lambda x: mb.slice_update(x=x, update=x, begin=[-1], end=[0], stride=[-1], end_mask=[True]),
         r"slice_update_0 \(slice_update\) of main: stride \[-1\]: only positive strides are supported"),
        (lambda x: mb.cond(pred=mb.cast(x=mb.squeeze(x=mb.reduce_sum(x=x, axes=[0], keep_dims=True)), dtype="bool"),
                           _true_fn=lambda: mb.identity(x=x), _false_fn=lambda: mb.abs(x=x)),
         r"operation 'cond' of main has blocks of its own, which are not read; export without control flow"),
        (lambda x: mb.constexpr_sparse_to_dense(nonzero_data=half(2), mask=narrow([1, 0, 1], "uint1")),
         r"constexpr_sparse_to_dense_0 \(.*\) of main is not known to the interpreter; it expands constexpr_bl"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused(body: Callable[[Any], Any], message: str, tmp_path: Path) -> None:
    def whole(x: Any) -> Any:
        return mb.identity(x=body(x), name="out")

    made = function(whole, {"x": ((9,), "float16")})
    with pytest.raises((UnsupportedOperation, BundleError), match=message):
        Interpreter(Package(save(tmp_path / "unknown.mlpackage", main=made))).load()


def test_results_are_held_against_what_the_program_declares(tmp_path: Path) -> None:
    """Folded ones when the function is compiled, the others at its first run."""
    zero = np.zeros(2, np.float16)

    def body(x: Any) -> list[Any]:
        folded = mb.fill(shape=[2], value=np.float16(1), name="folded")
        return [mb.add(x=x, y=folded, name="sum"), mb.cast(x=x, dtype="fp32", name="wide")]

    for name, message in (
        ("folded", r"folded \(fill\) of main gives 'folded' as float16 \[2\], but the program declares float16 \[3\]"),
        ("wide", r"wide \(cast\) of main gives 'wide' as float32 \[2\], but the program declares float32 \[3\]"),
    ):
        path = save(tmp_path / f"{name}.mlpackage", main=function(body, {"x": ((2,), "float16")}))
        package = Package(path)
        main = package.spec.mlProgram.functions["main"]
        for operation in main.block_specializations[main.opset].operations:
            for output in operation.outputs:
                if output.name == name:
                    output.type.tensorType.dimensions[0].constant.size = 3
        for output in package.spec.description.output:
            if output.name == name:
                output.type.multiArrayType.shape[0] = 3
        (path / "Data/com.apple.CoreML/model.mlmodel").write_bytes(package.spec.SerializeToString())
        with pytest.raises(ExportError, match=message):
            Interpreter(Package(path)).run("main", {"x": zero}, {})


def test_an_older_opset_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "old.mlpackage"
    program = mb.program(input_specs=[mb.TensorSpec((2,))], opset_version=ct.target.iOS17)(lambda x: mb.relu(x=x))
    ct.convert(
        program, convert_to="mlprogram", minimum_deployment_target=ct.target.iOS17, skip_model_load=True,
        pass_pipeline=ct.PassPipeline.EMPTY,
    ).save(str(path))  # fmt: skip
    with pytest.raises(UnsupportedOperation, match=r"opset CoreML7; the interpreter knows CoreML8: build for iOS 18"):
        Interpreter(Package(path)).load()


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Package:
    """Rows of a state at runtime places."""

    def body(x: Any, at: Any, cache: Any) -> Any:
        end = mb.add(x=at, y=np.array([2, 3], np.int32))
        new = mb.slice_update(x=mb.read_state(input=cache), update=x, begin=at, end=end)
        new = mb.coreml_update_state(state=cache, value=new)
        return mb.gather(x=new, indices=mb.slice_by_size(x=at, begin=[0], size=[1]), axis=0, name="row")

    made = function(body, {"x": ((2, 3), "float16"), "at": ((2,), "int32")}, {"cache": (4, 3)})
    return Package(save(tmp_path_factory.mktemp("rows") / "rows.mlpackage", main=made))


def test_calls_are_held_against_the_declaration(rows: Package) -> None:
    interpreter = Interpreter(rows)
    x, at = half(2, 3), np.zeros(2, np.int32)
    for inputs, message in (
        ({"x": x}, r"main needs input 'at'; got \['x'\]"),
        ({"x": x, "at": at, "y": x}, r"main has no input 'y'; it has \['at', 'x'\]"),
        ({"x": x[:1], "at": at}, r"main input 'x' is float16 \[1, 3\]; the program declares float16 \[2, 3\]"),
        ({"x": x.astype(np.float32), "at": at}, r"main input 'x' is float32 \[2, 3\]; the program declares float16"),
        ({"x": x, "at": at.astype(np.int64)}, r"main input 'at' is int64 \[2\]; the program declares int32 \[2\]"),
    ):
        with pytest.raises(CallError, match=message):
            interpreter.run("main", inputs, interpreter.new_states())
    for states, message in (
        ({}, r"main needs state 'cache'; got \[\]: begin with new_states\(\)"),
        ({"cache": torch.zeros(4, 3)}, r"main state 'cache' is float32 \[4, 3\]; the program declares float16 "),
    ):
        with pytest.raises(CallError, match=message):
            interpreter.run("main", {"x": x, "at": at}, states)
    with pytest.raises(BundleError, match=r"has no function 'decode'; it has main"):
        interpreter.run("decode", {}, {})


@pytest.mark.parametrize(
    ("at", "message"),
    [
        (3, r"slice_update_0 \(slice_update\) of main fails: the slice of x \[4, 3\] is \[1, 3\], update \[2, 3\]"),
        (-4, r"row \(gather\) of main fails: .*(out of range|out of bounds)"),
    ],
)
def test_places_outside_are_errors(at: int, message: str, rows: Package) -> None:
    """A slice past the end is shorter than the update; a negative index is undefined on the device."""
    interpreter = Interpreter(rows)
    with pytest.raises(ExportError, match=message):
        interpreter.run("main", {"x": half(2, 3), "at": np.array([at, 0], np.int32)}, interpreter.new_states())

"""Reading Core ML packages: the weight file, programs of several functions, and packages that are broken."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.bundle.manifest import BundleError
from export.spec import ExportError
from runtime_tests.mil import ct, function, mb, narrow, save
from targets.to_coreml import program
from targets.to_coreml.blob import CODES, RECORD, BlobFile, BlobTensor
from targets.to_coreml.constants import weights
from targets.to_coreml.program import Package, Reference, TensorType

MODEL = Path("Data/com.apple.CoreML/model.mlmodel")
WEIGHTS = Path("Data/com.apple.CoreML/weights/weight.bin")
RNG = np.random.default_rng(0)
CODED = narrow(RNG.integers(-8, 8, (8, 64)), "int4")
SCALES = RNG.random((8, 2)).astype(np.float16)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two functions, decode and prefill_4, of one int4 layer and a cache."""

    def body(x: Any, cache: Any) -> Any:
        weight = mb.constexpr_blockwise_shift_scale(data=CODED, scale=SCALES, name="weight")
        held = mb.coreml_update_state(state=cache, value=mb.add(x=mb.read_state(input=cache), y=np.float16(1)))
        table = mb.const(val=np.arange(16, dtype=np.float16), name="table")
        return mb.concat(values=[mb.linear(x=x, weight=weight), mb.add(x=held, y=table)], axis=-1, name="out")

    return save(
        tmp_path_factory.mktemp("package") / "two.mlpackage",
        **{
            name: function(body, {"x": ((rows, 64), "float16")}, {"cache": (rows, 16)})
            for name, rows in (("decode", 1), ("prefill_4", 4))
        },
    )


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """The package, to be broken."""
    return Path(shutil.copytree(saved, tmp_path / "copy.mlpackage"))


def test_a_package_gives_functions_types_and_operations(saved: Path) -> None:
    package = Package(saved)
    assert list(package.functions) == ["decode", "prefill_4"]
    decode = package.function("decode")
    assert decode.inputs == {"x": TensorType((1, 64), "float16")}
    assert decode.states == {"cache": TensorType((1, 16), "float16")}
    assert decode.outputs == {"out": TensorType((1, 24), "float16")}
    assert package.function("prefill_4").outputs == {"out": TensorType((4, 24), "float16")}
    kinds = [operation.type for operation in decode.operations if operation.type != "const"]
    assert kinds == [
        "constexpr_blockwise_shift_scale", "read_state", "add", "write_state", "read_state", "linear", "add", "concat",
    ]  # fmt: skip
    concat = next(operation for operation in decode.operations if operation.type == "concat")
    assert concat.name == "out" and all(isinstance(value, Reference) for value in concat.inputs["values"])
    weight = next(operation for operation in decode.operations if operation.name == "weight")
    (data,) = weight.inputs["data"]
    assert isinstance(data, BlobTensor) and (data.dtype, data.shape) == ("int4", (8, 64))
    np.testing.assert_array_equal(data.array(), CODED.astype(np.int8))
    np.testing.assert_array_equal(data.rows(3, 5), CODED.astype(np.int8)[3:5])
    np.testing.assert_array_equal(package.value("decode", "table"), np.arange(16))
    with pytest.raises(BundleError, match=r"decode of two\.mlpackage has no constant tensor 'weight'"):
        package.value("decode", "weight")
    with pytest.raises(BundleError, match=r"two\.mlpackage has no function 'vision'; it has decode, prefill_4"):
        package.function("vision")


@pytest.mark.parametrize("dtype", sorted(CODES.keys() - {"bfloat16"}))  # which coremltools does not write
@pytest.mark.parametrize("count", [1, 7, 8, 13, 33])
def test_every_type_of_the_weight_file_is_read(dtype: str, count: int, tmp_path: Path) -> None:
    """Against the writer that coremltools ships, and in every slice."""
    from coremltools.libmilstoragepython import _BlobStorageWriter

    path = tmp_path / "weight.bin"
    writer = _BlobStorageWriter(str(path))
    values: Any
    if dtype == "float16":
        values = RNG.standard_normal(count).astype(np.float16)
        offset = writer.write_fp16_data(values.view(np.uint16))
    elif dtype == "float32":
        values = RNG.standard_normal(count).astype(np.float32)
        offset = writer.write_float_data(values)
    else:
        bits = int(dtype.lstrip("uint"))
        low = -(1 << (bits - 1)) if dtype.startswith("int") else 0
        values = RNG.integers(low, low + (1 << bits), count)
        values = narrow(values, dtype) if bits < 8 else values.astype(dtype)
        offset = getattr(writer, f"write_{dtype}_data")(values)
    del writer  # which writes the number of entries
    tensor = BlobFile(path).tensor(offset, dtype, (count,))
    want = np.asarray(values).astype(float)
    np.testing.assert_array_equal(tensor.array().astype(float), want)
    for start, stop in ((0, 0), (1, count), (count // 2, count), (3, 6)):
        np.testing.assert_array_equal(tensor.flat(start, min(stop, count)).astype(float), want[start:stop])


def test_immediate_values_of_every_type(tmp_path: Path) -> None:
    """Small constants lie in the program itself: packed, as bytes or as lists, scalars and empty ones too."""
    arrays: dict[str, Any] = {
        "float16": np.array([1.5, -2], np.float16),
        "float32": np.array([0.1], np.float32),
        "int32": np.array([[-7, 9]], np.int32),
        "bool": np.array([True, False, True]),
        "int8": np.array([-128, 3], np.int8),
        "uint8": np.array([255, 0], np.uint8),
        "int16": np.array([-300], np.int16),
        "uint16": np.array([65535, 1], np.uint16),
        "int4": narrow([-8, 7, 1], "int4"),
        "uint3": narrow([7, 0, 5], "uint3"),
        "scalar": np.float16(2.5),
    }

    def body(x: Any) -> Any:
        for name, value in arrays.items():
            mb.const(val=value, name=f"c_{name}")
        return mb.add(x=x, y=np.float16(1), name="out")

    package = Package(save(tmp_path / "immediate.mlpackage", main=function(body, {"x": ((2,), "float16")})))
    for name, value in arrays.items():
        found = package.value("main", f"c_{name}")
        assert found.shape == np.shape(value)
        np.testing.assert_array_equal(found.astype(float), np.asarray(value).astype(float), err_msg=name)


def test_functions_of_one_weight_file_share_their_tensors(saved: Path, tmp_path: Path) -> None:
    descriptor = ct.utils.MultiFunctionDescriptor()
    for rows in (1, 2):
        made = function(
            lambda x: mb.linear(x=x, weight=np.float16(np.arange(640).reshape(10, 64))), {"x": ((rows, 64), "float16")}
        )
        descriptor.add_function(str(save(tmp_path / f"{rows}.mlpackage", main=made)), "main", f"rows_{rows}")
    descriptor.default_function_name = "rows_1"
    ct.utils.save_multifunction(descriptor, str(tmp_path / "both.mlpackage"))
    package = Package(tmp_path / "both.mlpackage")
    keys = {
        value.key
        for name in ("rows_1", "rows_2")
        for operation in package.function(name).operations
        for (value, *_) in operation.inputs.values()
        if isinstance(value, BlobTensor) and value.shape == (10, 64)
    }
    assert len(keys) == 1


def test_coremltools_itself_is_not_imported(saved: Path) -> None:
    """Its import takes ten seconds; its messages can be imported before and after it."""
    code = (
        "import sys; from pathlib import Path; from targets.to_coreml.program import Package; "
        f"Package(Path({str(saved)!r})); print('coremltools' in sys.modules, 'torch' in sys.modules)"
    )
    root = Path(__file__).parents[1]
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert shown.stdout.split() == ["False", "False"]


def test_a_missing_coremltools_is_said(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "find_spec", lambda name: None)
    for name in [name for name in sys.modules if name.startswith(program.MESSAGES)]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ExportError, match=r"needs the Python package coremltools, .* 'qwen35-mobile\[coreml\]'"):
        Package(saved)


# Broken packages


def read(path: Path) -> Any:
    """Everything that a package holds."""
    package = Package(path)
    return [(one.operations, one.outputs, weights(one)) for one in package.functions.values()]


def respec(path: Path, change: Callable[[Any], None]) -> None:
    """Change the model message of a package."""
    package = Package(path)
    change(package.spec)
    (path / MODEL).write_bytes(package.spec.SerializeToString())


def block(spec: Any) -> Any:
    function = spec.mlProgram.functions["decode"]
    return function.block_specializations[function.opset]


def blob(spec: Any) -> Any:
    """The message that says where the codes of the weight lie."""
    (weight,) = (one for one in block(spec).operations if one.type.startswith("constexpr"))
    return weight.inputs["data"].arguments[0].value


def no_manifest(path: Path) -> None:
    (path / "Manifest.json").unlink()


def strange_manifest(path: Path) -> None:
    (path / "Manifest.json").write_text("{}")


def outside_manifest(path: Path) -> None:
    manifest = json.loads((path / "Manifest.json").read_text())
    manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"] = "../../model.mlmodel"
    (path / "Manifest.json").write_text(json.dumps(manifest))


def edit_manifest(path: Path, **changes: Any) -> None:
    manifest = json.loads((path / "Manifest.json").read_text())
    (path / "Manifest.json").write_text(json.dumps({**manifest, **changes}))


def root_path(value: Any) -> Callable[[Path], None]:
    """Another path of the root model."""
    return lambda path: edit_manifest(path, itemInfoEntries={"x": {"path": value}}, rootModelIdentifier="x")


def listed_entries(path: Path) -> None:
    edit_manifest(path, itemInfoEntries=[{"path": "com.apple.CoreML/model.mlmodel"}], rootModelIdentifier=0)


def no_entry(path: Path) -> None:
    edit_manifest(path, itemInfoEntries=[], rootModelIdentifier=0)


def binary_manifest(path: Path) -> None:
    (path / "Manifest.json").write_bytes(b"\xff\xfe")


def deep_manifest(path: Path) -> None:
    (path / "Manifest.json").write_text("[" * 100_000)


def null_weights(path: Path) -> None:
    respec(path, lambda spec: setattr(blob(spec).blobFileValue, "fileName", "@model_path/weights/\0"))


def cut_model(path: Path) -> None:
    content = (path / MODEL).read_bytes()
    (path / MODEL).write_bytes(content[: len(content) // 2])


def no_model(path: Path) -> None:
    (path / MODEL).unlink()


def other_model(path: Path) -> None:
    respec(path, lambda spec: spec.pipeline.SetInParent())


def no_weights(path: Path) -> None:
    (path / WEIGHTS).unlink()


def linked_weights(path: Path) -> None:
    outside = path.parent / "outside.bin"
    (path / WEIGHTS).rename(outside)
    (path / WEIGHTS).symlink_to(outside)


def empty_weights(path: Path) -> None:
    (path / WEIGHTS).write_bytes(b"")


def cut_weights(path: Path) -> None:
    content = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(content[:200])


def headless_weights(path: Path) -> None:
    content = bytearray((path / WEIGHTS).read_bytes())
    content[4] = 7
    (path / WEIGHTS).write_bytes(content)


def wrong_sentinel(path: Path) -> None:
    respec(path, lambda spec: setattr(blob(spec).blobFileValue, "offset", 0))


def far_offset(path: Path) -> None:
    respec(path, lambda spec: setattr(blob(spec).blobFileValue, "offset", 1 << 40))


def escaping_weights(path: Path) -> None:
    respec(path, lambda spec: setattr(blob(spec).blobFileValue, "fileName", "@model_path/../../../weight.bin"))


def absolute_weights(path: Path) -> None:
    respec(path, lambda spec: setattr(blob(spec).blobFileValue, "fileName", "/etc/passwd"))


def other_shape(path: Path) -> None:
    respec(path, lambda spec: setattr(blob(spec).type.tensorType.dimensions[0].constant, "size", 9))


def other_dtype(path: Path) -> None:
    respec(path, lambda spec: setattr(blob(spec).type.tensorType, "dataType", 21))


def far_data(path: Path) -> None:
    offset = blob(Package(path).spec).blobFileValue.offset
    content = bytearray((path / WEIGHTS).read_bytes())
    sentinel, code, size, _, bits = RECORD.unpack_from(content, offset)
    RECORD.pack_into(content, offset, sentinel, code, size, 1 << 40, bits)
    (path / WEIGHTS).write_bytes(content)


def no_scale(path: Path) -> None:
    def change(spec: Any) -> None:
        (weight,) = (one for one in block(spec).operations if one.type.startswith("constexpr"))
        del weight.inputs["scale"]

    respec(path, change)


def no_value(path: Path) -> None:
    def change(spec: Any) -> None:
        (table,) = (one for one in block(spec).operations if one.outputs and one.outputs[0].name == "table")
        del table.attributes["val"]

    respec(path, change)


def unknown_value(path: Path) -> None:
    def change(spec: Any) -> None:
        (linear,) = (one for one in block(spec).operations if one.type == "linear")
        linear.inputs["x"].arguments[0].name = "y"

    respec(path, change)


def twice_defined(path: Path) -> None:
    def change(spec: Any) -> None:
        (linear,) = (one for one in block(spec).operations if one.type == "linear")
        linear.outputs[0].name = "x"

    respec(path, change)


def no_output(path: Path) -> None:
    respec(path, lambda spec: block(spec).outputs.__setitem__(0, "y"))


def no_code(path: Path) -> None:
    respec(path, lambda spec: setattr(spec.mlProgram.functions["decode"], "opset", "CoreML9"))


def open_shape(path: Path) -> None:
    def change(spec: Any) -> None:
        spec.mlProgram.functions["decode"].inputs[0].type.tensorType.dimensions[0].unknown.variadic = False

    respec(path, change)


def other_description(path: Path) -> None:
    respec(path, lambda spec: setattr(spec.description.functions[0].input[0], "name", "y"))


def described_shape(path: Path) -> None:
    respec(path, lambda spec: spec.description.functions[0].output[0].type.multiArrayType.shape.__setitem__(1, 25))


def missing_description(path: Path) -> None:
    respec(path, lambda spec: spec.description.functions.__delitem__(0))


def described_image(path: Path) -> None:
    respec(path, lambda spec: spec.description.functions[0].input[0].type.imageType.SetInParent())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_manifest, r"copy\.mlpackage is no \.mlpackage: it has no Manifest\.json; copy the package again"),
        (strange_manifest, r"Manifest\.json names no root model \(KeyError\('itemInfoEntries'\)\); copy the package"),
        (outside_manifest, r"Manifest\.json of copy\.mlpackage names '\.\./\.\./model\.mlmodel', which lies outside"),
        (root_path(5), r"Manifest\.json is no manifest of a package: .* the root model's path is 5; copy the package"),
        (root_path(None), r"Manifest\.json is no manifest of a package: .* the root model's path is None; copy the"),
        (root_path("a\0"), r"Manifest\.json of copy\.mlpackage names 'a\\x00', which is no path \(.*null byte\); copy"),
        (root_path("a" * 300), r"names 'a+', which is no path \(.*File name too long.*\); copy the package again"),
        (listed_entries, r"Manifest\.json is no manifest of a package: itemInfoEntries must be an object"),
        (no_entry, r"Manifest\.json names no root model \(IndexError.*\); copy the package again"),
        (binary_manifest, r"Manifest\.json names no root model \(UnicodeDecodeError.*\); copy the package again"),
        (deep_manifest, r"Manifest\.json names no root model \(RecursionError.*\); copy the package again"),
        (null_weights, r"names 'com\.apple\.CoreML/weights/\\x00', which is no path \(.*null byte\); copy the package"),
        (cut_model, r"model\.mlmodel is damaged or cut short \(.*\); copy the package again"),
        (no_model, r"Manifest\.json of copy\.mlpackage names 'com\.apple\.CoreML/model\.mlmodel', which is missing"),
        (other_model, r"copy\.mlpackage holds a model of type pipeline, not an mlProgram; export it again"),
        (no_weights, r"names 'com\.apple\.CoreML/weights/weight\.bin', which is missing; copy the package again"),
        (linked_weights, r"names 'com\.apple\.CoreML/weights/weight\.bin', which lies outside the package"),
        (empty_weights, r"weight\.bin is cut short: it has no header; copy the package again"),
        (cut_weights, r"weight\.bin at offset \d+: (the program reads there, but the file has 200|its data ends at)"),
        (headless_weights, r"weight\.bin is no weight file of version 2 \(it says 7\); export it again"),
        (wrong_sentinel, r"weight\.bin at offset 0 begins with 0x0000000., a metadata record with 0xdeadbeef; program"),
        (far_offset, r"weight\.bin at offset 1099511627776: the program reads there, but the file has \d+ bytes"),
        (escaping_weights, r"names 'com\.apple\.CoreML/\.\./\.\./\.\./weight\.bin', which lies outside the package"),
        (absolute_weights, r"reads '/etc/passwd', not a path below @model_path/; export the package again"),
        (other_shape, r"weight\.bin at offset \d+ holds 256 bytes, int4 \[9, 64\] needs 288; export the package again"),
        (other_dtype, r"weight\.bin at offset \d+ holds int4, the program declares int8; export the package again"),
        (far_data, r"weight\.bin at offset \d+: its data ends at byte 1099511628032 of \d+; copy the package again"),
        (no_scale, r"weight \(constexpr_blockwise_shift_scale\) of decode: its parts do not fit \(.*'scale'\); export"),
        (no_value, r"table of decode is a const without a value; export the package again"),
        (unknown_value, r"linear_\d \(linear\) of decode reads 'y', which nothing before it defines"),
        (twice_defined, r"decode defines 'x' twice; export the package again"),
        (no_output, r"decode returns 'y', which nothing defines; export the package again"),
        (no_code, r"decode has no code for its own opset 'CoreML9'; export the package again"),
        (open_shape, r"decode input 'x' has the open shape \[-1, 64\]; only fixed shapes are read"),
        (other_description, r"decode input 'x' is float16 \[1, 64\] in the program, absent in the description"),
        (described_shape, r"decode output 'out' is float16 \[1, 24\] in the program, float16 \[1, 25\] in the descr"),
        (missing_description, r"the description of copy\.mlpackage omits function 'decode'; export it again"),
        (described_image, r"'x' of decode is described as imageType; arrays of float16, float32, int32, int8 are read"),
    ],
)
def test_a_broken_package_is_refused(damage: Callable[[Path], None], message: str, copy: Path) -> None:
    damage(copy)
    with pytest.raises(BundleError, match=message):
        read(copy)


def test_the_undamaged_package_is_not(copy: Path) -> None:
    assert len(read(copy)) == 2

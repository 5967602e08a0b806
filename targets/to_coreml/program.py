"""A saved Core ML program (.mlpackage), read with the protobuf messages that coremltools ships: functions, operations
and constants in plain Python. Nothing is trusted: paths stay inside the package, names and types are checked as they
are read, and weights are read only when asked for. Torch-free.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from export.bundle.manifest import BundleError
from export.spec import ExportError
from targets.to_coreml.blob import BITS, DTYPES, BlobFile, BlobTensor, elements

MODEL_PATH = "@model_path/"
"""How a program names the folder of its own model file."""
ARRAYS = {65552: "float16", 65568: "float32", 131104: "int32", 131080: "int8"}
"""ArrayDataType of FeatureTypes.proto, where the description of a model names dtypes."""
MESSAGES = "coremltools_messages"
"""Under which name the messages of coremltools are imported."""
DYNAMIC = -1
"""A dimension that the program leaves open."""


@dataclass(frozen=True)
class TensorType:
    """Shape (`DYNAMIC` where open) and dtype, as MIL names it in lower case."""

    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


Constant: TypeAlias = "NDArray[Any] | BlobTensor | str | tuple[Constant, ...]"
"""An immediate value (sub-byte elements widened to a byte), a tensor of the weight file, text, or a list of them."""


@dataclass(frozen=True)
class Reference:
    """An argument that is an input of the function, a state, or the output of an earlier operation."""

    name: str


@dataclass(frozen=True)
class Operation:
    """One operation. The value of a `const` is its input `val`; other attributes count as inputs too."""

    name: str
    type: str
    inputs: Mapping[str, tuple[Reference | Constant, ...]]
    outputs: tuple[tuple[str, TensorType], ...]


class Function:
    """A function of a program; its operations are read on first use."""

    def __init__(self, package: Package, name: str, proto: Any) -> None:
        self._package, self._proto = package, proto
        self.name = name
        self.opset: str = proto.opset
        self.inputs: dict[str, TensorType] = {}
        self.states: dict[str, TensorType] = {}
        for value in proto.inputs:
            kind = value.type.WhichOneof("type")
            if kind == "stateType":
                self.states[value.name] = self._fixed(value.name, value.type.stateType.wrappedType)
            else:
                self.inputs[value.name] = self._fixed(value.name, value.type)
        features = package.features(name)
        self._compare("input", self.inputs, features.input)
        self._compare("state", self.states, features.state)

    def _compare(self, kind: str, program: Mapping[str, TensorType], features: Any) -> None:
        """An app binds what the description says, the runtime what the program says: they must agree."""
        described = {feature.name: self._package.feature_type(feature, self.name) for feature in features}
        for name in sorted(program.keys() | described.keys()):
            own, other = program.get(name), described.get(name)
            # The description leaves open shapes out, and knows no scalars.
            if own is None or other is None or own.dtype != other.dtype or (
                own.shape and other.shape and own.shape != other.shape
            ):
                raise BundleError(
                    f"{self.name} {kind} {name!r} is {own or 'absent'} in the program, {other or 'absent'} in the "
                    "description of the model; export the package again"
                )

    def _fixed(self, name: str, proto: Any) -> TensorType:
        found = self._package.tensor_type(proto, f"{self.name} input {name!r}")
        if DYNAMIC in found.shape:
            raise BundleError(
                f"{self.name} input {name!r} has the open shape {list(found.shape)}; "
                "only fixed shapes are read: export one function per shape"
            )
        return found

    @property
    def _block(self) -> Any:
        if self.opset not in self._proto.block_specializations:
            raise BundleError(f"{self.name} has no code for its own opset {self.opset!r}; export the package again")
        return self._proto.block_specializations[self.opset]

    @cached_property
    def operations(self) -> list[Operation]:
        """All operations in order.

        Raises:
            BundleError: an operation cannot be read, uses a value that does not exist, or redefines one.
        """
        known = {*self.inputs, *self.states}
        found = []
        for proto in self._block.operations:
            operation = self._package.operation(proto, self.name)
            for argument in (one for given in operation.inputs.values() for one in given):
                if isinstance(argument, Reference) and argument.name not in known:
                    raise BundleError(
                        f"{operation.name} ({operation.type}) of {self.name} reads {argument.name!r}, which nothing "
                        "before it defines; export the package again"
                    )
            for name, _ in operation.outputs:
                if name in known:
                    raise BundleError(f"{self.name} defines {name!r} twice; export the package again")
                known.add(name)
            found.append(operation)
        return found

    @cached_property
    def outputs(self) -> dict[str, TensorType]:
        """What the function returns.

        Raises:
            BundleError: an output that no operation defines.
        """
        types = {name: kind for operation in self.operations for name, kind in operation.outputs} | self.inputs
        for name in self._block.outputs:
            if name not in types:
                raise BundleError(f"{self.name} returns {name!r}, which nothing defines; export the package again")
        found = {name: types[name] for name in self._block.outputs}
        self._compare("output", found, self._package.features(self.name).output)
        return found


class Package:
    """A `.mlpackage` folder that holds an ML program."""

    spec: Any
    """The Model message."""
    functions: Mapping[str, Function]

    def __init__(self, path: Path) -> None:
        """Read the program; weights stay on disk.

        Raises:
            BundleError: not a package, cut short, or no ML program. ExportError: coremltools is not installed.
        """
        self.path = path
        self._mil = _messages("MIL_pb2")
        self._model = self._inside(_root_model(path), f"Manifest.json of {path.name}")
        self.spec = _messages("Model_pb2").Model()
        try:
            self.spec.ParseFromString(self._model.read_bytes())
        except Exception as error:  # the class of DecodeError depends on protobuf's implementation
            raise BundleError(
                f"{self._model} is damaged or cut short ({error}); copy the package again"
            ) from error
        kind = self.spec.WhichOneof("Type")
        if kind != "mlProgram":
            raise BundleError(f"{path.name} holds a model of type {kind}, not an mlProgram; export it again")
        self._dtypes = {number: name.lower() for name, number in self._mil.DataType.items()}
        self._blobs: dict[Path, BlobFile] = {}
        self.functions = {
            name: Function(self, name, self.spec.mlProgram.functions[name])
            for name in sorted(self.spec.mlProgram.functions)
        }

    def function(self, name: str) -> Function:
        """A function by name.

        Raises:
            BundleError: there is none of that name.
        """
        if name not in self.functions:
            raise BundleError(f"{self.path.name} has no function {name!r}; it has {', '.join(self.functions)}")
        return self.functions[name]

    def features(self, function: str) -> Any:
        """What the model's description says about a function: its `input`, `output` and `state`."""
        description = self.spec.description
        for one in description.functions:
            if one.name == function:
                return one
        if description.functions:
            raise BundleError(f"the description of {self.path.name} omits function {function!r}; export it again")
        return description  # a model of one function

    def value(self, function: str, name: str) -> NDArray[Any]:
        """The value of a constant, by the name that the function gives it; compressed ones are not expanded.

        Raises:
            BundleError: no such constant.
        """
        for operation in self.function(function).operations:
            if operation.type == "const" and operation.outputs[0][0] == name:
                (value,) = operation.inputs["val"]
                if isinstance(value, BlobTensor):
                    return value.array()
                if isinstance(value, np.ndarray):
                    return value
        raise BundleError(f"{function} of {self.path.name} has no constant tensor {name!r}")

    def _inside(self, relative: str, source: str) -> Path:
        """A path below the package's Data folder.

        Raises:
            BundleError: it leads elsewhere, or nothing is there.
        """
        data = self.path / "Data"
        parts = PurePosixPath(relative)
        found = data / parts
        try:
            outside = parts.is_absolute() or ".." in parts.parts or not found.resolve().is_relative_to(data.resolve())
            missing = not found.is_file()
        except (OSError, ValueError) as error:  # a null byte, or longer than names may be
            raise BundleError(
                f"{source} names {relative!r}, which is no path ({error}); copy the package again"
            ) from error
        if outside:
            raise BundleError(f"{source} names {relative!r}, which lies outside the package; do not use the package")
        if missing:
            raise BundleError(f"{source} names {relative!r}, which is missing; copy the package again")
        return found

    # What follows reads single messages; `Function` calls it.

    def operation(self, proto: Any, function: str) -> Operation:
        """One operation message."""
        where = f"operation {proto.type!r} of {function}"
        if len(proto.blocks):
            raise BundleError(f"{where} has blocks of its own, which are not read; export without control flow")
        name = where
        inputs: dict[str, tuple[Reference | Constant, ...]] = {}
        for key, attribute in proto.attributes.items():
            value = self._constant(attribute, where)
            if key == "name" and isinstance(value, str):
                name = value
            else:
                inputs[key] = (value,)
        for key, argument in proto.inputs.items():
            inputs[key] = tuple(
                Reference(one.name) if one.WhichOneof("binding") == "name" else self._constant(one.value, where)
                for one in argument.arguments
            )
        outputs = tuple((one.name, self._output_type(one, where)) for one in proto.outputs)
        if proto.type.startswith("const") and (len(outputs) != 1 or (proto.type == "const" and "val" not in inputs)):
            raise BundleError(f"{name} of {function} is a {proto.type} without a value; export the package again")
        return Operation(name, proto.type, inputs, outputs)

    def _output_type(self, proto: Any, where: str) -> TensorType:
        if proto.type.WhichOneof("type") == "listType":  # a list of texts, as attributes are
            return TensorType((DYNAMIC,), "list")
        return self.tensor_type(proto.type, where)

    def tensor_type(self, proto: Any, where: str) -> TensorType:
        """A ValueType message that holds a tensor.

        Raises:
            BundleError: it holds something else.
        """
        kind = proto.WhichOneof("type")
        if kind != "tensorType":
            raise BundleError(f"{where} is a {kind}, only tensors are read; export the package again")
        shape = tuple(
            int(one.constant.size) if one.WhichOneof("dimension") == "constant" else DYNAMIC
            for one in proto.tensorType.dimensions
        )
        if proto.tensorType.dataType not in self._dtypes:
            raise BundleError(f"{where} has the unknown type {proto.tensorType.dataType}; export the package again")
        return TensorType(shape, self._dtypes[proto.tensorType.dataType])

    def feature_type(self, proto: Any, function: str) -> TensorType:
        """A FeatureDescription message that holds an array.

        Raises:
            BundleError: it holds something else.
        """
        kind = proto.type.WhichOneof("Type")
        array = proto.type.stateType.arrayType if kind == "stateType" else proto.type.multiArrayType
        if kind not in ("multiArrayType", "stateType") or array.dataType not in ARRAYS:
            raise BundleError(
                f"{proto.name!r} of {function} is described as {kind}; arrays of {', '.join(ARRAYS.values())} are read"
            )
        return TensorType(tuple(array.shape), ARRAYS[array.dataType])

    def _constant(self, proto: Any, where: str) -> Constant:
        if proto.WhichOneof("value") == "blobFileValue":
            return self._blob(proto.blobFileValue, self.tensor_type(proto.type, where), where)
        immediate = proto.immediateValue
        kind = immediate.WhichOneof("value")
        if kind == "tuple":
            return tuple(self._constant(one, where) for one in immediate.tuple.values)
        if kind == "list":
            return tuple(self._constant(one, where) for one in immediate.list.values)
        if kind != "tensor":
            raise BundleError(f"{where} has a constant of kind {kind}, which is not read; export the package again")
        return _immediate(immediate.tensor, self.tensor_type(proto.type, where), where)

    def _blob(self, proto: Any, kind: TensorType, where: str) -> BlobTensor:
        file: str = proto.fileName
        if not file.startswith(MODEL_PATH):
            raise BundleError(f"{where} reads {file!r}, not a path below {MODEL_PATH}; export the package again")
        folder = self._model.parent.relative_to(self.path / "Data")
        path = self._inside((folder / file.removeprefix(MODEL_PATH)).as_posix(), where)
        if path not in self._blobs:
            self._blobs[path] = BlobFile(path)
        return self._blobs[path].tensor(proto.offset, kind.dtype, kind.shape)


def _root_model(package: Path) -> str:
    """Where Manifest.json says the model file lies, below `Data`."""
    manifest = package / "Manifest.json"
    if not manifest.is_file():
        raise BundleError(f"{package} is no .mlpackage: it has no Manifest.json; copy the package again")
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        entries = content["itemInfoEntries"]
        path = entries[content["rootModelIdentifier"]]["path"]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise BundleError(f"{manifest} names no root model ({error!r}); copy the package again") from error
    if not isinstance(entries, dict) or not isinstance(path, str):
        raise BundleError(
            f"{manifest} is no manifest of a package: itemInfoEntries must be an object with texts as paths, "
            f"the root model's path is {path!r}; copy the package again"
        )
    return path


def _immediate(proto: Any, kind: TensorType, where: str) -> NDArray[Any] | str:
    """A TensorValue. Which field holds the elements depends on their type; without one they are all zero."""
    field = proto.WhichOneof("value")
    if field == "strings":
        texts = list(proto.strings.values)
        if len(texts) == 1:
            return str(texts[0])
        raise BundleError(f"{where} has a tensor of {len(texts)} texts, which is not read; export the package again")
    if kind.dtype not in DTYPES or DYNAMIC in kind.shape:
        raise BundleError(f"{where} has a constant {kind}, which is not read; read dtypes: {', '.join(DTYPES)}")
    dtype, count = DTYPES[kind.dtype], math.prod(kind.shape)
    if field is None:
        values = np.zeros(count, dtype)
    elif field == "bytes":
        values = _from_bytes(proto.bytes.values, kind.dtype, dtype, count)
    else:
        values = np.array(getattr(proto, field).values, dtype)
    if values.size != count:
        raise BundleError(f"{where} has a constant {kind} of {values.size} elements; export the package again")
    return values.reshape(kind.shape)


def _from_bytes(raw: bytes, name: str, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
    """Elements packed as in a weight file; how many there are is checked by the caller."""
    if name in BITS:
        return elements(np.frombuffer(raw, np.uint8), name)[: max(count, len(raw) * 8 // BITS[name] - 7)]
    return np.frombuffer(raw[: len(raw) // dtype.itemsize * dtype.itemsize], dtype).copy()


def _messages(module: str) -> ModuleType:
    """One of the modules of protobuf messages that coremltools ships. They are imported from their folder, as a package
    of their own: importing coremltools itself takes ten seconds for converters that nobody needs here.
    """
    if MESSAGES not in sys.modules:
        found = find_spec("coremltools")
        if found is None or not found.submodule_search_locations:
            raise ExportError(
                "reading a Core ML package needs the Python package coremltools, which is not installed; "
                "install it with pip install 'qwen35-mobile[coreml]'"
            )
        package = ModuleType(MESSAGES)
        package.__path__ = [str(Path(place) / "proto") for place in found.submodule_search_locations]
        sys.modules[MESSAGES] = package
    return import_module(f"{MESSAGES}.{module}")

"""Writing a .mlpackage: MIL functions as protobuf, descriptions, weights by streaming.

The same functions give the same bytes: identifiers are made of names, maps are written in order.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coremltools.converters.mil.backend.mil.helper import create_file_value_tensor, types_to_proto_primitive
from coremltools.converters.mil.backend.mil.load import MILProtoExporter
from coremltools.converters.mil.mil import Function, Program, types
from coremltools.proto import FeatureTypes_pb2, Model_pb2

from export.spec import UsageError
from targets.to_coreml.weights import WeightFile

SPECIFICATION = 9
"""Core ML specification version of iOS 18 and macOS 15: states, several functions, blockwise weights."""
INSIDE = "Data/com.apple.CoreML"
MODEL, WEIGHTS = "model.mlmodel", "weights/weight.bin"
ARRAY = FeatureTypes_pb2.ArrayFeatureType
ARRAYS = {types.fp16: ARRAY.FLOAT16, types.fp32: ARRAY.FLOAT32, types.int32: ARRAY.INT32}


@dataclass(frozen=True)
class Description:
    """What a package says of itself in Xcode."""

    text: str
    author: str
    license: str
    version: str
    functions: Mapping[str, str]
    tensors: Mapping[str, str]
    """Input, output or state -> what it is."""


class _Exporter(MILProtoExporter):  # type: ignore[misc]
    """coremltools' serialiser, whose large constants are places in a file that is written later."""

    def __init__(self, program: Program, weights: WeightFile) -> None:
        super().__init__(program, "", SPECIFICATION)
        self._weights = weights

    def create_file_value(self, var: Any) -> Any:
        place = self._weights.places.get(var.op.name)
        if place is None:
            place = self._weights.small(var.val)
        primitive = var.sym_type.get_primitive() if hasattr(var.sym_type, "get_primitive") else var.sym_type
        return create_file_value_tensor(
            file_name=f"@model_path/{WEIGHTS}",
            offset=place,
            dim=var.val.shape,
            data_type=types_to_proto_primitive(primitive),
        )


def write_package(
    path: Path,
    functions: Mapping[str, Function],
    weights: WeightFile,
    said: Description,
    most: int | None = None,
    remedy: str = "",
) -> list[Path]:
    """Write a package; its Manifest.json last, so that one without it is not whole.

    Args:
        most: bytes that its weight file may have, of which nothing is written if it would have more.
        remedy: what else to do then than allow more.

    Returns:
        every file of the package.

    Raises:
        UsageError: the weight file would be larger than `most`.
    """
    program = Program()
    for name, function in functions.items():
        program.add_function(name, function)
    program.default_function_name = next(iter(functions))
    program.export_as_multifunction = True
    model = Model_pb2.Model(specificationVersion=SPECIFICATION)
    model.mlProgram.CopyFrom(_Exporter(program, weights).export())
    if most is not None and weights.size > most:  # all constants are planned by now
        raise UsageError(
            f"--max-file-size {most}: the weights of {path.name} would have {weights.size} bytes; "
            f"give at least {weights.size}{remedy}"
        )
    _describe(model, functions, said)
    data = path / INSIDE
    (data / WEIGHTS).parent.mkdir(parents=True, exist_ok=True)
    (data / MODEL).write_bytes(model.SerializeToString(deterministic=True))
    weights.write(data / WEIGHTS)
    manifest = path / "Manifest.json"
    manifest.write_text(json.dumps(_manifest(path.name), indent=4) + "\n", encoding="utf-8")
    return files(path)


def files(path: Path) -> list[Path]:
    """Every file of a package."""
    return [path / "Manifest.json", path / INSIDE / MODEL, path / INSIDE / WEIGHTS]


def _manifest(name: str) -> dict[str, Any]:
    """What ModelPackage of Core ML wants; identifiers that follow from the name."""
    items = {
        "model.mlmodel": "CoreML Model Specification",
        "weights": "CoreML Model Weights",
    }
    entries = {
        str(uuid.uuid5(uuid.NAMESPACE_URL, f"{name}/{item}")).upper(): {
            "author": "com.apple.CoreML",
            "description": text,
            "name": item,
            "path": f"com.apple.CoreML/{item}",
        }
        for item, text in items.items()
    }
    root = next(key for key, entry in entries.items() if entry["name"] == "model.mlmodel")
    return {"fileFormatVersion": "1.0.0", "itemInfoEntries": entries, "rootModelIdentifier": root}


def _describe(model: Any, functions: Mapping[str, Function], said: Description) -> None:
    about = model.description
    about.metadata.shortDescription = said.text
    about.metadata.author = said.author
    about.metadata.license = said.license
    about.metadata.versionString = said.version
    about.defaultFunctionName = next(iter(functions))
    for name, function in functions.items():
        about.metadata.userDefined[f"function {name}"] = said.functions[name]
        entry = about.functions.add(name=name)
        for title, var in function.inputs.items():
            state = types.is_state(var.sym_type)
            feature = (entry.state if state else entry.input).add(name=title, shortDescription=said.tensors[title])
            target = feature.type.stateType.arrayType if state else feature.type.multiArrayType
            _array(target, var.sym_type.wrapped_type() if state else var.sym_type)
        for var in function.outputs:
            feature = entry.output.add(name=var.name, shortDescription=said.tensors[var.name])
            _array(feature.type.multiArrayType, var.sym_type)


def _array(target: Any, tensor: Any) -> None:
    target.shape.extend(tensor.get_shape())
    target.dataType = ARRAYS[tensor.get_primitive()]

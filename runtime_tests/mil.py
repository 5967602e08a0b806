"""Small Core ML programs for tests, written in MIL and saved as packages without any optimisation."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

logging.disable(logging.WARNING)  # coremltools says what it cannot load off a Mac
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import coremltools as ct
    from coremltools.converters.mil.mil import Builder as mb
    from coremltools.converters.mil.mil import Function, Program, types
    from coremltools.converters.mil.mil.types.type_mapping import string_to_nptype
logging.disable(logging.NOTSET)

__all__ = ["IOS18", "Function", "ct", "function", "mb", "narrow", "save", "types"]
IOS18 = ct.target.iOS18
DTYPES = {"float16": types.fp16, "float32": types.fp32, "int32": types.int32}


def function(
    body: Callable[..., Any],
    inputs: Mapping[str, tuple[Sequence[int], str]],
    states: Mapping[str, Sequence[int]] | None = None,
) -> Any:
    """A MIL function of inputs (shape, dtype) and float16 states; `body` gets them by name and returns the outputs."""
    specs = {name: mb.TensorSpec(shape, DTYPES[dtype]) for name, (shape, dtype) in inputs.items()}
    specs |= {name: mb.StateTensorSpec(shape, types.fp16) for name, shape in (states or {}).items()}
    with Function(specs, IOS18) as made:
        outputs = body(**{name: made.inputs[name] for name in specs})
        made.set_outputs(list(outputs) if isinstance(outputs, list | tuple) else [outputs])
    return made


def save(path: Path, **functions: Any) -> Path:
    """Save functions as one package; a single one is called main."""
    program = Program()
    for name, one in functions.items():
        program.add_function(name if len(functions) > 1 else "main", one)
    if len(functions) > 1:
        program.default_function_name = next(iter(functions))
        program.export_as_multifunction = True
    model = ct.convert(
        program, convert_to="mlprogram", minimum_deployment_target=IOS18, pass_pipeline=ct.PassPipeline.EMPTY,
        skip_model_load=True, compute_precision=ct.precision.FLOAT32,
    )  # fmt: skip
    model.save(str(path))
    return path


def narrow(values: Any, dtype: str) -> Any:
    """Integers as one of MIL's types below a byte."""
    return np.asarray(values).astype(np.int8 if dtype.startswith("int") else np.uint8).astype(string_to_nptype(dtype))

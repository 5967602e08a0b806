"""What a check of the linter looks at: a package, or one of its functions with its values followed. Torch-free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from targets.to_coreml.program import Constant, Function, Operation, Package, Reference, TensorType

SHOWN = 3
"""Names that a finding lists before it only counts."""


@dataclass(frozen=True)
class Hit:
    """A rule that something breaks; see `targets.base.Finding`."""

    rule: str
    item: str
    text: str
    function: str = ""


class View:
    """A function of a package with the paths of its values.

    Raises:
        BundleError: its program cannot be read.
    """

    def __init__(self, function: Function) -> None:
        self.function = function
        self.operations: Sequence[Operation] = function.operations
        self.outputs: Mapping[str, TensorType] = function.outputs
        self.makers = {name: operation for operation in self.operations for name, _ in operation.outputs}
        """Result -> operation."""
        self.readers: Counter[str] = Counter(list(self.outputs))
        """Value -> how often operations and outputs read it."""
        for operation in self.operations:
            self.readers.update(name for given in operation.inputs.values() for name in references(given))
        self._constants: set[str] = set()
        for operation in self.operations:
            names = [name for given in operation.inputs.values() for name in references(given)]
            if is_constant(operation) or (names and self._constants.issuperset(names)):
                self._constants.update(name for name, _ in operation.outputs)

    @property
    def running(self) -> Iterator[Operation]:
        """Operations that run at every call: no constants, and nothing that depends on constants alone."""
        return (o for o in self.operations if not is_constant(o) and not self._folded(o))

    def _folded(self, operation: Operation) -> bool:
        return bool(operation.outputs) and operation.outputs[0][0] in self._constants

    def is_known(self, operation: Operation, name: str) -> bool:
        """Whether an input is the same at every call, or not given."""
        return self._constants.issuperset(references(operation.inputs.get(name, ())))

    def type_of(self, operation: Operation, name: str) -> TensorType | None:
        """Shape and dtype of an operation's (first) input; None if it is not given."""
        given = operation.inputs.get(name)
        if not given:
            return None
        if isinstance(given[0], Reference):
            return self.named_type(given[0].name)
        shape, dtype = getattr(given[0], "shape", None), getattr(given[0], "dtype", None)
        return None if shape is None else TensorType(tuple(shape), str(dtype))

    def named_type(self, name: str) -> TensorType | None:
        """Shape and dtype of a value of the function."""
        if name in self.makers:
            return dict(self.makers[name].outputs)[name]
        return self.function.inputs.get(name) or self.function.states.get(name)

    def types(self) -> Iterator[tuple[str, TensorType]]:
        """Every tensor of the function by name: inputs, states, constants and results."""
        yield from self.function.inputs.items()
        yield from self.function.states.items()
        for operation in self.operations:
            for name, kind in operation.outputs:
                if kind.dtype != "list":
                    yield name, kind


@dataclass(frozen=True)
class Subject:
    """A package under scrutiny; `views` are those of its functions that can be read."""

    package: Package
    file: str
    manifest: Mapping[str, Any]
    views: Sequence[View]

    def stages(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """(signature, stage) of the bundle that call the package."""
        for signature, entry in self.manifest["signatures"].items():
            for stage in entry["stages"]:
                if stage["file"] == self.file and stage["kind"] == "graph":
                    yield signature, stage


def references(given: Sequence[Reference | Constant]) -> list[str]:
    """The names among the arguments of an input."""
    return [one.name for one in given if isinstance(one, Reference)]


def is_constant(operation: Operation) -> bool:
    return operation.type == "const" or operation.type.startswith("constexpr_")


def some(names: Sequence[str]) -> str:
    """A few names and how many more there are."""
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")

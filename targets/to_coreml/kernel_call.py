"""What a kernel's builder is told about an operation, and what it answers.

A builder is called once per operation, when its function is compiled. It takes the constant parameters, refuses what
it does not know, and returns a `Bound`: a function of the operands that are left, which runs at every call. Values are
tensors in the dtype of the program, float16 included: torch's float16 kernels compute in float32 and round once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from targets.to_coreml.constants import TORCH, Factor, UnsupportedOperation
from targets.to_coreml.program import DYNAMIC, Operation, TensorType

Result: TypeAlias = "Tensor | Sequence[Tensor]"


@dataclass(frozen=True)
class Bound:
    """A kernel with its parameters bound."""

    run: Callable[..., Result]
    """Of the operands, in order. Never writes to one."""
    operands: tuple[str, ...]
    """Inputs of the operation that are passed; one with several arguments passes all of them."""
    view: bool = False
    """The result may share the memory of an operand."""
    in_place: Callable[..., Tensor] | None = None
    """Like `run`, but overwrites the first operand and returns it."""


@dataclass(frozen=True)
class Call:
    """One operation of a function, as its builder sees it.

    `constants` gives the constant inputs: a tensor, a text, or several of them. `factor` gives one constant tensor
    as a factor of products. `types` has every tensor input.
    """

    operation: Operation
    function: str
    half_sums: bool
    """Stress mode: sums are rounded to float16 as they grow."""
    constants: Mapping[str, Callable[[], tuple[Any, ...]]]
    factor: Callable[[str], Factor]
    types: Mapping[str, tuple[TensorType, ...]]
    taken: set[str] = field(default_factory=set)
    """Inputs that the builder has looked at; any other is refused."""

    @property
    def output(self) -> TensorType:
        """What the program says the (first) result is."""
        return self.operation.outputs[0][1]

    @property
    def dtype(self) -> torch.dtype:
        """In which the (first) result is held."""
        return TORCH[self.output.dtype]

    def has(self, name: str) -> bool:
        """Whether an optional input is given."""
        self.taken.add(name)
        return name in self.operation.inputs

    def is_constant(self, name: str) -> bool:
        """Whether an input is known when the function is compiled."""
        self.taken.add(name)
        return name in self.constants

    def tensor(self, name: str) -> Tensor:
        """A constant tensor.

        Raises:
            UnsupportedOperation: it is known only at run time, or missing.
        """
        (value,) = self._constant(name)
        if not isinstance(value, Tensor):
            raise self.refuse(f"{name} must be a tensor")
        return value

    def number(self, name: str, default: float | None = None) -> Any:
        """A constant scalar: int, float or bool."""
        if default is not None and not self.has(name):
            return default
        return self.tensor(name).item()

    def numbers(self, name: str, default: Sequence[Any] | None = None) -> list[Any]:
        """A constant vector."""
        if default is not None and not self.has(name):
            return list(default)
        found = self.tensor(name).tolist()
        return found if isinstance(found, list) else [found]

    def text(self, name: str, default: str, allowed: Sequence[str]) -> str:
        """A constant text, one of `allowed`."""
        value = self._constant(name)[0] if self.has(name) else default
        if value not in allowed:
            raise self.refuse(f"{name} is {value!r}; supported: {', '.join(allowed)}")
        return str(value)

    def _constant(self, name: str) -> tuple[Any, ...]:
        self.taken.add(name)
        if name not in self.constants:
            raise self.refuse(
                f"{name} must be a constant" if name in self.operation.inputs else f"it has no input {name!r}"
            )
        return self.constants[name]()

    def type(self, name: str, place: int = 0) -> TensorType:
        """Shape and dtype of an input."""
        self.taken.add(name)
        if name not in self.types:
            raise self.refuse(f"it has no input {name!r}")
        return self.types[name][place]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of an input.

        Raises:
            UnsupportedOperation: a dimension is known only at run time.
        """
        found = self.type(name).shape
        if DYNAMIC in found:
            raise self.refuse(f"{name} has the open shape {list(found)}; only fixed shapes are supported here")
        return found

    def axis(self, name: str, rank: int, default: int | None = None) -> int:
        """A constant axis, counted from the front."""
        value = self.number(name, default)
        if not -rank <= value < max(rank, 1):
            raise self.refuse(f"{name} is {value}, beyond rank {rank}")
        return int(value) % max(rank, 1)

    def axes(self, name: str, rank: int) -> list[int]:
        """Constant axes in rising order, counted from the front; all of them if the input is not given."""
        return sorted({int(axis) % rank for axis in self.numbers(name, range(rank))})

    def refuse(self, reason: str) -> UnsupportedOperation:
        """An error that says where and why."""
        return UnsupportedOperation(f"{self.operation.name} ({self.operation.type}) of {self.function}: {reason}")


Builder: TypeAlias = "Callable[[Call], Bound]"

"""Methods of an ExecuTorch program: values, delegate and kernel calls, and where each tensor lies in memory.

Inputs stay where the caller has them. Results of calls lie in arena 1 and share its bytes once nobody needs
them any more; new states lie in arena 2 at places that all methods of a file agree on. Loaders that give all
methods the same arenas and loaders that give each its own are then both right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from executorch.exir import schema
from executorch.exir.scalar_type import ScalarType
from numpy.typing import NDArray

from targets.to_executorch.xnnpack import BACKEND, Delegate, Shape, Tensor

ALIGNMENT = 64
TEMPORARY, STATES = 1, 2
"""Arenas; 0 is the runtime's name for constants."""
SCALARS = {
    "float32": ScalarType.FLOAT,
    "int32": ScalarType.INT,
    "int64": ScalarType.LONG,
    "int8": ScalarType.CHAR,
    "uint8": ScalarType.BYTE,
    "bool": ScalarType.BOOL,
}
Slot = int


def nbytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass
class Constants:
    """Tensors all methods of a program read; equal ones are stored once."""

    arrays: list[bytes] = field(default_factory=lambda: [b""])
    _places: dict[bytes, int] = field(default_factory=dict)

    def place(self, array: NDArray[Any]) -> int:
        data = np.ascontiguousarray(array).tobytes()
        if data not in self._places:
            self._places[data] = len(self.arrays)
            self.arrays.append(data)
        return self._places[data]


@dataclass(frozen=True)
class _Kernel:
    operator: str
    arguments: tuple[Slot, ...]


@dataclass
class _Jump:
    """Over the calls up to `to`, unless the condition holds."""

    condition: Slot
    to: int = 0


class Method:
    """One method under construction; `node` and `kernel` calls happen in the order they were made.

    Args:
        name: as apps call it. constants: those of the program.
    """

    def __init__(self, name: str, constants: Constants) -> None:
        self.name = name
        self._constants = constants
        self._values: list[Any] = []
        self._tensors: list[Tensor | None] = []
        self._constant_at: dict[Slot, int] = {}
        self._names: dict[Slot, str] = {}
        self._cached: dict[Any, Tensor] = {}
        self._inputs: list[Slot] = []
        self._outputs: list[Slot] = []
        self._state_at: dict[Slot, int] = {}
        self._calls: list[Delegate | _Kernel | _Jump] = []
        self._open: Delegate | None = None
        self.label = "start"
        """Names the next delegate, for errors and traces."""

    # -- values -----------------------------------------------------------------------------------
    def input(self, shape: Shape, dtype: str = "float32") -> Tensor:
        """A tensor that the caller passes; its memory is used in place."""
        tensor = Tensor(shape, dtype)
        self._inputs.append(self.slot(tensor))
        return tensor

    def buffer(self, shape: Shape, offset: int) -> Tensor:
        """A tensor that keeps its contents between calls, at a place of its own in the arena of states."""
        tensor = Tensor(shape)
        self._state_at[self.slot(tensor)] = offset
        return tensor

    def replace(self, buffer: Tensor, tensor: Tensor) -> None:
        """Let a computed tensor lie where a buffer is: it is what the next call finds there."""
        self._state_at[self.slot(tensor)] = self._state_at[self.slot(buffer)]

    def constant(self, array: NDArray[Any], name: str | None = None) -> Tensor:
        """A tensor that the program holds; `name` says which parameter of the model it is."""
        key = (name, array.shape, str(array.dtype), array.tobytes())
        if key not in self._cached:
            tensor = Tensor(array.shape, str(array.dtype))
            slot = self.slot(tensor)
            self._constant_at[slot] = self._constants.place(array)
            if name:
                self._names[slot] = name
            self._cached[key] = tensor
        return self._cached[key]

    def scalar(self, value: int | float | bool | list[int] | None) -> Slot:
        """An argument of a kernel that is no tensor."""
        kinds: dict[type, Callable[[Any], Any]] = {
            bool: schema.Bool, int: schema.Int, float: schema.Double, type(None): lambda _: schema.Null()
        }
        if isinstance(value, list):
            return self._value(schema.IntList([self.scalar(item) for item in value]), None)
        return self._value(kinds[type(value)](value), None)

    def slot(self, tensor: Tensor) -> Slot:
        """A tensor's place among the values of the method; a delegate that computed it hands it out."""
        if tensor.slot is None:
            if tensor.delegate is not None:
                tensor.delegate.leaves(tensor)
            tensor.slot = self._value(None, tensor)
        return tensor.slot

    def _value(self, value: Any, tensor: Tensor | None) -> Slot:
        self._values.append(value)
        self._tensors.append(tensor)
        return len(self._values) - 1

    def output(self, tensor: Tensor, state_offset: int | None = None) -> None:
        """Make a computed tensor the next output; a new state has its place in the arena of states."""
        slot = self.slot(tensor)
        if slot in self._outputs or (tensor.delegate is None and slot in (*self._inputs, *self._constant_at)):
            raise ValueError(f"{self.name}: output {len(self._outputs)} is no tensor of its own")
        self._outputs.append(slot)
        if state_offset is not None:
            self._state_at[slot] = state_offset

    # -- calls --------------------------------------------------------------------------------------
    @property
    def delegate(self) -> Delegate:
        """The delegate that the next node goes into."""
        if self._open is None:
            self._open = Delegate(f"{self.name}:{self.label}")
            self._calls.append(self._open)
        return self._open

    def read(self, tensor: Tensor) -> int:
        """Id of a tensor for a node of the open delegate."""
        delegate = self.delegate
        if tensor.delegate is not delegate:
            self.slot(tensor)
        return delegate.read(tensor)

    def cut(self, label: str) -> None:
        """End the open delegate; the next one is called `label`."""
        self._open, self.label = None, label

    def kernel(self, operator: str, arguments: Sequence[Tensor | Slot], results: Sequence[Tensor | Slot]) -> None:
        """Call a kernel of the runtime, in the order of its schema: arguments, then what it writes."""
        slots = [a if isinstance(a, int) else self.slot(a) for a in arguments]
        out = [r if isinstance(r, int) else self.slot(r) for r in results]
        # What an out-variant writes is passed twice: as its `out` argument and as its result.
        self._calls.append(_Kernel(operator, (*slots, *out, *(out if operator.endswith("out") else ()))))
        self.cut(f"after {operator}")

    def only_if(self, condition: Slot, calls: Callable[[], None]) -> None:
        """Make some calls of kernels that run only where a truth value holds."""
        jump = _Jump(condition)
        self._calls.append(jump)
        calls()
        jump.to = len(self._calls)

    def delegates(self) -> list[Delegate]:
        return [call for call in self._calls if isinstance(call, Delegate)]

    def kernels(self) -> list[str]:
        """Operators left to kernels of the runtime, in the order of their calls."""
        return [call.operator for call in self._calls if isinstance(call, _Kernel)]

    # -- the finished plan ----------------------------------------------------------------------------
    def plan(self, first_blob: int) -> Any:
        """The method in the runtime's schema; delegates refer to blobs first_blob, first_blob + 1, …"""
        operators = sorted({call.operator for call in self._calls if isinstance(call, _Kernel)})
        uses: dict[Slot, list[int]] = {}
        instructions: list[Any] = []
        delegates: list[Any] = []
        for step, call in enumerate(self._calls):
            arguments: list[Slot] = []
            if isinstance(call, _Kernel):
                arguments = list(call.arguments)
                action: Any = schema.KernelCall(operators.index(call.operator), arguments)
            elif isinstance(call, _Jump):
                action = schema.JumpFalseCall(call.condition, call.to)
            else:
                arguments = [self.slot(t) for t in (*call.inputs, *call.outputs)]
                action = schema.DelegateCall(len(delegates), arguments)
                where = schema.BackendDelegateDataReference(schema.DataLocation.INLINE, first_blob + len(delegates))
                delegates.append(schema.BackendDelegate(BACKEND, where, []))
            for slot in arguments:
                uses.setdefault(slot, []).append(step)
            instructions.append(schema.Instruction(action))
        for slot in self._outputs:
            uses.setdefault(slot, []).append(len(self._calls))
        places, size = self._places(uses)
        states = max((at + aligned(nbytes(self._tensor(s))) for s, at in self._state_at.items()), default=0)
        values = [schema.EValue(self._evalue(slot, places)) for slot in range(len(self._values))]
        return schema.ExecutionPlan(
            name=self.name,
            container_meta_type=schema.ContainerMetadata("", ""),
            values=values,
            inputs=self._inputs,
            outputs=self._outputs,
            chains=[schema.Chain(self._inputs, self._outputs, instructions, None)],
            operators=[schema.Operator(*_split(name)) for name in operators],
            delegates=delegates,
            non_const_buffer_sizes=[0, size, *([states] if states else [])],
        )

    def _tensor(self, slot: Slot) -> Tensor:
        tensor = self._tensors[slot]
        if tensor is None:
            raise TypeError(f"{self.name}: value {slot} is no tensor")
        return tensor

    def _places(self, uses: Mapping[Slot, list[int]]) -> tuple[dict[Slot, int], int]:
        """Offsets in arena 1, largest tensor first, each at the lowest place free for its whole lifetime."""
        fixed = {*self._inputs, *self._constant_at, *self._state_at}
        placed: list[tuple[int, int, int, int]] = []  # first use, last use, offset, end
        places: dict[Slot, int] = {}
        wanted = [s for s, t in enumerate(self._tensors) if t is not None and s not in fixed and s in uses]
        for slot in sorted(wanted, key=lambda s: (-nbytes(self._tensor(s)), s)):
            first, last, size = min(uses[slot]), max(uses[slot]), aligned(nbytes(self._tensor(slot)) + ALIGNMENT)
            offset = 0
            for begin, end in sorted((o, e) for since, until, o, e in placed if since <= last and first <= until):
                if offset + size <= begin:
                    break
                offset = max(offset, end)
            placed.append((first, last, offset, offset + size))
            places[slot] = offset
        return places, max((end for *_, end in placed), default=0)

    def _evalue(self, slot: Slot, places: Mapping[Slot, int]) -> Any:
        tensor = self._tensors[slot]
        if tensor is None:
            return self._values[slot]
        where, name = None, self._names.get(slot)
        if slot in self._state_at:
            where = _allocation(STATES, self._state_at[slot])
        elif slot in places:
            where = _allocation(TEMPORARY, places[slot])
        return schema.Tensor(
            scalar_type=SCALARS[tensor.dtype],
            storage_offset=0,
            sizes=list(tensor.shape),
            dim_order=list(range(len(tensor.shape))),
            requires_grad=False,
            layout=0,
            data_buffer_idx=self._constant_at.get(slot, 0),
            allocation_info=where,
            shape_dynamism=schema.TensorShapeDynamism.STATIC,
            extra_tensor_info=schema.ExtraTensorInfo(fully_qualified_name=name) if name else None,
        )


def _allocation(arena: int, offset: int) -> Any:
    return schema.AllocationDetails(arena, offset & 0xFFFFFFFF, offset >> 32)


def _split(operator: str) -> tuple[str, str]:
    name, _, overload = operator.partition(".")
    return name, overload


def value_method(name: str, value: int | bool | list[int]) -> Any:
    """A method that returns a number or a list of them: what runners read about a model."""
    if isinstance(value, list):
        values = [schema.EValue(schema.Int(item)) for item in value]
        outputs = list(range(len(values)))
    else:
        values = [schema.EValue(schema.Bool(value) if isinstance(value, bool) else schema.Int(value))]
        outputs = [0]
    return schema.ExecutionPlan(
        name=name,
        container_meta_type=schema.ContainerMetadata("", ""),
        values=values,
        inputs=[],
        outputs=outputs,
        chains=[schema.Chain([], outputs, [], None)],
        operators=[],
        delegates=[],
        non_const_buffer_sizes=[0],
    )

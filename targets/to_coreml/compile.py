"""A function of a package as a list of steps over numbered slots: no protobuf, no name is looked up at run time.

1. Constants, and operations on constants alone, are evaluated now; what is left becomes a step.
2. States are names, not memory: `read_state` gives the slot of a state's present value another name, `write_state`
   makes another slot the state's value. A reader sees the writes before it; an earlier reader keeps what it read.
3. A slot is emptied after its last use.
4. `slice_update` writes in place where nothing can notice: no live slot, and no state that is still to be read or
   kept, may share memory with its operand. Which slots may share memory follows from the kernels that give views.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from export.spec import ExportError
from targets.to_coreml.blob import BlobTensor
from targets.to_coreml.constants import (
    TORCH,
    Constants,
    Factor,
    UnsupportedOperation,
    Weight,
    stored,
    weights,
)
from targets.to_coreml.kernel_call import Bound, Call
from targets.to_coreml.kernels import KERNELS
from targets.to_coreml.program import DYNAMIC, Constant, Function, Operation, Reference, TensorType

OPSET = "CoreML8"
"""iOS 18: operations of other opsets have other meanings."""
FAILURES = (RuntimeError, IndexError, ValueError, TypeError)
"""What a kernel raises on values that do not fit."""

Slots: TypeAlias = "list[Any]"
"""The values of one run; None where there is none (any longer)."""


@dataclass(frozen=True)
class Step:
    """One operation of a run."""

    operation: Operation
    apply: Callable[[Slots], None]
    results: tuple[int, ...]
    dead: tuple[int, ...]
    """Slots that nobody reads after this step."""


@dataclass
class Compiled:
    """A function, ready to run."""

    steps: list[Step]
    slots: Slots
    """What every run begins with: constants in their places."""
    inputs: dict[str, int]
    states: dict[str, tuple[int, int]]
    """The slot in which a state comes in, and the one that holds it at the end."""
    outputs: dict[str, int]
    copied_states: frozenset[str]
    """Those whose last value may share memory with a constant, an input or another state."""
    copied_outputs: frozenset[str]
    """Those that may share memory with a constant, an input or a state."""


def compile_function(function: Function, constants: Constants, half_sums: bool) -> Compiled:
    """Compile a function.

    Raises:
        UnsupportedOperation: an operation, or a parameter of one, that the interpreter does not know.
        BundleError: a constant cannot be read. ExportError: an operation does not fit its inputs.
    """
    if function.opset != OPSET:
        raise UnsupportedOperation(
            f"{function.name} is written in opset {function.opset}; the interpreter knows {OPSET}: build for iOS 18"
        )
    return _Compiler(function, constants, half_sums).compile()


@dataclass
class _Pending:
    """An operation that runs at every call."""

    operation: Operation
    bound: Bound
    sources: list[int]
    results: list[int]


@dataclass
class _Compiler:
    function: Function
    constants: Constants
    half_sums: bool
    slots: Slots = field(default_factory=list)
    types: dict[str, TensorType] = field(default_factory=dict)
    weights: dict[str, Weight] = field(init=False)
    """Constants that the program stores."""
    folded: dict[str, Tensor] = field(default_factory=dict)
    """Constants that were computed from constants."""
    texts: dict[str, Constant] = field(default_factory=dict)
    places: dict[str, int] = field(default_factory=dict)
    """The slot of every tensor that has one."""
    pending: list[_Pending] = field(default_factory=list)

    def compile(self) -> Compiled:
        function = self.function
        self.weights = weights(function)
        self.types |= function.inputs
        inputs = {name: self._slot(name) for name in function.inputs}
        states = {name: self._new_slot() for name in function.states}
        current = dict(states)
        for operation in function.operations:
            try:
                self._add(operation, current)
            except (*FAILURES, KeyError) as error:
                raise failed(operation, function.name, error) from error
        outputs = {name: self._operand(Reference(name)) for name in function.outputs}
        foreign = frozenset(inputs.values()).union(slot for slot, value in enumerate(self.slots) if value is not None)
        steps, roots = self._schedule({*states.values()}, foreign, {*current.values(), *outputs.values()})
        copied: set[str] = set()
        for name, slot in current.items():
            others = [roots[other] for state, other in current.items() if state != name and state not in copied]
            if roots[slot] & foreign or any(roots[slot] & other for other in others):
                copied.add(name)
        held = foreign.union(*(roots[slot] for slot in current.values()))
        return Compiled(
            steps, self.slots, inputs, {name: (states[name], current[name]) for name in states}, outputs,
            frozenset(copied), frozenset(name for name, slot in outputs.items() if roots[slot] & held),
        )  # fmt: skip

    # Names and slots

    def _new_slot(self, value: Any = None) -> int:
        self.slots.append(value)
        return len(self.slots) - 1

    def _slot(self, name: str) -> int:
        self.places[name] = self._new_slot()
        return self.places[name]

    def _operand(self, argument: Reference | Constant) -> int:
        """The slot of an argument; a constant gets one when it is first asked for."""
        if isinstance(argument, Reference):
            if argument.name not in self.places:
                self.places[argument.name] = self._new_slot(self._constant(argument))
            return self.places[argument.name]
        return self._new_slot(self._constant(argument))

    def _is_constant(self, argument: Reference | Constant) -> bool:
        known = (self.weights, self.folded, self.texts)
        return not isinstance(argument, Reference) or any(argument.name in names for names in known)

    def _constant(self, argument: Reference | Constant) -> Any:
        """A constant argument: a tensor or a text."""
        if isinstance(argument, Reference):
            if argument.name in self.folded:
                return self.folded[argument.name]
            if argument.name in self.weights:
                return self.constants.tensor(self.weights[argument.name])
            return self.texts[argument.name]
        return argument if isinstance(argument, str | tuple) else self.constants.tensor(stored(argument))

    def _values(self, arguments: Sequence[Reference | Constant]) -> tuple[Any, ...]:
        return tuple(self._constant(argument) for argument in arguments)

    # Operations

    def _add(self, operation: Operation, states: dict[str, int]) -> None:
        """Note what an operation defines; `states` has the slot of every state's present value."""
        self.types |= dict(operation.outputs)
        if operation.type in ("read_state", "write_state"):
            (state,) = operation.inputs["input"]
            if not isinstance(state, Reference) or state.name not in states:
                raise ValueError("it names no state")
            for name, _ in operation.outputs:
                self.places[name] = states[state.name]
            for value in operation.inputs.get("data", ()):
                states[state.name] = self._operand(value)
            return
        if operation.type == "const":
            ((name, _),), (value,) = operation.outputs, operation.inputs["val"]
            if isinstance(value, str | tuple):
                self.texts[name] = value
            return
        if operation.type.startswith("constexpr_"):
            return
        bound = self._bind(operation)
        arguments = [one for name in bound.operands for one in operation.inputs[name]]
        if all(self._is_constant(argument) for argument in arguments):
            results = bound.run(*(self._constant(argument) for argument in arguments))
            found = [results] if isinstance(results, Tensor) else results
            check_results(operation, found, self.function.name)
            self.folded |= {name: value for (name, _), value in zip(operation.outputs, found, strict=True)}
            return
        sources = [self._operand(argument) for argument in arguments]
        self.pending.append(_Pending(operation, bound, sources, [self._slot(name) for name, _ in operation.outputs]))

    def _bind(self, operation: Operation) -> Bound:
        if operation.type not in KERNELS:
            raise UnsupportedOperation(
                f"{operation.name} of {self.function.name} is a {operation.type}, which the interpreter does not run; "
                f"it runs {', '.join(sorted(KERNELS))}"
            )
        inputs = operation.inputs
        constant = {name for name, given in inputs.items() if all(self._is_constant(one) for one in given)}
        call = Call(
            operation, self.function.name, self.half_sums and operation.outputs[0][1].dtype == "float16",
            {name: partial(self._values, inputs[name]) for name in constant},
            lambda name: self._factor(inputs[name][0]),
            {name: tuple(self._type(one) for one in given) for name, given in inputs.items()},
        )  # fmt: skip
        bound = KERNELS[operation.type](call)
        missing, unknown = set(bound.operands) - set(inputs), set(inputs) - call.taken - set(bound.operands)
        if missing:
            raise call.refuse(f"it has no input {min(missing)!r}")
        if unknown:
            raise call.refuse(f"it has the input {min(unknown)!r}, which is not supported")
        return bound

    def _type(self, argument: Reference | Constant) -> TensorType:
        if isinstance(argument, Reference):
            return self.types[argument.name]
        if isinstance(argument, BlobTensor):
            return TensorType(argument.shape, argument.dtype)
        if isinstance(argument, np.ndarray):
            return TensorType(argument.shape, str(argument.dtype))
        return TensorType((), "string")

    def _factor(self, argument: Reference | Constant) -> Factor:
        if isinstance(argument, Reference) and argument.name in self.weights:
            return self.constants.factor(self.weights[argument.name])
        found: Tensor = self._constant(argument).float()
        return Factor(tuple(found.shape), found, lambda start, stop: found[start:stop])

    # Life times and shared memory

    def _schedule(
        self, states: set[int], foreign: frozenset[int], kept: set[int]
    ) -> tuple[list[Step], list[frozenset[int]]]:
        """Steps, and the roots of every slot: the slots that got memory of their own and may share it with this one.

        Args:
            states: slots in which states come in. foreign: slots of inputs and constants, which nobody may write to.
            kept: slots that are read after the last step.
        """
        last = {slot: place for place, one in enumerate(self.pending) for slot in (*one.results, *one.sources)}
        last |= dict.fromkeys(kept, len(self.pending))
        dying: list[list[int]] = [[] for _ in range(len(self.pending) + 1)]
        for slot, place in last.items():
            dying[place].append(slot)
        roots = [frozenset((slot,)) for slot in range(len(self.slots))]
        live = states & last.keys()  # without `foreign`: what shares memory with those is never written in place
        steps = []
        for place, one in enumerate(self.pending):
            live -= set(dying[place])
            run, own = one.bound.run, roots[one.sources[0]]
            if one.bound.in_place is not None:
                watched = (*live, *one.sources[1:])
                if not own & foreign and not any(own & roots[slot] for slot in watched):
                    run = one.bound.in_place  # nobody else has this memory, so it is as good as new
            elif one.bound.view:
                for slot in one.results:
                    roots[slot] = own.union(*(roots[slot] for slot in one.sources))
            live |= set(one.results) - set(dying[place])
            dead = tuple(slot for slot in dying[place] if self.slots[slot] is None)
            steps.append(Step(one.operation, _apply(run, one.sources, one.results), tuple(one.results), dead))
        return steps, roots


def _apply(run: Callable[..., Any], sources: list[int], results: list[int]) -> Callable[[Slots], None]:
    """The step as a function of the slots, written out for the common numbers of operands."""
    if len(results) != 1:

        def several(slots: Slots) -> None:
            for slot, value in zip(results, run(*[slots[source] for source in sources]), strict=True):
                slots[slot] = value

        return several
    (result,) = results
    if len(sources) == 1:
        (only,) = sources

        def one(slots: Slots) -> None:
            slots[result] = run(slots[only])

        return one
    if len(sources) == 2:
        first, second = sources

        def two(slots: Slots) -> None:
            slots[result] = run(slots[first], slots[second])

        return two

    def many(slots: Slots) -> None:
        slots[result] = run(*[slots[source] for source in sources])

    return many


def failed(operation: Operation, function: str, error: Exception) -> ExportError:
    """An error of a kernel, with its place."""
    return ExportError(f"{operation.name} ({operation.type}) of {function} fails: {error}")


def check_results(operation: Operation, values: Sequence[Tensor], function: str) -> None:
    """Hold the results of an operation against what the program declares.

    Raises:
        ExportError: another dtype or shape.
    """
    for value, (name, kind) in zip(values, operation.outputs, strict=True):
        fits = len(kind.shape) == value.dim() and all(
            want in (DYNAMIC, got) for want, got in zip(kind.shape, value.shape, strict=True)
        )
        if not fits or TORCH[kind.dtype] != value.dtype:
            raise ExportError(
                f"{operation.name} ({operation.type}) of {function} gives {name!r} as "
                f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}, but the program declares {kind}; "
                "export the package again"
            )

"""Checks of the linter on states: what they are, and how a call reads and writes them. Torch-free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from targets.to_coreml.lint_view import Hit, Subject, View, references, some
from targets.to_coreml.program import TensorType

ALIGNMENT = 32
MOST_STATES = 2
"""That published packages of the source of `state-count` ran with on the Neural Engine; its one with three failed."""
SAME_BUFFER = ("identity", "reshape", "expand_dims", "squeeze", "transpose", "read_state")
"""Operations behind which a runtime may keep the buffer of their input."""


def equal(subject: Subject) -> Iterator[Hit]:
    """All functions declare the same states."""
    declared = {view.function.name: view.function.states for view in subject.views}
    for name in sorted({state for states in declared.values() for state in states}):
        kinds: dict[str, list[str]] = {}
        for function, states in declared.items():
            kinds.setdefault(str(states.get(name, "absent")), []).append(function)
        if len(kinds) > 1:
            found = "; ".join(f"{kind} in {some(functions)}" for kind, functions in kinds.items())
            text = f"{found}; all functions of a package must declare the same states: declare it in each, the same way"
            yield Hit("states-equal", name, text)


def kinds(subject: Subject) -> Iterator[Hit]:
    """Dtype and alignment, once for all functions that declare the same."""
    seen: set[tuple[str, TensorType]] = set()
    for view in subject.views:
        for name, kind in view.function.states.items():
            if (name, kind) in seen:
                continue
            seen.add((name, kind))
            if kind.dtype != "float16":
                yield Hit(
                    "state-dtype", name,
                    f"is {kind}; a state must be float16: pass it as input and output (--state-layout explicit)",
                    view.function.name,
                )  # fmt: skip
            wrong = _misaligned(kind.shape)
            if wrong:
                text = f"is {kind}; {wrong}: pad it, or pass it as input and output"
                yield Hit("state-alignment", name, text, view.function.name)
    most = max((len(view.function.states) for view in subject.views), default=0)
    if most > MOST_STATES:
        text = (
            f"has {most} states; one package with 3 failed at its first call on the Neural Engine and ran on the GPU, "
            f"others ran with {MOST_STATES}, or with 48: call it once on the device; if that fails, "
            "--max-file-layers 1 leaves 2 states in a package, and --profile gpu has no such limit"
        )
        yield Hit("state-count", "", text)


def _misaligned(shape: tuple[int, ...]) -> str | None:
    """What is wrong with the last two axes, of which the second to last may be 1."""
    last = shape[-1] if shape else 1
    if last % ALIGNMENT:
        return f"its last axis must be a multiple of {ALIGNMENT}, not {last}"
    if len(shape) > 1 and shape[-2] != 1 and shape[-2] % ALIGNMENT:
        return f"its second to last axis must be 1 or a multiple of {ALIGNMENT}, not {shape[-2]}"
    return None


def uses(subject: Subject, view: View) -> Iterator[Hit]:
    """Each state is written once, and read or written at all."""
    written: Counter[str] = Counter()
    for operation in view.operations:
        if operation.type == "write_state":
            written.update(references(operation.inputs.get("input", ())))
    for name in view.function.states:
        if written[name] > 1:
            text = f"is written {written[name]} times; once is what is known to work: join the new values first"
            yield Hit("state-writes", name, text)
        if not view.readers[name]:
            text = "is neither read nor written; every function must declare it, but some should use it: drop the state"
            yield Hit("state-unused", name, text)


def outputs(subject: Subject, view: View) -> Iterator[Hit]:
    """No output is what a state receives, not even behind operations that keep the buffer."""
    for operation in view.operations:
        if operation.type != "write_state":
            continue
        state = some(references(operation.inputs.get("input", ())))
        pending = references(operation.inputs.get("data", ()))
        while pending:
            name = pending.pop()
            if name in view.outputs:
                text = (
                    f"is an output and the value written into state {state}; a runtime crashes while it loads this: "
                    "return a value of its own, such as the product with 1"
                )
                yield Hit("state-is-output", name, text)
                break
            maker = view.makers.get(name)
            if maker is not None and maker.type in SAME_BUFFER:
                pending += [one for given in maker.inputs.values() for one in references(given)]


CHECKS = (equal, kinds)
FUNCTION_CHECKS = (uses, outputs)

"""How deliberate faults are made, and the faults of a host, which are the same for every target.

A fault is a function that patches: a row of a target's table, one of its functions, or a session.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from export.model import positions
from export.validate import ladder

Patch = pytest.MonkeyPatch
Patcher = Callable[[Patch], None]


def replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Patcher:
    """Another function in place of one of the target's; made of the right one."""
    return lambda monkeypatch: monkeypatch.setattr(owner, name, make(getattr(owner, name)))


def both(*patchers: Patcher) -> Patcher:
    """One mistake that shows in several places."""

    def patch(monkeypatch: Patch) -> None:
        for one in patchers:
            one(monkeypatch)

    return patch


def lost_between_chunks(session: Any, kind: str) -> Patcher:
    """States whose names begin with `kind` are zeros before every chunk of a session class that keeps them in place."""

    def make(right: Any) -> Any:
        def run(self: Any, signature: str, inputs: Any) -> Any:
            if signature.startswith("prefill"):
                for name, state in self.states().items():
                    if name.startswith(kind):
                        state[...] = 0
            return right(self, signature, inputs)

        return run

    return replaced(session, "run", make)


def fading(session: Any) -> Patcher:
    """Recurrent states of a session class that keeps them in place lose a tenth before every decode step."""

    def make(right: Any) -> Any:
        def run(self: Any, signature: str, inputs: Any) -> Any:
            if signature == "decode":
                for name, state in self.states().items():
                    if name.startswith("recurrent"):
                        state *= np.float32(0.9)
            return right(self, signature, inputs)

        return run

    return replaced(session, "run", make)


def spoiled(session: Any, spoil: Callable[[Any], Any]) -> Patcher:
    """Other logits [..., V] from a session class."""

    def make(right: Any) -> Any:
        def run(self: Any, signature: str, inputs: Any) -> Any:
            outputs = dict(right(self, signature, inputs))
            if "logits" in outputs:
                outputs["logits"] = spoil(outputs["logits"].copy())
            return outputs

        return run

    return replaced(session, "run", make)


def blurred(logits: Any) -> Any:
    """Noise that is the same for every token, about as large as the logits."""
    return logits + np.random.default_rng(0).normal(0, 6, logits.shape[-1]).astype(np.float32)


def shuffled(logits: Any) -> Any:
    """Of the first 320 ids, which are the words of a small vocabulary."""
    logits[..., :320] = logits[..., np.random.default_rng(0).permutation(320)]
    return logits


def always(token: int) -> Callable[[Any], Any]:
    """One id above all others, whatever is asked."""

    def spoil(logits: Any) -> Any:
        logits[..., token] += 100
        return logits

    return spoil


def first_answer(right: Any) -> Any:
    """Tables of the first image size, whatever the size."""
    known: list[Any] = []

    def wrong(*inputs: Any) -> Any:
        known.append(right(*inputs))
        return known[0]

    return wrong


class Emitters:
    """Faults in a target's table.

    Args:
        table: operator -> what emits it. modules: those that look up an operator's operands.
    """

    def __init__(self, table: dict[str, Any], modules: Sequence[Any]) -> None:
        self._table = table
        self._modules = modules

    def replaced(self, make: Callable[[Any], Any], *names: str) -> Patcher:
        """Other rows in the table: each made of the right one."""

        def patch(monkeypatch: Patch) -> None:
            for name in names:
                monkeypatch.setitem(self._table, name, make(self._table[name]))

        return patch

    def within(self, name: str, *changes: tuple[Any, str, Callable[[Any], Any]]) -> Patcher:
        """Other functions (owner, attribute, made of the right one) while one operator is emitted."""

        def make_emitter(right: Any) -> Any:
            def wrong(low: Any, node: Any) -> None:
                with pytest.MonkeyPatch.context() as monkeypatch:
                    for change in changes:
                        replaced(*change)(monkeypatch)
                    right(low, node)

            return wrong

        return self.replaced(make_emitter, name)

    def arguments(self, name: str, change: Callable[..., tuple[Any, ...]]) -> Patcher:
        """An operator that reads other operands."""
        return self.within(
            name, *((m, "operands", lambda right: lambda node: change(*right(node))) for m in self._modules)
        )


# -- faults of the host -------------------------------------------------------------------------------
def all_rows_valid(inputs: dict[str, Any]) -> None:
    if "valid" in inputs:
        inputs["valid"] = np.asarray([inputs["embeddings"].shape[1]], np.int32)


def positions_as_text(inputs: dict[str, Any]) -> None:
    count = inputs["position_ids"].shape[1]
    inputs["position_ids"] = np.tile(inputs["start"] + np.arange(count, dtype=np.int32), (3, 1))


def positions_of_one_axis(inputs: dict[str, Any]) -> None:
    inputs["position_ids"] = np.tile(inputs["position_ids"][:1], (3, 1))


def colours_exchanged(inputs: dict[str, Any]) -> None:
    inputs["image"] = np.ascontiguousarray(inputs["image"][:, ::-1])


def swapped_images(patch: Patch) -> None:
    right = positions.splice
    patch.setattr(ladder, "splice", lambda rows, ids, token, images: right(rows, ids, token, list(images)[::-1]))


def reversed_rows(patch: Patch) -> None:
    right = positions.splice
    patch.setattr(
        ladder, "splice", lambda rows, ids, token, images: right(rows, ids, token, [i[::-1] for i in images])
    )


def host(session: type, lose: Callable[[Any, str], None]) -> dict[str, Patcher]:
    """What a host may do wrong, by name.

    Args:
        session: the target's. lose: sets the states of a kind to zero in one.
    """

    def fed(change: Callable[[dict[str, Any]], None], which: str = "start") -> Patcher:
        """Other inputs in calls that have the input `which`."""

        def make(right: Any) -> Any:
            def run(self: Any, name: str, inputs: Any) -> Any:
                inputs = dict(inputs)
                if which in inputs:
                    change(inputs)
                return right(self, name, inputs)

            return run

        return replaced(session, "run", make)

    def lost(kind: str) -> Patcher:
        """Other states between calls."""

        def make(right: Any) -> Any:
            def run(self: Any, name: str, inputs: Any) -> Any:
                if "start" in inputs:
                    lose(self, kind)
                return right(self, name, inputs)

            return run

        return replaced(session, "run", make)

    return {
        "image positions as text": fed(positions_as_text),
        "one axis of positions for all three": fed(positions_of_one_axis),
        "colours of the picture exchanged": fed(colours_exchanged, "image"),
        "two pictures exchanged": swapped_images,
        "rows of a picture reversed": reversed_rows,
        "padding counted as valid": fed(all_rows_valid),
        "conv state not carried": lost("conv"),
        "recurrent state not carried": lost("recurrent"),
        "keys not carried": lost("key"),
        "values not carried": lost("value"),
    }


def zeroed(session: Any, kind: str) -> None:
    """Lose the states of a session that lends its own."""
    for name, array in session.states().items():
        if name.startswith(kind):
            array[...] = 0

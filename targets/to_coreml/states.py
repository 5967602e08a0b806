"""States of a package: what it declares, how one call reads and writes them, what the manifest says.

All functions of a package declare the same states, so that one MLState serves prefill and decode. A state that the
runtime keeps counts as zeros in a call with `start` = 0, whatever it holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import types
from torch.fx import Node

from export.model.state import State
from targets.to_coreml.lowering import Lowering, ints
from targets.to_coreml.profiles import Profile

KV = ("key", "value")
LARGEST = np.finfo(np.float16).max
ROWS_AXIS = 2
"""Axis of tokens in a cache [1, Hkv, L, Dh], in front of which stacked ones have their layers."""


@dataclass(frozen=True)
class Kept:
    """One state of the package: some layers' tensors of one kind, along its first axis."""

    name: str
    kind: str
    layers: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: str = "float16"

    def as_manifest(self) -> dict[str, Any]:
        layer: Any = list(self.layers) if len(self.layers) > 1 else self.layers[0]
        return {"name": self.name, "kind": self.kind, "layer": layer, "shape": list(self.shape), "dtype": self.dtype}


def shape(state: State, profile: Profile) -> tuple[int, ...]:
    """Shape of one layer's state: caches [1, Hkv, L, Dh], recurrent [1, Hv, Dk, Dv], inputs of the convolution as
    rows of the profile, the last of them its history.
    """
    if state.kind != "conv":
        return (1, *state.shape)
    channels, width = state.shape
    history = profile.history or width
    return (1, channels, 1, history) if profile.convolutions else (1, history, channels)


def plan(states: Sequence[State], profile: Profile, layout: str, number: int) -> list[Kept]:
    """The states of package `number`, in the order of their layers."""
    if layout != "stacked":
        return [
            Kept(
                f"{s.kind}_state_{s.layer}",  # MIL calls the results of its own operations conv_0, conv_1, …
                s.kind,
                (s.layer,),
                shape(s, profile),
                "float32" if layout == "explicit" and s.kind == "recurrent" else "float16",
            )
            for s in states
        ]
    found = []
    for kind in ("conv", "recurrent", "key", "value"):
        same = [s for s in states if s.kind == kind]
        if same:
            layers = tuple(s.layer for s in same)
            found.append(Kept(f"{kind}_states_{number}", kind, layers, (len(same), *shape(same[0], profile)[1:])))
    return found


NEW = "_new"
"""Ends the name of the output that holds an explicit state's new value."""


def result_name(kept: Kept) -> str:
    """Output that holds the new value of an explicit state."""
    return f"{kept.name}{NEW}"


def described(kept: Kept) -> dict[str, str]:
    """What a state, and the output of an explicit one, is."""
    what = {
        "conv": "Last inputs of the causal convolution",
        "recurrent": "State of the gated delta rule",
        "key": "Keys of the attention's cache",
        "value": "Values of the attention's cache",
    }[kept.kind]
    text = f"{what}, layer {', '.join(map(str, kept.layers))}."
    return {kept.name: text, **({result_name(kept): f"New: {text}"} if kept.dtype == "float32" else {})}


def bindings(kept: Sequence[Kept]) -> dict[str, Any]:
    """The `states` of a stage in the manifest."""
    return {
        k.name: {"input": k.name, "output": result_name(k)} if k.dtype == "float32" else "internal" for k in kept
    }


def placeholders(kept: Sequence[Kept]) -> dict[str, Any]:
    """Inputs of a MIL function, by name."""
    return {
        k.name: mb.placeholder(shape=k.shape, dtype=types.fp32)
        if k.dtype == "float32"
        else mb.state_tensor_placeholder(shape=k.shape, dtype=types.fp16)
        for k in kept
    }


class States:
    """Access to the states during one walk.

    Args:
        kept: of the package. inputs: the function's inputs. nodes: which state each placeholder of the traced
            program is.
    """

    def __init__(self, kept: Sequence[Kept], inputs: Mapping[str, Any], nodes: Mapping[Node, State]) -> None:
        self._kept = kept
        self._inputs = inputs
        self._nodes = nodes
        self._now: dict[str, Any] = {}
        """Present content of stacked caches."""
        self._written: set[str] = set()

    def _find(self, state: State) -> tuple[Kept, int]:
        kept = next(k for k in self._kept if k.kind == state.kind and state.layer in k.layers)
        return kept, kept.layers.index(state.layer)

    def _whole(self, kept: Kept) -> Any:
        if kept.dtype == "float32":
            return self._inputs[kept.name]
        if kept.name not in self._now:
            self._now[kept.name] = mb.read_state(input=self._inputs[kept.name])
        return self._now[kept.name]

    def read(self, low: Lowering, node: Node) -> Any:
        """A convolution or recurrent state as it was before the call."""
        kept, index = self._find(self._nodes[node])
        value = self._whole(kept)
        if kept.dtype != "float32":
            zero = low.constant("zero", np.float16(0))
            alive = low.once("alive", lambda: mb.greater(x=low.start, y=ints(0)))
            value = low.once(f"state {kept.name}", lambda: mb.select(cond=alive, a=value, b=zero))
        return value if len(kept.layers) == 1 else _layer(value, index)

    def write_rows(self, low: Lowering, node: Node, rows: Any) -> Any:
        """Write new rows [1, Hkv, C, Dh] into a cache from `start` on; returns the whole cache of that layer.

        A cache never holds NaN or infinity: rows that nobody may see count 0 times what they hold, which those would
        survive, into the next conversation too.
        """
        kept, index = self._find(self._nodes[node])
        finite = mb.less_equal(x=mb.abs(x=rows), y=LARGEST)
        rows = mb.select(cond=finite, a=rows, b=low.constant("zero", np.float16(0)))
        stacked = len(kept.layers) > 1
        place = low.once(f"place {index if stacked else 0} {rows.shape[2]}", lambda: _place(low, rows, index, stacked))
        begin, end = place
        updated = mb.slice_update(
            x=self._whole(kept), update=rows, begin=begin, end=end, end_mask=[False, True, False, True]
        )
        if stacked:
            self._now[kept.name] = updated
            return _layer(updated, index)
        self._written.add(kept.name)
        return mb.coreml_update_state(state=self._inputs[kept.name], value=updated)

    def finish(self, new: Mapping[Node, Any]) -> dict[str, Any]:
        """Write what is not written yet; returns the outputs that explicit states need.

        Args:
            new: placeholder of a state -> its value after the call.
        """
        by_state = {self._nodes[node].name: var for node, var in new.items()}
        outputs = {}
        for kept in self._kept:
            parts = [by_state[f"{kept.kind}_{layer}"] for layer in kept.layers]
            if kept.dtype == "float32":
                outputs[result_name(kept)] = parts[0]
            elif kept.kind in KV:
                if kept.name not in self._written:
                    mb.coreml_update_state(state=self._inputs[kept.name], value=self._now[kept.name])
            else:
                whole = parts[0] if len(parts) == 1 else mb.concat(values=parts, axis=0)
                mb.coreml_update_state(state=self._inputs[kept.name], value=whole)
        return outputs


def _layer(value: Any, index: int) -> Any:
    size = [1, *value.shape[1:]]
    return mb.slice_by_size(x=value, begin=[index] + [0] * (value.rank - 1), size=size)


def _place(low: Lowering, rows: Any, index: int, stacked: bool) -> tuple[Any, Any]:
    """begin and end of the rows in a cache."""
    first, zero = ints(index if stacked else 0), ints(0)
    begin = mb.concat(values=[first, zero, low.start, zero], axis=0)
    stop = mb.add(x=low.start, y=ints(rows.shape[2]))
    end = mb.concat(values=[ints(first[0] + 1), zero, stop, zero], axis=0)
    return begin, end

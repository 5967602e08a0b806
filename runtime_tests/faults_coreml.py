"""Faults of the Core ML lowering: another row of the table or function of the target, and the check that must fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from coremltools.converters.mil.mil import Builder as mb

from export.checkpoint import weights as published
from runtime_tests.faults import Emitters, Patcher, both, first_answer, replaced
from targets.to_coreml import attention, delta_rule, lower, norms, operators, states
from targets.to_coreml.lowering import Lowering, ints, shape_of
from targets.to_coreml.session import CoreMLSession


@dataclass(frozen=True)
class Fault:
    """What is wrong, and which check says so."""

    patch: Patcher
    check: str
    options: dict[str, Any] = field(default_factory=dict)
    """Of `build`, where the fault shows in some builds only."""
    quick: bool = False
    """Runs by default."""


def fault(
    patch: Patcher, check: str = "logits", *, quick: bool = False, **options: Any
) -> Fault:
    return Fault(patch, check, options, quick)


def names(faults: dict[str, Fault]) -> list[Any]:
    """Parameters of a test; all but the quick ones are marked slow."""

    def marks(one: Fault) -> list[Any]:
        return [] if one.quick else [pytest.mark.slow]

    return [pytest.param(name, marks=marks(one)) for name, one in faults.items()]



# -- how a fault is made ------------------------------------------------------------------------------
EMITTERS = Emitters(operators.EMITTERS, [attention, delta_rule, norms, operators])
emitter, within, arguments = EMITTERS.replaced, EMITTERS.within, EMITTERS.arguments


def built(name: str, operation: str, make: Callable[[Any], Any]) -> Patcher:
    """Another operation of MIL, while one operator is emitted."""
    return within(name, (mb, operation, make))


def with_valid(right: Any) -> Any:
    """An emitter that takes all rows of a chunk for real ones."""

    def wrong(low: Any, node: Any) -> None:
        before, low.valid = low.valid, low.valid and ints(shape_of(node.args[0])[0])
        right(low, node)
        low.valid = before

    return wrong


def constants(change: Callable[[str, Any], Any], *names: str) -> Patcher:
    """Other constants; of some operators only, where they are named."""

    def make(right: Any) -> Any:
        def wrong(low: Any, name: str, array: Any) -> Any:
            changed = change(name, array)
            return right(low, name, array if changed is array else np.ascontiguousarray(changed))

        return wrong

    if names:
        return both(*(within(name, (Lowering, "constant", make)) for name in names))
    return replaced(Lowering, "constant", make)


# -- faults of the decoder ----------------------------------------------------------------------------
def forgets(kind: str) -> Patcher:
    """The past of one kind of state counts as zeros."""

    def make(right: Any) -> Any:
        def wrong(self: states.States, low: Any, node: Any) -> Any:
            value = right(self, low, node)
            return mb.mul(x=value, y=np.float16(0)) if self._nodes[node].kind == kind else value

        return wrong

    return replaced(states.States, "read", make)


def eps_where(dimensions: int) -> Patcher:
    """A large eps in norms of rows [C, D] (all but the first follow a residual) or of heads [C, H, D]."""

    def change(x: Any, weight: Any, eps: float) -> tuple[Any, ...]:
        return x, weight, 1e-2 if len(shape_of(x)) == dimensions else eps

    return arguments("mobile.rms_norm.default", change)


def interleaved(right: Any) -> Any:
    """Pairs of neighbours rotated instead of two halves: the same after sorting them, and back."""

    def wrong(x: Any, keep: Any, swap: Any, half_width: int) -> Any:
        def sort(y: Any, pair: tuple[int, int]) -> Any:
            rest = y.shape[3] - 2 * half_width
            parts = mb.split(x=y, split_sizes=[2 * half_width, rest], axis=3) if rest else [y]
            apart = mb.reshape(x=parts[0], shape=[*y.shape[:3], *pair])
            turned = mb.reshape(x=mb.transpose(x=apart, perm=[0, 1, 2, 4, 3]), shape=list(parts[0].shape))
            return mb.concat(values=[turned, *parts[1:]], axis=3) if rest else turned

        return sort(right(sort(x, (half_width, 2)), keep, swap, half_width), (2, half_width))

    return wrong


def contiguous_sections(right: Any) -> Any:
    """M-RoPE sections one after the other instead of interleaved: the frequencies are the only product's factor."""

    def wrong(x: Any, y: Any) -> Any:
        axis, frequency = np.sort(y[0, :, 0].argmax(0)), y.max((0, 1, 2))
        chosen = np.zeros_like(y)
        chosen[0, axis, 0, np.arange(len(axis))] = frequency
        return right(x=x, y=chosen)

    return wrong


def exchanged_axes(right: Any) -> Any:
    """Height and width of a place exchanged."""
    return lambda x, y: right(x=x, y=np.ascontiguousarray(y[:, [0, 2, 1]]))


def tiled_heads(right: Any) -> Any:
    """Key head h serves value heads h, h + Hk, … instead of consecutive ones."""
    return lambda low, x, times: x if times == 1 else mb.concat(values=[x] * times, axis=1)


def other_query_heads(right: Any) -> Any:
    """Query heads 1 and 2 change places, which look at different key heads."""

    def wrong(self: Lowering, node: Any, heads: int) -> Any:
        x = right(self, node, heads)
        if heads != 4:
            return x
        parts = mb.split(x=x, num_splits=4, axis=1)
        return mb.concat(values=[parts[place] for place in (0, 2, 1, 3)], axis=1)

    return wrong


def repeated_rows(right: Any) -> Any:
    """The rows of the mask are those of the tokens, each twice; they should be all tokens, twice."""

    def wrong(x: Any, reps: list[int]) -> Any:
        _, _, tokens, rows = x.shape
        apart = right(x=mb.reshape(x=x, shape=[1, tokens, 1, rows]), reps=[1, 1, reps[2], 1])
        return mb.reshape(x=apart, shape=[1, 1, tokens * reps[2], rows])

    return wrong


def reread(right: Any) -> Any:
    """The new state is written before the old one is read."""

    def wrong(low: Any, node: Any) -> None:
        right(low, node)
        kept, _ = low.states._find(low.states._nodes[node.args[5]])
        mb.coreml_update_state(state=low.states._inputs[kept.name], value=low.results[node, 1].var)
        del low.states._now[kept.name], low._shared[f"state {kept.name}"]
        right(low, node)

    return wrong


def unsolved(right: Any) -> Any:
    """The tokens of a chunk do not see each other's writes."""
    return lambda low, lower, dtype: mb.add(x=mb.mul(x=lower, y=dtype(0)), y=np.eye(lower.shape[3], dtype=dtype))


def chunks_of(tokens: int) -> Patcher:
    """Right in itself: the delta rule in shorter chunks."""
    return replaced(delta_rule, "CHUNK", lambda right: tokens)


def from_the_old_state(right: Any) -> Any:
    """What follows the full chunks of a call starts from the state before the call."""

    def wrong(low: Any, node: Any) -> None:
        first: list[Any] = []

        def make(chunks: Any) -> Any:
            def found(low: Any, values: Any, state: Any) -> Any:
                first.append(state)
                return chunks(low, values, first[0])

            return found

        with pytest.MonkeyPatch.context() as monkeypatch:
            replaced(delta_rule, "_chunks", make)(monkeypatch)
            right(low, node)

    return wrong


def late(right: Any) -> Any:
    """Rows are written to slots start + 1, …."""

    def wrong(low: Any, *rest: Any) -> Any:
        before, low.start = low.start, mb.add(x=low.start, y=ints(1))
        found = right(low, *rest)
        low.start = before
        return found

    return wrong


def stale_row(right: Any) -> Any:
    """The first row a call writes to the key cache keeps what it held."""

    def run(self: CoreMLSession, name: str, inputs: Any) -> Any:
        before, _ = self.snapshot()
        outputs = right(self, name, inputs)
        held, explicit = self.snapshot()
        for file, arrays in held.items():
            for state, array in arrays.items():
                if state.startswith("key") and "start" in inputs:
                    row = int(inputs["start"][0])
                    array[..., row, :] = before[file][state][..., row, :] if file in before else 0
        self.restore((held, explicit))
        return outputs

    return run


def transform(name: str, wrong: str) -> Patcher:
    """A wrong elementwise map from published to exported weights, in the artifact only."""

    def make(right: Any) -> Any:
        def kept(self: Lowering, node: Any, *rest: Any, **options: Any) -> Any:
            given = self.weights.quantizer.weights
            parameter = self.parameter(node)
            entry = given.parameter(parameter)
            if entry.transform == name:
                parts = [given.checkpoint.read(s.tensor, s.start, s.stop) for s in entry.segments]
                self.once(f"parameter {parameter}", lambda: published.TRANSFORMS[wrong](parts[0]))
            return right(self, node, *rest, **options)

        return kept

    return replaced(Lowering, "kept", make)


def reversed_taps(name: str, array: Any) -> Any:
    """The newest input meets the weight of the oldest."""
    if "conv_weight" not in name:
        return array
    return array[:, ::-1] if name.endswith("__t") else array[..., ::-1]


def without_bias(name: str, array: Any) -> Any:
    return array * 0 if "dt_bias" in name else array


def absent_bias(right: Any) -> Any:
    """Zeros that are not named after the parameter."""
    return lambda low, name, array: right(low, "no_bias" if "dt_bias" in name else name, without_bias(name, array))


def identity(right: Any) -> Any:
    return lambda low, node: low.define(node, low.rows(node.args[0]))


def quick_gelu(right: Any) -> Any:
    return operators._unary(lambda x: mb.mul(x=x, y=mb.sigmoid(x=mb.mul(x=x, y=np.float16(1.702)))))


def row_early(place: str, row_bytes: int) -> Patcher:
    """The embedding's table begins a row too early in the file."""

    def make(right: Any) -> Any:
        def wrong(*inputs: Any) -> Any:
            stage = right(*inputs)
            stage["table"][place] -= row_bytes
            return stage

        return wrong

    return replaced(lower, "_table", make)


# -- faults of the ways of keeping states -------------------------------------------------------------
def other_layer(right: Any) -> Any:
    """A state is read where the other layer's lies."""

    def wrong(self: states.States, low: Any, node: Any) -> Any:
        with pytest.MonkeyPatch.context() as monkeypatch:
            slice_of = states._layer
            monkeypatch.setattr(states, "_layer", lambda value, index: slice_of(value, 1 - index))
            return right(self, low, node)

    return wrong


def same_place(right: Any) -> Any:
    """The new states of a layer are written over those of the first one."""

    def wrong(self: states.States, new: Any) -> Any:
        first = {k.kind: self._inputs[k.name] for k in reversed(self._kept)}
        with pytest.MonkeyPatch.context() as monkeypatch:
            update = mb.coreml_update_state
            monkeypatch.setattr(
                mb,
                "coreml_update_state",
                lambda state, value: update(state=first[state.name.split("_")[0]], value=value),
            )
            return right(self, new)

    return wrong


def first_of_its_kind(right: Any) -> Any:
    """States of a layer, caches apart, are read where those of the first one lie."""

    def wrong(self: states.States, state: Any) -> Any:
        if state.kind in states.KV:
            return right(self, state)
        return next(k for k in self._kept if k.kind == state.kind), 0

    return wrong


def exchanged_outputs(right: Any) -> Any:
    """Two outputs come out under each other's name."""

    def wrong(*inputs: Any) -> Any:
        outputs = right(*inputs)
        return dict(zip(outputs, reversed(list(outputs.values())), strict=True))

    return wrong


def joined_in_reverse(right: Any) -> Any:
    """The layers of a stack are written in the wrong order."""

    def wrong(self: states.States, new: Any) -> Any:
        with pytest.MonkeyPatch.context() as monkeypatch:
            join = mb.concat
            monkeypatch.setattr(mb, "concat", lambda values, axis: join(values=values[::-1], axis=axis))
            return right(self, new)

    return wrong


def uncleared(right: Any) -> Any:
    """States are read as they are, whatever `start` is."""

    def wrong(self: states.States, low: Any, node: Any) -> Any:
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(mb, "select", lambda cond, a, b: a)
            return right(self, low, node)

    return wrong


# -- faults of the Neural Engine's layout and precision -----------------------------------------------
def unturned(order: tuple[int, ...]) -> Patcher:
    """A transpose that is a mere reshape."""

    def make(right: Any) -> Any:
        def wrong(self: Lowering, x: Any, axes: Any) -> Any:
            if tuple(axes) == order:
                return self.reshape(x, tuple(x.shape[axis] for axis in axes))
            return right(self, x, axes)

        return wrong

    return replaced(Lowering, "transpose", make)


def merged_by_width(right: Any) -> Any:
    """Neighbouring patches side by side in every channel; their channels should be together."""

    def wrong(low: Any, x: Any, tokens: int, count: int) -> Any:
        width = x.shape[low.features]
        apart = low.transpose(low.reshape(x, (1, width, tokens, count)), (0, 1, 3, 2))
        return low.reshape(apart, low.row_shape(tokens, width * count))

    return wrong


def one_input_early(right: Any) -> Any:
    """The convolution reads its history from one input before the right one on."""
    return lambda low, series, weight, skip, tokens: right(low, series, weight, skip - 1, tokens)


def softplus(make: Callable[[Any], Any]) -> Patcher:
    return replaced(delta_rule, "_softplus", make)


def short_series(right: Any) -> Any:
    """Two terms of the four."""

    def wrong(x: Any) -> Any:
        small = mb.exp(x=mb.mul(x=mb.abs(x=x), y=np.float16(-1)))
        z = mb.real_div(x=small, y=mb.add(x=small, y=np.float16(2)))
        series = mb.add(x=mb.mul(x=mb.mul(x=z, y=z), y=np.float16(2 / 3)), y=np.float16(2))
        return mb.add(x=mb.maximum(x=x, y=np.float16(0)), y=mb.mul(x=z, y=series))

    return wrong


# -- faults of the vision encoder ---------------------------------------------------------------------
def transposed_kernel(right: Any) -> Any:
    """Rows and columns of a patch exchanged in the kernel."""

    def wrong(low: Any, source: Any, kernel: Any, bias: Any) -> Any:
        return right(low, source, mb.const(val=np.ascontiguousarray(kernel.val.swapaxes(2, 3))), bias)

    return wrong


CONV, GATES, NORM = "mobile.causal_conv.default", "mobile.delta_gates.default", "mobile.l2_norm.default"
STEP, CHUNK = "mobile.gated_delta_step.default", "mobile.gated_delta_chunk.default"
ATTENTION, VISION = "mobile.cached_attention.default", "aten.scaled_dot_product_attention.default"
GATED = "mobile.gated_rms_norm.default"
TABLE, ROTARY = "mobile.rotary_table.default", "mobile.rotary.default"
ANE: dict[str, Any] = {"profile": "ane"}
SEES: dict[str, Any] = {"vision": True}
STACKED: dict[str, Any] = {"state_layout": "stacked"}
EXPLICIT: dict[str, Any] = {"state_layout": "explicit"}
PIECES: dict[str, Any] = {"max_head_columns": 128}

L1: dict[str, Fault] = {
    "eps of the l2 norm too small": fault(arguments(NORM, lambda x, eps, scale: (x, eps / 100, scale))),
    "eps of the l2 norm left out": fault(arguments(NORM, lambda x, eps, scale: (x, 0.0, scale)), quick=True),
    "eps of the rms norm too large": fault(eps_where(3)),
    "eps of the residual norm too large": fault(eps_where(2)),
    "eps of the gated norm too large": fault(arguments(GATED, lambda *a: (*a[:3], 1e-2))),
    "rotary interleaved": fault(replaced(attention, "_rotate", interleaved)),
    "cos and sin exchanged": fault(arguments(ROTARY, lambda x, cos, sin: (x, sin, cos)), quick=True),
    "attention scale missing": fault(arguments(ATTENTION, lambda *a: (*a[:-1], 1.0))),
    "keys and values exchanged": fault(arguments(ATTENTION, lambda q, k, v, *a: (q, v, k, *a))),
    "attention not causal": fault(
        replaced(attention, "_mask", lambda right: lambda *a: mb.mul(x=right(*a), y=np.float16(0)))
    ),
    "mask one row short": fault(built(ATTENTION, "greater", lambda right: mb.greater_equal), quick=True),
    "mask one row long": fault(built(ATTENTION, "greater", lambda right: lambda x, y: right(x=x, y=mb.add(x=y, y=1)))),
    "mask of minus infinity": fault(replaced(attention, "UNSEEN", lambda right: np.float16(-np.inf))),
    "mask repeated by token": fault(built(ATTENTION, "tile", repeated_rows)),
    "query heads of another key head": fault(within(ATTENTION, (Lowering, "heads", other_query_heads))),
    "silu after the convolution missing": fault(built(CONV, "silu", lambda right: lambda x: x)),
    "taps of the convolution reversed": fault(constants(reversed_taps, CONV)),
    "conv state not carried": fault(forgets("conv")),
    "recurrent state not carried": fault(forgets("recurrent")),
    "query scale applied twice": fault(arguments(NORM, lambda x, eps, scale: (x, eps, scale**2))),
    "delta rule without delta in a step": fault(built(STEP, "sub", lambda right: lambda x, y: x)),
    "delta rule without delta inside a chunk": fault(replaced(delta_rule, "_unit_lower_inverse", unsolved), quick=True),
    "decay of a token's own step counted twice": fault(
        constants(lambda name, array: np.tril(np.ones_like(array)) if name.startswith("before") else array, CHUNK)
    ),
    "decay to the end of a chunk one token long": fault(
        constants(lambda name, array: np.triu(np.ones_like(array)) if name.startswith("after") else array, CHUNK)
    ),
    # Calls of the probe are shorter than a chunk of the product; shorter chunks show what joins them.
    "every chunk reads the first one": fault(
        both(chunks_of(8), replaced(delta_rule, "_each", lambda right: lambda x: right(x)[:1] * len(right(x))))
    ),
    "the rest of a call starts from its old state": fault(both(chunks_of(10), emitter(from_the_old_state, CHUNK))),
    "old state read after the new one is written": fault(emitter(reread, STEP)),
    "decay and dt bias exchanged": fault(
        arguments(GATES, lambda a, b, decay, bias, valid: (a, b, bias, decay, valid))
    ),
    "dt bias left out": fault(constants(without_bias, GATES)),
    "a and b exchanged": fault(arguments(GATES, lambda a, b, *rest: (b, a, *rest))),
    "gate is sigmoid, not silu": fault(built(GATED, "silu", lambda right: mb.sigmoid)),
    "quick gelu for silu in the MLP": fault(emitter(quick_gelu, "aten.silu.default")),
    "conv state of the padded tail": fault(emitter(with_valid, CONV), "states", quick=True),
    "padding reaches the recurrent state": fault(arguments(GATES, lambda *a: (*a[:-1], None)), "states"),
    "NaN of padded rows not removed": fault(emitter(identity, "mobile.real_rows.default"), "padding", quick=True),
    "wrong head grouping": fault(replaced(delta_rule, "_repeat", tiled_heads)),
    "M-RoPE sections not interleaved": fault(built(TABLE, "mul", contiguous_sections), quick=True),
    "height and width of a place exchanged": fault(built(TABLE, "mul", exchanged_axes)),
    "attention gate without sigmoid": fault(emitter(identity, "aten.sigmoid.default")),
    "zero-centred norm without one": fault(transform("plus_one", "none")),
    "positive decay": fault(transform("negative_exp", "none")),
    "KV slots off by one": fault(replaced(states, "_place", late)),
    "stale KV row": fault(replaced(CoreMLSession, "run", stale_row)),
    "logits of a padded row": fault(emitter(with_valid, "mobile.last_valid.default")),
    "embedding off by one row": fault(row_early("data_offset", 2 * 128), "embed"),
    "states of two layers in one place": fault(
        both(
            replaced(states.States, "_find", first_of_its_kind), replaced(states.States, "finish", same_place)
        )
    ),
    # Stacked and explicit states.
    "state of another layer in a stack": fault(replaced(states.States, "read", other_layer), quick=True, **STACKED),
    "caches of all layers written to the first of a stack": fault(
        replaced(states, "_place", lambda right: lambda low, rows, index, stacked: right(low, rows, 0, stacked)),
        **STACKED,
    ),
    "stacked states joined in reverse": fault(
        replaced(states.States, "finish", joined_in_reverse),
        "states",
        **STACKED,
    ),
    "new explicit states exchanged": fault(
        replaced(states.States, "finish", exchanged_outputs), "states", quick=True, **EXPLICIT
    ),
    "states not cleared at the start": fault(
        replaced(states.States, "read", uncleared),
        "padding",
        quick=True,
    ),
    # The head in pieces.
    "pieces of the logits exchanged": fault(
        replaced(lower._Decoder, "_outputs", exchanged_outputs), quick=True, **PIECES, **SEES
    ),
    # The Neural Engine's layout, and float16 in place of float32.
    "heads not turned on the Neural Engine": fault(unturned((0, 1, 3, 2)), quick=True, **ANE),
    "embeddings not turned on the Neural Engine": fault(unturned((0, 2, 1)), **ANE),
    "history of the convolution one input early": fault(replaced(delta_rule, "_taps", one_input_early), **ANE),
    "taps reversed on the Neural Engine": fault(constants(reversed_taps, CONV), **ANE),
    "softplus without its linear part": fault(
        softplus(lambda right: lambda x: mb.sub(x=right(x), y=mb.maximum(x=x, y=np.float16(0)))), **ANE
    ),
    "series of the softplus cut short": fault(softplus(short_series), quick=True, **ANE),
    "eps of the float16 norms left out": fault(
        replaced(norms, "_units", lambda right: lambda value: (np.float16(0), np.float16(0))), quick=True, **ANE
    ),
    "eps of the float16 norms sixteen times too large": fault(
        replaced(norms, "_units", lambda right: lambda value: right(16 * value)), **ANE
    ),
    "rows of zeros divided by zero": fault(replaced(norms, "SMALLEST", lambda right: 0.0), **ANE),
    "patches merged along the wrong axis": fault(
        replaced(operators, "_merge", merged_by_width), "vision", **SEES, **ANE
    ),
    # The vision encoder.
    "patches in raster order": fault(
        arguments("mobile.patchify.default", lambda x, patch, merge: (x, patch, 1)), "vision", **SEES
    ),
    "kernel of the patches transposed": fault(
        replaced(operators, "_patches", transposed_kernel), "vision", quick=True, **SEES
    ),
    "picture not normalised": fault(
        arguments("mobile.normalize_image.default", lambda x, mean, std: (x, [0.0] * 3, [1.0] * 3)), "vision", **SEES
    ),
    "vision rotary grid transposed": fault(
        replaced(attention, "grid_rotary_table", lambda right: lambda rows, columns, *a: right(columns, rows, *a)),
        "vision",
        **SEES,
    ),
    "vision positions transposed": fault(
        replaced(operators, "resample_positions", lambda right: lambda x, rows, columns, m: right(x, columns, rows, m)),
        "vision",
        **SEES,
    ),
    # Each size has a function of its own here, so that only the making of its tables can be at fault.
    "positions of another image size": fault(replaced(operators, "resample_positions", first_answer), "vision", **SEES),
    "rotary grid of another image size": fault(
        replaced(attention, "grid_rotary_table", first_answer), "vision", **SEES
    ),
    "exact gelu in the vision MLP": fault(
        built("aten.gelu.default", "gelu", lambda right: lambda x, mode: right(x=x, mode="EXACT")),
        "vision",
        quick=True,
        **SEES,
    ),
    "eps of the layer norm too large": fault(
        arguments("aten.layer_norm.default", lambda *a: (*a[:4], 1e-3)), "vision", **SEES
    ),
    "vision attention scale missing": fault(
        within(VISION, (attention, "attend", lambda right: lambda low, q, k, v, scale: right(low, q, k, v, 1.0))),
        "vision",
        **SEES,
    ),
}

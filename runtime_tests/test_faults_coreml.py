"""The faults of the other targets in the Core ML lowering, and many that only it can have.

A fault replaces an emitter of the table, a function of the target or what the host feeds; nothing else differs from
the builds that pass in `test_the_right_lowering_passes`. Each names the check that must fail. Packages are compared
with float32 in place of float16 (`L1.exact`): storage in float16 would hide what is smaller than it. What a fault
cannot touch, tracing and PyTorch's side of the comparison, is done once. The most telling faults run by default,
each mechanism once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coremltools.converters.mil.mil import Builder as mb

from export.checkpoint import weights as published
from export.checkpoint.weights import Weights
from export.model import trace
from export.quantize.quantizer import Quantizer
from export.quantize.recipe import Recipe, Setting, load_recipe
from export.validate import metrics, reference
from export.validate.ladder import Case, RoundedWeights, Rung, compare_lowered, l2, l3, make_plan, replay
from export.validate.probe import make_probe
from runtime_tests import test_faults_host
from runtime_tests.conftest import SIZES, MemoryCheckpoint, variant
from runtime_tests.faults import Emitters, Patch, Patcher, both, first_answer, host, replaced
from targets import load_target
from targets.base import Job
from targets.to_coreml import attention, delta_rule, lower, norms, operators, states, weights
from targets.to_coreml.lint import lint_bundle
from targets.to_coreml.lowering import Lowering, ints, shape_of
from targets.to_coreml.session import CoreMLSession
from targets.to_coreml.weights import WeightFile

NAME = "coreml"
LENGTHS = (16,)
TOKENS = 48
"""Of the probe and the context: two chunks, the second one padded, then single tokens, with two pictures."""
LINEAR, FULL = "linear_attention", "full_attention"


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


# -- what is built and compared -----------------------------------------------------------------------
@pytest.fixture(scope="module")
def text() -> MemoryCheckpoint:
    """Two layers of each kind. Small q and k, so that the eps inside DeltaNet's norms counts, as it does in quiet
    channels.
    """
    checkpoint = MemoryCheckpoint(variant(num_hidden_layers=4, layer_types=[LINEAR, FULL] * 2))
    for name, tensor in checkpoint.tensors.items():
        if "conv1d" in name:
            tensor[:128] *= 5e-3
    return checkpoint


@pytest.fixture(scope="module")
def seeing() -> MemoryCheckpoint:
    """One layer of each kind, a small vision encoder, and words for two pieces of the head."""
    return MemoryCheckpoint(
        variant(num_hidden_layers=2, layer_types=[LINEAR, FULL], vocab_size=256, vision={"depth": 1})
    )


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors are so small that two threads would wait for each other longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def known() -> dict[Any, Any]:
    return {}


@pytest.fixture(autouse=True)
def once(known: dict[Any, Any], monkeypatch: Patch) -> None:
    """All lowerings trace the same programs, which emitters only read; all comparisons have the same PyTorch side."""

    def remember(owner: Any, name: str, key: Callable[..., Any]) -> None:
        right = getattr(owner, name)

        def found(*inputs: Any, **options: Any) -> Any:
            place = name, key(*inputs, **options)
            if place not in known:
                known[place] = right(*inputs, **options)
            return known[place]

        monkeypatch.setattr(owner, name, found)

    for name in ("trace_decoder", "trace_vision"):
        remember(trace, name, lambda config, *sizes, **options: (config, sizes, str(options)))
    remember(reference, "own_sequence", lambda given, rows, *_: (id(given.checkpoint), len(rows)))
    remember(reference, "own_vision", lambda given, image: (id(given.checkpoint), image.shape))


def build(checkpoint: MemoryCheckpoint, folder: Path, recipe: Recipe, *, vision: bool, **limits: Any) -> Any:
    """Lower a checkpoint, with or without its vision encoder; the manifest holds what sessions and rungs read."""
    config, target = checkpoint.model_config, load_target(NAME)
    quantizer = Quantizer(Weights(checkpoint, config), recipe)
    limits = {"profile": "gpu", **limits}
    sizes = SIZES if vision else ()
    lowered = target.lower(Job(config, quantizer, TOKENS, LENGTHS, sizes, folder, try_out=False, **limits))
    return {
        "signatures": lowered.signatures,
        "states": lowered.states,
        "context_length": TOKENS,
        "prefill_lengths": list(LENGTHS),
        "image_sizes": [list(size) for size in sizes],
        "target": {"name": NAME, "profile": limits["profile"], "min_version": target.min_version},
        "session_options": lowered.session_options,
        "tokenizer": {"stop_token_ids": [1], "special_token_ids": {"image": 5}},
    }


def climb_l1(checkpoint: MemoryCheckpoint, folder: Path, *, vision: bool = False, **limits: Any) -> Rung:
    """The exact pass of L1 on a lowering without quantisation."""
    manifest = build(checkpoint, folder, Recipe.unquantised(), vision=vision, **limits)
    config = checkpoint.model_config
    probe = make_probe(config, TOKENS, SIZES)
    rows = reference.embed(checkpoint, probe.ids).astype(np.float16)
    rounded = RoundedWeights(Weights(checkpoint, config))
    plan, pictures = make_plan(TOKENS, LENGTHS), probe.images if vision else []
    with closing(load_target(NAME).open_exact(folder, manifest, 1)) as session:
        kept = limits.get("state_layout") != "explicit"
        return compare_lowered(session, rounded, probe, plan, rows, LENGTHS, pictures, "L1.exact", kept=kept)


def make_case(checkpoint: MemoryCheckpoint, folder: Path, recipe: Recipe, **limits: Any) -> Case:
    manifest = build(checkpoint, folder, recipe, vision=True, **limits)
    config, target = checkpoint.model_config, load_target(NAME)
    return Case(checkpoint, config, recipe, target, folder, manifest, 1, tokens=TOKENS)


INT4 = load_recipe("int4", 32)


def climb_l2(checkpoint: MemoryCheckpoint, folder: Path, recipe: Recipe = INT4, **limits: Any) -> Rung:
    return l2(make_case(checkpoint, folder, recipe, **limits))


def failing(rung: Rung) -> set[str]:
    return {one.name for one in rung.checks if one.status == "FAIL"}


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
        replaced(norms, "_factors", lambda right: lambda value: (np.float16(0), np.float16(0))), quick=True, **ANE
    ),
    "eps of the float16 norms not divided by the square": fault(
        replaced(norms, "_factors", lambda right: lambda value: (np.float16(value**0.5), np.float16(0))), **ANE
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


# -- faults of what writes weights --------------------------------------------------------------------
def part(kind: str, change: Callable[[Any], Any], dtypes: tuple[str, ...] = ("int4", "uint4", "int8")) -> Patcher:
    """Other values, scales, offsets or palettes of matrices whose codes are of some types; rows as numpy has them."""

    def make(right: Any) -> Any:
        def wrong(self: WeightFile, name: str, matrix: Any) -> Any:
            for region, start, data in right(self, name, matrix):
                if region is getattr(matrix, kind) and matrix.values.dtype in dtypes:
                    halves = kind in ("scales", "palettes")
                    rows = np.frombuffer(data, np.float16 if halves else np.uint8)
                    count = len(data) * 8 // region.row_bits
                    changed = change(rows.reshape(count, -1)).tobytes()
                    assert len(changed) == len(data)
                    yield region, start, changed
                else:
                    yield region, start, data

        return wrong

    return replaced(WeightFile, "_blocks", make)


def codes(change: Callable[[Any], Any]) -> Patcher:
    """Other 4-bit codes in the file."""

    def make(right: Any) -> Any:
        def wrong(block: Any, setting: Any, dtype: str) -> bytes:
            data: bytes = right(block, setting, dtype)
            return data if setting.bits == 8 else change(np.frombuffer(data, np.uint8)).tobytes()

        return wrong

    return replaced(weights, "pack_codes", make)


def one_more(packed: Any) -> Any:
    """Both codes of every byte, plus one."""
    return ((packed & 15) + 1 & 15) | ((packed >> 4) + 1 & 15) << 4


def neighbours(rows: Any) -> Any:
    return np.roll(rows, 1, axis=-1)


def other_palette(rows: Any) -> Any:
    return np.roll(rows.reshape(len(rows), -1, 16), 1, axis=1)


def in_bfloat16(rows: Any) -> Any:
    return (rows.astype(np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)


def without_offsets(right: Any) -> Any:
    """The head's codes are stored for the table, which knows that they are code + 8, and the program does not."""
    return lambda self, name, pieces, form="signed": right(self, name, pieces, "table" if form == "offset" else form)


def pieces_exchanged(right: Any) -> Any:
    """Pieces of the head read each other's rows."""
    return lambda self, name, pieces, form="signed": right(self, name, pieces, form)[::-1]


def piece_late(right: Any) -> Any:
    """Pieces of the head but the first one begin a row late."""

    def wrong(self: WeightFile, path: Path) -> None:
        self._records = [(place, region, first + bool(first), rows) for place, region, first, rows in self._records]
        right(self, path)

    return wrong


def other_constants(right: Any) -> Any:
    """The constants of one function are not those of the others."""

    def wrong(self: Lowering, node: Any, *rest: Any, **options: Any) -> Any:
        if self.program.signature == "decode":
            name = self.parameter(node)
            self.once(f"parameter {name}", lambda: self.weights.quantizer.weights.tensor(name) + 1)
        return right(self, node, *rest, **options)

    return wrong


def exchanged_places(right: Any) -> Any:
    """Two matrices of one size, each where the other belongs."""

    def wrong(path: Path, functions: Any, weights: WeightFile, said: Any) -> Any:
        k, v = (f"decoder_layers_1_mixer_{name}_weight" for name in "kv")
        for kind in ("codes", "scales"):
            a, b = f"{k}_{kind}", f"{v}_{kind}"
            if a in weights.places:
                weights.places[a], weights.places[b] = weights.places[b], weights.places[a]
        return right(path, functions, weights, said)

    return wrong


PALETTES: dict[str, Any] = {"palettes": True}
ASYMMETRIC: dict[str, Any] = {
    "recipe": Recipe("asymmetric", {**INT4.roles, "decoder": Setting(4, 32, symmetric=False)})
}
WRONG, MISSING = "mismatches", "missing"

L2: dict[str, Fault] = {
    "nibbles exchanged": fault(codes(lambda packed: (packed << 4) | (packed >> 4)), WRONG, quick=True),
    "zero point 7 for 8": fault(part("offsets", lambda rows: rows - np.uint8(0x11)), WRONG),
    "offsets of a tied head missing": fault(replaced(WeightFile, "matrix", without_offsets), WRONG, quick=True),
    "codes one too large": fault(codes(one_more), WRONG),
    "index into a palette off by one": fault(codes(one_more), WRONG, quick=True, **PALETTES),
    "palette of the neighbour group": fault(part("palettes", other_palette), WRONG, **PALETTES),
    "palette turned round": fault(part("palettes", lambda rows: rows[:, ::-1]), WRONG, **PALETTES),
    "zero point of the neighbour group": fault(
        part("offsets", lambda rows: np.roll(rows, 1, axis=-1)), WRONG, **ASYMMETRIC
    ),
    "scales of another row": fault(part("scales", lambda rows: rows[::-1]), WRONG),
    "scales transposed": fault(part("scales", lambda rows: rows.T.reshape(rows.shape)), WRONG),
    "scale of the neighbour group": fault(part("scales", neighbours), WRONG, quick=True),
    "scales in bfloat16": fault(part("scales", in_bfloat16), WRONG),
    "8-bit scales of another row": fault(part("scales", lambda rows: rows[::-1], ("int8",)), WRONG),
    "embedding off by one row": fault(row_early("data_offset", 64), WRONG),
    "scales of the embedding off by one row": fault(row_early("scale_offset", 8), WRONG),
    "pieces of the head exchanged in the file": fault(
        replaced(WeightFile, "matrix", pieces_exchanged), WRONG, quick=True, **PIECES
    ),
    "a piece of the head begins a row late": fault(replaced(WeightFile, "write", piece_late), WRONG, **PIECES),
    "taps of the convolution reversed": fault(constants(reversed_taps), WRONG),
    "zero-centred norm without one": fault(transform("plus_one", "none"), WRONG),
    "positions of another image size": fault(replaced(operators, "resample_positions", first_answer), WRONG),
    "kernel of the patches transposed": fault(
        constants(lambda name, array: array.swapaxes(2, 3) if name == "vision_patch_weight" else array), WRONG
    ),
    "dt bias left out": fault(within(GATES, (Lowering, "constant", absent_bias)), MISSING),
    "norms of another model in one function": fault(replaced(Lowering, "kept", other_constants), WRONG),
    "keys and values exchanged in the file": fault(replaced(lower, "write_package", exchanged_places), WRONG),
}


# -- faults of the host -------------------------------------------------------------------------------
def lose(session: CoreMLSession, kind: str) -> None:
    held, explicit = session.snapshot()
    for arrays in held.values():
        for state, array in arrays.items():
            if state.startswith(kind):
                array[...] = 0
    session.restore((held, explicit))


CHECKS = {"one axis of positions for all three": "states", "colours of the picture exchanged": "vision"}
QUICK = {"one axis of positions for all three", "conv state not carried"}
L3: dict[str, Fault] = {
    name: fault(patch, CHECKS.get(name, "kl_mean"), quick=name in QUICK)
    for name, patch in host(CoreMLSession, lose).items()
}


BUILDS: dict[str, dict[str, Any]] = {
    "gpu": {},
    "ane": {**ANE, **SEES},
    "stacked": STACKED,
    "explicit": EXPLICIT,
    "pieces": {**PIECES, **SEES},
}
STORED: dict[str, dict[str, Any]] = {"int4": {}, "palettes": {**PALETTES, **PIECES}, "asymmetric": ASYMMETRIC}


@pytest.fixture(scope="module")
def case(seeing: MemoryCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(seeing, tmp_path_factory.mktemp("host"), Recipe.unquantised())


@pytest.mark.parametrize("name", list(BUILDS))
def test_the_right_lowering_passes(
    name: str, text: MemoryCheckpoint, seeing: MemoryCheckpoint, tmp_path: Path
) -> None:
    options = BUILDS[name]
    rung = climb_l1(seeing if options.get("vision") else text, tmp_path, **options)
    assert rung.status == "PASS", [(c.name, c.value) for c in rung.checks]


@pytest.mark.parametrize("name", list(STORED))
def test_the_right_files_pass(name: str, seeing: MemoryCheckpoint, tmp_path: Path) -> None:
    rung = climb_l2(seeing, tmp_path, **STORED[name])
    assert rung.status == "PASS", rung.series


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [8, 10])
def test_shorter_chunks_are_no_fault(tokens: int, text: MemoryCheckpoint, tmp_path: Path, monkeypatch: Patch) -> None:
    chunks_of(tokens)(monkeypatch)
    assert climb_l1(text, tmp_path).status == "PASS"


@pytest.mark.parametrize("name", names(L1))
def test_l1_catches(
    name: str, text: MemoryCheckpoint, seeing: MemoryCheckpoint, tmp_path: Path, monkeypatch: Patch
) -> None:
    wrong = L1[name]
    wrong.patch(monkeypatch)
    rung = climb_l1(seeing if wrong.options.get("vision") else text, tmp_path, **wrong.options)
    assert f"L1.exact.{wrong.check}" in failing(rung), [(c.name, c.value) for c in rung.checks]


@pytest.mark.parametrize("name", names(L2))
def test_l2_catches(name: str, seeing: MemoryCheckpoint, tmp_path: Path, monkeypatch: Patch) -> None:
    wrong = L2[name]
    wrong.patch(monkeypatch)
    rung = climb_l2(seeing, tmp_path, **wrong.options)
    assert f"L2.{wrong.check}" in failing(rung), rung.series


@pytest.mark.parametrize("name", names(L3))
def test_l3_catches(name: str, case: Case, monkeypatch: Patch) -> None:
    assert case.truth
    L3[name].patch(monkeypatch)
    rung = l3(case)
    assert f"L3.{L3[name].check}" in failing(rung), [(c.name, c.value) for c in rung.checks]


def test_the_faults_leave_no_trace(case: Case) -> None:
    rung = l3(case)
    assert rung.status == "PASS", [(c.name, c.value) for c in rung.checks]


def test_a_second_conversation_shows_states_that_are_not_cleared(
    text: MemoryCheckpoint, tmp_path: Path, monkeypatch: Patch
) -> None:
    """Without a reset between the two, as an app may hold them."""
    L1["states not cleared at the start"].patch(monkeypatch)
    manifest = build(text, tmp_path, Recipe.unquantised(), vision=False)
    probe, plan = make_probe(text.model_config, TOKENS, SIZES), make_plan(TOKENS, LENGTHS)
    rows = reference.embed(text, probe.ids).astype(np.float16)
    with closing(CoreMLSession(tmp_path, manifest, 1, exact=True)) as session:
        first = np.stack(replay(session, rows, probe.positions, plan, junk=0.0))
        monkeypatch.setattr(session, "reset", lambda: None)
        second = np.stack(replay(session, rows, probe.positions, plan, junk=0.0))
    assert metrics.relative(first, second) > 1e-2


def test_the_linter_catches_what_no_number_shows(text: MemoryCheckpoint, tmp_path: Path, monkeypatch: Patch) -> None:
    """softplus is right everywhere but on the Neural Engine itself."""
    replaced(delta_rule, "_softplus", lambda right: lambda x: mb.softplus(x=x))(monkeypatch)
    manifest = build(text, tmp_path, Recipe.unquantised(), vision=False, **ANE)
    assert {f.rule for f in lint_bundle(tmp_path, manifest) if f.severity == "error"} == {"ane-softplus"}


def test_every_fault_of_the_other_lowerings_is_here() -> None:
    """Under another name where one thing there is another, or two, here."""
    from runtime_tests import test_faults, test_faults_executorch

    renamed = {
        "delta rule without delta": ["delta rule without delta in a step", "delta rule without delta inside a chunk"],
        "tables of another image size": ["positions of another image size", "rotary grid of another image size"],
        # Decays are sums over masked tokens here: no clamp, but a mask can be wrong.
        "decay above the diagonal not clamped": ["decay of a token's own step counted twice"],
        "norms of another model in one method": ["norms of another model in one function"],
        # Scales are float16 here; those of a tied embedding are the head's.
        "scales in float16": ["scales in bfloat16"],
        "scales of the embedding in bfloat16": ["scales in bfloat16"],
    }
    elsewhere = {"temporaries given up too early"}  # Core ML plans the memory of a call itself
    for ours, lists in (
        (L1, (test_faults.L1, test_faults_executorch.L1)),
        (L2, (test_faults.L2, test_faults_executorch.L2)),
        (L3, (test_faults_host.L3, test_faults_executorch.L3)),
    ):
        for theirs in lists:
            wanted = {new for name in theirs for new in renamed.get(name, [name])}
            assert wanted - elsewhere <= set(ours)

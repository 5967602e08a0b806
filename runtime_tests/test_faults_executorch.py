"""The faults of `test_faults` and `test_faults_host` in the ExecuTorch lowering, and some that only it can have.

A fault replaces an emitter of the table, a function of the target or what the host feeds; nothing else differs
from the build that passes in `test_the_right_lowering_passes`. What a fault cannot touch is done once for all of
them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.checkpoint import weights as weights_module
from export.quantize.recipe import Recipe, load_recipe
from export.validate.case import Case, Rung
from export.validate.ladder import l2, l3
from runtime_tests import test_faults, test_faults_host
from runtime_tests.conftest import MemoryCheckpoint, build, climb_l1, variant
from runtime_tests.faults import Emitters, Patch, Patcher, both, first_answer, host, replaced, zeroed
from targets import load_target
from targets.to_executorch import delta_rule, file, lower, nodes, operators, pack
from targets.to_executorch.pack import WeightTable
from targets.to_executorch.program import Method
from targets.to_executorch.session import ExecuTorchSession

pytestmark = pytest.mark.usefixtures("one_thread", "traced_once", "judged_once", "compared_once", "hints_once")

NAME = "executorch"
LENGTHS = (16,)


@pytest.fixture(scope="module")
def model() -> MemoryCheckpoint:
    """Small q and k, so that the eps inside DeltaNet's norms counts, as it does in quiet channels."""
    checkpoint = MemoryCheckpoint(variant(num_hidden_layers=4))
    for name, tensor in checkpoint.tensors.items():
        if "conv1d" in name:
            tensor[:128] *= 5e-3
    return checkpoint


def make_case(checkpoint: MemoryCheckpoint, folder: Path, recipe: Recipe) -> Case:
    _, manifest, _ = build(checkpoint, folder, recipe, NAME, lengths=LENGTHS)
    return Case(checkpoint, checkpoint.model_config, recipe, load_target(NAME), folder, manifest, 1)


def lowered_l1(checkpoint: MemoryCheckpoint, folder: Path) -> Rung:
    return climb_l1(checkpoint, folder, NAME, lengths=LENGTHS)


def lowered_l2(checkpoint: MemoryCheckpoint, folder: Path) -> Rung:
    return l2(make_case(checkpoint, folder, load_recipe("int4", 32)))


# -- how a fault is made ------------------------------------------------------------------------------
EMITTERS = Emitters(operators.EMITTERS, [operators])
emitter, arguments = EMITTERS.replaced, EMITTERS.arguments


def within(name: str, owner: Any, attribute: str, make: Callable[[Any], Any]) -> Patcher:
    """Another function while one operator is emitted."""
    return EMITTERS.within(name, (owner, attribute, make))


# -- faults of the decoder ----------------------------------------------------------------------------
def forgets(place: int) -> Callable[[Any], Any]:
    """An emitter that reads zeros in place of a past state."""

    def make(right: Any) -> Any:
        def wrong(low: Any, node: Any) -> None:
            state = node.args[place]
            past = low.values[state]
            low.values[state] = low.constant(np.zeros(past.shape))
            right(low, node)
            low.values[state] = past

        return wrong

    return make


def eps_where(dimensions: int) -> Patcher:
    """A large eps in norms of rows [C, D] (all but the first follow a residual) or of heads [C, H, D]."""

    def change(x: Any, weight: Any, eps: float) -> tuple[Any, ...]:
        return x, weight, 1e-2 if x.meta["val"].ndim == dimensions else eps

    return arguments("mobile.rms_norm.default", change)


def interleaved(right: Any) -> Any:
    """Pairs of neighbours rotated instead of two halves: the same after sorting them, and back."""

    def wrong(low: Any, x: Any, cos: Any, sin: Any, name: str) -> Any:
        m, half = low.method, cos.shape[-1]
        rest = x.shape[-1] - 2 * half

        def sort(y: Any, pair: tuple[int, int]) -> Any:
            head = nodes.reshape(m, nodes.cut(m, y, -1, 0, 2 * half), (*y.shape[:-1], *pair))
            head = nodes.reshape(m, nodes.transpose(m, head, (0, 1, 3, 2)), (*y.shape[:-1], 2 * half))
            return nodes.concat(m, [head, nodes.cut(m, y, -1, 2 * half, rest)], -1) if rest else head

        return sort(right(low, sort(x, (half, 2)), cos, sin, name), (2, half))

    return wrong


def contiguous_sections(right: Any) -> Any:
    """M-RoPE sections one after the other instead of interleaved."""

    def wrong(self: WeightTable, title: str, array: Any) -> Any:
        if title == "rotary":
            axis, frequency = np.sort(array.argmax(1)), array.max(1)
            array = np.zeros_like(array)
            array[np.arange(len(axis)), axis] = frequency
        return right(self, title, array)

    return wrong


def tiled_heads(right: Any) -> Any:
    """Key head h serves value heads h, h + Hk, … instead of consecutive ones."""
    return lambda m, x, times, axis: nodes.concat(m, [x] * times, axis)


def late_read(right: Any) -> Any:
    """The old state is read once more after the new one was written over it: the two are one buffer."""

    def wrong(*inputs: Any) -> Any:
        _, new = right(*inputs)
        output, _ = right(*inputs)
        return output, new

    return wrong


def unsolved(right: Any) -> Any:
    """The tokens of a chunk do not see each other's writes."""

    def identity_like(m: Any, x: Any) -> Any:
        return nodes.add(m, nodes.scale(m, x, 0.0), m.constant(np.eye(x.shape[-1], dtype=np.float32)[None, None]))

    return identity_like


def chunks_of(tokens: int) -> Patcher:
    """Right in itself: the delta rule in shorter chunks."""
    return replaced(delta_rule, "CHUNK", lambda right: tokens)


def first_entry(right: Any) -> Any:
    def cut(m: Any, x: Any, axis: int, first: int, count: int) -> Any:
        return right(m, x, axis, 0 if axis == 0 and len(x.shape) == 4 else first, count)

    return cut


def from_the_old_state(right: Any) -> Any:
    def wrong(m: Any, tokens: Any, state: Any, sums: Any) -> Any:
        with pytest.MonkeyPatch.context() as monkeypatch:
            group = delta_rule._group
            monkeypatch.setattr(delta_rule, "_group", lambda m, part, _, *sizes: group(m, part, state, *sizes))
            return right(m, tokens, state, sums)

    return wrong


def reversed_taps(right: Any) -> Any:
    """The newest input meets the weight of the oldest."""

    def wrong(self: WeightTable, name: str) -> Any:
        if name in self.weights:  # of an earlier method: turned round already
            return right(self, name)
        found, weight = right(self, name), self.weights[name]
        width = found.shape[1]

        def read() -> Any:
            for piece, data in weight.read():
                yield piece, np.frombuffer(data, np.float32).reshape(width, -1)[::-1].tobytes()

        self.weights[name] = file.Weight(name, weight.sizes, read)
        return found

    return wrong


def late(right: Any) -> Any:
    """KV slots: the kernels take start + 1 for start."""

    def wrong(low: Any, start: Any) -> int:
        m = low.method
        shifted: int = m.scalar(0)
        m.kernel("executorch_prim::add.Scalar", [right(low, start), m.scalar(1)], [shifted])
        return shifted

    return wrong


def last_row(right: Any) -> Any:
    """Logits of the last row of the chunk, padding or not."""

    def wrong(low: Any, node: Any) -> None:
        rows = low.value(node.args[0])
        low.define(node, nodes.cut(low.method, rows, 0, rows.shape[0] - 1, 1))

    return wrong


def stale_row(right: Any) -> Any:
    """The first row a call writes to the key cache keeps what it held."""

    def run(self: ExecuTorchSession, name: str, inputs: Any) -> Any:
        before = self.snapshot()
        outputs = right(self, name, inputs)
        for state, array in self.states().items():
            if state.startswith("key") and "start" in inputs:
                array[:, int(inputs["start"][0])] = before[state].numpy()[:, int(inputs["start"][0])]
        return outputs

    return run


def transform(name: str, wrong: str) -> Patcher:
    """A wrong elementwise map from published to exported weights, in the artifact only."""

    def make(right: Any) -> Any:
        def kept(self: WeightTable, parameter: str) -> Any:
            weights = self.quantizer.weights
            entry = weights.parameter(parameter)
            if entry.transform != name:
                return right(self, parameter)
            parts = [weights.checkpoint.read(s.tensor, s.start, s.stop) for s in entry.segments]
            return weights_module.TRANSFORMS[wrong](parts[0]).numpy()

        return kept

    return replaced(WeightTable, "kept", make)


def identity(right: Any) -> Any:
    return lambda low, node: low.define(node, low.value(node.args[0]))


def quick_gelu(right: Any) -> Any:
    return lambda m, x: nodes.multiply(m, x, nodes.unary(m, "Sigmoid", nodes.scale(m, x, 1.702)))


def row_early(field: str, row_bytes: int) -> Patcher:
    """The embedding's table begins a row too early in the file."""

    def make(right: Any) -> Any:
        def wrong(*inputs: Any, **options: Any) -> Any:
            stage = right(*inputs, **options)
            stage["table"][field] -= row_bytes
            return stage

        return wrong

    return replaced(lower, "table_stage", make)


CONV, GATES, NORM = "mobile.causal_conv.default", "mobile.delta_gates.default", "mobile.l2_norm.default"
STEP, CHUNK = "mobile.gated_delta_step.default", "mobile.gated_delta_chunk.default"
ATTENTION, VISION = "mobile.cached_attention.default", "aten.scaled_dot_product_attention.default"

L1: dict[str, Patcher] = {
    "eps of the l2 norm too small": arguments(NORM, lambda x, eps, factor: (x, eps / 100, factor)),
    "eps of the l2 norm left out": arguments(NORM, lambda x, eps, factor: (x, 0.0, factor)),
    # There is no fused norm of a sum here: what onnxruntime tells apart by operator is told apart by shape.
    "eps of the rms norm too large": eps_where(3),
    "eps of the residual norm too large": eps_where(2),
    "eps of the gated norm too large": arguments("mobile.gated_rms_norm.default", lambda *a: (*a[:3], 1e-2)),
    "rotary interleaved": replaced(operators, "_rotate", interleaved),
    "cos and sin exchanged": arguments("mobile.rotary.default", lambda x, cos, sin: (x, sin, cos)),
    "attention scale missing": arguments(ATTENTION, lambda *a: (*a[:-1], 1.0)),
    "keys and values exchanged": arguments(ATTENTION, lambda q, k, v, *a: (q, v, k, *a)),
    "attention not causal": within(
        ATTENTION, Method, "scalar", lambda right: lambda m, value: right(m, False if value is True else value)
    ),
    "silu after the convolution missing": within(CONV, nodes, "silu", lambda right: lambda m, x: x),
    "taps of the convolution reversed": replaced(WeightTable, "taps", reversed_taps),
    "conv state not carried": emitter(forgets(2), CONV),
    "recurrent state not carried": emitter(forgets(5), STEP, CHUNK),
    "query scale applied twice": arguments(NORM, lambda x, eps, factor: (x, eps, factor**2)),
    # Here one token and a chunk are two formulas: each can lose the delta alone.
    "delta rule without delta in a step": within(STEP, nodes, "subtract", lambda right: lambda m, v, held: v),
    "delta rule without delta inside a chunk": replaced(delta_rule, "_unit_lower_inverse", unsolved),
    "decay above the diagonal not clamped": within(CHUNK, nodes, "clamp", lambda right: lambda m, x, *limits: x),
    # Calls of the probe are shorter than a chunk of the product; shorter chunks show what joins them.
    "every chunk reads the first one": both(chunks_of(8), within(CHUNK, nodes, "cut", first_entry)),
    "the rest of a call starts from its old state": both(
        chunks_of(10), replaced(delta_rule, "chunked", from_the_old_state)
    ),
    "old state read after the new one is written": replaced(delta_rule, "step", late_read),
    # The projection of `a` adds dt_bias, so that one of the two must be exchanged there.
    "decay and dt bias exchanged": both(
        arguments(GATES, lambda a, b, decay, bias, valid: (a, b, bias, decay, valid)),
        replaced(operators, "_bias_of_gates", lambda right: lambda n: right(n) and next(iter(n.users)).args[2]),
    ),
    "dt bias left out": replaced(operators, "_bias_of_gates", lambda right: lambda node: None),
    "a and b exchanged": arguments(GATES, lambda a, b, *rest: (b, a, *rest)),
    "gate is sigmoid, not silu": within(
        "mobile.gated_rms_norm.default", nodes, "silu", lambda right: lambda m, x: nodes.unary(m, "Sigmoid", x)
    ),
    "quick gelu for silu in the MLP": within("aten.silu.default", nodes, "silu", quick_gelu),
    "conv state of the padded tail": arguments(CONV, lambda *a: (*a[:-1], None)),
    "padding reaches the recurrent state": arguments(GATES, lambda *a: (*a[:-1], None)),
    "NaN of padded rows not removed": emitter(identity, "mobile.real_rows.default"),
    "wrong head grouping": replaced(delta_rule, "_repeat", tiled_heads),
    "M-RoPE sections not interleaved": replaced(WeightTable, "small", contiguous_sections),
    "attention gate without sigmoid": emitter(identity, "aten.sigmoid.default"),
    # As if every patch were a token: their order is then that of the picture.
    "patches in raster order": arguments("mobile.patchify.default", lambda x, patch, merge: (x, patch, 1)),
    "vision rotary grid transposed": replaced(
        operators, "grid_rotary_table", lambda right: lambda rows, columns, *a: right(columns, rows, *a)
    ),
    "vision positions transposed": replaced(
        operators, "resample_positions", lambda right: lambda x, rows, columns, merge: right(x, columns, rows, merge)
    ),
    # Each size has a method of its own here, so that only the making of its tables can be at fault.
    "positions of another image size": replaced(operators, "resample_positions", first_answer),
    "rotary grid of another image size": replaced(operators, "grid_rotary_table", first_answer),
    "exact gelu in the vision MLP": emitter(
        lambda right: lambda low, n: low.define(n, nodes.unary(low.method, "Gelu", low.value(n.args[0]))),
        "aten.gelu.default",
    ),
    "eps of the layer norm too large": arguments("aten.layer_norm.default", lambda *a: (*a[:4], 1e-3)),
    "vision attention scale missing": within(VISION, nodes, "scale", lambda right: lambda m, x, factor: x),
    "zero-centred norm without one": transform("plus_one", "none"),
    "positive decay": transform("negative_exp", "none"),
    "KV slots off by one": replaced(operators, "_start", late),
    "stale KV row": replaced(ExecuTorchSession, "run", stale_row),
    "logits of a padded row": emitter(last_row, "mobile.last_valid.default"),
    "embedding off by one row": row_early("data_offset", 4 * 128),
    # Memory is planned by hand.
    "temporaries given up too early": replaced(
        Method, "_places", lambda right: lambda m, uses: right(m, {s: steps[:1] for s, steps in uses.items()})
    ),
    "states of two layers in one place": replaced(
        Method, "output", lambda right: lambda m, x, at=None: right(m, x, None if at is None else 0)
    ),
}


# -- faults of the packer -----------------------------------------------------------------------------
def codes(change: Callable[[Any], Any]) -> Patcher:
    """Other 4-bit codes in the file."""
    return replaced(
        pack, "pack_codes", lambda right: lambda b, bits: change(right(b, bits)) if bits == 4 else right(b, bits)
    )


def scales(change: Callable[[Any], Any], widths: tuple[int, ...] = (4, 8)) -> Patcher:
    """Other scales in the file: bfloat16 [r, G] at 4 bits, float32 [r, 1] at 8."""

    def make(right: Any) -> Any:
        def wrong(block: Any, bits: int) -> Any:
            found = right(block, bits)
            return np.ascontiguousarray(change(found)) if bits in widths else found

        return wrong

    return replaced(pack, "pack_scales", make)


def as_float32(bfloat16: Any) -> Any:
    return (bfloat16.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def pieces(change: Callable[[str, bytes], bytes]) -> Patcher:
    """Other bytes in some pieces of quantised weights."""

    def make(right: Any) -> Any:
        def wrong(self: WeightTable, name: str, of_scales: str) -> Any:
            return ((piece, change(piece, data)) for piece, data in right(self, name, of_scales))

        return wrong

    return replaced(WeightTable, "_quantised", make)


def in_bfloat16(piece: str, data: bytes) -> bytes:
    """A table wants float16 scales, matrices bfloat16."""
    if not piece.endswith(".float16"):
        return data
    wide = np.frombuffer(data, np.float16).astype(np.float32).view(np.uint32)
    return (wide >> np.uint32(16)).astype(np.uint16).tobytes()


def other_constants(right: Any) -> Any:
    """The norms of one method are not those of the others."""

    def wrong(self: Method, array: Any, name: str | None = None) -> Any:
        return right(self, array + 1 if name and self.name != "decode_step" else array, name)

    return wrong


def exchanged_places(right: Any) -> Any:
    """Two matrices of one size, each where the other belongs."""
    k, v = (f"decoder.layers.3.mixer.{name}.weight" for name in "kv")

    def wrong(out: Any, weight: Any, places: Any) -> Any:
        return right(out, weight, {**places, k: places[v], v: places[k]} if k in places else places)

    return wrong


L2: dict[str, Patcher] = {
    "nibbles exchanged": codes(lambda packed: (packed << np.uint8(4)) | (packed >> np.uint8(4))),
    "zero point 7 for 8": codes(lambda packed: packed - np.uint8(0x11)),
    "scales of another row": scales(lambda found: found[::-1]),
    "scales transposed": scales(lambda found: found.T.reshape(found.shape)),
    "scale of the neighbour group": scales(lambda found: np.roll(found, 1, axis=-1)),
    "scales in float16": scales(lambda found: as_float32(found).astype(np.float16), (4,)),
    "8-bit scales of another row": scales(lambda found: found[::-1], (8,)),
    "scales of the embedding in bfloat16": pieces(in_bfloat16),
    "embedding off by one row": row_early("data_offset", 64),
    "scales of the embedding off by one row": row_early("scale_offset", 8),
    "taps of the convolution reversed": replaced(WeightTable, "taps", reversed_taps),
    "zero-centred norm without one": transform("plus_one", "none"),
    "positions of another image size": replaced(operators, "resample_positions", first_answer),
    "dt bias left out": replaced(operators, "_bias_of_gates", lambda right: lambda node: None),
    "norms of another model in one method": replaced(Method, "constant", other_constants),
    "keys and values exchanged in the file": replaced(file, "_stream", exchanged_places),
}


L3 = host(ExecuTorchSession, zeroed)


@pytest.fixture(scope="module")
def case(model: MemoryCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(model, tmp_path_factory.mktemp("host"), Recipe.unquantised())


def test_the_right_lowering_passes(model: MemoryCheckpoint, case: Case, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for rung in (lowered_l1(model, tmp_path / "a"), lowered_l2(model, tmp_path / "b"), l3(case)):
        assert rung.status == "PASS", [(c.name, c.value) for c in rung.checks]


@pytest.mark.parametrize("tokens", [8, 10])
def test_shorter_chunks_are_no_fault(tokens: int, model: MemoryCheckpoint, tmp_path: Path, monkeypatch: Patch) -> None:
    chunks_of(tokens)(monkeypatch)
    assert lowered_l1(model, tmp_path).status == "PASS"


@pytest.mark.parametrize("fault", list(L1))
def test_l1_catches(fault: str, model: MemoryCheckpoint, tmp_path: Path, monkeypatch: Patch) -> None:
    L1[fault](monkeypatch)
    rung = lowered_l1(model, tmp_path)
    assert rung.status == "FAIL", [(c.name, c.value) for c in rung.checks]


@pytest.mark.parametrize("fault", list(L2))
def test_l2_catches(fault: str, model: MemoryCheckpoint, tmp_path: Path, monkeypatch: Patch) -> None:
    L2[fault](monkeypatch)
    assert lowered_l2(model, tmp_path).status == "FAIL"


@pytest.mark.parametrize("fault", list(L3))
def test_l3_catches(fault: str, case: Case, monkeypatch: Patch) -> None:
    assert case.truth
    L3[fault](monkeypatch)
    rung = l3(case)
    assert rung.status == "FAIL", [(c.name, c.value) for c in rung.checks]


def test_the_faults_leave_no_trace(case: Case) -> None:
    assert l3(case).status == "PASS"


def test_every_fault_of_the_onnx_lowering_is_here() -> None:
    """Two have other names, because what is one node there is two things here."""
    renamed = {
        "delta rule without delta": ["delta rule without delta in a step", "delta rule without delta inside a chunk"],
        "tables of another image size": ["positions of another image size", "rotary grid of another image size"],
    }
    for theirs, ours in ((test_faults.L1, L1), (test_faults.L2, L2), (test_faults_host.L3, L3)):
        wanted = {name for fault in theirs for name in renamed.get(fault, [fault])}
        assert wanted <= set(ours)

"""Deliberately wrong lowerings: the named rung must catch each of them.

A fault changes nodes of the finished graph, an emitter of the table, or the packer; nothing else differs
from the build that passes in `test_the_right_lowering_passes`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from export.checkpoint import weights as weights_module
from export.checkpoint.weights import Weights
from export.quantize.recipe import load_recipe
from export.validate.case import Case, Rung
from export.validate.ladder import l2
from runtime_tests.conftest import MemoryCheckpoint, build, climb_l1, variant
from runtime_tests.faults import Patch, Patcher
from targets import load_target
from targets.to_onnx import operators, pack
from targets.to_onnx.graph import Graph
from targets.to_onnx.session import OnnxSession

pytestmark = pytest.mark.usefixtures("traced_once", "compared_once")

Nodes = list[onnx.NodeProto]


@pytest.fixture(scope="module")
def model() -> MemoryCheckpoint:
    """Small q and k, so that the eps inside DeltaNet's norms counts, as it does in quiet channels."""
    checkpoint = MemoryCheckpoint(variant(num_hidden_layers=4))
    for name, tensor in checkpoint.tensors.items():
        if "conv1d" in name:
            tensor[:128] *= 5e-3
    return checkpoint


def climb_l2(checkpoint: MemoryCheckpoint, folder: Path) -> Rung:
    recipe = load_recipe("int4", 32)
    _, manifest, _ = build(checkpoint, folder, recipe)
    return l2(Case(checkpoint, checkpoint.model_config, recipe, load_target("onnx"), folder, manifest, 1))


def on_nodes(change: Callable[[Graph, Nodes], None]) -> Patcher:
    """A fault that edits the nodes of every graph before it is saved."""

    def patch(monkeypatch: Patch) -> None:
        save = Graph.save

        def wrong(graph: Graph, path: Path) -> None:
            change(graph, graph._nodes)
            save(graph, path)

        monkeypatch.setattr(Graph, "save", wrong)

    return patch


def attribute(op: str, name: str, value: Any, which: Callable[[onnx.NodeProto], bool] = lambda n: True) -> Any:
    """Set an attribute of all nodes of one type."""

    def change(graph: Graph, nodes: Nodes) -> None:
        for node in nodes:
            if node.op_type == op and which(node):
                kept = [a for a in node.attribute if a.name != name]
                del node.attribute[:]
                node.attribute.extend([*kept, helper.make_attribute(name, value)])

    return on_nodes(change)


def operand(op: str, place: int, source: Callable[[Graph, onnx.NodeProto], str]) -> Any:
    """Feed one input of all nodes of one type from elsewhere."""

    def change(graph: Graph, nodes: Nodes) -> None:
        for node in nodes:
            if node.op_type == op:
                node.input[place] = source(graph, node)

    return on_nodes(change)


def zeros_like(place: int) -> Callable[[Graph, onnx.NodeProto], str]:
    """Zeros in place of a past state; other inputs stay as they are."""

    def source(graph: Graph, node: onnx.NodeProto) -> str:
        name = node.input[place]
        return graph.constant(np.zeros(graph.shapes[name]), np.float32) if name.startswith("past.") else name

    return source


def first_size(graph: Graph, node: onnx.NodeProto) -> str:
    """Tables of the first image size, whatever the size of the call; other gathers stay as they are."""
    return graph.constant([0], np.int64) if "ArgMax" in node.input[1] else node.input[1]


def swap_inputs(op: str, a: int, b: int) -> Any:
    def change(graph: Graph, nodes: Nodes) -> None:
        for node in nodes:
            if node.op_type == op:
                node.input[a], node.input[b] = node.input[b], node.input[a]

    return on_nodes(change)


def emitter(name: str, wrong: Callable[[Any], Any]) -> Patcher:
    """A fault in one row of the operator table."""
    return lambda monkeypatch: monkeypatch.setitem(operators.EMITTERS, name, wrong(operators.EMITTERS[name]))


def without_valid(right: Any) -> Any:
    """The emitter sees no padding."""

    def wrong(low: Any, node: Any) -> None:
        node.args = (*node.args[:-1], None)
        right(low, node)

    return wrong


def without_silu(right: Any) -> Any:
    """The convolution's activation is forgotten."""

    def wrong(low: Any, node: Any) -> None:
        right(low, node)
        silu = next(n for n in low.graph._nodes if low.results[node, 0] in n.output)
        low.results[node, 0] = silu.input[0]

    return wrong


def reversed_taps(right: Any) -> Any:
    """The newest input meets the weight of the oldest."""

    def wrong(low: Any, node: Any) -> None:
        right(low, node)
        products = [n for n in low.graph._nodes if "|tap" in "".join(n.input)][-4:]
        weights = [n.input[1] for n in products]
        for product, weight in zip(products, reversed(weights), strict=True):
            product.input[1] = weight

    return wrong


def contiguous_sections(right: Any) -> Any:
    """M-RoPE sections one after the other instead of interleaved."""

    def wrong(low: Any, node: Any) -> None:
        take = np.asarray

        def sections(value: Any, dtype: Any = None) -> Any:
            array = take(value, dtype)
            if array.dtype == np.int64 and array.shape == (8,) and set(array.tolist()) == {0, 1, 2}:
                return np.sort(array)
            return array

        original = low.graph.constant
        low.graph.constant = lambda value, dtype: original(sections(value, dtype), dtype)
        right(low, node)
        low.graph.constant = original

    return wrong


def tiled_heads(right: Any) -> Any:
    """Key head h serves value heads h, h + Hk, … instead of consecutive ones."""

    def wrong(low: Any, node: Any) -> None:
        right(low, node)
        output = low.results[node, 0]
        graph = low.graph
        heads, width = (int(d) for d in node.args[2].meta["val"].shape[-2:])
        split = graph.view(output, ("C", 2, heads // 2, width))
        moved = graph.apply("Transpose", [split], ("C", heads // 2, 2, width), perm=[0, 2, 1, 3])
        low.results[node, 0] = graph.view(moved, (1, "C", heads * width))

    return wrong


def ungated(right: Any) -> Any:
    """The sigmoid of attention's output gate is forgotten."""

    def wrong(low: Any, node: Any) -> None:
        low.define(node, low.value(node.args[0]))

    return wrong


def transposed(name: str) -> Patcher:
    """Rows and columns of the patch grid exchanged in a table made at export."""

    def patch(monkeypatch: Patch) -> None:
        right = getattr(operators, name)
        if name == "resample_positions":
            monkeypatch.setattr(operators, name, lambda table, rows, columns, merge: right(table, columns, rows, merge))
        else:
            monkeypatch.setattr(operators, name, lambda rows, columns, *rest: right(columns, rows, *rest))

    return patch


def is_patches(node: onnx.NodeProto) -> bool:
    return any(len(a.ints) == 7 for a in node.attribute)


def transform(name: str, wrong: str) -> Patcher:
    """A wrong elementwise map from published to exported weights, in the artifact only."""

    def patch(monkeypatch: Patch) -> None:
        def rows(self: Weights, parameter: str) -> Any:
            entry = self.parameter(parameter)
            if entry.transform != name:
                return original(self, parameter)
            parts = [self.checkpoint.read(s.tensor, s.start, s.stop) for s in entry.segments]
            return iter([(0, weights_module.TRANSFORMS[wrong](parts[0]))])

        original = Weights.blocks
        monkeypatch.setattr(Weights, "blocks", rows)

    return patch


def wrong_pack(name: str, value: Any) -> Patcher:
    return lambda monkeypatch: monkeypatch.setattr(pack, name, value)


def is_l2(node: onnx.NodeProto) -> bool:
    """Norms of DeltaNet's q and k have a constant weight."""
    return node.input[1].startswith("const_")


L1: dict[str, Any] = {
    "eps of the l2 norm left out": attribute("SimplifiedLayerNormalization", "epsilon", 0.0, is_l2),
    "eps of the rms norm too large": attribute("SimplifiedLayerNormalization", "epsilon", 1e-2),
    "eps of the residual norm too large": attribute("SkipSimplifiedLayerNormalization", "epsilon", 1e-2),
    "rotary interleaved": attribute("RotaryEmbedding", "interleaved", 1),
    "cos and sin exchanged": swap_inputs("RotaryEmbedding", 1, 2),
    "attention scale missing": attribute("GroupQueryAttention", "scale", 1.0),
    "keys and values exchanged": swap_inputs("GroupQueryAttention", 1, 2),
    "silu after the convolution missing": emitter("mobile.causal_conv.default", without_silu),
    "taps of the convolution reversed": emitter("mobile.causal_conv.default", reversed_taps),
    "conv state not carried": operand("Concat", 0, zeros_like(0)),
    "recurrent state not carried": operand("LinearAttention", 3, zeros_like(3)),
    "query scale applied twice": attribute("LinearAttention", "scale", 0.5),
    "delta rule without delta": attribute("LinearAttention", "update_rule", "gated"),
    "decay and dt bias exchanged": swap_inputs("LinearAttentionGate", 1, 2),
    "a and b exchanged": swap_inputs("LinearAttentionGate", 0, 3),
    "gate is sigmoid, not silu": attribute("QuickGelu", "alpha", 1.702),
    "conv state of the padded tail": emitter("mobile.causal_conv.default", without_valid),
    "padding reaches the recurrent state": emitter("mobile.delta_gates.default", without_valid),
    "wrong head grouping": emitter("mobile.gated_delta_chunk.default", tiled_heads),
    "M-RoPE sections not interleaved": emitter("mobile.rotary_table.default", contiguous_sections),
    "attention gate without sigmoid": emitter("aten.sigmoid.default", ungated),
    "patches in raster order": attribute("Transpose", "perm", [1, 2, 4, 5, 0, 3, 6], is_patches),
    "vision rotary grid transposed": transposed("grid_rotary_table"),
    "vision positions transposed": transposed("resample_positions"),
    "tables of another image size": operand("Gather", 1, first_size),
    "exact gelu in the vision MLP": attribute("Gelu", "approximate", "none"),
    "zero-centred norm without one": transform("plus_one", "none"),
    "positive decay": transform("negative_exp", "none"),
}


def off_by_one(name: str, amount: int) -> Patcher:
    """KV slots: the total length seen by attention is wrong by `amount`."""

    def change(graph: Graph, nodes: Nodes) -> None:
        for node in nodes:
            if node.op_type == "Add" and "start" in list(node.input):
                total = node.output[0]
                shifted = helper.make_node(
                    "Add", [total, graph.constant([amount], np.int32)], ["shifted"], name="shifted"
                )
                for other in nodes:
                    for place, used in enumerate(other.input):
                        if used == total:
                            other.input[place] = "shifted"
                nodes.insert(nodes.index(node) + 1, shifted)
                return

    return on_nodes(change)


def last_row(graph: Graph, nodes: Nodes) -> None:
    """Logits of the last row of the chunk, padding or not."""
    for node in nodes:
        if node.op_type == "Sub" and node.input[0] == "valid":
            tokens = next(n.output[0] for n in nodes if n.op_type == "Cast" and "Shape" in n.input[0])
            node.input[0] = tokens


def stale_row(monkeypatch: Patch) -> None:
    """The first row a call writes to the key cache keeps what it held."""
    right = OnnxSession.run

    def run(self: OnnxSession, name: str, inputs: Any) -> Any:
        before = self.snapshot()
        outputs = right(self, name, inputs)
        for state, array in self.states().items():
            if state.startswith("key") and "start" in inputs:
                row = int(inputs["start"][0])
                array[..., row, :] = before[state][..., row, :]
        return outputs

    monkeypatch.setattr(OnnxSession, "run", run)


L1["KV slots off by one"] = off_by_one("late", 1)
L1["stale KV row"] = stale_row
L1["logits of a padded row"] = on_nodes(last_row)

PACK_BITS, PER_BLOCK = pack.pack_bits, pack._per_block


def exchanged_nibbles(values: Any, bits: int) -> Any:
    return PACK_BITS(values if bits == 8 else values.reshape(len(values), -1, 2)[..., ::-1].reshape(values.shape), bits)


L2: dict[str, Any] = {
    "nibbles exchanged": wrong_pack("pack_bits", exchanged_nibbles),
    "scales of another row": wrong_pack("_per_block", lambda s, n: np.ascontiguousarray(PER_BLOCK(s, n)[::-1])),
    "scales transposed": wrong_pack(
        "_per_block", lambda s, n: np.ascontiguousarray(PER_BLOCK(s, n).T).reshape(len(s), n)
    ),
    "scale of the neighbour group": wrong_pack("_per_block", lambda s, n: np.roll(PER_BLOCK(s, n), 1, axis=1)),
    "zero point 7 for 8": wrong_pack(
        "pack_codes", lambda q, bits: PACK_BITS((q.codes.numpy() + 7).astype(np.uint8), bits)
    ),
}


def test_the_right_lowering_passes(model: MemoryCheckpoint, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert climb_l1(model, tmp_path / "a").status == "PASS"
    assert climb_l2(model, tmp_path / "b").status == "PASS"


@pytest.mark.parametrize("fault", list(L1))
def test_l1_catches(fault: str, model: MemoryCheckpoint, tmp_path: Path, monkeypatch: Patch) -> None:
    L1[fault](monkeypatch)
    rung = climb_l1(model, tmp_path)
    assert rung.status == "FAIL", [(c.name, c.value) for c in rung.checks]


@pytest.mark.parametrize("fault", list(L2))
def test_l2_catches(fault: str, model: MemoryCheckpoint, tmp_path: Path, monkeypatch: Patch) -> None:
    L2[fault](monkeypatch)
    assert climb_l2(model, tmp_path).status == "FAIL"


def test_there_are_enough_faults() -> None:
    assert len(L1) + len(L2) >= 20

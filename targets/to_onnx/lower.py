"""Traced programs to ONNX files: one decoder graph for every prefill length and decode, one embedding
graph, one vision graph for every image size, and a single weight file behind them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from onnx import TensorProto

from export.bundle.manifest import dump
from export.model import trace
from export.model.state import State, cache_rows
from targets.base import Job, Lowered
from targets.to_onnx import genai
from targets.to_onnx.graph import Graph, Shape, WeightFile
from targets.to_onnx.operators import Lowering, shape_of, walk

WEIGHTS = "weights.bin"
VISION = "vision.onnx"
SESSION_OPTIONS = {"session.intra_op.allow_spinning": "1"}
"""Config entries of onnxruntime: without spinning a decode step waits for its threads at every operator."""
DTYPES = {
    "embeddings": TensorProto.FLOAT,
    "position_ids": TensorProto.INT32,
    "start": TensorProto.INT32,
    "valid": TensorProto.INT32,
    "image": TensorProto.FLOAT,
    "input_ids": TensorProto.INT64,
}
NAMES = {TensorProto.FLOAT: "float32", TensorProto.INT32: "int32", TensorProto.INT64: "int64"}


def state_shape(state: State) -> Shape:
    """Shape of a state in the runtime: a batch of one; conv rows oldest first, channels last."""
    if state.kind == "conv":
        return (1, state.shape[1], state.shape[0])
    return (1, *state.shape)


def lower(job: Job) -> Lowered:
    """Write decoder.onnx, embed.onnx, vision.onnx and weights.bin into the job's folder."""
    rows = cache_rows(job.context_length, job.prefill_lengths)
    with WeightFile(job.folder / WEIGHTS, job.resume) as weights:
        program = trace.trace_decoder(job.config, rows, None)
        _emit(job, weights, program, "decoder.onnx")
        _emit(job, weights, trace.trace_embed(job.config), "embed.onnx")
        files = {"decoder.onnx": "decoder", "embed.onnx": "embedding", WEIGHTS: "weights"}
        genai.emit(job, weights, rows, state_shape)
        (job.folder / genai.CONFIG).write_text(dump(genai.config(job, list(job.stop_token_ids))))
        files |= {genai.GRAPH: "genai", genai.CONFIG: "genai"}
        images = job.image_sizes if job.config.vision is not None else ()
        if images:
            _emit(job, weights, trace.trace_vision(job.config), VISION)
            files[VISION] = "vision"
    states = [
        {
            "name": state.name,
            "kind": state.kind,
            "layer": state.layer,
            "shape": list(state_shape(state)),
            "dtype": "float32",
        }
        for state in program.states
    ]
    return Lowered(_signatures(job, program.states, images), states, files, SESSION_OPTIONS)


def _emit(job: Job, weights: WeightFile, program: trace.Program, name: str) -> None:
    graph = Graph(program.signature, weights)
    low = Lowering(graph, program, job.quantizer, job.advance, job.image_sizes)
    placeholders = [n for n in program.exported.graph.nodes if n.op == "placeholder"]
    free = [n for n in placeholders if program.parameter(n.name) is None]
    for node, tensor in zip(free, program.inputs, strict=False):
        low.define(node, graph.input(tensor, DTYPES[tensor], shape_of(node)))
    for node, state in zip(free[len(program.inputs) :], program.states, strict=True):
        low.define(node, graph.input(f"past.{state.name}", TensorProto.FLOAT, state_shape(state)))
    if "valid" in program.inputs:
        # decode runs the same graph: one token, and a caller that does not know of `valid`.
        graph.default("valid", [1], "int32")
    walk(low)
    output = next(n for n in program.exported.graph.nodes if n.op == "output")
    results = list(output.args[0])
    names = [*program.outputs, *(f"present.{state.name}" for state in program.states)]
    for node, tensor in zip(results, names, strict=True):
        is_state = tensor.startswith("present.")
        value = low.values[node] if is_state else low.value(node)
        graph.output(value, tensor, TensorProto.FLOAT)
    graph.save(job.folder / name)


def _tensor(name: str, shape: Sequence[int | str], dtype: str | None = None) -> dict[str, Any]:
    return {"name": name, "dtype": dtype or NAMES[DTYPES[name]], "shape": list(shape)}


def _signatures(
    job: Job, states: tuple[State, ...], images: tuple[tuple[int, int], ...]
) -> dict[str, Any]:
    hidden, vocab = job.config.text.hidden_size, job.config.text.vocab_size
    bindings = {
        state.name: {
            "input": f"past.{state.name}",
            "output": f"present.{state.name}",
            "in_place": True,
        }
        for state in states
    }

    def stage(file: str, inputs: Sequence[str], output: str, **more: Any) -> dict[str, Any]:
        return {
            "kind": "graph",
            "file": file,
            "inputs": {name: name for name in inputs},
            "outputs": {output: output},
            **more,
        }

    def decoder(tokens: int) -> dict[str, Any]:
        inputs = [
            _tensor("embeddings", (1, tokens, hidden)),
            _tensor("position_ids", (3, tokens)),
            _tensor("start", (1,)),
        ]
        return {"inputs": inputs, "outputs": [_tensor("logits", (1, vocab), "float32")], "stages": []}

    signatures: dict[str, Any] = {
        "embed": {
            "inputs": [_tensor("input_ids", (1, "S"))],
            "outputs": [_tensor("embeddings", (1, "S", hidden))],
            "stages": [stage("embed.onnx", ["input_ids"], "embeddings")],
        },
        "decode": decoder(1),
    }
    names = ["embeddings", "position_ids", "start"]
    signatures["decode"]["stages"] = [stage("decoder.onnx", names, "logits", states=bindings)]
    for length in job.prefill_lengths:
        entry = decoder(length)
        entry["inputs"].append(_tensor("valid", (1,)))
        entry["stages"] = [stage("decoder.onnx", [*names, "valid"], "logits", states=bindings)]
        signatures[f"prefill_{length}"] = entry
    side = job.config.vision.pixels_per_token if job.config.vision is not None else 1
    for height, width in images:
        count = (height // side) * (width // side)
        signatures[f"vision_{height}x{width}"] = {
            "inputs": [_tensor("image", (1, 3, height, width))],
            "outputs": [_tensor("image_embeddings", (1, count, hidden), "float32")],
            "stages": [stage(VISION, ["image"], "image_embeddings")],
        }
    return signatures

"""Traced programs to ONNX files: one decoder graph for every prefill length and decode, one embedding
graph, one vision graph for every image size, and a single weight file behind them all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from onnx import TensorProto

from export.bundle.manifest import dump
from export.model import trace
from export.model.state import State, cache_rows
from targets.base import Job, Lowered
from targets.contract import signatures
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
        genai.emit(job, weights, program, state_shape)
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
    return Lowered(signatures(job, _stages(program.states)), states, files, SESSION_OPTIONS)


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


def _stages(states: tuple[State, ...]) -> Callable[[str], list[dict[str, Any]]]:
    """One stage per signature; names of the contract are those of the graphs."""
    bindings = {
        state.name: {"input": f"past.{state.name}", "output": f"present.{state.name}", "in_place": True}
        for state in states
    }

    def stage(file: str, inputs: Sequence[str], output: str, **more: Any) -> list[dict[str, Any]]:
        names = {name: name for name in inputs}
        return [{"kind": "graph", "file": file, "inputs": names, "outputs": {output: output}, **more}]

    def stages(signature: str) -> list[dict[str, Any]]:
        if signature == "embed":
            return stage("embed.onnx", ["input_ids"], "embeddings")
        if signature.startswith("vision"):
            return stage(VISION, ["image"], "image_embeddings")
        inputs = ["embeddings", "position_ids", "start", *([] if signature == "decode" else ["valid"])]
        return stage("decoder.onnx", inputs, "logits", states=bindings)

    return stages

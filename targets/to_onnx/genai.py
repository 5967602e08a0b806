"""A second, thin graph over the same weight file, in the interface of onnxruntime-genai 0.18, and its config.

The runtime feeds token ids, an attention mask and three rows of positions, keeps all states itself, and calls
without padding. Its text model type for this family is `qwen3_5_text`; it has none that takes image
embeddings for a hybrid decoder from outside, so that pictures need our own session (docs/decisions/005).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto

from export.model.state import State
from export.model.trace import Program
from targets.base import Job
from targets.to_onnx.graph import Graph, WeightFile
from targets.to_onnx.operators import Lowering, embed_rows, walk

GRAPH = "genai.onnx"
CONFIG = "genai_config.json"
KV = {"key", "value"}
UNPADDED = {"mobile.causal_conv.default", "mobile.delta_gates.default"}


def state_name(state: State, prefix: str) -> str:
    """Name of a state in that runtime's interface; `prefix` is past or present."""
    if state.kind in KV and prefix == "past":
        return f"past_key_values.{state.layer}.{state.kind}"
    return f"{prefix}.{state.layer}.{state.kind}"


def emit(job: Job, weights: WeightFile, program: Program, state_shape: Any) -> None:
    """Write genai.onnx into the job's folder.

    Args:
        program: the decoder with a symbolic number of tokens; it is left without padding.
    """
    nodes = list(program.exported.graph.nodes)
    for node in nodes:
        if str(node.target) in UNPADDED:
            node.args = (*node.args[:-1], None)
    graph = Graph("genai", weights)
    low = Lowering(graph, program, job.quantizer, job.advance)
    ids = graph.input("input_ids", TensorProto.INT64, (1, "C"))
    mask = graph.input("attention_mask", TensorProto.INT64, (1, "T"))
    positions = graph.input("position_ids", TensorProto.INT64, (3, 1, "C"))
    low.shared["tokens"] = _int32(graph, graph.apply("Shape", [ids], (1,), start=1, end=2))
    axis = graph.constant([1], np.int64)
    low.shared["total"] = _int32(graph, graph.apply("ReduceSum", [mask, axis], (1,), keepdims=0))
    hidden = job.config.text.hidden_size
    values = {
        "embeddings": embed_rows(low, "embedding.weight", ids, (1, "C", hidden)),
        "position_ids": graph.view(positions, (3, "C")),
        "start": low.shared["total"],  # not read: `total` stands for start + C
        "valid": low.shared["tokens"],
    }
    free = [n for n in nodes if n.op == "placeholder" and program.parameter(n.name) is None]
    for node, name in zip(free, program.inputs, strict=False):
        low.define(node, values[name])
    for node, state in zip(free[len(program.inputs) :], program.states, strict=True):
        low.define(node, graph.input(state_name(state, "past"), TensorProto.FLOAT, state_shape(state)))
    walk(low)
    results = list(next(n for n in nodes if n.op == "output").args[0])
    logits = low.value(results[0], (1, 1, job.config.text.vocab_size))
    graph.output(logits, "logits", TensorProto.FLOAT)
    for node, state in zip(results[1:], program.states, strict=True):
        graph.output(low.values[node], state_name(state, "present"), TensorProto.FLOAT)
    graph.save(job.folder / GRAPH)


def _int32(graph: Graph, value: str) -> str:
    return graph.apply("Cast", [value], (1,), to=TensorProto.INT32)


def config(job: Job, stop_token_ids: list[int]) -> dict[str, Any]:
    """genai_config.json as that runtime's own builder writes it for this family."""
    text = job.config.text
    stops = stop_token_ids or [text.vocab_size - 1]
    return {
        "model": {
            "type": "qwen3_5_text",
            "bos_token_id": stops[-1],
            "eos_token_id": stops,
            "pad_token_id": stops[-1],
            "context_length": job.context_length,
            "vocab_size": text.vocab_size,
            "decoder": {
                "filename": GRAPH,
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "head_size": text.head_dim,
                "hidden_size": text.hidden_size,
                "num_attention_heads": text.num_attention_heads,
                "num_key_value_heads": text.num_key_value_heads,
                "num_hidden_layers": text.num_hidden_layers,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                    "past_conv_names": "past.%d.conv",
                    "past_recurrent_names": "past.%d.recurrent",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                    "present_conv_names": "present.%d.conv",
                    "present_recurrent_names": "present.%d.recurrent",
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": job.context_length,
            "past_present_share_buffer": True,
            "temperature": 1.0,
            "top_k": 50,
            "top_p": 1.0,
        },
    }

"""Traced programs to .pte files: the decoder in one file or several ranges of layers, the vision encoder in one.

A decoder file has one method per prefill length and one for decode, over the same weights. The embedding is a
table that the host reads: over the head's own bytes where they are tied, else a file of its own.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from export.checkpoint.weights import HEAD_BASIS
from export.model import trace
from export.model.state import State, cache_rows
from export.spec import UsageError
from targets.base import Job, Lowered
from targets.contract import DTYPES, signatures
from targets.table import table_stage
from targets.to_executorch import file, text_runner
from targets.to_executorch.check import check_methods
from targets.to_executorch.operators import Lowering, shape_of, walk
from targets.to_executorch.pack import WeightTable
from targets.to_executorch.program import Constants, Method, aligned, value_method

VISION, EMBEDDING = "vision.pte", "embed.bin"
KV = ("key", "value")
Stage = dict[str, Any]
HEAD = "decoder.head.weight"
ROWS_AXIS = 1
"""Axis of tokens in a KV cache [1, L, Hkv, Dh]."""


def state_shape(state: State) -> tuple[int, ...]:
    """Shape of a state in the runtime: tokens before heads, convolution channels last."""
    if state.kind in KV:
        heads, rows, width = state.shape
        return (1, rows, heads, width)
    return (state.shape[1], state.shape[0]) if state.kind == "conv" else state.shape


def entry(signature: str) -> str:
    """Method of a signature. Runners of the runtime give a method called `decode` another meaning."""
    return "decode_step" if signature == "decode" else signature


def lower(job: Job) -> Lowered:
    """Write the .pte files and, for an untied embedding, its table into the job's folder."""
    text = job.config.text
    rows = cache_rows(job.context_length, job.prefill_lengths)
    ranges = layer_ranges(job)
    if job.text_runner and len(ranges) > 1:
        raise ValueError("the text runner's method holds the whole decoder: leave out the limits of a file")
    stages: dict[str, list[Stage]] = {}
    states: list[State] = []
    files: dict[str, str] = {}
    table: Stage | None = None
    for number, layers in enumerate(ranges):
        name = "decoder.pte" if len(ranges) == 1 else f"decoder_{number}.pte"
        part = _Part(job, rows, layers, number, last=number == len(ranges) - 1)
        for tokens in (1, *job.prefill_lengths):
            signature, stage = part.emit(tokens, name)
            stages.setdefault(signature, []).append(stage)
        states += part.states
        if job.text_runner:
            part.emit_text_runner()
        places = _write(job, name, part.source())
        files[name] = "decoder"
        if HEAD in places and text.tie_word_embeddings:
            scales = places.get(part.table_scales() or "")
            table = table_stage(job, name, places[HEAD], scales, floats="float32")
    if table is None:
        table = _write_table(job)
        files[EMBEDDING] = "embedding"
    stages["embed"] = [table]
    if job.image_sizes and job.config.vision is not None:
        stages |= _vision(job)
        files[VISION] = "vision"
    described = [
        {"name": s.name, "kind": s.kind, "layer": s.layer, "shape": list(state_shape(s)), "dtype": "float32"}
        for s in states
    ]
    return Lowered(signatures(job, stages.__getitem__), described, files)


def _write(job: Job, name: str, source: file.Source) -> dict[str, int]:
    """Write a file and run its methods once in another process; returns where each piece of its weights is."""
    places = file.write(job.folder / name, source, job.resume)
    if job.try_out:
        check_methods(job.folder / name, source, places)
    return places


def layer_ranges(job: Job) -> list[range]:
    """Consecutive layers that share a file, as far as the job's limits allow; the last file also has the head.

    A head that does not fit beside any layer gets a file of its own: an empty range.

    Raises:
        UsageError: a layer or the head alone is larger than a file may be.
    """
    count = job.config.text.num_hidden_layers
    most_layers, most_bytes = job.max_file_layers or count, job.max_file_bytes or 2**63
    sizes = [stored_bytes(job, f"decoder.layers.{layer}.") for layer in range(count)]
    head = stored_bytes(job, HEAD) + stored_bytes(job, HEAD_BASIS)
    least = max(*sizes, head)
    if least > most_bytes:
        what = "the head" if head == least else f"layer {sizes.index(least)}"
        raise UsageError(
            f"--max-file-size {most_bytes}: {what} alone has {least} bytes, and neither a layer nor the head is ever "
            f"cut; give at least {least}"
        )
    ranges, first = [], 0
    for layer in range(1, count):
        if layer - first == most_layers or sum(sizes[first : layer + 1]) > most_bytes:
            ranges.append(range(first, layer))
            first = layer
    ranges.append(range(first, count))
    if sum(sizes[first:]) + head > most_bytes:
        ranges.append(range(count, count))
    return ranges


def stored_bytes(job: Job, prefix: str) -> int:
    """Bytes of the parameters whose names begin so, as the files hold them."""
    total = 0
    for name, parameter in job.quantizer.weights.parameters.items():
        if name.startswith(prefix):
            setting = job.quantizer.setting(name)
            elements = math.prod(parameter.shape)
            if setting is None:
                total += 4 * elements
            else:
                scales = 2 * elements // setting.group_size if setting.group_size else 4 * parameter.shape[0]
                total += elements * setting.bits // 8 + scales
                if name == HEAD and setting.bits == 4 and job.config.text.tie_word_embeddings:
                    total += scales  # once more, for the table
    return total


class _Part:
    """The methods of one decoder file: layers `layers`, from hidden rows or embeddings to hidden rows or logits."""

    def __init__(self, job: Job, rows: int, layers: range, number: int, last: bool) -> None:
        self._job, self._rows, self._layers, self._number, self._last = job, rows, layers, number, last
        self._constants = Constants()
        self._weights = WeightTable(job.quantizer, job.advance)
        self._methods: list[Method] = []
        self._states_end = 0
        self.states: tuple[State, ...] = ()

    def emit(self, tokens: int, name: str) -> tuple[str, Stage]:
        """Add the method for so many tokens; returns its signature and its stage."""
        program = trace.trace_decoder(
            self._job.config, self._rows, tokens, layers=self._layers, head=self._last
        )
        self.states = program.states
        method = Method(entry(program.signature), self._constants)
        self._methods.append(method)
        low = Lowering(method, program, self._weights)
        nodes = list(program.exported.graph.nodes)
        free = [n for n in nodes if n.op == "placeholder" and program.parameter(n.name) is None]
        names = [f"hidden_{self._number}" if n == "embeddings" and self._number else n for n in program.inputs]
        inputs = {}
        for place, (node, tensor) in enumerate(zip(free[: len(names)], names, strict=True)):
            shape = shape_of(node)
            if tensor.startswith("hidden"):
                shape = shape[1:]  # rows as the file before hands them on
            low.define(node, method.input(shape, DTYPES.get(tensor, "float32")))
            inputs[tensor] = str(place)
        for node, state in zip(free[len(names) :], program.states, strict=True):
            low.define(node, method.input(state_shape(state)))
        walk(low)
        results = list(next(n for n in nodes if n.op == "output").args[0])
        method.output(low.value(results[0]))
        offset, bindings = 0, {}
        for index, (node, state) in enumerate(zip(results[1:], program.states, strict=True)):
            binding: dict[str, Any] = {"input": str(len(names) + index), "output": str(1 + index)}
            if state.kind in KV:
                method.output(low.values[node])
                bindings[state.name] = {**binding, "update": "rows", "axis": ROWS_AXIS}
            else:
                method.output(low.view(low.values[node], state_shape(state)), offset)
                offset += aligned(4 * int(np.prod(state_shape(state))))
                bindings[state.name] = {**binding, "in_place": True}
        self._states_end = offset
        output = "logits" if self._last else f"hidden_{self._number + 1}"
        return program.signature, {
            "kind": "graph",
            "file": name,
            "entry": method.name,
            "inputs": inputs,
            "outputs": {output: "0"},
            "states": bindings,
        }

    def emit_text_runner(self) -> None:
        """Add `forward`, which keeps its states itself; see `text_runner`."""
        program = trace.trace_decoder(self._job.config, self._rows, 1)
        method = Method(text_runner.NAME, self._constants)
        self._methods.append(method)
        low = Lowering(method, program, self._weights)
        nodes = list(program.exported.graph.nodes)
        free = [n for n in nodes if n.op == "placeholder" and program.parameter(n.name) is None]
        shapes = [state_shape(state) for state in program.states]
        text_runner.define_inputs(low, free, program, self._states_end, shapes)
        walk(low)
        results = list(next(n for n in nodes if n.op == "output").args[0])
        method.output(low.value(results[0]))
        for placeholder, node, state in zip(free[3:], results[1:], program.states, strict=True):
            if state.kind not in KV:
                method.replace(low.buffers[placeholder], low.view(low.values[node], state_shape(state)))

    def table_scales(self) -> str | None:
        """Piece that holds the scales of the head as a table wants them."""
        return self._weights.scales_of(HEAD)

    def source(self) -> file.Source:
        """What the file is made of. The head of a tied model also gets the scales its table needs."""
        if self._last and self._job.config.text.tie_word_embeddings:
            self._weights.add_table_scales(HEAD)
        return file.Source(self._methods, metadata(self._job), self._constants, list(self._weights.weights.values()))


def metadata(job: Job) -> list[Any]:
    """Methods without inputs that runners read about a model."""
    values: dict[str, int | bool | list[int]] = {
        "get_max_seq_len": job.context_length,
        "get_max_context_len": job.context_length,
        "get_vocab_size": job.config.text.vocab_size,
        "get_n_layers": job.config.text.num_hidden_layers,
        "get_eos_ids": list(job.stop_token_ids),
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": False,
    }
    return [value_method(name, value) for name, value in values.items()]


def _write_table(job: Job) -> Stage:
    """An embedding that is not the head's matrix, in a file of its own: codes, then scales."""
    weights = WeightTable(job.quantizer, job.advance)
    weights.linear("embedding.weight")
    weights.add_table_scales("embedding.weight")
    (weight,) = weights.weights.values()
    codes = weight.sizes["embedding.weight"]
    scales = weights.scales_of("embedding.weight")
    starts = {"embedding.weight": 0, **({scales: aligned(codes)} if scales else {})}
    written = dict.fromkeys(starts, 0)
    with open(job.folder / EMBEDDING, "wb") as out:
        for piece, data in weight.read():
            if piece in starts:
                out.seek(starts[piece] + written[piece])
                out.write(data)
                written[piece] += len(data)
    return table_stage(job, EMBEDDING, 0, starts.get(scales or ""), floats="float32")


def _vision(job: Job) -> dict[str, list[Stage]]:
    """One method per image size, over the same weights."""
    constants, weights = Constants(), WeightTable(job.quantizer, job.advance)
    methods, stages = [], {}
    for height, width in job.image_sizes:
        program = trace.trace_vision(job.config, height, width)
        method = Method(program.signature, constants)
        low = Lowering(method, program, weights)
        nodes = list(program.exported.graph.nodes)
        (image,) = (n for n in nodes if n.op == "placeholder" and program.parameter(n.name) is None)
        low.define(image, method.input((1, 3, height, width)))
        walk(low)
        (result,) = next(n for n in nodes if n.op == "output").args[0]
        method.output(low.value(result))
        methods.append(method)
        stages[program.signature] = [
            {
                "kind": "graph",
                "file": VISION,
                "entry": method.name,
                "inputs": {"image": "0"},
                "outputs": {"image_embeddings": "0"},
            }
        ]
    _write(job, VISION, file.Source(methods, [], constants, list(weights.weights.values())))
    return stages

"""Traced programs to .mlpackages: the decoder in one or several, the vision encoder in one.

A package of the decoder has decode and every prefill length as functions over the same weights and states. It holds
some layers, pieces of the head, or both. The embedding is a table that the host reads: over the head's own bytes
where they are tied and in one package, else a file of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import coremltools as ct
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import Function, types
from torch.fx import Node

from export.model import trace
from export.model.state import State, layout
from targets.base import Job, Lowered
from targets.contract import signatures
from targets.table import table_stage
from targets.to_coreml import states as kept_states
from targets.to_coreml.cut import HEAD, Part, cut, limit, padded_rows
from targets.to_coreml.lowering import Lowering, Storage
from targets.to_coreml.operators import needed, walk
from targets.to_coreml.package import INSIDE, WEIGHTS, Description, files, write_package
from targets.to_coreml.profiles import profile
from targets.to_coreml.weights import WeightFile

VISION, EMBEDDING = "vision.mlpackage", "embed.bin"
FLOATS = "float16"
"""What embeddings, rows between packages and logits are."""
TENSORS = {
    "embeddings": "Rows of the embedding table, or of image_embeddings where a picture stands.",
    "position_ids": "Temporal, height and width position of each token (M-RoPE).",
    "start": "Slot of the first token in the KV cache; 0 begins a conversation and clears the states.",
    "valid": "How many rows are real, from 1 on; those after them change nothing.",
    "logits": "Scores of the next token, after the last valid row.",
}
VISION_TENSORS = {
    "image": "RGB in 0...1, resized to the function's size; normalisation is inside.",
    "image_embeddings": "One row for each <|image_pad|> token, in their order.",
}
REMEDIES = {
    "decoder": ", or put fewer layers into a package with --max-file-layers",
    "vision": ", or leave the vision encoder out with --no-vision: it is not cut",
}
"""What to do, by role, when a package is too large and the limit cannot be raised."""
Stage = dict[str, Any]


def lower(job: Job) -> Lowered:
    """Write the packages and, where the head's bytes do not serve, the embedding's table into the job's folder."""
    kind = profile(job.profile)
    parts = cut(job)
    head = [piece for part in parts for piece in part.head]
    stages: dict[str, list[Stage]] = {}
    described: list[dict[str, Any]] = []
    written: dict[str, str] = {}
    table: Stage | None = None
    if job.image_sizes and job.config.vision is not None:  # first: one that is too large costs no decoder
        weights = WeightFile(job.quantizer, job.advance)
        functions, stages = _vision(job, weights)
        written |= _write(job, VISION, "vision", functions, weights, VISION_TENSORS)
    for part in parts:
        weights = WeightFile(job.quantizer, job.advance)
        builder = _Decoder(job, part, Storage(part.head, part.tied, job.palettes), weights)
        functions = {}
        for tokens in (1, *job.prefill_lengths):
            name, functions[name], stage = builder.function(tokens)
            stages.setdefault(name, []).append(stage)
        described += [k.as_manifest() for k in builder.kept]
        written |= _write(job, part.file, "decoder", functions, weights, builder.tensors)
        if part.tied:
            table = _table(job, f"{part.file}/{INSIDE}/{WEIGHTS}", weights)
    if table is None:
        table = _write_table(job)
        written[EMBEDDING] = "embedding"
    stages["embed"] = [table]
    called = signatures(job, stages.__getitem__, floats=FLOATS, pieces=[len(piece) for piece in head])
    return Lowered(called, described, written, {"computeUnits": kind.compute_units})


def _write(
    job: Job,
    name: str,
    role: str,
    functions: Mapping[str, Any],
    weights: WeightFile,
    tensors: Mapping[str, str],
) -> dict[str, str]:
    """Write a package, unless a whole one is there from before; returns its files with their role."""
    path = job.folder / name
    if not (job.resume and (path / "Manifest.json").exists()):
        said = Description(
            f"Qwen3.5, {role}, from {source_of(job)}; the manifest.json of its bundle says how to call it.",
            f"{source_of(job)}, converted by qwen35-mobile",
            job.license,
            f"{version('qwen35-mobile')} {job.quantizer.recipe.name}",
            {function: purpose(function) for function in functions},
            tensors,
        )
        write_package(path, functions, weights, said, limit(job), REMEDIES[role])
    else:
        job.advance(weights.elements)
    return {str(file.relative_to(job.folder).as_posix()): role for file in files(path)}


def source_of(job: Job) -> str:
    """The model that is converted: "Qwen/Qwen3.5-2B at 1a2b3c"."""
    name, revision = job.source.get("id", "unknown weights"), job.source.get("revision")
    return f"{name} at {revision}" if revision else str(name)


def purpose(function: str) -> str:
    """What a function is for, in a sentence."""
    kind, _, size = function.partition("_")
    return {
        "decode": "One token.",
        "prefill": f"A chunk of {size} tokens, of which `valid` are real.",
        "vision": f"A picture of {size} pixels (height x width) to its image embeddings.",
    }[kind]


class _Decoder:
    """The functions of one package of the decoder."""

    def __init__(self, job: Job, part: Part, storage: Storage, weights: WeightFile) -> None:
        self._job, self._part, self._storage, self._weights = job, part, storage, weights
        self._profile = profile(job.profile)
        self._rows = padded_rows(job)
        text = job.config.text
        self.kept: list[kept_states.Kept] = kept_states.plan(
            layout(text, self._rows, part.layers),
            self._profile,
            job.state_layout or self._profile.state_layout,
            part.number,
        )
        self.tensors = dict(TENSORS)
        """What every input, output and state of the package is."""
        for state in self.kept:
            self.tensors |= kept_states.described(state)
        for number in (part.number, part.number + 1):
            self.tensors[f"hidden_{number}"] = f"Rows between package {number - 1} and package {number}."
        for index in range(part.first_piece, part.first_piece + len(part.head)):
            self.tensors[f"logits_{index}"] = f"Piece {index} of the logits; the host joins them in order."

    def function(self, tokens: int) -> tuple[str, Any, Stage]:
        """One function: its name (that of the signature), itself, and the stage that calls it."""
        part, width = self._part, self._job.config.text.hidden_size
        program = trace.trace_decoder(
            self._job.config, self._rows, tokens, layers=part.layers, head=bool(part.head)
        )
        free = [
            n for n in program.exported.graph.nodes if n.op == "placeholder" and program.parameter(n.name) is None
        ]
        named = dict(zip(program.inputs, free, strict=False))
        states: dict[Node, State] = dict(zip(free[len(program.inputs) :], program.states, strict=True))
        wanted = needed(program)
        low = Lowering(program, self._weights, self._profile, self._storage)
        source = f"hidden_{part.number}" if part.number else "embeddings"
        shape = low.row_shape(tokens, width) if part.number else (1, tokens, width)
        inputs = {source: mb.placeholder(shape=shape, dtype=types.fp16)}
        for name, extent in (("position_ids", (3, tokens)), ("start", (1,)), ("valid", (1,))):
            if name in named and (named[name] in wanted or (name == "start" and part.layers)):
                inputs[name] = mb.placeholder(shape=extent, dtype=types.int32)
        with Function(inputs | kept_states.placeholders(self.kept), opset_version=ct.target.iOS18) as function:
            mb.name_count.clear()  # names of operations follow from the function alone
            given = function.inputs
            low.start, low.valid = given.get("start"), given.get("valid")
            rows = given[source]
            if not part.number and self._profile.convolutions:
                rows = low.reshape(low.transpose(rows, (0, 2, 1)), low.row_shape(tokens, width))
            low.define(named["embeddings"], rows)
            if "position_ids" in given:
                low.define(named["position_ids"], given["position_ids"])
            low.states = kept_states.States(self.kept, given, states)
            walk(low)
            results = list(next(n for n in program.exported.graph.nodes if n.op == "output").args[0])
            outputs = self._outputs(low, results[0])
            new = {node: low.values[value].var for node, value in zip(states, results[1:], strict=True)}
            outputs |= low.states.finish(new)
            for name, var in outputs.items():
                var.name = name
            function.set_outputs(list(outputs.values()))
        stage = {
            "kind": "graph",
            "file": part.file,
            "entry": program.signature,
            "inputs": {name: name for name in inputs},
            "outputs": {name: name for name in outputs if not name.endswith(kept_states.NEW)},
            "states": kept_states.bindings(self.kept),
        }
        return program.signature, function, stage

    def _outputs(self, low: Lowering, result: Node) -> dict[str, Any]:
        part = self._part
        if not part.head:
            return {f"hidden_{part.number + 1}": low.rows(result)}
        pieces = [low.reshape(piece, (1, len(rows))) for piece, rows in zip(low.last, part.head, strict=True)]
        if part.single:
            return {"logits": pieces[0]}
        return {f"logits_{part.first_piece + i}": piece for i, piece in enumerate(pieces)}


def _vision(job: Job, weights: WeightFile) -> tuple[dict[str, Any], dict[str, list[Stage]]]:
    """One function per image size, over the same weights."""
    functions, stages = {}, {}
    for height, width in job.image_sizes:
        program = trace.trace_vision(job.config, height, width)
        low = Lowering(program, weights, profile(job.profile), Storage((), False, job.palettes))
        image = mb.placeholder(shape=(1, 3, height, width), dtype=types.fp32)
        with Function({"image": image}, opset_version=ct.target.iOS18) as function:
            mb.name_count.clear()  # names of operations follow from the function alone
            nodes = list(program.exported.graph.nodes)
            (source,) = (n for n in nodes if n.op == "placeholder" and program.parameter(n.name) is None)
            low.define(source, function.inputs["image"])
            walk(low)
            (result,) = nodes[-1].args[0]
            rows = low.rows(result)
            if low.profile.convolutions:
                rows = low.reshape(low.transpose(rows, (0, 2, 3, 1)), (1, rows.shape[3], rows.shape[1]))
            rows.name = "image_embeddings"
            function.set_outputs([rows])
        name = program.signature
        functions[name] = function
        stages[name] = [
            {
                "kind": "graph",
                "file": VISION,
                "entry": name,
                "inputs": {"image": "image"},
                "outputs": {"image_embeddings": "image_embeddings"},
            }
        ]
    return functions, stages


def _table(job: Job, file: str, weights: WeightFile) -> Stage:
    """The `table` stage over a planned matrix, the head's or the embedding's own."""
    matrix = weights.planned(HEAD if file != EMBEDDING else "embedding.weight")
    scales = None if matrix.scales is None else matrix.scales.offset
    return table_stage(job, file, matrix.values.offset, scales, floats=FLOATS)


def _write_table(job: Job) -> Stage:
    """An embedding that is not the head's matrix, in a file of its own."""
    weights = WeightFile(job.quantizer, job.advance)
    weights.matrix("embedding.weight", [range(job.config.text.vocab_size)], "table")
    weights.write(job.folder / EMBEDDING)
    return _table(job, EMBEDDING, weights)

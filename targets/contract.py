"""The contract of signatures (docs/bundle.md), for every target: what they declare, and what a call must fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from export.spec import ExportError
from targets.base import Job

DTYPES = {
    "input_ids": "int64",
    "embeddings": "float32",
    "position_ids": "int32",
    "start": "int32",
    "valid": "int32",
    "logits": "float32",
    "image": "float32",
    "image_embeddings": "float32",
}


class CallError(ExportError):
    """A signature was called against its contract."""


def signatures(
    job: Job, stages: Callable[[str], list[dict[str, Any]]], floats: str = "float32", pieces: Sequence[int] = ()
) -> dict[str, Any]:
    """Every signature of a bundle with one `embed`.

    Args:
        stages: gives a signature's stages by its name. floats: dtype of embeddings and logits. pieces: columns of
            each piece of a split head.
    """
    hidden, vocab = job.config.text.hidden_size, job.config.text.vocab_size
    logits: list[tuple[str, tuple[int, int]]] = [("logits", (1, vocab))]
    if len(pieces) > 1:
        logits = [(f"logits_{index}", (1, columns)) for index, columns in enumerate(pieces)]
    found = {"embed": _signature([("input_ids", (1, "S"))], [("embeddings", (1, "S", hidden))])}
    for tokens in (1, *job.prefill_lengths):
        name = "decode" if tokens == 1 else f"prefill_{tokens}"
        inputs = [("embeddings", (1, tokens, hidden)), ("position_ids", (3, tokens)), ("start", (1,))]
        found[name] = _signature(inputs + ([] if tokens == 1 else [("valid", (1,))]), logits)
    vision = job.config.vision
    for height, width in job.image_sizes if vision is not None else ():
        side = vision.pixels_per_token if vision is not None else 1
        rows = (height // side) * (width // side)
        found[f"vision_{height}x{width}"] = _signature(
            [("image", (1, 3, height, width))], [("image_embeddings", (1, rows, hidden))]
        )
    for entry in found.values():
        for tensor in (*entry["inputs"], *entry["outputs"]):
            if tensor["name"] != "image" and tensor["dtype"] == "float32":
                tensor["dtype"] = floats
    return {name: {**entry, "stages": stages(name)} for name, entry in found.items()}


Declared = Sequence[tuple[str, Sequence[int | str]]]


def _signature(inputs: Declared, outputs: Declared) -> dict[str, Any]:
    def tensors(declared: Declared) -> list[dict[str, Any]]:
        dtypes = [DTYPES["logits" if name.startswith("logits_") else name] for name, _ in declared]
        return [
            {"name": name, "dtype": dtype, "shape": list(shape)}
            for (name, shape), dtype in zip(declared, dtypes, strict=True)
        ]

    return {"inputs": tensors(inputs), "outputs": tensors(outputs)}


def check_call(manifest: Mapping[str, Any], signature: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """The manifest's entry of a signature, once the inputs are known to fit it.

    Raises:
        CallError: no such signature; an input missing or of another shape or dtype; a place outside the context.
    """
    entry: dict[str, Any] | None = manifest["signatures"].get(signature)
    if entry is None:
        known = ", ".join(sorted(manifest["signatures"]))
        raise CallError(f"the bundle has no signature {signature!r}; it has {known}")
    for tensor in entry["inputs"]:
        array = inputs.get(tensor["name"])
        if array is None:
            raise CallError(f"{signature} needs input {tensor['name']!r}; got {sorted(inputs)}")
        fits = len(array.shape) == len(tensor["shape"]) and all(
            isinstance(want, str) or want == got for want, got in zip(tensor["shape"], array.shape, strict=True)
        )
        if not fits or str(array.dtype) != tensor["dtype"]:
            raise CallError(
                f"{signature} input {tensor['name']!r} is {array.dtype} {list(array.shape)}; "
                f"the manifest declares {tensor['dtype']} {tensor['shape']}"
            )
    if "start" in inputs:
        start = int(inputs["start"][0])
        valid = int(inputs["valid"][0]) if "valid" in inputs else 1
        context = manifest["context_length"]
        rows = entry["inputs"][0]["shape"][1]
        if not 1 <= valid <= rows or start < 0 or start + valid > context:
            raise CallError(
                f"{signature} at start {start} with valid {valid}: valid must be 1 to {rows} and "
                f"start + valid at most the context_length {context}; start a new conversation"
            )
    return entry

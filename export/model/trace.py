"""One torch.export program per signature of the bundle, traced on meta tensors without any weight.

A `Program` is the traced graph plus what the contract calls its inputs, outputs and states. Prefill is
traced with a symbolic number of tokens when asked: a runtime that handles dynamic shapes then serves
every prefill length, and decode, from one graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from export.model.config import ModelConfig
from export.model.decoder import Decoder, Embedding
from export.model.state import State, layout
from export.model.vision import VisionEncoder


@dataclass(frozen=True)
class Program:
    """A traced signature.

    Placeholders of `exported` are first parameters, then `inputs`, then one per state; results are
    `outputs`, then one new value per state. Names are those of the contract.
    """

    signature: str
    exported: ExportedProgram
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    states: tuple[State, ...]

    def parameter(self, placeholder: str) -> str | None:
        """Name of the model parameter (as in `export.checkpoint.weights`) behind a placeholder."""
        return self.exported.graph_signature.inputs_to_parameters.get(placeholder)


class _Prefill(nn.Module):
    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(
        self, embeddings: Tensor, position_ids: Tensor, start: Tensor, valid: Tensor, states: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        return self.decoder(embeddings.squeeze(0), position_ids, start, valid, states)


class _Decode(nn.Module):
    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(
        self, embeddings: Tensor, position_ids: Tensor, start: Tensor, states: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        return self.decoder(embeddings.squeeze(0), position_ids, start, None, states)


class _Vision(nn.Module):
    def __init__(self, vision: VisionEncoder) -> None:
        super().__init__()
        self.vision = vision

    def forward(self, image: Tensor) -> Tensor:
        return self.vision(image.squeeze(0)).unsqueeze(0)


class _Embed(nn.Module):
    def __init__(self, embedding: Embedding) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.embedding(input_ids)


def trace_decoder(
    config: ModelConfig,
    rows: int,
    tokens: int | None,
    *,
    layers: range | None = None,
    head: bool = True,
) -> Program:
    """Trace the decoder, or a range of its layers.

    Args:
        rows: rows L of the KV buffers. tokens: 1 is `decode`, another number `prefill_{tokens}`, None
        prefill with a symbolic number of tokens C (2 … rows).
    """
    text = config.text
    states = layout(text, rows, layers)
    with torch.device("meta"):
        decoder = Decoder(text, layers, head).eval()
        count = 2 if tokens is None else tokens
        example: tuple[object, ...] = (
            torch.empty(1, count, text.hidden_size),
            torch.empty(3, count, dtype=torch.int32),
            torch.empty(1, dtype=torch.int32),
        )
        if tokens != 1:
            example += (torch.empty(1, dtype=torch.int32),)
        example += ([torch.empty(state.shape) for state in states],)
    dynamic: tuple[object, ...] | None = None
    if tokens is None:
        symbol = Dim("C", min=2, max=rows)
        dynamic = ({1: symbol}, {1: symbol}, None, None, [None] * len(states))
    module = _Decode(decoder) if tokens == 1 else _Prefill(decoder)
    inputs = ("embeddings", "position_ids", "start") + (() if tokens == 1 else ("valid",))
    name = "decode" if tokens == 1 else f"prefill_{'C' if tokens is None else tokens}"
    outputs = ("logits",) if head else ("hidden",)
    return _trace(name, module, example, inputs, outputs, tuple(states), dynamic)


def trace_vision(config: ModelConfig, height: int | None = None, width: int | None = None) -> Program:
    """Trace the vision encoder for one image size in pixels, or with symbolic height and width.

    Symbolic, the patch grid appears as numbers of an arbitrary example in the arguments of
    `resample_positions` and `grid_rotary`: the lowering must put the size of the call in their place.
    """
    if config.vision is None:
        raise ValueError("the model has no vision encoder")
    side = config.vision.pixels_per_token
    dynamic: tuple[object, ...] | None = None
    if height is None or width is None:
        dynamic = ({2: side * Dim("rows", min=2), 3: side * Dim("columns", min=2)},)
    with torch.device("meta"):
        vision = VisionEncoder(config.vision).eval()
        example = (torch.empty(1, 3, height or 3 * side, width or 5 * side),)
    name = "vision" if dynamic else f"vision_{height}x{width}"
    return _trace(name, _Vision(vision), example, ("image",), ("image_embeddings",), (), dynamic)


def trace_embed(config: ModelConfig) -> Program:
    """Trace the embedding with a symbolic number of tokens S."""
    with torch.device("meta"):
        embedding = Embedding(config.text).eval()
        example = (torch.empty(1, 2, dtype=torch.int64),)
    return _trace(
        "embed", _Embed(embedding), example, ("input_ids",), ("embeddings",), (), ({1: Dim("S", min=2)},)
    )


def _trace(
    signature: str,
    module: nn.Module,
    example: tuple[object, ...],
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    states: tuple[State, ...],
    dynamic: tuple[object, ...] | None = None,
) -> Program:
    with torch.no_grad():
        exported = torch.export.export(module, example, dynamic_shapes=dynamic, strict=False)
    return Program(signature, exported, inputs, outputs, states)


def vocabulary(program: Program) -> set[str]:
    """Names of the operators a traced program uses; the closed list is in the tests."""
    return {str(node.target) for node in program.exported.graph.nodes if node.op == "call_function"}

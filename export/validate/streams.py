"""How large the residual streams of a model become: our modules in float32 over prompts and pictures, streamed.

For targets whose activations are float16. Not more than one decoder layer, or the vision encoder, is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from export.chat.template import has_template, load_tokenizer, render
from export.checkpoint.weights import Weights
from export.model import state
from export.model.config import ModelConfig
from export.model.decoder import Decoder
from export.model.positions import PositionCounter, splice
from export.model.vision import VisionEncoder
from export.quantize.scale import StreamScale
from export.validate import texts
from export.validate.examples import QUESTION
from export.validate.probe import Probe, image_tokens, make_probe
from export.validate.reference import fill
from export.validate.transformers_model import on_meta

TEXT_TOKENS = 128
"""Of text in what an export measures on, beside pictures."""

NORMS = ("norm1", "norm2", "merger_norm")
"""Modules of the vision encoder that read its residual stream."""


@dataclass(frozen=True)
class Streams:
    """Largest magnitudes of a residual stream, before and inside each layer or block, and after the last."""

    text: tuple[float, ...]
    vision: tuple[float, ...]
    """Empty without pictures."""

    @property
    def scale(self) -> StreamScale:
        """With what factors float16 holds them well.

        Raises:
            ScaleError: a stream that is not finite.
        """
        return StreamScale.fitting(text=_most(self.text), vision=_most(self.vision))


def prompts(config: ModelConfig, folder: Path, sizes: tuple[tuple[int, int], ...]) -> list[Probe]:
    """What an export measures on: the passages with two pictures, and a rendered question, whose delimiters are where
    trained models have their largest activations. Random tokens for weights without a tokenizer.

    Args:
        folder: with the bundle's tokenizer.

    Raises:
        ExportError: the tokenizer or the template fails.
    """
    tokens = TEXT_TOKENS + sum(image_tokens(config, *size) + 2 for size in (list(sizes) * 2)[:2])
    if not (folder / "tokenizer.json").exists():
        return [make_probe(config, tokens, sizes)]
    tokenizer = load_tokenizer(folder)
    found = [make_probe(config, tokens, sizes, text=texts.text(tokenizer))]
    if has_template(tokenizer):
        ids = render(tokenizer, [{"role": "user", "content": QUESTION}])
        found.append(Probe(ids, PositionCounter().prompt(ids, config.image_token_id, []), []))
    return found


@torch.inference_mode()
def measure(weights: Weights, probes: Sequence[Probe], advance: Callable[[], None] = lambda: None) -> Streams:
    """Run every sequence with its pictures.

    Args:
        weights: whose streams are not scaled yet. probes: their image tokens are expanded; pictures are [3, H, W].
        advance: called after every layer.
    """
    vision: list[float] = []
    rows = []
    embeddings = _embeddings(weights, probes)
    encoder: nn.Module | None = _encoder(weights) if any(probe.images for probe in probes) else None
    for probe in probes:
        images = []
        for image in probe.images:
            if encoder is None:
                raise ValueError("a picture for a model without a vision encoder")
            with _watched(_norms(encoder)) as seen:
                last = encoder(torch.from_numpy(image))
            images.append(np.asarray(last.numpy(), np.float32))
            found = [_most(seen[i : i + 2]) for i in range(0, len(seen), 2)]
            vision = [_most(pair) for pair in zip(vision or found, found, strict=True)]
        plain = np.stack([embeddings[i] for i in probe.ids])
        rows.append(splice(plain, probe.ids, weights.config.image_token_id, images))
    del encoder
    return Streams(tuple(_text(weights, probes, rows, advance)), tuple(vision))


def _text(
    weights: Weights, probes: Sequence[Probe], rows: list[NDArray[np.float32]], advance: Callable[[], None]
) -> list[float]:
    config = weights.config
    hidden = [torch.from_numpy(each) for each in rows]
    largest = [0.0] * (config.text.num_hidden_layers + 1)
    for index in range(config.text.num_hidden_layers):
        part = range(index, index + 1)
        decoder = on_meta(lambda p=part: Decoder(config.text, p, head=False))
        fill(decoder, weights, "decoder.")
        layer = decoder.layers[str(index)]
        for place, probe in enumerate(probes):
            count = len(probe.ids)
            states = [torch.zeros(s.shape) for s in state.layout(config.text, count, part)]
            positions = torch.from_numpy(probe.positions)
            start, valid = torch.zeros(1, dtype=torch.int32), torch.tensor([count], dtype=torch.int32)
            with _watched([layer.input_norm, layer.post_norm]) as seen:
                hidden[place], _ = decoder(hidden[place], positions, start, valid, states)
            largest[index] = _most([largest[index], *seen])
        advance()
    largest[-1] = _most([float(each.abs().max()) for each in hidden])
    return largest


def _embeddings(weights: Weights, probes: Sequence[Probe]) -> dict[int, NDArray[np.float32]]:
    """Rows [D] of the tokens that occur."""
    ids = {i for probe in probes for i in probe.ids}
    return {i: weights.rows("embedding.weight", i, i + 1)[0].numpy() for i in ids}


def _encoder(weights: Weights) -> VisionEncoder | None:
    vision = weights.config.vision
    if vision is None:
        return None
    encoder = on_meta(lambda: VisionEncoder(vision))
    fill(encoder, weights, "vision.")
    return encoder


def _norms(encoder: nn.Module) -> list[nn.Module]:
    """What reads the stream, in order."""
    return [norm for name, norm in encoder.named_modules() if name.rpartition(".")[2] in NORMS]


@contextmanager
def _watched(norms: Sequence[nn.Module]) -> Iterator[list[float]]:
    """A list that gets the largest magnitude of what each of the modules reads, as they are called."""
    seen: list[float] = []

    def see(module: nn.Module, given: tuple[Any, ...]) -> None:
        x: Tensor = given[0]
        seen.append(float(x.abs().max()))

    handles = [norm.register_forward_pre_hook(see) for norm in norms]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _most(values: Sequence[float]) -> float:
    """The largest; NaN where one is, infinity included, and 0 of none."""
    return float(np.max(np.asarray([0.0, *values])))

"""Our own modules in PyTorch behind the same session as every bundle: the first rung of the ladder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from export.checkpoint.weights import Weights
from export.model import state
from export.model.config import ModelConfig
from export.model.decoder import Decoder, Embedding
from export.model.vision import VisionEncoder

Arrays = dict[str, NDArray[Any]]


class Model(nn.Module):
    """Embedding, decoder and vision encoder with parameters named as in `export.checkpoint.weights`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.text)
        self.decoder = Decoder(config.text)
        self.vision = VisionEncoder(config.vision) if config.vision is not None else None

    @classmethod
    def load(cls, weights: Weights) -> Model:
        """The whole model in float32; for models that fit in memory."""
        with torch.device("meta"):
            model = cls(weights.config)
        head, tied = "decoder.head.weight", weights.config.text.tie_word_embeddings
        tensors = {name: weights.tensor(name) for name in weights.parameters if not (tied and name == head)}
        if tied:
            tensors[head] = tensors["embedding.weight"]
        model.load_state_dict(tensors, assign=True)
        return model.eval().requires_grad_(False)


class TorchSession:
    """Runs the contract's signatures on a `Model`; states are float32 tensors, zero at the start."""

    def __init__(self, model: Model, context_length: int, prefill_lengths: tuple[int, ...]) -> None:
        self.model = model
        self.config = model.config
        self.load_seconds = 0.0
        self.context_length = context_length
        self.prefill_lengths = prefill_lengths
        self.rows = state.cache_rows(context_length, prefill_lengths)
        self._states: list[Tensor] = []
        self.reset()

    def run(self, signature: str, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in inputs.items()}
        with torch.inference_mode():
            if signature == "embed":
                return {"embeddings": self.model.embedding(tensors["input_ids"]).numpy()}
            if signature.startswith("vision_"):
                if self.model.vision is None:
                    raise ValueError("the model has no vision encoder")
                image = self.model.vision(tensors["image"].squeeze(0))
                return {"image_embeddings": image.unsqueeze(0).numpy()}
            valid = None if signature == "decode" else tensors["valid"]
            logits, self._states = self.model.decoder(
                tensors["embeddings"].squeeze(0),
                tensors["position_ids"],
                tensors["start"],
                valid,
                self._states,
            )
            return {"logits": logits.numpy()}

    def reset(self) -> None:
        self._states = state.zeros(self.config.text, self.rows)

    def snapshot(self) -> list[Tensor]:
        return [tensor.clone() for tensor in self._states]

    def restore(self, snapshot: list[Tensor]) -> None:
        self._states = [tensor.clone() for tensor in snapshot]

    def states(self) -> Arrays:
        names = state.layout(self.config.text, self.rows)
        return {s.name: t.numpy() for s, t in zip(names, self._states, strict=True)}

    def close(self) -> None:
        """Nothing to release."""

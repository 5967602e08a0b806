"""Weights as the recipe wants them, streamed: read rows, quantise, hand on, forget."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from export.checkpoint.weights import Weights
from export.quantize import rtn
from export.quantize.recipe import Recipe, Setting, layer_of
from export.quantize.tensor import QuantizedBlock
from export.spec import ExportError

Method = Callable[[Tensor, Setting], QuantizedBlock]

METHODS: dict[str, Method] = {"rtn": rtn.quantize_block}
"""Name in a recipe -> function of float32 rows. A calibrated method joins here."""


class Quantizer:
    """One recipe applied to one checkpoint. Nothing is cached but error sums."""

    def __init__(self, weights: Weights, recipe: Recipe) -> None:
        text = weights.config.text
        self.weights = weights
        self.recipe = recipe.for_model(text.tie_word_embeddings, text.num_hidden_layers)
        self._errors: dict[str, tuple[float, float]] = {}

    def setting(self, name: str) -> Setting | None:
        """How a parameter is quantised, or None when it stays float32."""
        role = self.weights.parameter(name).role
        if role == "kept":
            return None
        setting = self.recipe.setting(role, layer_of(name))
        return setting if setting.quantised else None

    def blocks(self, name: str, first: int = 0, stop: int | None = None) -> Iterator[tuple[int, QuantizedBlock]]:
        """(first row, quantised rows) of a parameter, or of its rows first…stop-1, about 4 M weights at a time."""
        setting = self._required(name)
        signal = noise = 0.0
        for start, rows in self.weights.blocks(name, first, stop):
            block = _quantised(name, rows, setting)
            error = block.dequantize().sub_(rows)
            signal += float(rows.square().sum())
            noise += float(error.square().sum())
            yield start, block
        self._errors[name] = (signal, noise)

    def reference_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a parameter as every bundle of this recipe must hold them: float32, dequantised."""
        rows = self.weights.rows(name, start, stop)
        setting = self.setting(name)
        if setting is None:
            return rows
        return _quantised(name, rows, setting).dequantize()

    def relative_errors(self) -> dict[str, float]:
        """Root mean square error of each streamed parameter, relative to its own."""
        return {name: (noise / signal) ** 0.5 if signal else 0.0 for name, (signal, noise) in self._errors.items()}

    def _required(self, name: str) -> Setting:
        setting = self.setting(name)
        if setting is None:
            raise ValueError(f"{name} is not quantised by recipe {self.recipe.name}")
        return setting


def _quantised(name: str, rows: Tensor, setting: Setting) -> QuantizedBlock:
    try:
        return METHODS[setting.method](rows, setting)
    except ExportError as error:
        raise type(error)(f"{name}: {error}") from error

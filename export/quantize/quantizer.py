"""Weights as the recipe wants them, streamed: read rows, quantise, hand on, forget."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from export.checkpoint.weights import Weights
from export.quantize import rtn
from export.quantize.recipe import Recipe, Setting, layer_of
from export.quantize.tensor import QuantizedBlock
from export.spec import ExportError

Method = Callable[[Tensor, Setting, float], QuantizedBlock]

METHODS: dict[str, Method] = {"rtn": rtn.quantize_block}
"""Name in a recipe -> function of float32 rows, with no scale below a number. A calibrated method joins here."""


class Quantizer:
    """One recipe applied to one checkpoint. Nothing is cached but error sums.

    Args:
        smallest_scale: that of the target, in `Capabilities`.
    """

    def __init__(self, weights: Weights, recipe: Recipe, smallest_scale: float = rtn.SMALLEST) -> None:
        text = weights.config.text
        self.weights = weights
        self.recipe = recipe.for_model(text.tie_word_embeddings, text.num_hidden_layers)
        self._smallest = smallest_scale
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
        for start, rows in self.weights.blocks(name, first, stop):
            yield start, self._quantised(name, rows, setting)

    def reference_rows(self, name: str, start: int, stop: int, floats: str = "float32") -> Tensor:
        """Rows of a parameter as every bundle of this recipe must hold them, in float32.

        Args:
            floats: dtype in which the target stores what is not quantised.
        """
        rows = self.weights.rows(name, start, stop)
        setting = self.setting(name)
        if setting is not None:
            stored = self._quantised(name, rows, setting).dequantize()
        elif floats == "float16":
            stored = rows.half().float()
        else:
            return rows
        signal, noise = self._errors.get(name, (0.0, 0.0))
        error = float((stored - rows).square().sum())
        self._errors[name] = (signal + float(rows.square().sum()), noise + error)
        return stored

    def relative_errors(self) -> dict[str, float]:
        """Root mean square error of each parameter that `reference_rows` rounded, over all rows it gave, relative to
        that of the checkpoint: 1 where nothing of it is left.
        """
        return {name: (noise / signal) ** 0.5 if signal else 0.0 for name, (signal, noise) in self._errors.items()}

    def _required(self, name: str) -> Setting:
        setting = self.setting(name)
        if setting is None:
            raise ValueError(f"{name} is not quantised by recipe {self.recipe.name}")
        return setting

    def _quantised(self, name: str, rows: Tensor, setting: Setting) -> QuantizedBlock:
        try:
            return METHODS[setting.method](rows, setting, self._smallest)
        except ExportError as error:
            raise type(error)(f"{name}: {error}") from error

"""The one representation of quantised weights that every target packs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class QuantizedBlock:
    """Some rows of a quantised weight [r, K] with G groups of K/G input features each.

    codes: int8 [r, K]; symmetric -8…7 or -127…127, asymmetric 0…15. scales: float32 [r, G], each exact in
    float16 and bfloat16 too. zero_points: uint8 [r, G], or None when symmetric.
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None

    def dequantize(self) -> Tensor:
        """float32 [r, K]: (code - zero point) · scale."""
        rows, columns = self.codes.shape
        grouped = self.codes.reshape(rows, self.scales.shape[1], -1).to(torch.float32)
        if self.zero_points is not None:
            grouped = grouped - self.zero_points.unsqueeze(-1).to(torch.float32)
        return (grouped * self.scales.unsqueeze(-1)).reshape(rows, columns)

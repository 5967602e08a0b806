"""The exportable modules in training: operators with a gradient, one step's computation, the initial tensors.

Leaf parameters have published names and shapes; each step stacks them into the exportable model's parameters with the
same map the exporter uses. Importing this replaces the decoder's operators by those for training.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from export.checkpoint.names import expected
from export.model import decoder, delta_rule, state
from export.model.config import ModelConfig
from export.model.session import Model

CHUNK = 64


class TrainingOperators:
    """The exporter's operators, the delta rule without recomputation in its backward."""

    gated_delta_chunk = staticmethod(delta_rule.chunked)
    lost = ""
    """What attention has lost of earlier chunks: "keys", "values" (both read as zeros) or nothing."""

    def cached_attention(
        self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, start: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not self.lost:
            result: tuple[Tensor, Tensor, Tensor] = torch.ops.mobile.cached_attention(
                q, k, v, keys, values, start, scale
            )
            return result
        group, count = q.shape[-2] // k.shape[-2], q.shape[-3]
        each = [x.transpose(-3, -2).repeat_interleave(group, dim=-3) for x in (k, v)]
        place = torch.arange(count)
        earlier = place[:, None] // CHUNK > place[None, :] // CHUNK
        scores = (q.transpose(-3, -2) @ each[0].transpose(-2, -1)) * scale
        if self.lost == "keys":
            scores = scores.masked_fill(earlier, 0.0)
        weights = scores.masked_fill(place[:, None] < place[None, :], float("-inf")).softmax(-1)
        if self.lost == "values":
            weights = weights.masked_fill(earlier, 0.0)
        return (weights @ each[1]).transpose(-3, -2), keys, values

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.ops.mobile, name)


def substitution(lower: Tensor) -> Tensor:
    """Inverse of I + L by forward substitution: on a CPU, with its gradient, four times faster than doubling."""
    one = torch.eye(lower.shape[-1]).expand_as(lower)
    return torch.linalg.solve_triangular(lower + one, one, upper=False, unitriangular=True)


operators = TrainingOperators()
decoder.ops = operators  # type: ignore[assignment]
delta_rule.unit_lower_inverse = substitution


class Forward(nn.Module):
    """What one training step computes, over the exportable modules with a batch dimension."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.vision_trains = True
        with torch.device("meta"):
            self.model = Model(config)

    def forward(self, images: Tensor | None, ids: Tensor | None, positions: Tensor | None) -> Tensor:
        vision: Any = self.model.vision  # None only where no pictures come
        if ids is None:
            encoded: Tensor = vision(images)
            return encoded
        text = self.model.config.text
        rows = self.model.embedding(ids)
        if images is not None:
            with torch.set_grad_enabled(self.vision_trains and torch.is_grad_enabled()):
                encoded = vision(images)
            rows = rows.masked_scatter((ids == self.model.config.image_token_id).unsqueeze(-1), encoded.to(rows.dtype))
        count = ids.shape[1]
        states = [
            torch.zeros(len(ids), *s.shape) for s in state.layout(text, count)
        ]
        start, valid = torch.zeros(1, dtype=torch.int32), torch.tensor([count], dtype=torch.int32)
        return self.model.decoder(rows, positions, start, valid, states, all_rows=True)[0]


def initial(config: ModelConfig) -> dict[str, Tensor]:
    """Published tensors at the start. The embedding is large, or the residual stream drowns it."""
    torch.manual_seed(0)
    tensors = {}
    for name, shape in expected(config).items():
        fan_in = math.prod(shape[1:]) if len(shape) > 1 else 1
        tensor = torch.randn(shape) * fan_in**-0.5
        if name.endswith("embed_tokens.weight"):
            tensor = torch.randn(shape)
        elif name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight")):
            tensor *= 0.4
        elif name.endswith("A_log"):
            tensor = torch.empty(shape).uniform_(0.5, 8).log()
        elif name.endswith("dt_bias"):  # inverse softplus of log-uniform steps (Gu & Dao 2023)
            step = torch.exp(torch.empty(shape).uniform_(math.log(1e-3), math.log(0.1)))
            tensor = step + torch.log(-torch.expm1(-step))
        elif name.endswith("pos_embed.weight"):
            tensor = torch.randn(shape) * 0.3
        elif name.endswith("linear_attn.norm.weight") or ("visual" in name and "norm" in name and "weight" in name):
            tensor = torch.ones(shape)
        elif name.endswith("language_model.norm.weight"):
            tensor = torch.full(shape, -0.9)  # the tied head would shout: start with small logits
        elif len(shape) == 1:
            tensor = torch.zeros(shape)
        tensors[name] = tensor
    return tensors

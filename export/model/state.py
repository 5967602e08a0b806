"""What survives a call: the shape of every state tensor, in the order in which programs take them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from export.model.config import FULL, TextConfig


@dataclass(frozen=True)
class State:
    """One state tensor; `kind` is key, value, conv or recurrent, `shape` without a batch dimension."""

    name: str
    kind: str
    layer: int
    shape: tuple[int, ...]


def cache_rows(context_length: int, prefill_lengths: tuple[int, ...]) -> int:
    """Rows of a KV buffer: a padded chunk may start at the last slot and still writes all its rows."""
    return context_length + max(prefill_lengths, default=1) - 1


def layout(config: TextConfig, rows: int, layers: range | None = None) -> list[State]:
    """States of the given layers, two per layer: conv, recurrent or key, value. `rows`: KV rows L."""
    states = []
    for layer in layers if layers is not None else range(config.num_hidden_layers):
        if config.layer_types[layer] == FULL:
            shape: tuple[int, ...] = (config.num_key_value_heads, rows, config.head_dim)
            pair: tuple[tuple[str, tuple[int, ...]], ...] = (("key", shape), ("value", shape))
        else:
            conv = (config.conv_dim, config.linear_conv_kernel_dim - 1)
            recurrent = (
                config.linear_num_value_heads,
                config.linear_key_head_dim,
                config.linear_value_head_dim,
            )
            pair = (("conv", conv), ("recurrent", recurrent))
        states += [State(f"{kind}_{layer}", kind, layer, shape) for kind, shape in pair]
    return states


def zeros(config: TextConfig, rows: int, batch: tuple[int, ...] = ()) -> list[Tensor]:
    """Fresh float32 states, all zero."""
    return [torch.zeros(*batch, *state.shape) for state in layout(config, rows)]

"""How much there is to compute: a number of the model, which no runtime and no host changes."""

from __future__ import annotations

import math

from export.checkpoint.weights import parameters
from export.model.config import FULL, ModelConfig


def decode_macs(config: ModelConfig, tokens: int) -> int:
    """Multiply-accumulates of one decode step behind `tokens` tokens of context.

    Every matrix of the decoder, its head and its convolutions meets one vector. Attention multiplies each query head
    with every key and weighs every value; the delta rule reads the recurrent state twice and adds an outer product to
    it. Norms, gates and activations, which have no sums over matrices, are left out.
    """
    text = config.text
    matrices = sum(
        math.prod(each.shape)
        for name, each in parameters(config.without_vision()).items()
        if name.startswith("decoder.") and len(each.shape) == 2
    )
    full = text.layer_types.count(FULL)
    attention = 2 * text.num_attention_heads * text.head_dim * (tokens + 1)
    state = text.linear_num_value_heads * text.linear_key_head_dim * text.linear_value_head_dim
    return matrices + full * attention + (text.num_hidden_layers - full) * 3 * state

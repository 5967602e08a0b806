"""transformers over many sequences at once, teacher-forced, layer by layer: logits where they are wanted.

Every layer is loaded once for all sequences, and no more than one is in memory. Tokens go in at once, without a cache:
the chunked delta rule that this takes rounds four times less exactly than single steps (docs/LOG.md), far below what
quantisation changes, and takes a hundredth of their time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from export.checkpoint.base import Checkpoint
from export.checkpoint.weights import TEXT
from export.model.config import FULL, ModelConfig
from export.validate.reference import Advance, head_logits, load_module
from export.validate.transformers_model import head_tensor, hf_config, on_meta, without_deprecations


@dataclass(frozen=True)
class Reading:
    """One sequence.

    Attributes:
        rows: embeddings [T, D]. positions: [3, T]. wanted: the tokens whose logits are asked.
    """

    rows: NDArray[np.float32]
    positions: NDArray[np.int32]
    wanted: Sequence[int]


@without_deprecations()
@torch.inference_mode()
def hf_logits(
    checkpoint: Checkpoint,
    config: ModelConfig,
    readings: Sequence[Reading],
    advance: Advance = lambda: None,
) -> list[NDArray[np.float32]]:
    """transformers fp32: logits [wanted, V] of each reading."""
    from transformers.models.qwen3_5 import modeling_qwen3_5 as hf

    settings = hf_config(checkpoint, config).text_config
    rotary = hf.Qwen3_5TextRotaryEmbedding(settings)
    hidden = [torch.from_numpy(reading.rows)[None] for reading in readings]
    tables = [
        rotary(rows, torch.from_numpy(reading.positions).to(torch.int64).unsqueeze(1))
        for rows, reading in zip(hidden, readings, strict=True)
    ]
    for index, kind in enumerate(config.text.layer_types):
        layer = on_meta(lambda i=index: hf.Qwen3_5DecoderLayer(settings, i))
        load_module(layer, checkpoint, f"{TEXT}.layers.{index}")
        for number, rows in enumerate(hidden):
            mask = _causal(rows.shape[1]) if kind == FULL else None
            hidden[number] = layer(rows, position_embeddings=tables[number], attention_mask=mask)
        advance()
    norm = on_meta(lambda: hf.Qwen3_5RMSNorm(config.text.hidden_size, config.text.rms_norm_eps))
    load_module(norm, checkpoint, f"{TEXT}.norm")
    asked = [norm(rows[0, list(reading.wanted)]) for rows, reading in zip(hidden, readings, strict=True)]
    (logits,) = head_logits(partial(checkpoint.read, head_tensor(checkpoint)), config, torch.cat(asked))
    return np.split(logits, np.cumsum([len(rows) for rows in asked])[:-1])


def _causal(tokens: int) -> Any:
    """An additive mask [1, 1, T, T]."""
    return torch.full((tokens, tokens), torch.finfo(torch.float32).min).triu(1)[None, None]

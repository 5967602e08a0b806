"""The fp32 reference, layer by layer: transformers' own layers, and ours, over one fixed sequence.

No more than one decoder layer (or one block of head rows) is in memory, so that a 9B model is judged on a
machine that could not hold it. A sequence is teacher-forced: every layer sees all its tokens, then the next
layer is loaded. transformers' modules are used as they are, and which tensor is the head is its decision
(`transformers_model`); the loop around them is ours, and `transformers_model.whole_model` checks it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.checkpoint.base import Checkpoint
from export.checkpoint.names import EMBEDDING
from export.checkpoint.weights import HEAD_BASIS, TEXT, VISION, Weights
from export.model import state
from export.model.config import FULL, ModelConfig
from export.model.decoder import Decoder
from export.model.operators import ops
from export.model.vision import VisionEncoder
from export.validate.transformers_model import (
    head_tensor,
    hf_config,
    on_meta,
    pixels,
    recurrent_rule,
    without_deprecations,
)

HEAD_ROWS = 16384
Arrays = dict[str, NDArray[Any]]
Advance = Callable[[], None]
"""Called after every layer, for a remaining time."""


def load_module(module: torch.nn.Module, checkpoint: Checkpoint, prefix: str) -> torch.nn.Module:
    """Fill a module made on the meta device from published tensors, in float32."""
    tensors = {name: checkpoint.read(f"{prefix}.{name}") for name, _ in module.named_parameters()}
    module.load_state_dict(tensors, strict=False, assign=True)
    return module.eval().requires_grad_(False)


def head_logits(
    read: Callable[[int, int], Tensor], config: ModelConfig, *hidden: Tensor
) -> list[NDArray[np.float32]]:
    """Each hidden [T, D] in its dtype times the head, which `read` gives by rows, in blocks of them: logits [T, V]."""
    logits = [np.empty((len(each), config.text.vocab_size), np.float32) for each in hidden]
    for start in range(0, config.text.vocab_size, HEAD_ROWS):
        stop = min(start + HEAD_ROWS, config.text.vocab_size)
        rows = read(start, stop)
        for each, found in zip(hidden, logits, strict=True):
            found[:, start:stop] = (each @ rows.to(each.dtype).T).numpy()
    return logits


def embed(checkpoint: Checkpoint, ids: Sequence[int]) -> NDArray[np.float32]:
    """Rows [T, D] of the published embedding, read one by one."""
    rows = {i: checkpoint.read(EMBEDDING, i, i + 1)[0].numpy() for i in set(ids)}
    return np.stack([rows[i] for i in ids])


@torch.inference_mode()
def hf_vision(
    checkpoint: Checkpoint, config: ModelConfig, images: Sequence[NDArray[Any]]
) -> list[NDArray[np.float32]]:
    """transformers' image processor and vision tower on pictures [3, H, W] of 8-bit values in 0…1: embeddings [N, D]
    of each.
    """
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5VisionModel

    if not images:
        return []
    tower = on_meta(lambda: Qwen3_5VisionModel(hf_config(checkpoint, config).vision_config))
    tower.rotary_pos_emb = type(tower.rotary_pos_emb)(tower.config)
    load_module(tower, checkpoint, VISION)
    results = []
    for image in images:
        seen = pixels(checkpoint, config, [image])
        result = tower(seen.values, grid_thw=seen.grid).pooler_output
        results.append(np.asarray(result.numpy(), np.float32))
    return results


@without_deprecations()
@torch.inference_mode()
def hf_sequence(
    checkpoint: Checkpoint,
    config: ModelConfig,
    rows: NDArray[Any],
    position_ids: NDArray[Any],
    prefill: int | None = None,
    recurrent: bool = False,
    advance: Advance = lambda: None,
) -> tuple[NDArray[np.float32], Arrays]:
    """transformers fp32 over embeddings rows [T, D] at positions [3, T].

    The first `prefill` tokens (None: all) go in at once, the others one by one through the cache, as
    generation does: its recurrent step rounds differently from its chunks, which sum logarithms of decay.

    Args:
        recurrent: the tokens that go in at once take that step too, in transformers' own function for it: the same
            states and logits as one by one, in a tenth of the time, because a layer's matrices meet all of them.

    Returns:
        logits [T, V] and the state after the last token, named and shaped as in `export.model.state`
        (KV rows 0…T-1 only).
    """
    from transformers.cache_utils import DynamicCache
    from transformers.models.qwen3_5 import modeling_qwen3_5 as hf

    settings = hf_config(checkpoint, config).text_config
    hidden = torch.from_numpy(rows).unsqueeze(0)
    tokens = hidden.shape[1]
    rotary = hf.Qwen3_5TextRotaryEmbedding(settings)
    tables = rotary(hidden, torch.from_numpy(position_ids).to(torch.int64).unsqueeze(1))
    first = tokens if prefill is None else min(prefill, tokens)
    mask = torch.full((first, first), torch.finfo(torch.float32).min).triu(1)[None, None]
    cache: Any = DynamicCache(config=settings)
    states: Arrays = {}
    for index, kind in enumerate(config.text.layer_types):
        layer = on_meta(lambda i=index: hf.Qwen3_5DecoderLayer(settings, i))
        load_module(layer, checkpoint, f"{TEXT}.layers.{index}")
        full = kind == FULL
        parts = []
        with recurrent_rule() if recurrent else nullcontext():
            for part in [slice(0, first), *(slice(t, t + 1) for t in range(first, tokens))]:
                parts.append(
                    layer(
                        hidden[:, part],
                        position_embeddings=(tables[0][:, part], tables[1][:, part]),
                        attention_mask=mask if full and part.start == 0 else None,
                        past_key_values=cache,
                        use_cache=True,
                    )
                )
        hidden = torch.cat(parts, dim=1)
        advance()
        if full:
            states[f"key_{index}"] = cache.layers[index].keys[0].numpy()
            states[f"value_{index}"] = cache.layers[index].values[0].numpy()
        else:
            width = config.text.linear_conv_kernel_dim - 1
            conv = cache.get_conv_state(index, state_idx=0)[0]
            states[f"conv_{index}"] = conv[:, -width:].numpy()
            states[f"recurrent_{index}"] = cache.get_recurrent_state(index, state_idx=0)[0].numpy()
    norm = on_meta(lambda: hf.Qwen3_5RMSNorm(config.text.hidden_size, config.text.rms_norm_eps))
    load_module(norm, checkpoint, f"{TEXT}.norm")
    head = partial(checkpoint.read, head_tensor(checkpoint))
    (logits,) = head_logits(head, config, norm(hidden)[0])
    return logits, states


def fill(
    module: torch.nn.Module, weights: Weights, prefix: str, dtype: torch.dtype = torch.float32
) -> torch.nn.Module:
    """Fill one of our modules made on the meta device."""
    names = [name for name, _ in module.named_parameters()]
    module.load_state_dict({n: weights.tensor(f"{prefix}{n}").to(dtype) for n in names}, assign=True)
    return module.eval().requires_grad_(False)


@torch.inference_mode()
def own_vision(
    weights: Weights, images: Sequence[NDArray[Any]], dtype: torch.dtype = torch.float32
) -> list[NDArray[np.float32]]:
    """Our vision encoder on pictures [3, H, W] in 0…1, computed in `dtype`: embeddings [N, D] of each."""
    vision = weights.config.vision
    if not images:
        return []
    if vision is None:
        raise ValueError("the model has no vision encoder")
    encoder = fill(on_meta(lambda: VisionEncoder(vision)), weights, "vision.", dtype)
    return [np.asarray(encoder(torch.from_numpy(image).to(dtype)).numpy(), np.float32) for image in images]


def pieces(tokens: int, plan: Sequence[tuple[int | None, int]]) -> Iterator[tuple[int, int | None, int]]:
    """(first token, chunk length or None for decode, valid tokens) covering `tokens`."""
    first = 0
    for length, valid in plan:
        yield first, length, valid
        first += valid
    if first != tokens:
        raise ValueError(f"the plan covers {first} tokens, not {tokens}")


@dataclass(frozen=True)
class Pass:
    """One way of our modules over a sequence: by padded chunks and single steps as `plan` says, with caches of so many
    rows, computed in `dtype`; logits of all tokens, or of the `last` alone.
    """

    plan: Sequence[tuple[int | None, int]]
    cache_rows: int
    dtype: torch.dtype = torch.float32
    last: int = 0


def own_sequence(
    weights: Weights,
    rows: NDArray[Any],
    position_ids: NDArray[Any],
    plan: Sequence[tuple[int | None, int]],
    cache_rows: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[NDArray[np.float32], Arrays]:
    """One pass of `own_sequences`."""
    return own_sequences(weights, rows, position_ids, [Pass(plan, cache_rows, dtype)])[0]


@torch.inference_mode()
def own_sequences(
    weights: Weights,
    rows: NDArray[Any],
    position_ids: NDArray[Any],
    passes: Sequence[Pass],
    advance: Advance = lambda: None,
) -> list[tuple[NDArray[np.float32], Arrays]]:
    """Our modules over rows [T, D] at positions [3, T], several times. Every layer is read once, for all passes; those
    in float64 come last.

    Returns:
        Of each pass the logits and the final states, KV caches with all their rows.
    """
    config = weights.config
    hidden = [torch.from_numpy(rows).to(each.dtype) for each in passes]
    states: list[Arrays] = [{} for _ in passes]
    for index in range(config.text.num_hidden_layers):
        part = range(index, index + 1)
        decoder = on_meta(lambda p=part: Decoder(config.text, p, head=False))
        fill(decoder, weights, "decoder.")
        for place, each in sorted(enumerate(passes), key=lambda item: item[1].dtype == torch.float64):
            decoder.to(each.dtype)  # float32 to float64 once, which loses nothing
            layout = state.layout(config.text, each.cache_rows, part)
            current = [torch.zeros(s.shape, dtype=each.dtype) for s in layout]
            hidden[place], current = _through(decoder, hidden[place], position_ids, each.plan, current)
            states[place] |= {s.name: t.numpy() for s, t in zip(layout, current, strict=True)}
        advance()
    norm = weights.tensor("decoder.norm.weight")
    normed = []
    for each, found in zip(passes, hidden, strict=True):
        last = ops.rms_norm(found[-each.last :], norm.to(each.dtype), config.text.stream_eps)
        basis = weights.tensor(HEAD_BASIS).to(each.dtype) if config.text.head_basis else None
        normed.append(last if basis is None else last @ basis.T)
    return list(zip(head_logits(partial(weights.rows, "decoder.head.weight"), config, *normed), states, strict=True))


def _through(
    decoder: torch.nn.Module,
    hidden: Tensor,
    position_ids: NDArray[Any],
    plan: Sequence[tuple[int | None, int]],
    states: list[Tensor],
) -> tuple[Tensor, list[Tensor]]:
    """hidden [T, D] behind one layer, and its states."""
    positions = torch.from_numpy(position_ids)
    outputs = []
    for first, length, valid in pieces(len(hidden), plan):
        size = length or 1
        chunk = torch.zeros(size, hidden.shape[1], dtype=hidden.dtype)
        chunk[:valid] = hidden[first : first + valid]
        places = torch.zeros(3, size, dtype=torch.int32)
        places[:, :valid] = positions[:, first : first + valid]
        limit = None if length is None else torch.tensor([valid], dtype=torch.int32)
        start = torch.tensor([first], dtype=torch.int32)
        result, states = decoder(chunk, places, start, limit, states)
        outputs.append(result[:valid])
    return torch.cat(outputs), states

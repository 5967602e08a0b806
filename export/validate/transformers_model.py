"""What transformers itself makes of a checkpoint: its config, tying, positions, splicing, pictures, the whole model.

Every decision is asked of transformers' own classes, so that a mistake in this project's reading of a config cannot
be on both sides of a comparison. Where a decision needs no weights, it is asked of a skeleton without layers.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.checkpoint.base import Checkpoint, equal_rows
from export.checkpoint.names import EMBEDDING, HEAD, canonical, expected
from export.checkpoint.weights import VISION
from export.model.config import ConfigError, ModelConfig
from targets.quiet import quiet_imports

SPARE_BYTES = 2**30
"""Room for activations: a 0.8B took 0.3 GB beside weights and logits, and a wider model takes more."""


def on_meta(make: Any) -> Any:
    """What `make` makes, with parameters that have shapes only."""
    with torch.device("meta"):
        return make()


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without advice, load reports and progress bars."""
    from transformers.utils import logging

    bars: Any = logging
    shown = bars.is_progress_bar_enabled()
    with quiet_imports():
        bars.disable_progress_bar()
        try:
            yield
        finally:
            if shown:
                bars.enable_progress_bar()


@contextmanager
def without_deprecations() -> Iterator[None]:
    """transformers 5.24 renames an argument of its layers that 5.23 only knows by the old name: no news for users."""
    from transformers.utils import logging

    logger = logging.get_logger("transformers.utils.generic")
    level = logger.level
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*past_key_values", category=FutureWarning)
        logger.setLevel(40)  # ERROR
        try:
            yield
        finally:
            logger.setLevel(level)


@contextmanager
def recurrent_rule() -> Iterator[None]:
    """Inside, transformers' DeltaNet layers take tokens that come at once by its recurrent function, one by one, and
    not by chunks. Both are functions of its module with the same arguments, which it looks up at every call.
    """
    from transformers.models.qwen3_5 import modeling_qwen3_5 as hf

    chunked = hf.torch_chunk_gated_delta_rule
    hf.torch_chunk_gated_delta_rule = hf.torch_recurrent_gated_delta_rule
    try:
        yield
    finally:
        hf.torch_chunk_gated_delta_rule = chunked


@contextmanager
def _reading_config() -> Iterator[None]:
    try:
        with quiet():
            yield
    except Exception as error:  # of fields that only transformers reads, which it checks with many kinds of error
        raise ConfigError(
            f"config.json: transformers, which the bundle is compared with, refuses it: {error}; correct the field, "
            "or leave the comparison out with --skip-validation"
        ) from error


def cut(settings: Any, layer_types: Sequence[str], vision: bool = True) -> Any:
    """A copy of transformers' config with those decoder layers only, and a vision encoder without blocks if asked."""
    settings = copy.deepcopy(settings)
    text = settings.get_text_config()
    text.num_hidden_layers, text.layer_types = len(layer_types), list(layer_types)
    if not vision and text is not settings:
        settings.vision_config.depth = 0
    settings._attn_implementation = "eager"
    return settings


def hf_config(checkpoint: Checkpoint, config: ModelConfig) -> Any:
    """transformers' Qwen3_5Config for `checkpoint.config`, truncated like `config`.

    Raises:
        ConfigError: transformers refuses it.
    """
    from transformers import Qwen3_5Config

    raw = copy.deepcopy(dict(checkpoint.config))
    with _reading_config():
        settings = Qwen3_5Config(**{k: v for k, v in raw.items() if k != "architectures"})
    return cut(settings, config.text.layer_types)


def model_class(checkpoint: Checkpoint, config: ModelConfig) -> tuple[Any, Any]:
    """The class that transformers loads the checkpoint with, and the config it then has, truncated like `config`.

    The config comes from the folder's own config.json where the checkpoint has a folder. The text decoder saved
    alone (qwen3_5_text) has a class, a spelling of names and a tying flag of its own.

    Raises:
        ConfigError: transformers refuses the config.
    """
    from transformers import AutoConfig, Qwen3_5ForCausalLM, Qwen3_5ForConditionalGeneration

    if checkpoint.folder is None:
        settings = hf_config(checkpoint, config)
    else:
        with _reading_config():
            settings = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
    alone = settings.get_text_config() is settings
    settings = cut(settings, config.text.layer_types, vision=config.vision is not None)
    if getattr(settings, "quantization_config", None) is not None:
        # Left over from training: quantised tensors are refused on reading, and float32 ones not quantised here.
        del settings.quantization_config
    return Qwen3_5ForCausalLM if alone else Qwen3_5ForConditionalGeneration, settings


# --- tying ----------------------------------------------------------------------------------------------------


def head_tensor(checkpoint: Checkpoint) -> str:
    """Published name of the tensor that transformers takes for the head of this checkpoint.

    Its own tie_weights decides, on a model without layers in which one number stands for each of the two matrices:
    equal numbers if and only if the matrices are, which are compared block by block.
    """
    kind, settings = model_class(checkpoint, checkpoint.model_config)
    with quiet():
        model = on_meta(lambda: kind(cut(settings, (), vision=False)))
        stored = set(checkpoint.names())
        missing = {name for name in model.state_dict() if canonical(name) not in stored}
        # Without a tie in transformers' mapping nothing is compared, so nothing needs to be read.
        asked = bool(model.all_tied_weights_keys) and stored >= {EMBEDDING, HEAD}
        apart = asked and not _same(checkpoint, EMBEDDING, HEAD)
        embedding = torch.nn.Parameter(torch.zeros(1))
        model.get_input_embeddings().weight = embedding
        model.get_output_embeddings().weight = torch.nn.Parameter(torch.full((1,), float(apart)))
        model.tie_weights(missing_keys=missing, recompute_mapping=False)
    return EMBEDDING if model.get_output_embeddings().weight is embedding else HEAD


def _same(checkpoint: Checkpoint, one: str, other: str) -> bool:
    """Whether two stored tensors are equal."""
    shape = checkpoint.shape(one)
    return shape == checkpoint.shape(other) and equal_rows(
        shape, partial(checkpoint.read, one), partial(checkpoint.read, other)
    )


# --- pictures, positions, splicing ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Pixels:
    """Pictures as transformers' encoder takes them: patches [P, 3·t·p·p], and a row (time, rows, columns) each."""

    values: Tensor
    grid: Tensor


def pixels(checkpoint: Checkpoint, config: ModelConfig, images: Sequence[NDArray[Any]]) -> Pixels:
    """Pictures [3, H, W] of 8-bit values in 0…1 through transformers' image processor.

    Its settings are those in the checkpoint's folder as transformers reads them, else `checkpoint.preprocessor`, else
    the published ones (mean and standard deviation 0.5). The pictures have a size of the bundle already, so that
    nothing is resized.

    Raises:
        ConfigError: transformers refuses the settings.
        ValueError: values that are no multiples of 1/255: the processor takes bytes, and rounding would be compared.
    """
    if config.vision is None:
        raise ValueError("the model has no vision encoder")
    stored = [_bytes(image) for image in images]
    vision = hf_config(checkpoint, config).vision_config
    cutting = {
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
    }
    try:
        with quiet():
            found = _image_processor(checkpoint)(
                stored, do_resize=False, input_data_format="channels_first", return_tensors="pt", **cutting
            )
    except Exception as error:  # of many kinds, by the setting
        raise ConfigError(
            f"the image processor's settings: transformers, which the bundle is compared with, refuses them: {error}; "
            "take preprocessor_config.json from the published checkpoint, or leave the comparison out with "
            "--skip-validation"
        ) from error
    return Pixels(found["pixel_values"], found["image_grid_thw"])


def _image_processor(checkpoint: Checkpoint) -> Any:
    from transformers import Qwen2VLImageProcessorPil

    published: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    if checkpoint.folder is None:
        given = checkpoint.preprocessor
        return Qwen2VLImageProcessorPil(**(published if given is None else given))
    try:
        return Qwen2VLImageProcessorPil.from_pretrained(checkpoint.folder)
    except OSError:  # neither processor_config.json nor preprocessor_config.json
        return Qwen2VLImageProcessorPil(**published)


def _bytes(image: NDArray[Any]) -> NDArray[np.uint8]:
    scaled = image.astype(np.float64) * 255
    rounded = np.rint(scaled)
    if np.abs(scaled - rounded).max() > 1e-3:
        raise ValueError("a picture for transformers' image processor must hold multiples of 1/255 in 0…1")
    return rounded.astype(np.uint8)


def _skeleton(checkpoint: Checkpoint, config: ModelConfig) -> Any:
    """transformers' Qwen3_5Model without layers."""
    from transformers import Qwen3_5Model

    settings = cut(hf_config(checkpoint, config), (), vision=False)
    return on_meta(lambda: Qwen3_5Model(settings))


def token_kinds(ids: Tensor, image_token_id: int) -> Tensor:
    """The mm_token_type_ids of transformers' processors: 1 for image tokens, 0 for text."""
    return (ids == image_token_id).int()


def hf_positions(
    checkpoint: Checkpoint, config: ModelConfig, ids: Sequence[int], grid: Tensor | None
) -> NDArray[np.int32]:
    """Positions [3, T] that transformers gives tokens with pictures of that grid (None: no pictures)."""
    model, row = _skeleton(checkpoint, config), torch.tensor([list(ids)])
    kinds = token_kinds(row, model.config.image_token_id)
    found, _ = model.get_rope_index(row, kinds, image_grid_thw=grid)
    return np.asarray(found[:, 0].numpy(), np.int32)


def hf_splice(
    checkpoint: Checkpoint,
    config: ModelConfig,
    rows: NDArray[Any],
    ids: Sequence[int],
    images: Sequence[NDArray[Any]],
) -> NDArray[np.float32]:
    """Token embeddings [T, D] with the image embeddings [N, D] where transformers' forward puts them."""
    if not images:
        return np.asarray(rows, np.float32)
    model, row = _skeleton(checkpoint, config), torch.tensor([list(ids)])
    embeddings, features = torch.from_numpy(rows)[None], torch.from_numpy(np.concatenate(images))
    mask, _ = model.get_placeholder_mask(row, inputs_embeds=embeddings, image_features=features)
    return np.asarray(embeddings.masked_scatter(mask, features)[0].numpy(), np.float32)


# --- the whole model ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Whole:
    """Logits [T, V] of the whole model, or None where it does not fit, and a sentence on how it was made."""

    logits: NDArray[np.float32] | None
    note: str


def bytes_needed(checkpoint: Checkpoint, config: ModelConfig, tokens: int) -> int:
    """Memory in which transformers' whole model answers `tokens` tokens in float32.

    Four bytes for every parameter and every logit; the largest tensor once more, which is there in its stored form
    while it is converted; and `SPARE_BYTES`.
    """
    names = set(expected(config)) | ({HEAD} & set(checkpoint.names()))
    sizes = [math.prod(checkpoint.shape(name)) for name in names]
    return 4 * (sum(sizes) + max(sizes) + tokens * config.text.vocab_size) + SPARE_BYTES


@without_deprecations()
@torch.inference_mode()
def whole_model(
    checkpoint: Checkpoint, config: ModelConfig, ids: Sequence[int], images: Sequence[NDArray[Any]]
) -> Whole:
    """transformers' whole model in float32, run once from token ids and pixels to logits, if it fits the free memory.

    Nothing of this project stands between the ids and the logits, and between the folder and the weights only where
    the note says so.
    """
    needed, free = bytes_needed(checkpoint, config, len(ids)), psutil.virtual_memory().available
    if needed > free:
        return Whole(
            None,
            f"L0.whole_model was left out: transformers' whole model takes {needed / 1e9:.1f} GB in float32 and "
            f"{free / 1e9:.1f} GB are free.",
        )
    row = torch.tensor([list(ids)])
    inputs: dict[str, Tensor] = {"input_ids": row}
    if images:
        seen = pixels(checkpoint, config, images)
        kinds = token_kinds(row, hf_config(checkpoint, config).image_token_id)
        inputs |= {"pixel_values": seen.values, "image_grid_thw": seen.grid, "mm_token_type_ids": kinds}
    with quiet():
        model, note = _load(checkpoint, config)
        logits = model(**inputs, use_cache=False).logits[0]
    return Whole(np.asarray(logits.numpy(), np.float32), note)


def _load(checkpoint: Checkpoint, config: ModelConfig) -> tuple[Any, str]:
    """The whole model, and a sentence on where its weights came from: the folder itself if transformers finds every
    tensor in it, else what the checkpoint reads.
    """
    kind, settings = model_class(checkpoint, config)
    options = {"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True}
    what = f"L0.whole_model ran transformers' {kind.__name__}"
    if checkpoint.folder is None:
        why = "the checkpoint is no folder that it reads"
    else:
        try:
            model, found = kind.from_pretrained(
                checkpoint.folder, config=settings, use_safetensors=True, **options
            )
        except Exception as error:  # of many kinds: what it cannot read is told in the note
            # Not its text: that names folders of this machine, and the note goes into the bundle.
            why = f"it cannot load the folder ({type(error).__name__})"
        else:
            missing = sorted(name for name in found["missing_keys"] if not _unused(name, config))
            if not missing:
                return model, f"{what} as from_pretrained loads it from the checkpoint's folder."
            why = f"it does not find {missing[0]}{_more(missing)} in the folder"
    names = {name: canonical(name) for name in on_meta(lambda: kind(settings)).state_dict()}
    stored = set(checkpoint.names())
    tensors = {
        name: checkpoint.read(published)
        for name, published in names.items()
        if not _unused(name, config) and (published != HEAD or HEAD in stored)
    }
    model, _ = kind.from_pretrained(None, config=settings, state_dict=tensors, **options)
    return model, f"{what} filled with the tensors as this project reads them, because {why}."


def _unused(name: str, config: ModelConfig) -> bool:
    """Tensors of the vision encoder where the bundle has none: it is made without blocks and sees no picture."""
    return config.vision is None and canonical(name).startswith(f"{VISION}.")


def _more(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""

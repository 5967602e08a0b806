"""Checkpoint folders in the published form: config, layout, index, sidecars and true shapes, with random weights.

Two layers (one DeltaNet, one of full attention) and two blocks of the encoder stand for all of them. There is no
generation_config.json, as in the published repositories. Folders are kept in out/, keyed by what makes them.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from export.checkpoint.random import RandomCheckpoint
from export.checkpoint.shards import INDEX
from export.model.config import FULL, LINEAR
from export.sizes import get_size, shipped_tiny
from runtime_tests import published_tokenizer
from runtime_tests.files import PUBLISHED, published_template

CACHE = Path(__file__).parents[1] / "out" / "fixtures"
SHARD_BYTES = 400_000_000
TINY_IDS = {"image_token_id": 404, "video_token_id": 405, "vision_start_token_id": 401, "vision_end_token_id": 402}


def published_config(size: str, rows: int | None = None) -> dict[str, Any]:
    """The published config.json of a size with two layers and two blocks.

    Args:
        rows: cut the vocabulary to so many rows; the ids of pictures are then those of tiny's tokenizer.
    """
    config: dict[str, Any] = copy.deepcopy(dict(get_size(size).config or {}))
    config["text_config"] |= {"num_hidden_layers": 2, "layer_types": [LINEAR, FULL]}
    config["vision_config"]["depth"] = 2
    if rows is not None:
        config["text_config"] |= {"vocab_size": rows, "eos_token_id": 392}
        config |= TINY_IDS
    return config


def folder(size: str, rows: int | None = None) -> Path:
    """Such a checkpoint; written if it is not there yet."""
    config = published_config(size, rows)
    template = published_template(PUBLISHED[0] if size in ("0.8b", "2b") else PUBLISHED[1])
    made_by = Path(__file__).read_bytes() + json.dumps(config).encode() + template.encode()
    place = CACHE / f"published-{size}-{hashlib.sha256(made_by).hexdigest()[:16]}"
    if not place.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
            made = Path(temporary) / "checkpoint"
            _write(made, config, template, shipped_tiny() if rows is not None else published_tokenizer.folder())
            if not place.is_dir():  # another worker may have been faster
                made.rename(place)
    return place


def _write(place: Path, config: dict[str, Any], template: str, tokenizer: Path) -> None:
    place.mkdir()
    (place / "config.json").write_text(json.dumps(config, indent=2))
    (place / "chat_template.jinja").write_text(template)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, place / name)
    shutil.copyfile(shipped_tiny() / "preprocessor_config.json", place / "preprocessor_config.json")
    (place / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Random weights in the published form\n")
    random = RandomCheckpoint(config, seed=1)
    hidden = config["text_config"]["hidden_size"]
    # The published files hold an extra head, which nobody exports.
    shards: list[dict[str, torch.Tensor]] = [{"mtp.norm.weight": torch.ones(hidden, dtype=torch.bfloat16)}]
    size = 0
    for name in random.names():
        tensor = random.read(name).to(torch.bfloat16)
        if size and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    placed: dict[str, str] = {}
    for number, tensors in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, place / file, {"format": "pt"})
        placed |= dict.fromkeys(tensors, file)
    (place / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": placed}))

"""Checkpoint folders as the published ones are, with random weights: true widths and vocabulary, two layers or all.

config.json, the layout of the weights (bfloat16 shards with an index, the unused `mtp.*` head among them) and the files
beside them are those of a published checkpoint; there is no generation_config.json. Of two layers one is a DeltaNet
and one has full attention. Rows are written as they are drawn, so that no tensor is held whole.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from export.checkpoint.base import block_rows
from export.checkpoint.names import EMBEDDING, HEAD
from export.checkpoint.random import RandomCheckpoint
from export.checkpoint.shards import INDEX
from export.model.config import FULL, LINEAR
from export.sizes import get_size, shipped_tiny
from runtime_tests import published_tokenizer
from runtime_tests.files import PUBLISHED, published_template

DEPTH = 2
"""Layers of the decoder, and blocks of the encoder."""
CUT_ROWS = 32_768
"""Rows of a table that is cut; its tokenizer and its ids are those of the shipped tiny checkpoint."""
BRANCH = 0.5
"""What mixers and MLPs write is scaled by BRANCH / sqrt(D), so that every token is its own likely successor. Otherwise
all of 248,320 random tokens are about as likely, and the gates of L3 for 4 and 8 bits measure ties: without it `int4`
has an SQNR of 6.6 dB and `int8` 25.6 dB, with 2 of 32 greedy tokens.
"""
WRITING = ("out_proj.weight", "o_proj.weight", "down_proj.weight")
FORBIDDEN = (1.5, 1.4)
"""The last row of the table, which has no token, and the row of the image placeholder are so many times the row of
the token that ends every prompt: each would win every step of an answer if it were not masked.
"""
SHARD_BYTES = 300_000_000
"""A shard is closed when it holds so much."""
IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def config(size: str, *, cut: bool = False, whole: bool = False) -> dict[str, Any]:
    """The published config.json of a size, with DEPTH layers, or all of them if it is to be `whole`; `cut`: with
    CUT_ROWS rows, and tiny's ids inside.
    """
    document: dict[str, Any] = copy.deepcopy(dict(get_size(size).config or {}))
    text = document["text_config"]
    text["dtype"] = "bfloat16"
    if not whole:
        text |= {"num_hidden_layers": DEPTH, "layer_types": [LINEAR, FULL]}
        document["vision_config"]["depth"] = DEPTH
    if cut:
        tiny = json.loads((shipped_tiny() / "config.json").read_text(encoding="utf-8"))
        document |= {name: tiny[name] for name in IDS}
        text |= {"vocab_size": CUT_ROWS, "eos_token_id": tiny["text_config"]["eos_token_id"]}
    return document


def write(folder: Path, size: str, *, cut: bool = False, whole: bool = False) -> Path:
    """Write the checkpoint of a size into a new folder, which is returned."""
    folder.mkdir()
    document = config(size, cut=cut, whole=whole)
    _dump(folder / "config.json", document)
    _dump(folder / "preprocessor_config.json", _preprocessor(document["vision_config"]))
    (folder / "README.md").write_text(f"---\nlicense: apache-2.0\n---\n\n# {get_size(size).hub_id}\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(
        published_template(PUBLISHED[size in ("4b", "9b")]), encoding="utf-8"
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile((shipped_tiny() if cut else published_tokenizer.folder()) / name, folder / name)
    _weights(folder, document, last_token(folder))
    return folder


def last_token(folder: Path) -> int:
    """Id of the token that ends every prompt of the published templates without thinking: that of two line ends."""
    return int(Tokenizer.from_file(str(folder / "tokenizer.json")).encode("\n\n").ids[-1])


def _preprocessor(vision: dict[str, Any]) -> dict[str, Any]:
    sides = {"shortest_edge": 65_536, "longest_edge": 16_777_216}
    patches = {"patch_size": vision["patch_size"], "temporal_patch_size": vision["temporal_patch_size"]}
    scales = {"merge_size": vision["spatial_merge_size"], "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    classes = {"processor_class": "Qwen3VLProcessor", "image_processor_type": "Qwen2VLImageProcessorFast"}
    return {"size": sides, **patches, **scales, **classes}


class _Decided(RandomCheckpoint):
    """Random weights that have a likely answer, and forbidden ones that are likelier."""

    def __init__(self, document: dict[str, Any], last: int) -> None:
        super().__init__(document)
        self.forbidden = (document["text_config"]["vocab_size"] - 1, document["image_token_id"])
        self.last = last

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        rows = super().read(name, start, stop)
        if name == HEAD:  # another matrix, whose rows are near enough to the embedding's
            rows = 0.6 * rows + 0.8 * super().read(EMBEDDING, start, stop)
        if name.startswith("model.language_model.") and name.endswith(WRITING):
            return rows * (BRANCH / math.sqrt(self.model_config.text.hidden_size))
        if name in (EMBEDDING, HEAD):
            for row, factor in zip(self.forbidden, FORBIDDEN, strict=True):
                if start <= row < start + len(rows):
                    rows[row - start] = factor * self.read(name, self.last, self.last + 1)[0]
        return rows


def _weights(folder: Path, document: dict[str, Any], last: int) -> None:
    """The shards and their index."""
    checkpoint = _Decided(document, last)
    shapes = {name: checkpoint.shape(name) for name in checkpoint.names()} | _mtp(document["text_config"])
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in sorted(shapes.items()):
        if sum(2 * math.prod(each) for each in shards[-1].values()) >= SHARD_BYTES:
            shards.append({})
        shards[-1][name] = shape
    placed: dict[str, str] = {}
    for number, part in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        _shard(folder / file, part, checkpoint)
        placed |= dict.fromkeys(part, file)
    total = sum(2 * math.prod(shape) for shape in shapes.values())
    _dump(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": placed})


def _mtp(text: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The multi-token-prediction head, but for the large matrices of its layer: it is never read."""
    width, norms = text["hidden_size"], ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
    layer = ("layers.0.input_layernorm", "layers.0.post_attention_layernorm")
    return {"mtp.fc.weight": (width, 2 * width)} | {f"mtp.{name}.weight": (width,) for name in (*norms, *layer)}


def _shard(path: Path, shapes: dict[str, tuple[int, ...]], checkpoint: RandomCheckpoint) -> None:
    """A safetensors file: the length of its header, the header, the values one after the other."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # values begin at a multiple of 8 bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            for rows in _rows(name, shape, checkpoint):
                file.write(rows.to(torch.bfloat16).view(torch.int16).numpy().tobytes())


def _rows(name: str, shape: tuple[int, ...], checkpoint: RandomCheckpoint) -> Iterator[torch.Tensor]:
    """Blocks of rows [R, ...] of a tensor, as float32."""
    if name.startswith("mtp."):
        yield torch.empty(shape).normal_(0.0, 0.02, generator=torch.Generator().manual_seed(len(name)))
        return
    step = block_rows(shape)
    for start in range(0, shape[0], step):
        yield checkpoint.read(name, start, min(shape[0], start + step))


def _dump(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2), encoding="utf-8")

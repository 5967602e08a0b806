"""config.json and the image processor's settings in the published form, whatever tool wrote them. Torch-free.

transformers saves a text decoder alone with a config of its own; the rest of this project knows one form, the
published one: model_type qwen3_5 with a text_config and, if the model sees, a vision_config.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from export.checkpoint.base import CheckpointError, read_json

TEXT_TYPE = "qwen3_5_text"
CONFIG = "config.json"
PROCESSOR = "processor_config.json"
PREPROCESSOR = "preprocessor_config.json"


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder in the published form.

    Raises:
        CheckpointError: no folder, no or unreadable config.json; the root of a hub cache.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"checkpoint {folder} is not a folder; give a folder with {CONFIG} and model.safetensors, "
            "a hub id, or random"
        )
    if not (folder / CONFIG).is_file():
        snapshots = sorted(path for path in (folder / "snapshots").glob("*") if (path / CONFIG).is_file())
        if snapshots:
            raise CheckpointError(
                f"{folder} is a repository of the hub's cache, not a checkpoint; give one of its snapshots: "
                f"{snapshots[0]}"
            )
    return published(read_json(folder / CONFIG))


def published(document: dict[str, Any]) -> dict[str, Any]:
    """A config.json in the published form: a text decoder's own config becomes the text_config of a whole one.

    Tying follows the top level, and the config of a decoder saved alone is its own top level.
    """
    if document.get("model_type") != TEXT_TYPE:
        return document
    whole: dict[str, Any] = {"model_type": "qwen3_5", "text_config": document}
    for name in ("architectures", "tie_word_embeddings", "quantization_config", "eos_token_id"):
        if name in document:
            whole[name] = document[name]
    return whole


def read_image_processor(folder: Path) -> Mapping[str, Any] | None:
    """What the checkpoint's image processor is told, from where transformers takes it: the part about pictures of
    processor_config.json, else preprocessor_config.json.

    Raises:
        CheckpointError: unreadable JSON.
    """
    if (folder / PROCESSOR).is_file():
        nested = read_json(folder / PROCESSOR).get("image_processor")
        if isinstance(nested, Mapping):
            return nested
    if (folder / PREPROCESSOR).is_file():
        return read_json(folder / PREPROCESSOR)
    return None

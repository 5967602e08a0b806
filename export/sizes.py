"""The sizes of the family: hub ids, and the config that `--checkpoint random` and `check_size` use.

Written down in the form of a published config.json. A real checkpoint is always read through its own
config.json; this table only generates random weights, and says what a checkpoint's size is called.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.spec import ExportError, UsageError

TINY = "tiny"
CUSTOM = "custom"
"""What a checkpoint is called whose dimensions are no published size's."""
NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
"""Form of a size's name, as in the schema of the manifest."""
SHIPPED = "checkpoints/tiny"
"""Source id of the shipped checkpoint. No folder of a user's can have it: theirs are plain names."""

# Text dimensions that tell the sizes apart. A resized vocabulary is still the same size; the vision encoder and the
# tie flag are the checkpoint's own.
_CHECKED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
)


@dataclass(frozen=True)
class Size:
    """One row of the table. `hub_id` and `config` are None for tiny, whose checkpoint is shipped."""

    name: str
    hub_id: str | None
    base_hub_id: str | None
    revision: str
    config: Mapping[str, Any] | None


def _config(
    *,
    hidden: int,
    ffn: int,
    layers: int,
    heads: int,
    kv_heads: int,
    value_heads: int,
    tied: bool,
    vision: tuple[int, int, int, int],
) -> dict[str, Any]:
    """A published config.json. `vision` is (depth, hidden, FFN, heads)."""
    depth, vision_hidden, vision_ffn, vision_heads = vision
    return {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "image_token_id": 248056,
        "video_token_id": 248057,
        "vision_start_token_id": 248053,
        "vision_end_token_id": 248054,
        "tie_word_embeddings": tied,
        "text_config": {
            "model_type": "qwen3_5_text",
            "vocab_size": 248320,
            "hidden_size": hidden,
            "intermediate_size": ffn,
            "num_hidden_layers": layers,
            "full_attention_interval": 4,
            "layer_types": [
                "full_attention" if (i + 1) % 4 == 0 else "linear_attention" for i in range(layers)
            ],
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": 256,
            "attention_bias": False,
            "attn_output_gate": True,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": value_heads,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "linear_conv_kernel_dim": 4,
            "max_position_embeddings": 262144,
            "eos_token_id": 248044,
            "tie_word_embeddings": tied,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000000,
                "partial_rotary_factor": 0.25,
                "mrope_section": [11, 11, 10],
                "mrope_interleaved": True,
            },
        },
        "vision_config": {
            "model_type": "qwen3_5",
            "depth": depth,
            "hidden_size": vision_hidden,
            "intermediate_size": vision_ffn,
            "num_heads": vision_heads,
            "in_channels": 3,
            "hidden_act": "gelu_pytorch_tanh",
            "patch_size": 16,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "num_position_embeddings": 2304,
            "out_hidden_size": hidden,
            "deepstack_visual_indexes": [],
        },
    }


def _published(name: str, label: str, config: dict[str, Any]) -> Size:
    return Size(name, f"Qwen/Qwen3.5-{label}", f"Qwen/Qwen3.5-{label}-Base", "main", config)


SIZES: Mapping[str, Size] = {
    TINY: Size(TINY, None, None, "main", None),
    "0.8b": _published(
        "0.8b",
        "0.8B",
        _config(hidden=1024, ffn=3584, layers=24, heads=8, kv_heads=2, value_heads=16, tied=True,
                vision=(12, 768, 3072, 12)),
    ),
    "2b": _published(
        "2b",
        "2B",
        _config(hidden=2048, ffn=6144, layers=24, heads=8, kv_heads=2, value_heads=16, tied=True,
                vision=(24, 1024, 4096, 16)),
    ),
    "4b": _published(
        "4b",
        "4B",
        _config(hidden=2560, ffn=9216, layers=32, heads=16, kv_heads=4, value_heads=32, tied=True,
                vision=(24, 1024, 4096, 16)),
    ),
    "9b": _published(
        "9b",
        "9B",
        _config(hidden=4096, ffn=12288, layers=32, heads=16, kv_heads=4, value_heads=32, tied=False,
                vision=(27, 1152, 4304, 16)),
    ),
}  # fmt: skip


def get_size(name: str) -> Size:
    """The row of a size.

    Raises:
        UsageError: unknown name; the message lists the choices.
    """
    if name not in SIZES:
        raise UsageError(f"--size {name}: unknown size; choose from {', '.join(SIZES)}")
    return SIZES[name]


def hub_id(name: str, base: bool = False) -> str:
    """The hub id of a size, of its base variant if asked.

    Raises:
        UsageError: unknown size, or tiny, which is shipped and not on a hub.
    """
    size = get_size(name)
    found = size.base_hub_id if base else size.hub_id
    if found is None:
        raise UsageError(
            f"--size {name}: the {name} checkpoint is shipped with this package and has no "
            f"{'base variant' if base else 'hub id'}; {'leave out --base' if base else 'give no hub id'}"
        )
    return found


def shipped_tiny() -> Path:
    """Folder of the trained tiny checkpoint: inside the installed package, or in the repository.

    Raises:
        ExportError: neither place holds it.
    """
    package = Path(__file__).resolve().parent
    places = (package / "_checkpoints" / TINY, package.parent / "checkpoints" / TINY)
    for place in places:
        if (place / "config.json").is_file():
            return place
    raise ExportError(
        f"the tiny checkpoint is in neither {places[0]} nor {places[1]}; reinstall the package, or give "
        "another one with --checkpoint PATH"
    )


def check_name(name: str) -> None:
    """Refuse a name that no manifest could hold.

    Raises:
        UsageError: naming the rule.
    """
    if not NAME.fullmatch(name):
        raise UsageError(
            f"--size {name}: a size's name has small letters, digits, dots and dashes; choose from {', '.join(SIZES)}, "
            f"or such as {CUSTOM}"
        )


def check_size(name: str, config: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose dimensions are not those of a published size that it is called; other names are free.

    Raises:
        UsageError: naming the first field that differs, its value and the expected one, or a name of the wrong form.
    """
    check_name(name)
    if name not in SIZES:
        return
    expected, found = _dimensions(name), _text_config(config)
    for field, want in expected.items():
        if found.get(field) != want:
            raise UsageError(
                f"--size {name}: the checkpoint has text_config.{field} {found.get(field)}, {name} has {want}; leave "
                f"out --size (this one is called {size_of(config)}), or give it a name of your own"
            )


def size_of(config: Mapping[str, Any]) -> str:
    """The name of the size that a config.json in the published form has the text dimensions of; else "custom"."""
    found = _text_config(config)
    for name in SIZES:
        if all(found.get(field) == want for field, want in _dimensions(name).items()):
            return name
    return CUSTOM


def _dimensions(name: str) -> dict[str, Any]:
    """The text dimensions of a size, tiny's from the shipped checkpoint."""
    config = SIZES[name].config
    if config is None:
        config = json.loads((shipped_tiny() / "config.json").read_text(encoding="utf-8"))
    return {field: config["text_config"][field] for field in _CHECKED}


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text = config.get("text_config")
    return text if isinstance(text, Mapping) else {}

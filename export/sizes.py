"""The sizes of the family: hub ids, and the config that `--checkpoint random` and `check_size` use.

Written down in the form of a published config.json. A real checkpoint is always read through its own
config.json; this table only generates random weights and catches a checkpoint of another size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.spec import ExportError, UsageError

TINY = "tiny"
SHIPPED = "checkpoints/tiny"
"""Source id of the shipped checkpoint. No folder of a user's can have it: theirs are plain names."""

# Text dimensions that tell the sizes apart. Vision rows and the tie flag are left out on purpose: those
# of 2B and 9B were never seen in a published config, so the checkpoint's own values are taken as they are.
_CHECKED = (
    "vocab_size",
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


def check_size(name: str, config: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose dimensions are not those of the size; tiny takes any of the family.

    Raises:
        UsageError: naming the first field that differs, its value and the expected one.
    """
    expected = get_size(name).config
    if expected is None:
        return
    text = config.get("text_config")
    found = text if isinstance(text, Mapping) else {}
    for field in _CHECKED:
        want, got = expected["text_config"][field], found.get(field)
        if got != want:
            raise UsageError(
                f"--size {name}: the checkpoint has text_config.{field} {got}, {name} has {want}; "
                f"give a {name} checkpoint, or --size {_closest(found)} for this one"
            )


def _closest(text: Mapping[str, Any]) -> str:
    """The size that these text dimensions belong to, else tiny, which takes any."""
    for size in SIZES.values():
        if size.config and all(size.config["text_config"][f] == text.get(f) for f in _CHECKED):
            return size.name
    return TINY

"""The dimensions of one Qwen3.5 checkpoint, read from its config.json.

Every other module takes its shapes from here and never from a table of sizes. A config of another
family, or one that uses a feature the exportable model lacks, is refused with the field's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from export.spec import ExportError

LINEAR = "linear_attention"
FULL = "full_attention"


class ConfigError(ExportError):
    """config.json does not describe a model this project can export."""


@dataclass(frozen=True)
class TextConfig:
    """Text decoder. Letters used in docstrings: D hidden_size, F intermediate_size, V vocab_size."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layer_types: tuple[str, ...]
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary_dim: int
    rope_theta: float
    mrope_section: tuple[int, int, int]
    rms_norm_eps: float
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    tie_word_embeddings: bool

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layer_types)

    @property
    def linear_key_dim(self) -> int:
        """Width of all DeltaNet keys of a token: Hk·Dk."""
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def linear_value_dim(self) -> int:
        """Width of all DeltaNet values of a token: Hv·Dv."""
        return self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the causal convolution: q, k and v of DeltaNet side by side."""
        return 2 * self.linear_key_dim + self.linear_value_dim


@dataclass(frozen=True)
class VisionConfig:
    """Vision encoder. The image is a grid of patches; merge×merge neighbours become one token."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    out_hidden_size: int
    num_position_embeddings: int
    rope_theta: float
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def pixels_per_token(self) -> int:
        """Side of the square of pixels behind one image token (32 in every published size)."""
        return self.patch_size * self.spatial_merge_size


@dataclass(frozen=True)
class ModelConfig:
    """One checkpoint: text decoder, optional vision encoder, and the ids that join them."""

    text: TextConfig
    vision: VisionConfig | None
    image_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int

    @classmethod
    def from_dict(
        cls, config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None
    ) -> ModelConfig:
        """Read a published config.json (and preprocessor_config.json for the image mean and std).

        Raises:
            ConfigError: another model family, a missing field or an unsupported feature.
        """
        family = config.get("model_type")
        if family != "qwen3_5":
            raise ConfigError(
                f"config.json has model_type {family!r}; this project exports 'qwen3_5' (dense Qwen3.5): "
                "give a Qwen3.5 checkpoint"
            )
        text = _text(_section(config, "text_config"), bool(config.get("tie_word_embeddings", False)))
        vision = None
        if config.get("vision_config"):
            vision = _vision(_section(config, "vision_config"), preprocessor or {})
            if vision.out_hidden_size != text.hidden_size:
                raise ConfigError(
                    f"config.json has vision out_hidden_size {vision.out_hidden_size} but text hidden_size "
                    f"{text.hidden_size}; image tokens must be as wide as text tokens"
                )
        return cls(
            text=text,
            vision=vision,
            image_token_id=int(config.get("image_token_id", 248056)),
            vision_start_token_id=int(config.get("vision_start_token_id", 248053)),
            vision_end_token_id=int(config.get("vision_end_token_id", 248054)),
        )

    def truncated(self, num_layers: int | None) -> ModelConfig:
        """The same model with its first `num_layers` decoder layers only (None keeps all).

        Raises:
            ConfigError: num_layers outside 1…number of layers.
        """
        if num_layers is None:
            return self
        if not 1 <= num_layers <= self.text.num_hidden_layers:
            raise ConfigError(
                f"--num-layers {num_layers}: the checkpoint has {self.text.num_hidden_layers} layers; "
                f"use 1 to {self.text.num_hidden_layers}"
            )
        return replace(self, text=replace(self.text, layer_types=self.text.layer_types[:num_layers]))

    def without_vision(self) -> ModelConfig:
        return replace(self, vision=None)


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name)
    if not isinstance(section, Mapping):
        raise ConfigError(f"config.json has no {name!r} object; a published Qwen3.5 config has one")
    return section


def _field(section: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in section:
        raise ConfigError(f"config.json lacks {where}.{name}; take config.json from the published checkpoint")
    return section[name]


def _require(section: Mapping[str, Any], name: str, default: Any, supported: Any) -> None:
    value = section.get(name, default)
    if value != supported:
        raise ConfigError(
            f"config.json has {name} {value!r}; the exportable model knows only {supported!r}, "
            "which every published Qwen3.5 uses"
        )


def _text(section: Mapping[str, Any], tied: bool) -> TextConfig:
    def get(name: str) -> Any:
        return _field(section, name, "text_config")

    _require(section, "hidden_act", "silu", "silu")
    _require(section, "attention_bias", False, False)
    _require(section, "attn_output_gate", True, True)
    rope = dict(section.get("rope_parameters") or section.get("rope_scaling") or {})
    _require(rope, "rope_type", "default", "default")
    _require(rope, "mrope_interleaved", True, True)
    head_dim = int(get("head_dim"))
    factor = float(rope.get("partial_rotary_factor", section.get("partial_rotary_factor", 0.25)))
    theta = rope.get("rope_theta", section.get("rope_theta"))
    if theta is None:
        raise ConfigError("config.json lacks text_config.rope_parameters.rope_theta")
    rotary_dim = int(head_dim * factor)
    sections = tuple(int(n) for n in rope.get("mrope_section", (11, 11, 10)))
    if len(sections) != 3 or sum(sections) != rotary_dim // 2:
        raise ConfigError(
            f"config.json has mrope_section {list(sections)}; its three numbers must add up to "
            f"{rotary_dim // 2}, half of the {rotary_dim} rotated dimensions"
        )
    layers = int(get("num_hidden_layers"))
    interval = int(section.get("full_attention_interval", 4))
    kinds = section.get("layer_types") or [FULL if (i + 1) % interval == 0 else LINEAR for i in range(layers)]
    if len(kinds) != layers or not set(kinds) <= {LINEAR, FULL}:
        raise ConfigError(
            f"config.json has layer_types {kinds!r} for {layers} layers; give one of {LINEAR!r}, {FULL!r} each"
        )
    text = TextConfig(
        vocab_size=int(get("vocab_size")),
        hidden_size=int(get("hidden_size")),
        intermediate_size=int(get("intermediate_size")),
        layer_types=tuple(kinds),
        num_attention_heads=int(get("num_attention_heads")),
        num_key_value_heads=int(get("num_key_value_heads")),
        head_dim=head_dim,
        rotary_dim=rotary_dim,
        rope_theta=float(theta),
        mrope_section=(sections[0], sections[1], sections[2]),
        rms_norm_eps=float(section.get("rms_norm_eps", 1e-6)),
        linear_num_key_heads=int(get("linear_num_key_heads")),
        linear_num_value_heads=int(get("linear_num_value_heads")),
        linear_key_head_dim=int(get("linear_key_head_dim")),
        linear_value_head_dim=int(get("linear_value_head_dim")),
        linear_conv_kernel_dim=int(section.get("linear_conv_kernel_dim", 4)),
        tie_word_embeddings=bool(section.get("tie_word_embeddings", tied)) or tied,
    )
    for many, few in (
        ("num_attention_heads", "num_key_value_heads"),
        ("linear_num_value_heads", "linear_num_key_heads"),
    ):
        if getattr(text, many) % getattr(text, few):
            raise ConfigError(
                f"config.json has {many} {getattr(text, many)} and {few} {getattr(text, few)}; "
                "the first must be a multiple of the second"
            )
    return text


def _vision(section: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> VisionConfig:
    def get(name: str) -> Any:
        return _field(section, name, "vision_config")

    _require(section, "hidden_act", "gelu_pytorch_tanh", "gelu_pytorch_tanh")
    _require(section, "in_channels", 3, 3)
    rope = section.get("rope_parameters") or {}
    vision = VisionConfig(
        depth=int(get("depth")),
        hidden_size=int(get("hidden_size")),
        intermediate_size=int(get("intermediate_size")),
        num_heads=int(get("num_heads")),
        patch_size=int(section.get("patch_size", 16)),
        temporal_patch_size=int(section.get("temporal_patch_size", 2)),
        spatial_merge_size=int(section.get("spatial_merge_size", 2)),
        out_hidden_size=int(get("out_hidden_size")),
        num_position_embeddings=int(get("num_position_embeddings")),
        rope_theta=float(rope.get("rope_theta", 10000.0)),
        image_mean=tuple(float(x) for x in preprocessor.get("image_mean", (0.5, 0.5, 0.5))),
        image_std=tuple(float(x) for x in preprocessor.get("image_std", (0.5, 0.5, 0.5))),
    )
    side = round(vision.num_position_embeddings**0.5)
    if side * side != vision.num_position_embeddings:
        raise ConfigError(
            f"config.json has num_position_embeddings {vision.num_position_embeddings}; "
            "it must be the square of the side of the position grid"
        )
    if vision.hidden_size % (4 * vision.num_heads):
        raise ConfigError(
            f"config.json has vision hidden_size {vision.hidden_size} and num_heads {vision.num_heads}; "
            "each head must have a multiple of 4 dimensions for two-dimensional rotary embedding"
        )
    return vision

"""The dimensions of one Qwen3.5 checkpoint, read from its config.json.

Every other module takes its shapes from here and never from a table of sizes. A config of another
family, or one that uses a feature the exportable model lacks, is refused with the field's name.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from export.spec import ExportError

LINEAR = "linear_attention"
FULL = "full_attention"
MAX_DIMENSION = 2**31 - 1
"""Runtimes index with int32."""
MAX_LAYERS = 1024
Scale = tuple[tuple[float, ...], tuple[float, ...]]
PUBLISHED_SCALE: Scale = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
"""Mean and std of the published image processors, for weights that come without one."""
CLIP_SCALE: Scale = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
"""What transformers' image processor takes where its settings leave them out."""
DEFAULT_THETA = 10000.0
"""transformers' base of rotary embedding where config.json names none."""


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
    head_basis: bool = False
    """Between the last norm and the head stands a matrix [D, D]: the head is tied to an embedding in another basis."""
    stream_scale: float = 1.0
    """What the residual stream is multiplied by, for float16; see `export.quantize.scale`."""

    @property
    def stream_eps(self) -> float:
        """The eps of the norms that read the residual stream."""
        return self.rms_norm_eps * self.stream_scale**2

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
    stream_scale: float = 1.0
    """As in `TextConfig`."""

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
        """Read a config.json in the published form, and the image processor's settings for how pixels are scaled.

        Whether head and embedding are tied is what config.json says at its top level; the checkpoint may know better.

        Raises:
            ConfigError: another model family, an unsupported feature, or a field that is missing, of another
                type or outside its range.
        """
        family = config.get("model_type")
        if family != "qwen3_5":
            raise ConfigError(
                f"config.json has model_type {family!r}; this project exports 'qwen3_5' (dense Qwen3.5): "
                "give a Qwen3.5 checkpoint"
            )
        top = _Section(config)
        text = _text(top.section("text_config"), top.flag("tie_word_embeddings", False))
        vision = None
        if config.get("vision_config") not in (None, {}):
            defaults = PUBLISHED_SCALE if preprocessor is None else CLIP_SCALE
            pictures = _Section(preprocessor or {}, "", "the image processor")
            vision = _vision(top.section("vision_config"), pictures, defaults)
            if vision.out_hidden_size != text.hidden_size:
                raise ConfigError(
                    f"config.json has vision out_hidden_size {vision.out_hidden_size} but text hidden_size "
                    f"{text.hidden_size}; image tokens must be as wide as text tokens"
                )
        # Only a model that sees pictures needs their tokens to have rows in its embedding.
        most = MAX_DIMENSION if vision is None else text.vocab_size - 1
        return cls(
            text=text,
            vision=vision,
            image_token_id=top.integer("image_token_id", 248056, least=0, most=most),
            vision_start_token_id=top.integer("vision_start_token_id", 248053, least=0, most=most),
            vision_end_token_id=top.integer("vision_end_token_id", 248054, least=0, most=most),
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


@dataclass(frozen=True)
class _Section:
    """One JSON object of a file; every value is checked as it is read.

    Every method raises ConfigError, naming file, field, value and rule.
    """

    values: Mapping[str, Any]
    where: str = ""
    file: str = "config.json"

    def section(self, name: str) -> _Section:
        """An object that must be there."""
        if not isinstance(self.values.get(name), Mapping):
            raise ConfigError(f"{self.file} has no {self.where}{name!r} object; a published Qwen3.5 config has one")
        return _Section(self.values[name], f"{self.where}{name}.", self.file)

    def optional(self, *names: str) -> _Section:
        """The first of these objects that is there, else an empty one."""
        for name in names:
            value = self.values.get(name)
            if value is not None and not isinstance(value, Mapping):
                raise self.wrong(name, "it must be a JSON object")
            if value:
                return _Section(value, f"{self.where}{name}.", self.file)
        return _Section({}, f"{self.where}{names[0]}.", self.file)

    def get(self, name: str, default: Any = None) -> Any:
        """A value as it is; without a default it must be there."""
        if name in self.values:
            return self.values[name]
        if default is None:
            raise ConfigError(
                f"{self.file} lacks {self.where}{name}; take {self.file} from the published checkpoint"
            )
        return default

    def integer(
        self, name: str, default: int | None = None, *, least: int = 1, most: int = MAX_DIMENSION
    ) -> int:
        """A whole number from `least` to `most`; true and 8.0 are none."""
        value = self.get(name, default)
        if type(value) is not int or not least <= value <= most:
            raise self.wrong(name, f"it must be a whole number from {least} to {most}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self.get(name, default)
        if not _is_number(value) or value <= 0:
            raise self.wrong(name, "it must be a number above 0")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """true or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, "it must be true or false")
        return value

    def channels(
        self, name: str, default: tuple[float, ...], *, above: float = -math.inf
    ) -> tuple[float, ...]:
        """One number for each of red, green and blue."""
        value = self.get(name, default)
        if not isinstance(value, list | tuple) or len(value) != 3 or not all(map(_is_number, value)):
            raise self.wrong(name, "it must be three numbers, for red, green and blue")
        if min(value) <= above:
            raise self.wrong(name, f"its numbers must be above {above:g}")
        return tuple(float(x) for x in value)

    def require(self, name: str, supported: Any) -> None:
        """A feature that the exportable model has in one form only, which is also the default."""
        value = self.values.get(name)
        if value is not None and value != supported:
            raise ConfigError(
                f"{self.file} has {self.where}{name} {_shown(value)}; the exportable model knows only "
                f"{supported!r}, which every published Qwen3.5 uses"
            )

    def wrong(self, name: str, rule: str) -> ConfigError:
        """The error about a value that breaks a rule."""
        return ConfigError(
            f"{self.file} has {self.where}{name} {_shown(self.values.get(name))}; {rule}: take {self.file} "
            "from the published checkpoint"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _shown(value: Any) -> str:
    """A value, cut where it is long."""
    return reprlib.repr(value)


def _text(section: _Section, tied: bool) -> TextConfig:
    section.require("hidden_act", "silu")
    section.require("attention_bias", False)
    section.require("attn_output_gate", True)
    rope = _rope(section)
    head_dim = section.integer("head_dim")
    factor = _holder("partial_rotary_factor", rope, section)
    rotated = head_dim * factor.number("partial_rotary_factor", 0.25)
    if not 2 <= rotated <= head_dim or int(rotated) % 2:
        raise factor.wrong(
            "partial_rotary_factor",
            f"of {head_dim} dimensions it rotates {rotated:g}, which must be an even number from 2 to {head_dim}",
        )
    rotary_dim = int(rotated)
    text = TextConfig(
        vocab_size=section.integer("vocab_size"),
        hidden_size=section.integer("hidden_size"),
        intermediate_size=section.integer("intermediate_size"),
        layer_types=_layer_types(section),
        num_attention_heads=section.integer("num_attention_heads"),
        num_key_value_heads=section.integer("num_key_value_heads"),
        head_dim=head_dim,
        rotary_dim=rotary_dim,
        rope_theta=_holder("rope_theta", rope, section).number("rope_theta", DEFAULT_THETA),
        mrope_section=_mrope_section(rope),
        rms_norm_eps=section.number("rms_norm_eps", 1e-6),
        linear_num_key_heads=section.integer("linear_num_key_heads"),
        linear_num_value_heads=section.integer("linear_num_value_heads"),
        linear_key_head_dim=section.integer("linear_key_head_dim"),
        linear_value_head_dim=section.integer("linear_value_head_dim"),
        linear_conv_kernel_dim=section.integer("linear_conv_kernel_dim", 4),
        tie_word_embeddings=tied,
    )
    section.flag("tie_word_embeddings", tied)  # transformers asks the top level only, but refuses other values here
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


def _holder(name: str, *sections: _Section) -> _Section:
    """The first section with a field: configs of different age keep rope's in different places."""
    return next((section for section in sections if name in section.values), sections[0])


def _rope(section: _Section) -> _Section:
    """The object that describes rotary embedding, standardised as transformers does (modeling_rope_utils,
    `convert_rope_params_to_dict`): `rope_scaling` of older configs wins over `rope_parameters`, `type` is the old
    name of `rope_type`.

    Raises:
        ConfigError: positions are stretched (yarn, linear, dynamic, …), or there is one rope per kind of layer.
    """
    name = "rope_scaling" if section.values.get("rope_scaling") else "rope_parameters"
    rope = section.optional(name)
    kind = rope.values.get("rope_type", rope.values.get("type", "default"))
    nested = [key for key in (LINEAR, FULL) if key in rope.values]
    if nested:
        raise ConfigError(
            f"config.json has {rope.where}{nested[0]}; the exportable model has one rotary embedding for all layers: "
            "give a checkpoint with a flat rope_parameters"
        )
    if kind != "default":
        beside = " (it wins over rope_parameters beside it)" if name == "rope_scaling" else ""
        raise ConfigError(
            f"config.json has {rope.where}rope_type {_shown(kind)}{beside}; the exportable model knows 'default' only, "
            f"which every published Qwen3.5 uses: remove text_config.{name} if the model was not trained with it, and "
            "keep to the context it was trained for"
        )
    rope.require("mrope_interleaved", True)
    return rope


def _mrope_section(rope: _Section) -> tuple[int, int, int]:
    """Rotated pairs that time, height and width get.

    They need not add up to all pairs: the second and third bound which of them height and width take, and time has
    the rest (transformers, `recomposition_frequencies`).
    """
    sections = rope.get("mrope_section", (11, 11, 10))
    whole = isinstance(sections, list | tuple) and all(type(n) is int and n > 0 for n in sections)
    if not whole or len(sections) != 3:
        raise ConfigError(
            f"config.json has mrope_section {_shown(sections)}; it must be three whole numbers above 0: take "
            "config.json from the published checkpoint"
        )
    return sections[0], sections[1], sections[2]


def _layer_types(section: _Section) -> tuple[str, ...]:
    layers = section.integer("num_hidden_layers", most=MAX_LAYERS)
    kinds = section.values.get("layer_types")
    if kinds is None:
        interval = section.integer("full_attention_interval", 4)
        return tuple(FULL if (i + 1) % interval == 0 else LINEAR for i in range(layers))
    if not isinstance(kinds, list | tuple) or len(kinds) != layers or any(k not in (LINEAR, FULL) for k in kinds):
        raise ConfigError(
            f"config.json has layer_types {_shown(kinds)} for {layers} layers; give one of {LINEAR!r}, {FULL!r} each"
        )
    return tuple(kinds)


# How the image processor and the encoder call the cutting of a picture into patches.
_PATCHES = (
    ("patch_size", "patch_size"),
    ("temporal_patch_size", "temporal_patch_size"),
    ("merge_size", "spatial_merge_size"),
)


def _vision(section: _Section, preprocessor: _Section, defaults: Scale) -> VisionConfig:
    section.require("hidden_act", "gelu_pytorch_tanh")
    section.require("in_channels", 3)
    mean, std = _pixel_scale(preprocessor, defaults)
    vision = VisionConfig(
        depth=section.integer("depth", most=MAX_LAYERS),
        hidden_size=section.integer("hidden_size"),
        intermediate_size=section.integer("intermediate_size"),
        num_heads=section.integer("num_heads"),
        patch_size=section.integer("patch_size", 16),
        temporal_patch_size=section.integer("temporal_patch_size", 2),
        spatial_merge_size=section.integer("spatial_merge_size", 2),
        out_hidden_size=section.integer("out_hidden_size"),
        num_position_embeddings=section.integer("num_position_embeddings"),
        rope_theta=section.optional("rope_parameters").number("rope_theta", 10000.0),
        image_mean=mean,
        image_std=std,
    )
    for theirs, ours in _PATCHES:
        if preprocessor.get(theirs, getattr(vision, ours)) != getattr(vision, ours):
            raise ConfigError(
                f"the image processor has {theirs} {_shown(preprocessor.values[theirs])}, config.json has "
                f"vision_config.{ours} {getattr(vision, ours)}; both must agree: take the two files from one checkpoint"
            )
    side = math.isqrt(vision.num_position_embeddings)
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


def _pixel_scale(preprocessor: _Section, defaults: Scale) -> Scale:
    """Mean and std that take a picture in 0…1 to what the image processor makes of its bytes.

    The processor multiplies bytes by `rescale_factor` (1/255) unless do_rescale is false, then subtracts the mean and
    divides by the std unless do_normalize is false; all of it is one scale and one shift of each channel.
    """
    mean = preprocessor.channels("image_mean", defaults[0])
    std = preprocessor.channels("image_std", defaults[1], above=0)
    if not preprocessor.flag("do_normalize", True):
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    factor = preprocessor.number("rescale_factor", 1 / 255) if preprocessor.flag("do_rescale", True) else 1.0
    if factor == 1 / 255:
        return mean, std
    return tuple(m / (255 * factor) for m in mean), tuple(s / (255 * factor) for s in std)

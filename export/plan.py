"""`--dry-run`: what an export would build, how large it gets and how much memory it needs. Torch-free.

Sizes are counted from the config's tensor shapes. Peak memory is an estimate fitted to measured exports; the
table at the end of every export says what it really was.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from export.checkpoint import is_folder
from export.checkpoint.adapter_config import NO_ADAPTER, AdapterConfig
from export.checkpoint.names import expected
from export.checkpoint.published import read_config
from export.model.config import FULL, ModelConfig
from export.quantize.recipe import Recipe, Setting, layer_of, load_recipe
from export.sizes import SIZES, TINY, check_size, hub_id, shipped_tiny
from export.spec import ExportSpec, UsageError
from targets import describe_target
from targets.base import Capabilities

# Host memory of an export on x86-64 without validation: 0.35 GiB for tiny, 0.53 for 0.8B, 0.55 for four layers
# of 9B (docs/LOG.md); tiny with validation 1.49.
RUNTIME_BYTES = 512 * 2**20
"""Python, torch and onnx loaded, traced programs, row blocks in flight."""
VALIDATION_BYTES = 2**30
"""transformers, plots, and the buffer that measures bandwidth."""
FLOAT_BYTES = {"float32": 4, "float16": 2}
SCALE_COPIES = 3
"""The scales of one tensor are collected, joined and written: that is what grows with the model."""

_ROLES = (
    (r"lm_head\.weight", "lm_head"),
    (r".*\.embed_tokens\.weight", "embedding"),
    (r".*\.linear_attn\.(in_proj_qkv|in_proj_z)\.weight", "linear_attention"),
    (r".*\.linear_attn\.out_proj\.weight", "linear_attention_out"),
    (r".*\.self_attn\.[qkv]_proj\.weight", "attention"),
    (r".*\.self_attn\.o_proj\.weight", "attention_out"),
    (r"model\.language_model\..*\.mlp\.(gate|up)_proj\.weight", "mlp"),
    (r"model\.language_model\..*\.mlp\.down_proj\.weight", "mlp_down"),
    (r"model\.visual\.blocks\..*(qkv|proj|linear_fc1|linear_fc2)\.weight", "vision"),
    (r"model\.visual\.merger\.(linear_fc1|linear_fc2)\.weight", "vision_merger"),
)


@dataclass(frozen=True)
class RoleSize:
    """How much of the model follows one entry of the recipe, "kept" none; `bits` 32 means unquantised."""

    role: str
    parameters: int
    bits: int
    group_size: int | None
    size_bytes: int


@dataclass(frozen=True)
class Plan:
    """What would be built."""

    name: str
    output: str
    target: str
    source: str
    num_layers: int
    context_length: int
    prefill_lengths: tuple[int, ...]
    image_sizes: tuple[tuple[int, int], ...]
    signatures: tuple[str, ...]
    roles: tuple[RoleSize, ...]
    num_parameters: int
    bundle_bytes: int
    state_bytes: int
    peak_memory_bytes: int
    notes: tuple[str, ...]


def role_of(name: str, tied: bool) -> str:
    """Role of a published tensor in a recipe; "kept" is never quantised."""
    for pattern, role in _ROLES:
        if re.fullmatch(pattern, name):
            return "lm_head" if role == "embedding" and tied else role
    return "kept"


def entry_of(name: str, recipe: Recipe, tied: bool) -> tuple[str, Setting]:
    """(path in the recipe, setting) of the entry that a published tensor follows; "kept" is none."""
    role = role_of(name, tied)
    return (role, Setting(32)) if role == "kept" else recipe.entry(role, layer_of(name))


def make(spec: ExportSpec) -> Plan:
    """Count sizes and estimate memory; reads at most a config.json.

    Raises:
        ExportError: the spec cannot work with this config.
    """
    source, document, notes = _source(spec)
    if spec.adapter not in (None, NO_ADAPTER):
        adapter = AdapterConfig.read(Path(str(spec.adapter)))
        source = f"{source} with the adapter {adapter.path.parent.name} of rank {adapter.r}"
    config = ModelConfig.from_dict(document).truncated(spec.num_layers)
    if is_folder(spec.checkpoint):
        check_size(spec.size, document)
    if not spec.vision:
        config = config.without_vision()
    tied = config.text.tie_word_embeddings
    able = describe_target(spec.target).capabilities
    recipe = load_recipe(spec.recipe, spec.group_size)
    able.check(spec.target, spec, recipe)
    recipe = recipe.for_model(tied, config.text.num_hidden_layers)
    shapes = expected(config)
    recipe.check(
        (name, role_of(name, tied), shape[1]) for name, shape in shapes.items() if role_of(name, tied) != "kept"
    )
    # Palettes take more than scales only where each group has one of its own; see targets/to_coreml/cut.py.
    stored = dict(shapes)
    if recipe.conditioning.rotate and tied:
        stored["matrix before the head"] = (config.text.hidden_size, config.text.hidden_size)
    roles = role_sizes(stored, recipe, tied, able, spec.palettes and spec.profile == "ane")
    weights = sum(role.size_bytes for role in roles)
    if spec.text_runner:  # whose kernel wants an embedding of its own, with float32 scales
        count = config.text.vocab_size * config.text.hidden_size
        weights += stored_bytes(count, recipe.setting("embedding"), replace(able, scale_bytes=4))
    images = spec.image_sizes if config.vision is not None else ()
    if not spec.skip_validation:
        whole = 4 * sum(map(math.prod, shapes.values()))
        notes += (f"L0 also runs transformers' whole model, if its {_size(whole)} of weights fit in free memory",)
    if spec.output.exists() and not spec.overwrite:
        notes += (f"{spec.output} exists: the export will need --overwrite or another -o",)
    return Plan(
        name=spec.name,
        output=str(spec.output),
        target=spec.target,
        source=source,
        num_layers=config.text.num_hidden_layers,
        context_length=spec.context_length,
        prefill_lengths=spec.prefill_lengths,
        image_sizes=images,
        signatures=(
            "embed",
            *(f"vision_{height}x{width}" for height, width in images),
            *(f"prefill_{length}" for length in spec.prefill_lengths),
            "decode",
        ),
        roles=roles,
        num_parameters=sum(map(math.prod, shapes.values())),
        bundle_bytes=weights,
        state_bytes=state_bytes(config, spec),
        peak_memory_bytes=peak_bytes(config, shapes, recipe, weights, spec),
        notes=notes,
    )


def role_sizes(
    shapes: Mapping[str, tuple[int, ...]], recipe: Recipe, tied: bool, able: Capabilities, palettes: bool = False
) -> tuple[RoleSize, ...]:
    """Parameters and stored bytes per entry of a recipe for the model."""
    counts: dict[str, int] = {}
    settings: dict[str, Setting] = {}
    for name, shape in shapes.items():
        entry, settings[entry] = entry_of(name, recipe, tied)
        counts[entry] = counts.get(entry, 0) + math.prod(shape)
    sizes = []
    for entry, count in sorted(counts.items()):
        setting = settings[entry]
        table = entry == "embedding" or (entry == "lm_head" and tied)
        size = stored_bytes(count, setting, able, palettes and not table)
        sizes.append(RoleSize(entry, count, setting.bits, setting.group_size, size))
    return tuple(sizes)


def stored_bytes(count: int, setting: Setting, able: Capabilities, palettes: bool = False) -> int:
    """Bytes of codes, scales and zero points; 8 bits repeat their channel's scale every 128 weights at most. With
    `palettes` each group has 16 float16 numbers of its own in place of a scale.
    """
    if not setting.quantised:
        return count * FLOAT_BYTES[able.floats]
    codes, groups = count * setting.bits // 8, count // (setting.group_size or 128)
    zeros = 0 if setting.symmetric else groups * setting.bits // 8
    scale = 4 if setting.bits == 8 else 32 if palettes and setting.symmetric else able.scale_bytes
    return codes + scale * groups + zeros


def state_bytes(config: ModelConfig, spec: ExportSpec) -> int:
    """States of one conversation, in the target's floats; explicit recurrent states are float32 everywhere."""
    text, able = config.text, describe_target(spec.target).capabilities
    rows = spec.context_length + max(spec.prefill_lengths, default=1) - 1
    rows = -(-rows // able.row_multiple) * able.row_multiple
    history = able.histories.get(spec.profile or able.profiles[0], text.linear_conv_kernel_dim - 1)
    full = sum(kind == FULL for kind in text.layer_types)
    attention = 2 * text.num_key_value_heads * rows * text.head_dim
    recurrent = text.linear_num_value_heads * text.linear_key_head_dim * text.linear_value_head_dim
    conv = text.conv_dim * history
    linear, size = len(text.layer_types) - full, FLOAT_BYTES[able.floats]
    wide = 4 if spec.state_layout == "explicit" else size
    return full * attention * size + linear * (recurrent * wide + conv * size)


def peak_bytes(
    config: ModelConfig,
    shapes: Mapping[str, tuple[int, ...]],
    recipe: Recipe,
    weight_bytes: int,
    spec: ExportSpec,
) -> int:
    """Estimated peak resident memory of the export, validation included unless it is skipped."""
    tied, able = config.text.tie_word_embeddings, describe_target(spec.target).capabilities
    scales = 0
    for name, shape in shapes.items():
        setting = entry_of(name, recipe, tied)[1]
        if setting.quantised:
            scales = max(scales, 4 * math.prod(shape) // (setting.group_size or 128))
    peak = RUNTIME_BYTES + SCALE_COPIES * scales
    if recipe.conditioning.rotate:  # one matrix that writes into the residual stream
        peak += max(4 * math.prod(shape) for name, shape in shapes.items() if ".mlp.down_proj." in name)
    layers: dict[str, int] = {}
    for name, shape in shapes.items():
        layer = ".".join(name.split(".")[:4])
        layers[layer] = layers.get(layer, 0) + 4 * math.prod(shape)
    largest = max(size for layer, size in layers.items() if ".layers." in layer)
    if able.floats == "float16":  # streams are measured in float32, with one layer or all of the encoder in memory
        peak += max(largest, sum(4 * math.prod(s) for n, s in shapes.items() if n.startswith("model.visual.")))
    if spec.target == "executorch" and spec.skip_validation:
        peak += RUNTIME_BYTES + weight_bytes  # of the process that tries every method out
    if not spec.skip_validation:
        # The bundle's runtime holds all weights (an emulator as float32, up to a limit), next to one fp32 layer of the
        # reference and both states.
        held = weight_bytes
        if able.emulated_bytes:
            held = min(4 * sum(map(math.prod, shapes.values())), able.emulated_bytes)
        peak += VALIDATION_BYTES + held + 2 * largest + 2 * state_bytes(config, spec)
    return peak


def _source(spec: ExportSpec) -> tuple[str, Mapping[str, Any], tuple[str, ...]]:
    """What the weights are, a config.json for them in the published form, and notes."""
    published = SIZES[spec.size].config if spec.size in SIZES else None
    if spec.checkpoint == "random":
        return f"random weights, seed {spec.seed}", published or read_config(shipped_tiny()), ()
    if spec.checkpoint is None and spec.size == TINY:
        return "the shipped tiny checkpoint", read_config(shipped_tiny()), ()
    if is_folder(spec.checkpoint):
        note = "dimensions are those of config.json: what the weights hold is read by the export"
        return str(spec.checkpoint), read_config(Path(str(spec.checkpoint))), (note,)
    name = spec.checkpoint or hub_id(spec.size, spec.base)
    if published is None:
        raise UsageError(f"--dry-run cannot know the size of {name} without downloading it; give a local folder")
    note = "nothing was downloaded: the dimensions are those this package knows of the size"
    return f"{name} at {spec.revision or 'the default revision'}", published, (note,)


def render(plan: Plan, *, as_json: bool) -> str:
    """The plan for a person, or as one JSON line."""
    if as_json:
        return json.dumps({"dry_run": True, **asdict(plan)}, sort_keys=True) + "\n"
    wide = max(18, *(len(role.role) + 2 for role in plan.roles))
    lines = [
        f"would build {plan.name} in {plan.output}",
        f"  from        {plan.source}, {plan.num_layers} layers, {plan.num_parameters / 1e6:.1f} M parameters",
        f"  signatures  {', '.join(plan.signatures)}",
        f"  context     {plan.context_length} tokens, states {_size(plan.state_bytes)}",
        "",
        f"  {'role':<{wide}}{'parameters':>14}{'bits':>6}{'group':>9}{'size':>12}",
    ]
    for role in plan.roles:
        group = "-" if role.bits >= 16 else role.group_size or "channel"
        lines.append(
            f"  {role.role:<{wide}}{role.parameters:>14,}{role.bits:>6}{group:>9}{_size(role.size_bytes):>12}"
        )
    lines += [
        f"  {'bundle, about':<{wide}}{'':>29}{_size(plan.bundle_bytes):>12}",
        f"  {'peak memory of the export, about':<{wide + 29}}{_size(plan.peak_memory_bytes):>12}",
    ]
    lines += [f"note: {note}" for note in plan.notes]
    return "\n".join(lines) + "\n"


def _size(count: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}" if unit == "GiB" else f"{count / scale:.1f} {unit}"
    return f"{count / 2**10:.1f} KiB"

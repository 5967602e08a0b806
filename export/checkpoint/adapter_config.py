"""adapter_config.json of PEFT, field by field, and how an adapter is told apart from a checkpoint.

Every field is decided: read, known to matter in training only, or refused by name. A field that this list
does not know is refused when it is set, because a newer PEFT may compute something else with it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.checkpoint.base import CheckpointError, read_json

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_PICKLE = "adapter_model.bin"
NO_ADAPTER = "none"

MERGE_FIRST = (
    "merge it with PEFT's merge_and_unload where it was trained, save_pretrained the result, and give that folder "
    "with --checkpoint"
)
RETRAIN = "no merged weights compute the same: train a plain LoRA"

_READ = {
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save",
    "ensure_weight_tying", "base_model_name_or_path", "init_lora_weights", "bias",
}
# Which modules were trained is known from the tensors; the rest steers training, or the refused initialisations.
_HARMLESS = {
    "task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "runtime_config",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout",
    "megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
}
_REFUSED: Mapping[str, tuple[str, str]] = {
    "use_dora": ("DoRA scales every merged row to a learned length", MERGE_FIRST),
    "lora_bias": ("the update has a bias, which most layers of Qwen3.5 have no place for", MERGE_FIRST),
    "fan_in_fan_out": ("it is for layers that store transposed weights; Qwen3.5 has none", "train with false"),
    "target_parameters": ("the update is of bare parameters, not of modules", MERGE_FIRST),
    "trainable_token_indices": ("single rows of the embedding were trained", MERGE_FIRST),
    "layer_replication": ("the trained model has other layers than the base", MERGE_FIRST),
    "use_qalora": ("the update works on averaged groups of inputs", MERGE_FIRST),
    "use_bdlora": ("the factors are stored as diagonal blocks", MERGE_FIRST),
    "kasa_config": ("KaSA changes the base weights as well", MERGE_FIRST),
    "velora_config": ("only plain LoRA is merged", MERGE_FIRST),
    "monteclora_config": ("only plain LoRA is merged", MERGE_FIRST),
    "megatron_config": ("the factors belong to Megatron's parallel layers", MERGE_FIRST),
    "alora_invocation_tokens": ("the update is active after certain tokens only", RETRAIN),
    "arrow_config": ("adapters are mixed anew for every token", RETRAIN),
}
# Those that leave the base as it is. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA subtract their start from it.
_INITIALISATIONS = ("gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True)
class AdapterConfig:
    """What adapter_config.json says about a plain LoRA."""

    path: Path
    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    modules_to_save: tuple[str, ...]
    ensure_weight_tying: bool
    base_model: str | None

    @classmethod
    def read(cls, folder: Path) -> AdapterConfig:
        """Read and check the file.

        Raises:
            CheckpointError: no adapter in the folder, only a pickled one, no plain LoRA, or malformed fields.
        """
        path = folder / ADAPTER_CONFIG
        if not path.is_file():
            raise CheckpointError(
                f"--adapter {folder}: the folder has no {ADAPTER_CONFIG}; give the folder that PEFT's "
                f"save_pretrained wrote, with {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}"
            )
        if not (folder / ADAPTER_WEIGHTS).is_file():
            if (folder / ADAPTER_PICKLE).is_file():
                raise CheckpointError(
                    f"--adapter {folder} holds its weights as pickle ({ADAPTER_PICKLE}); only {ADAPTER_WEIGHTS} is "
                    "read, because unpickling runs code: load it with PEFT and save_pretrained it again"
                )
            raise CheckpointError(
                f"--adapter {folder} has no {ADAPTER_WEIGHTS}; give the folder that PEFT's save_pretrained wrote"
            )
        values = read_json(path)
        _check_kind(path, values)
        fields = _Fields(path, values)
        return cls(
            path=path,
            r=int(fields.number("r", values.get("r", 8), whole=True)),
            lora_alpha=fields.number("lora_alpha", values.get("lora_alpha", 8)),
            use_rslora=fields.flag("use_rslora"),
            rank_pattern={k: int(v) for k, v in fields.pattern("rank_pattern", whole=True).items()},
            alpha_pattern=fields.pattern("alpha_pattern"),
            modules_to_save=fields.names("modules_to_save"),
            ensure_weight_tying=fields.flag("ensure_weight_tying"),
            base_model=base_model(folder),
        )

    def scale(self, module: str) -> tuple[int, float, float]:
        """Rank, alpha and scaling of a module, by its path inside the trained model."""
        rank, alpha = _matched(self.rank_pattern, module, self.r), _matched(self.alpha_pattern, module, self.lora_alpha)
        return int(rank), alpha, alpha / (math.sqrt(rank) if self.use_rslora else rank)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, with or without weights of a model beside it."""
    return any((folder / name).is_file() for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, ADAPTER_PICKLE))


def base_model(folder: Path) -> str | None:
    """The base that adapter_config.json names, for messages only: it is often a path of another machine."""
    path = folder / ADAPTER_CONFIG
    name = read_json(path).get("base_model_name_or_path") if path.is_file() else None
    return name if isinstance(name, str) and name else None


def check_beside(checkpoint: Path, adapter: str | None) -> None:
    """Refuse to drop silently an adapter that lies in the folder given as the checkpoint.

    Args:
        checkpoint: the folder of `--checkpoint`.
        adapter: what `--adapter` said: a folder, "none", or None where it was not given.

    Raises:
        CheckpointError: the folder is an adapter and no checkpoint, or holds one and the user has not chosen.
    """
    if not is_adapter(checkpoint):
        return
    weights = ("model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin")
    if not any(any(checkpoint.glob(pattern)) for pattern in weights):
        base = base_model(checkpoint) or "the model it was trained on"
        raise CheckpointError(
            f"{checkpoint} is an adapter, not a checkpoint: it holds what was trained on top of {base}; give the "
            f"base with --checkpoint and this folder with --adapter {checkpoint}"
        )
    if adapter is None:
        raise CheckpointError(
            f"{checkpoint} holds weights and an adapter that is not merged into them ({ADAPTER_CONFIG}), side by "
            f"side; say which is meant: --adapter {checkpoint} merges it, --adapter {NO_ADAPTER} leaves it out"
        )


def _check_kind(path: Path, values: Mapping[str, Any]) -> None:
    """Refuse what is no plain LoRA."""
    kind = values.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{path} has peft_type {kind!r}; only PEFT's 'LORA' is merged here: {MERGE_FIRST}")
    for name, (reason, remedy) in _REFUSED.items():
        if _is_set(values.get(name)):
            raise CheckpointError(f"{path} has {name} {_shown(values[name])}; {reason}: {remedy}")
    if values.get("bias", "none") != "none":
        raise CheckpointError(
            f"{path} has bias {values['bias']!r}; biases outside the LoRA were trained, only 'none' is merged here: "
            f"{MERGE_FIRST}"
        )
    start = values.get("init_lora_weights", True)
    if start not in (True, False, None) and str(start).lower() not in _INITIALISATIONS:
        raise CheckpointError(
            f"{path} has init_lora_weights {_shown(start)}; it may have changed the base weights, so the "
            "published base is not the one this adapter adds to: convert it with PEFT's "
            f"save_pretrained(path_initial_model_for_weight_conversion=…), or {MERGE_FIRST}"
        )
    for name in sorted(values.keys() - _READ - _HARMLESS - _REFUSED.keys()):
        if _is_set(values[name]):
            raise CheckpointError(
                f"{path} has {name} {_shown(values[name])}, a field this project does not know, which may change "
                f"what the adapter computes: {MERGE_FIRST}"
            )


@dataclass(frozen=True)
class _Fields:
    """Typed access; every method raises CheckpointError naming file, field, value and rule."""

    path: Path
    values: Mapping[str, Any]

    def number(self, name: str, value: Any, *, whole: bool = False) -> float:
        """A finite number above 0."""
        right = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if not right or not 0 < value < 1e9:
            raise self._wrong(name, value, f"it must be a {'whole ' if whole else ''}number above 0")
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.values.get(name) or False
        if not isinstance(value, bool):
            raise self._wrong(name, value, "it must be true or false")
        return value

    def names(self, name: str) -> tuple[str, ...]:
        value = self.values.get(name) or []
        if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
            raise self._wrong(name, value, "it must be a list of module names")
        return tuple(value)

    def pattern(self, name: str, *, whole: bool = False) -> dict[str, float]:
        """Regular expression of module paths -> number, in the file's order, as PEFT tries them."""
        value = self.values.get(name) or {}
        if not isinstance(value, dict):
            raise self._wrong(name, value, "it must map module names to numbers")
        for key in value:
            try:
                re.compile(key)
            except re.error as error:
                raise self._wrong(name, key, f"it must be a regular expression ({error})") from error
        return {key: self.number(f"{name} of {key}", number, whole=whole) for key, number in value.items()}

    def _wrong(self, name: str, value: Any, rule: str) -> CheckpointError:
        return CheckpointError(f"{self.path} has {name} {_shown(value)}; {rule}: save the adapter again")


def _matched(patterns: Mapping[str, float], module: str, default: float) -> float:
    """The number of the first pattern that fits the end of a module's path, as PEFT's get_pattern_key."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _is_set(value: Any) -> bool:
    """Whether a switch or a section of the config is there and on; 0 is a value that may mean something."""
    return value is not None and value is not False and value not in ("", [], {})


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

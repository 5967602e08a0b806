"""A LoRA adapter of PEFT, merged into a base checkpoint while rows are read.

`W + scaling · B A` in float32 is what PEFT's merge_and_unload computes; nothing but the adapter's factors of
one module and the rows asked for is held. What cannot be merged into the same function is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from export.checkpoint.adapter_config import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    MERGE_FIRST,
    AdapterConfig,
)
from export.checkpoint.base import (
    Checkpoint,
    CheckpointError,
    check_finite,
    check_range,
    equal_rows,
    read_json,
)
from export.checkpoint.names import EMBEDDING, HEAD, WRAPPERS, canonical
from export.checkpoint.safetensors import Entry, read_header, read_rows
from export.model.config import ModelConfig

_CONVOLUTION = ".linear_attn.conv1d.weight"

_FACTOR = re.compile(r"(?P<module>.+)\.(?:lora_(?P<linear>[AB])\.weight|lora_embedding_(?P<embedding>[AB]))")
# What PEFT writes beside `module.weight` when the vocabulary was resized; it reads neither of them back.
_COPY = re.compile(r"\.(modules_to_save|original_module)\.")

_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_VOCABULARY = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json")
_IDENTITY = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*/*.jinja")


@dataclass(frozen=True)
class Factors:
    """One LoRA: names and places of A and B, and what their product is scaled by.

    A linear layer or a convolution [N, …] has A [r, …] and B [N, r, 1…]; an embedding [V, D] has A [r, V] and
    B [D, r], whose product is transposed.
    """

    names: tuple[str, str]
    a: Entry
    b: Entry
    embedding: bool
    rank: int
    alpha: float
    scaling: float


class AdapterCheckpoint:
    """A base checkpoint with a LoRA adapter merged into it; see `Checkpoint`.

    Args:
        base: the checkpoint that the adapter was trained on.
        folder: holds adapter_config.json and adapter_model.safetensors as PEFT's save_pretrained writes them.

    Raises:
        CheckpointError: absent, unreadable or pickled files, an adapter that is no plain LoRA, or one that does
            not fit the base.
    """

    def __init__(self, base: Checkpoint, folder: Path | str) -> None:
        path = Path(folder)
        self._base, self._path = base, path
        self._adapter = AdapterConfig.read(path)
        self._loras: dict[str, Factors] = {}
        self._stored: dict[str, tuple[str, Entry]] = {}
        self._held: tuple[str, tuple[torch.Tensor, ...]] = ("", ())
        self._sort(read_header(path / ADAPTER_WEIGHTS))
        self._check_saved()
        for name in self._loras:
            self._check_factors(name)

        tied = base.model_config.text.tie_word_embeddings and self._stays_tied()
        if tied:
            self._stored.pop(HEAD, None)
        rows = self._check_vocabulary(tied)
        text = replace(base.model_config.text, tie_word_embeddings=tied, vocab_size=rows)
        self.model_config: ModelConfig = replace(base.model_config, text=text)
        self.config: Mapping[str, Any] = _config(base.config, base.model_config, self.model_config)
        self.preprocessor: Mapping[str, Any] | None = base.preprocessor
        self.source: dict[str, Any] = {**base.source, "adapter": path.resolve().name}
        self.folder: Path | None = None
        self.notices: list[str] = [*base.notices, self._notice()]
        self._names = sorted({*base.names()} - {HEAD} | (set() if tied else {HEAD}))
        self._template = _has_template(path)

    def sidecar(self, name: str) -> Path | None:
        """Path of a file beside the weights: fine-tuning tools save the tokenizer with the adapter, and it wins.

        The files of a vocabulary, and those of a template, come from one folder: a mixture would be a third
        tokenizer that nobody trained.
        """
        own = self._path / name
        if name in _VOCABULARY and any((self._path / file).is_file() for file in ("tokenizer.json", "vocab.json")):
            return own if own.is_file() else None
        if name in _TEMPLATES and self._template:
            return own if own.is_file() else None
        if name == "tokenizer_config.json" and own.is_file():
            return own
        return self._base.sidecar(name)

    def names(self) -> list[str]:
        """Published tensor names, sorted; with lm_head.weight where training untied the head."""
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; CheckpointError if it is missing."""
        if name in self._stored:
            return self._stored[name][1].shape
        return self._base.shape(self._source_name(name))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Merged rows [start, stop) of a tensor as float32; see `Checkpoint.read`."""
        start, stop = check_range(name, self.shape(name), start, stop)
        if name in self._stored:
            key, entry = self._stored[name]
            values = read_rows(f"{ADAPTER_WEIGHTS}: {key}", entry, start, stop)
        else:
            values = self._base.read(self._source_name(name), start, stop)
        if name in self._loras:
            values = values + self._update(name, start, stop).reshape(values.shape)
            check_finite(name, values, start)
        return values

    def content_key(self) -> str:
        """The base's, and names, sizes and modification times of the adapter's files."""
        files = {file for pattern in _IDENTITY for file in self._path.glob(pattern) if file.is_file()}
        stats = [(file.name, file.stat()) for file in sorted(files)]
        listed = ";".join(f"{name}:{stat.st_size}:{stat.st_mtime_ns}" for name, stat in stats)
        return f"{self._base.content_key()}|adapter:{listed}"

    def _source_name(self, name: str) -> str:
        """Where the base keeps a tensor: the head of a tied model is its embedding."""
        return EMBEDDING if name == HEAD and self._base.model_config.text.tie_word_embeddings else name

    def _update(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of scaling · B A, or of its transpose for an embedding: float32 [stop - start, …]."""
        lora = self._loras[name]
        if self._held[0] != name:
            # B of a linear layer is read by the rows that are asked for; the other factors serve every row.
            whole = [(lora.names[0], lora.a), (lora.names[1], lora.b)][: 2 if lora.embedding else 1]
            self._held = (name, tuple(read_rows(f"{ADAPTER_WEIGHTS}: {key}", entry) for key, entry in whole))
        held = self._held[1]
        if lora.embedding:
            return (held[1] @ held[0][:, start:stop]).T * lora.scaling
        b = read_rows(f"{ADAPTER_WEIGHTS}: {lora.names[1]}", lora.b, start, stop)
        return (b.reshape(stop - start, lora.rank) @ held[0].reshape(lora.rank, -1)) * lora.scaling

    def _sort(self, entries: Mapping[str, Entry]) -> None:
        """Every stored tensor becomes a factor of a LoRA or takes the place of a tensor of the base."""
        if not entries:
            raise self._error(f"holds no tensors in {ADAPTER_WEIGHTS}", "save the adapter again")
        known = {*self._base.names(), HEAD}
        pairs: dict[tuple[str, bool], dict[str, tuple[str, Entry]]] = {}
        for key, entry in entries.items():
            match = _FACTOR.fullmatch(key)
            if match:
                side = match["linear"] or match["embedding"]
                pairs.setdefault((match["module"], match["linear"] is None), {})[side] = (key, entry)
                continue
            if _COPY.search(key) and _COPY.sub(".", key) in entries:
                continue
            name = canonical(key.replace(".base_layer.", "."))
            if ".lora_" in key or name not in known:
                raise self._error(f"holds {key}, which no plain LoRA of this model has", MERGE_FIRST)
            if name in self._stored:
                raise self._error(f"holds {name} twice ({self._stored[name][0]} and {key})", MERGE_FIRST)
            self._stored[name] = (key, entry)
        for (module, embedding), sides in pairs.items():
            if len(sides) == 1:
                ((side, (key, _)),) = sides.items()
                partner = "A" if side == "B" else "B"
                raise self._error(f"holds {key} without its {partner}", "save the adapter again")
            name = canonical(f"{module}.") + "weight"
            if name not in known:
                raise self._error(
                    f"adapts {module}, which this checkpoint does not have", f"give {self._trained_on} as --checkpoint"
                )
            if name in self._loras or (name in self._stored and ".base_layer." not in self._stored[name][0]):
                raise self._error(f"adapts {module} twice", MERGE_FIRST)
            self._loras[name] = self._factors(module, sides, embedding)

    def _factors(self, module: str, sides: Mapping[str, tuple[str, Entry]], embedding: bool) -> Factors:
        rank, alpha, scaling = self._adapter.scale(_inner(module))
        (a_key, a), (b_key, b) = sides["A"], sides["B"]
        return Factors((a_key, b_key), a, b, embedding, rank, alpha, scaling)

    def _check_factors(self, name: str) -> None:
        """Compare the shapes of a LoRA with its rank and its tensor."""
        lora, shape = self._loras[name], self.shape(name)
        if name.endswith(_CONVOLUTION):
            raise self._error(
                f"adapts the depthwise convolution {name}, where PEFT has no merge (groups above 1)",
                "train without it",
            )
        if lora.embedding:
            wanted = [(lora.rank, shape[0]), (*shape[1:], lora.rank)]
        else:
            wanted = [(lora.rank, *shape[1:]), (shape[0], lora.rank, *(1,) * (len(shape) - 2))]
        for key, entry, expected in zip(lora.names, (lora.a, lora.b), wanted, strict=True):
            if len(shape) < 2 or entry.shape != expected:
                raise self._error(
                    f"holds {key} of shape {list(entry.shape)}; rank {lora.rank} of {ADAPTER_CONFIG} and "
                    f"{name} {list(shape)} imply {list(expected)}",
                    f"give {self._trained_on} as --checkpoint, and config and weights of one save",
                )

    def _check_saved(self) -> None:
        """What the config says was trained whole is there, and fits; its rows may differ in a vocabulary only."""
        for module in self._adapter.modules_to_save:
            stored = any(_belongs(key, module) for key, _ in self._stored.values())
            if not stored and any(_belongs(name, module) for name in {*self._base.names(), HEAD}):
                raise self._error(
                    f"holds no tensor of {module}, which modules_to_save of {ADAPTER_CONFIG} names",
                    "save the adapter again",
                )
        for name, (key, entry) in self._stored.items():
            shape = self._base.shape(self._source_name(name))
            free = 1 if name in (EMBEDDING, HEAD) else 0
            if len(entry.shape) != len(shape) or entry.shape[free:] != shape[free:]:
                raise self._error(
                    f"holds {key} of shape {list(entry.shape)}; the checkpoint has {list(shape)}",
                    f"give {self._trained_on} as --checkpoint",
                )

    def _stays_tied(self) -> bool:
        """Whether embedding and head of a tied base are still one tensor in the trained model.

        PEFT copies a module of modules_to_save and thereby unties it; a tensor stored for another reason (a
        resized vocabulary) is loaded into the shared one.
        """
        adapted, stored = self._loras.keys() & {EMBEDDING, HEAD}, self._stored.keys() & {EMBEDDING, HEAD}
        saved = {name for name in stored if self._is_saved(name)}
        if adapted:
            # One side untied by modules_to_save leaves the other to LoRA alone. Otherwise PEFT's merge adds the
            # update to the shared tensor, where the trained model added it to one side (or twice to both).
            if len(adapted) == 2 or not saved - adapted:
                raise self._error(
                    f"adapts {' and '.join(sorted(adapted))}, which this checkpoint ties to one tensor, so that PEFT's "
                    "merged model is not the one that was trained",
                    "clone the head and set tie_word_embeddings to false before merging with merge_and_unload, "
                    "save_pretrained and give that folder with --checkpoint, or train both with modules_to_save",
                )
            return False
        if len(stored) == 2:
            shape, pair = self.shape(EMBEDDING), [partial(self.read, name) for name in (EMBEDDING, HEAD)]
            return shape == self.shape(HEAD) and equal_rows(shape, *pair)
        if (stored and self._adapter.ensure_weight_tying) or stored - saved == {HEAD}:
            raise self._error(f"holds {min(stored)} alone, of the pair that training tied", "save the adapter again")
        return not saved

    def _is_saved(self, name: str) -> bool:
        """Whether a stored tensor belongs to a module of modules_to_save."""
        return any(_belongs(self._stored[name][0], module) for module in self._adapter.modules_to_save)

    def _check_vocabulary(self, tied: bool) -> int:
        """Rows of the embedding, and of the head."""
        config = self._base.model_config
        rows = self.shape(EMBEDDING)[0]
        head = rows if tied else self.shape(HEAD)[0]
        if head != rows:
            raise self._error(
                f"gives the embedding {rows} rows and the head {head}; both must have one for each token",
                "save it with save_embedding_layers=True",
            )
        ids = (config.image_token_id, config.vision_start_token_id, config.vision_end_token_id)
        if config.vision is not None and rows <= max(ids):
            raise self._error(
                f"gives the embedding {rows} rows; the token ids of pictures reach {max(ids)}",
                "export with --no-vision, or train without cutting the vocabulary",
            )
        return rows

    def _notice(self) -> str:
        """One sentence about what was merged."""
        loras = self._loras.values()
        parts = []
        if loras:
            method = "rsLoRA" if self._adapter.use_rslora else "LoRA"
            ranks = "/".join(str(n) for n in sorted({lora.rank for lora in loras}))
            alphas = "/".join(f"{n:g}" for n in sorted({lora.alpha for lora in loras}))
            modules = "1 module" if len(loras) == 1 else f"{len(loras)} modules"
            parts.append(f"{method} of rank {ranks} and alpha {alphas} into {modules}")
        if self._adapter.modules_to_save:
            parts.append(f"whole modules {', '.join(self._adapter.modules_to_save)}")
        elif self._stored:
            parts.append(f"{len(self._stored)} whole tensors")
        text, before = self.model_config.text, self._base.model_config.text
        if text.vocab_size != before.vocab_size:
            parts.append(f"a vocabulary of {text.vocab_size} rows instead of {before.vocab_size}")
        if text.tie_word_embeddings != before.tie_word_embeddings:
            parts.append("a head that is no longer tied to the embedding")
        return f"The adapter {self.source['adapter']} was merged: {', '.join(parts)}."

    @property
    def _trained_on(self) -> str:
        return self._adapter.base_model or "the base it was trained on"

    def _error(self, what: str, remedy: str) -> CheckpointError:
        return CheckpointError(f"the adapter {self._path} {what}; {remedy}")


def _inner(module: str) -> str:
    """A module's path inside the trained model, which is what PEFT matches patterns with."""
    for wrapper in WRAPPERS:
        if module.startswith(wrapper):
            return _inner(module[len(wrapper) :])
    return module


def _belongs(name: str, module: str) -> bool:
    """Whether a tensor lies in a module that modules_to_save names by the end of its path, as PEFT compares."""
    parts = name.split(".")
    return any(".".join(parts[:count]).endswith(module) for count in range(1, len(parts)))


def _has_template(folder: Path) -> bool:
    """Whether the tokenizer saved with an adapter has a chat template."""
    path = folder / "tokenizer_config.json"
    return any((folder / name).is_file() for name in _TEMPLATES) or (
        path.is_file() and bool(read_json(path).get("chat_template"))
    )


def _config(config: Mapping[str, Any], before: ModelConfig, after: ModelConfig) -> Mapping[str, Any]:
    """config.json with what the adapter changed: tying at every level that has it, and the vocabulary."""
    tying, size = after.text.tie_word_embeddings, after.text.vocab_size
    changed: dict[str, Any] = dict(config)
    nested = isinstance(config.get("text_config"), Mapping)
    text = dict(config["text_config"]) if nested else changed
    if tying != before.text.tie_word_embeddings:
        changed["tie_word_embeddings"] = text["tie_word_embeddings"] = tying
    if size != before.text.vocab_size:
        text["vocab_size"] = size
    if nested:
        changed["text_config"] = text
    return changed

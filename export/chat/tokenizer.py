"""The checkpoint's tokenizer as transformers makes it, written so that tokenizer.json alone says it all.

Which class transformers takes depends on config.json, and that class may rebuild the pre-tokenizer and add
tokens of tokenizer_config.json. Apps read tokenizer.json and nothing else, so the result is what is written.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from export.bundle.writer import BundleWriter
from export.chat.template import guarded
from export.checkpoint.base import Checkpoint, read_json
from export.model.config import ModelConfig

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
ADDITIONAL = "additional_chat_templates"
"""Folder of named templates, as transformers reads them: NAME.jinja."""
VOCABULARY = ("vocab.json", "merges.txt")
"""What tokenizer.json is made of where it is absent."""
JSON_FILES = (TOKENIZER, CONFIG, "special_tokens_map.json", "added_tokens.json", "vocab.json")
PLACEHOLDERS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
"""They stand for pixels in a prompt; as an answer they mean nothing."""
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
LOCAL = ("auto_map", "name_or_path", "vocab_file", "merges_file", "tokenizer_file", "local_files_only", "is_local")
"""Fields of tokenizer_config.json about the machine that wrote it, or about code that no bundle carries."""


def tokenizer_folder(checkpoint: Checkpoint) -> Path | None:
    """Where the tokenizer's files lie, or None if there are none."""
    whole = checkpoint.sidecar(TOKENIZER)
    parts = [checkpoint.sidecar(name) for name in VOCABULARY]
    return whole.parent if whole else parts[0].parent if parts[0] and parts[1] else None


def read_tokenizer(checkpoint: Checkpoint) -> Any | None:
    """transformers' tokenizer of a checkpoint, or None if it has none.

    Raises:
        CheckpointError: damaged files, or files that do not make a tokenizer.
    """
    origin = tokenizer_folder(checkpoint)
    if origin is None:
        return None
    for name in JSON_FILES:
        path = checkpoint.sidecar(name)
        if path is not None:
            read_json(path)
    with tempfile.TemporaryDirectory() as temporary:
        return _load(checkpoint, _gather(checkpoint, origin, Path(temporary)), origin)


def _gather(checkpoint: Checkpoint, origin: Path, place: Path) -> Path:
    """Copy the tokenizer's files into one folder: those of an adapter lie in its own and in its base's."""
    for name in (*JSON_FILES, "merges.txt", TEMPLATE):
        path = checkpoint.sidecar(name)
        if path is not None:
            shutil.copyfile(path, place / name)
    if (origin / ADDITIONAL).is_dir():
        shutil.copytree(origin / ADDITIONAL, place / ADDITIONAL)
    return place


def _load(checkpoint: Checkpoint, folder: Path, origin: Path) -> Any:
    """transformers' tokenizer of gathered files; `origin` is what messages name."""
    from transformers import AutoConfig, AutoTokenizer, Qwen3_5Tokenizer

    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if checkpoint.sidecar(TOKENIZER) is None:
        # Qwen3_5Tokenizer takes these files but its from_pretrained does not look for them by these names.
        vocab, merges = (str(folder / name) for name in VOCABULARY)
        return guarded(
            origin, lambda: Qwen3_5Tokenizer.from_pretrained(folder, vocab_file=vocab, merges_file=merges, **options)
        )

    def load() -> Any:
        # Only these decide the class, as the file says them; the rest of config.json is judged elsewhere.
        path = checkpoint.sidecar("config.json")
        stored = checkpoint.config if path is None else read_json(path)
        config = AutoConfig.for_model(stored["model_type"])
        config.tokenizer_class = stored.get("tokenizer_class")
        return AutoTokenizer.from_pretrained(folder, config=config, **options)

    return guarded(origin, load)


def write_files(tokenizer: Any, checkpoint: Checkpoint, writer: BundleWriter) -> list[str]:
    """Write tokenizer.json and tokenizer_config.json; returns their names."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # left over from training: an app would cut its prompts
    backend.no_padding()
    writer.add(TOKENIZER, "tokenizer").write_text(backend.to_str(), encoding="utf-8")
    source = checkpoint.sidecar(CONFIG)
    config = read_json(source) if source is not None else {}
    for name in (*LOCAL, "chat_template", "added_tokens_decoder", "additional_special_tokens"):
        config.pop(name, None)
    for name in SPECIAL:
        token = getattr(tokenizer, name)
        config[name] = None if token is None else str(token)
    # The class that takes tokenizer.json as it is, known to every release of transformers and to other readers.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    writer.add_json(CONFIG, "tokenizer", config)
    return [TOKENIZER, CONFIG]


def real_ids(tokenizer: Any) -> dict[int, str]:
    """Token by id, of every id that has one."""
    return {number: token for token, number in tokenizer.get_vocab().items()}


def never_sampled(real: dict[int, str], checkpoint: Checkpoint, config: ModelConfig, stops: Sequence[int]) -> list[int]:
    """Ids below the highest real one that no sampler may choose: placeholders of vision and gaps, no stop token."""
    found = {number for number, token in real.items() if token in PLACEHOLDERS}
    if config.vision is not None:
        found |= {config.image_token_id, config.vision_start_token_id, config.vision_end_token_id}
        video = checkpoint.config.get("video_token_id")
        found |= {video} if type(video) is int and 0 <= video < config.text.vocab_size else set()
    if real:
        found |= set(range(max(real) + 1)) - set(real)
    return sorted(found - set(stops))

"""Tokenizer and chat template of a bundle: copied from the checkpoint, tested messages beside them."""

from __future__ import annotations

import shutil
from pathlib import Path
from textwrap import shorten
from typing import Any

from jinja2 import TemplateSyntaxError

from export.bundle.writer import BundleWriter
from export.checkpoint.base import Checkpoint, CheckpointError, read_json
from export.model.config import ModelConfig
from export.spec import ExportError

FILES = {
    "tokenizer.json": "tokenizer",
    "tokenizer_config.json": "tokenizer",
    "chat_template.jinja": "chat_template",
    "generation_config.json": "generation",
    "preprocessor_config.json": "preprocessor",
}
PUBLISHED_STOPS = (248046, 248044)
"""<|im_end|> and <|endoftext|> of the published vocabulary, for weights that come without a tokenizer."""

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "plain": {"messages": [{"role": "user", "content": "What is 12 + 30?"}]},
    "system": {
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
    },
    "turns": {
        "messages": [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hi."},
            {"role": "user", "content": "What is 1 + 1?"},
        ],
    },
    "image": {
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is written?"}]}
        ]
    },
    "thinking": {"messages": [{"role": "user", "content": "Hello"}], "enable_thinking": True},
    "no-thinking": {"messages": [{"role": "user", "content": "Hello"}], "enable_thinking": False},
    "tools": {"messages": [{"role": "user", "content": "Weather in Paris?"}], "tools": [TOOL]},
}


def write_tokenizer(checkpoint: Checkpoint, config: ModelConfig, writer: BundleWriter) -> dict[str, Any]:
    """Copy tokenizer files, write chat_tests.json; returns `tokenizer` of the manifest.

    Raises:
        ExportError: one of the files cannot be read or used.
    """
    copied = []
    for name, role in FILES.items():
        source = checkpoint.sidecar(name)
        if source is not None:
            if name.endswith(".json"):
                read_json(source)
            shutil.copyfile(source, writer.add(name, role))
            copied.append(name)
    template = "chat_template.jinja" if "chat_template.jinja" in copied else None
    if "tokenizer.json" in copied:
        tokenizer = load_tokenizer(writer.path)
        if template:
            tests = chat_tests(tokenizer)
            _check_ids(tests, config.text.vocab_size)
            writer.add_json("chat_tests.json", "chat_tests", tests)
    return {
        "files": [name for name in copied if name.startswith("tokenizer")],
        "chat_template": template,
        "stop_token_ids": stop_ids(checkpoint, config),
        "special_token_ids": {
            "image": config.image_token_id,
            "vision_start": config.vision_start_token_id,
            "vision_end": config.vision_end_token_id,
        },
    }


def stop_ids(checkpoint: Checkpoint, config: ModelConfig) -> list[int]:
    """Stop tokens from generation_config.json: the tokenizer's eos alone would miss one.

    Raises:
        ExportError: a tokenizer without generation_config.json, a damaged one, or one that names no stop
            token of the vocabulary.
    """
    path = checkpoint.sidecar("generation_config.json")
    if path is None:
        if checkpoint.sidecar("tokenizer.json") is None:
            return [i for i in PUBLISHED_STOPS if i < config.text.vocab_size]
        raise ExportError(
            "the checkpoint has a tokenizer but no generation_config.json, which names the stop tokens; "
            "add the published one, or generation would never stop"
        )
    found = read_json(path).get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not ids:
        raise CheckpointError("generation_config.json names no eos_token_id; add the published stop tokens")
    vocab = config.text.vocab_size
    for token in ids:
        if type(token) is not int or not 0 <= token < vocab:
            raise CheckpointError(
                f"generation_config.json has eos_token_id {found!r}; it must be one or a list of token ids from 0 "
                f"to {vocab - 1}: take the published file"
            )
    return ids


def load_tokenizer(folder: Path) -> Any:
    """transformers' tokenizer of a bundle or checkpoint folder; no remote code, no network.

    Raises:
        ExportError: no tokenizer.json, or files that do not make a tokenizer.
    """
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").exists():
        raise ExportError(f"{folder} has no tokenizer.json (random weights have none); nothing to talk with")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except MemoryError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise CheckpointError(
            f"the tokenizer in {folder} cannot be loaded ({_reason(error)}); take tokenizer.json, "
            "tokenizer_config.json and chat_template.jinja from the published checkpoint"
        ) from error


def render(
    tokenizer: Any, messages: list[dict[str, Any]], *, generation_prompt: bool = True, **options: Any
) -> list[int]:
    """Messages -> token ids, by default with the generation prompt; image tokens single, as the template's.

    Raises:
        ExportError: the template is missing, malformed or refuses the messages, or the tokenizer fails.
    """
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generation_prompt, **options
        )
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    except MemoryError:
        raise
    except Exception as error:  # a template is a program of its own and may raise anything
        raise ExportError(
            f"the chat template cannot render the conversation ({_reason(error)}); take chat_template.jinja and "
            "tokenizer_config.json from the published checkpoint"
        ) from error
    return ids


def _reason(error: Exception) -> str:
    """Kind and text of an error on one line, with the line of the template that it is about."""
    place = f" in line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
    return f"{type(error).__name__}: {shorten(str(error), 200)}{place}"


def chat_tests(tokenizer: Any) -> list[dict[str, Any]]:
    """Messages -> token ids, for the apps' own template renderers and tokenizers."""
    entries = []
    for name, case in CONVERSATIONS.items():
        options = {key: value for key, value in case.items() if key != "messages"}
        ids = render(tokenizer, case["messages"], **options)
        entries.append({"name": name, **case, "add_generation_prompt": True, "token_ids": ids})
    return entries


def _check_ids(tests: list[dict[str, Any]], vocab: int) -> None:
    """Refuse the tokenizer of another model: its ids would read rows that the embedding does not have.

    Raises:
        CheckpointError: naming the conversation of `tests` and the id.
    """
    for test in tests:
        ids = test["token_ids"]
        if not ids or max(ids) >= vocab:
            found = f"ids up to {max(ids)}" if ids else "no ids"
            raise CheckpointError(
                f"template and tokenizer make {found} of the conversation {test['name']!r}; they must be 0 to "
                f"{vocab - 1}, the rows of the embedding: take chat_template.jinja, tokenizer.json and the weights "
                "from the same checkpoint"
            )

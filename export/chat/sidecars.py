"""What an app needs beside the programs: tokenizer, chat template, preprocessor, generation config, chat tests.

All of it is written into the bundle in one form, whatever form the checkpoint has; what cannot be found, and
what was decided between files that contradict each other, is told in notices.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from export.bundle.writer import BundleWriter
from export.chat import abilities
from export.chat.chat_tests import chat_tests, dump_tests, tells_time
from export.chat.stops import GENERATION, find_stops
from export.chat.template import load_tokenizer
from export.chat.tokenizer import (
    ADDITIONAL,
    CONFIG,
    TEMPLATE,
    never_sampled,
    read_tokenizer,
    real_ids,
    write_files,
)
from export.checkpoint.base import Checkpoint, CheckpointError, read_json
from export.model.config import ModelConfig

LEGACY = "chat_template.json"
PREPROCESSOR = "preprocessor_config.json"
_GENERATION_TAG = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")


@dataclass
class Sidecars:
    """What was written: `tokenizer` of the manifest, and whole sentences for the user."""

    manifest: dict[str, Any]
    notices: list[str] = field(default_factory=list)


def write_tokenizer(checkpoint: Checkpoint, config: ModelConfig, writer: BundleWriter) -> Sidecars:
    """Write everything but the programs that an app needs to talk with the model.

    Raises:
        ExportError: one of the files cannot be read or used.
    """
    notices: list[str] = []
    source = checkpoint.sidecar(GENERATION)
    if source is not None:
        read_json(source)
        shutil.copyfile(source, writer.add(GENERATION, "generation"))
    _write_preprocessor(checkpoint, config, writer, notices)
    rows = config.text.vocab_size
    manifest: dict[str, Any] = {"files": [], "chat_template": None}
    tokenizer = read_tokenizer(checkpoint)
    if tokenizer is None:
        stops = find_stops(checkpoint, rows)
        never = never_sampled({}, checkpoint, config, stops.ids)
        if checkpoint.source["kind"] != "random":
            notices.append(
                "the checkpoint has no tokenizer (tokenizer.json, or vocab.json with merges.txt): the bundle takes "
                "token ids only; add the files of the published checkpoint to talk with it"
            )
        real: dict[int, str] = {}
    else:
        manifest["files"] = write_files(tokenizer, checkpoint, writer)
        manifest |= _write_templates(find_templates(tokenizer, checkpoint, notices), writer)
        tokenizer = load_tokenizer(writer.path)  # what is judged and tested is what was written
        real = real_ids(tokenizer)
        if manifest["chat_template"] is not None:
            manifest["template"] = _try_template(tokenizer, config, writer, notices)
        stops = find_stops(checkpoint, rows, tokenizer, real)
        never = never_sampled(real, checkpoint, config, stops.ids)
        manifest["num_tokens"] = max(real) + 1
        _tell_rows(real, rows, notices)
    return Sidecars(
        {
            **manifest,
            "stop_token_ids": stops.ids,
            "never_sampled_ids": never,
            "special_token_ids": _special(real, config),
        },
        [*notices, *stops.notices],
    )


def _write_preprocessor(
    checkpoint: Checkpoint, config: ModelConfig, writer: BundleWriter, notices: list[str]
) -> None:
    """preprocessor_config.json, as the file itself if that is what transformers reads."""
    source, chosen = checkpoint.sidecar(PREPROCESSOR), checkpoint.preprocessor
    found = None if source is None else read_json(source)
    if source is not None and (chosen is None or found == chosen):
        shutil.copyfile(source, writer.add(PREPROCESSOR, "preprocessor"))
    elif chosen is not None:
        writer.add_json(PREPROCESSOR, "preprocessor", dict(chosen))
        if source is not None:
            notices.append(
                f"processor_config.json and {PREPROCESSOR} differ about pictures; transformers takes the first, and so "
                "does the bundle"
            )
    elif config.vision is not None and checkpoint.source["kind"] != "random":
        notices.append(
            f"the checkpoint has neither {PREPROCESSOR} nor processor_config.json; pictures are normalised with mean "
            f"{list(config.vision.image_mean)} and std {list(config.vision.image_std)}"
        )


def find_templates(tokenizer: Any, checkpoint: Checkpoint, notices: list[str]) -> dict[str, str]:
    """Chat templates by name, "default" first if there is one, ready for renderers that are not transformers.

    What transformers gives the tokenizer comes first (files before tokenizer_config.json), then
    chat_template.json, which transformers gives to processors only.

    Raises:
        CheckpointError: a file that is no template, or a name that is no file name.
    """
    chosen = _by_name(tokenizer.chat_template, CONFIG)
    sources = {}
    file = checkpoint.sidecar(TEMPLATE)
    if file is not None:
        sources[TEMPLATE] = {"default": file.read_text(encoding="utf-8")}
    for name in (CONFIG, LEGACY):
        path = checkpoint.sidecar(name)
        if path is not None:
            sources[name] = _by_name(read_json(path).get("chat_template"), name)
    chosen = chosen or sources.get(LEGACY, {})
    defaults = {name: portable(found["default"]) for name, found in sources.items() if "default" in found}
    if len(set(defaults.values())) > 1:
        notices.append(
            f"{' and '.join(defaults)} hold different chat templates; transformers takes {next(iter(defaults))}, and "
            "so does the bundle"
        )
    if not chosen:
        notices.append(
            f"the checkpoint has no chat template ({TEMPLATE}, or chat_template in {CONFIG} or {LEGACY}): the bundle "
            "cannot render conversations; add the published one"
        )
    elif "default" not in chosen:
        notices.append(
            f"none of the chat templates ({', '.join(sorted(chosen))}) is named default: the bundle cannot render "
            "conversations without tools; name one so, or add the published one"
        )
    for name in chosen:
        if not re.fullmatch(r"[\w-][\w .-]*", name):
            raise CheckpointError(
                f"the checkpoint names a chat template {name!r}; the name must do as a file name: rename it "
                "to letters, digits, _ and -"
            )
    return {name: portable(chosen[name]) for name in sorted(chosen, key=lambda name: (name != "default", name))}


def _by_name(value: Any, source: str) -> dict[str, str]:
    """Templates by name, of any form that they are stored in."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list) and all(isinstance(entry, Mapping) for entry in value):
        value = {entry.get("name"): entry.get("template") for entry in value}
    if isinstance(value, Mapping) and all(isinstance(text, str) for pair in value.items() for text in pair):
        return dict(value)
    raise CheckpointError(
        f"chat_template in {source} is a {type(value).__name__}; it must be a template, or a list of objects with name "
        "and template"
    )


def portable(template: str) -> str:
    """A template that means the same to any Jinja renderer as to transformers'.

    Line ends become plain newlines, as Jinja itself reads them, and TRL's generation tags, which only mark
    answers for training, become conditions that always hold.
    """
    plain = template.replace("\r\n", "\n").replace("\r", "\n")
    return _GENERATION_TAG.sub(lambda tag: f"{{%{tag[1]} {'endif' if tag[2] else 'if true'} {tag[3]}%}}", plain)


def _write_templates(templates: dict[str, str], writer: BundleWriter) -> dict[str, Any]:
    """Write the templates; returns their fields of the manifest."""
    fields: dict[str, Any] = {}
    for name, text in templates.items():
        path = TEMPLATE if name == "default" else f"{ADDITIONAL}/{name}.jinja"
        # In bytes: no platform may change the line ends.
        writer.add(path, "chat_template").write_bytes(text.encode("utf-8"))
        if name == "default":
            fields["chat_template"] = path
        else:
            fields.setdefault("additional_chat_templates", {})[name] = path
    return fields


def _try_template(
    tokenizer: Any, config: ModelConfig, writer: BundleWriter, notices: list[str]
) -> dict[str, Any]:
    """Probe the default template and write chat_tests.json; returns `template` of the manifest."""
    able = abilities.probe(tokenizer, config)
    notices += able.notices(config)
    if tells_time(tokenizer):
        notices.append(
            "the chat template asks for the time (strftime_now): an app must provide that function, and the entries of "
            'chat_tests.json say in "now" what it told them'
        )
    tests = chat_tests(tokenizer, able)
    _check_plain(tests[0]["token_ids"], config.text.vocab_size)
    writer.add("chat_tests.json", "chat_tests").write_text(dump_tests(tests), encoding="utf-8")
    return able.as_manifest()


def _check_plain(ids: list[int], rows: int) -> None:
    """Refuse the tokenizer of another model: its ids would read rows that the embedding does not have.

    Raises:
        CheckpointError: naming the ids.
    """
    if not ids or max(ids) >= rows:
        found = f"ids up to {max(ids)}" if ids else "no ids"
        raise CheckpointError(
            f"template and tokenizer make {found} of the conversation 'plain'; they must be 0 to {rows - 1}, the rows "
            "of the embedding: take chat_template.jinja, tokenizer.json and the weights from the same checkpoint"
        )


def _tell_rows(real: dict[int, str], rows: int, notices: list[str]) -> None:
    beyond = sorted(number for number in real if number >= rows)
    if beyond:
        notices.append(
            f"{len(beyond)} tokens have no row in the embedding of {rows} rows, from {real[beyond[0]]!r} "
            f"({beyond[0]}) on: prompts with them are refused; if the model was to know them, resize its embedding "
            "and train it (resize_token_embeddings)"
        )


def _special(real: dict[int, str], config: ModelConfig) -> dict[str, int]:
    """Ids that frame and hold a picture; of a model without vision, those that the tokenizer has as such."""
    ids = {
        "image": (config.image_token_id, "<|image_pad|>"),
        "vision_start": (config.vision_start_token_id, "<|vision_start|>"),
        "vision_end": (config.vision_end_token_id, "<|vision_end|>"),
    }
    keep = config.vision is not None or not real
    return {name: number for name, (number, token) in ids.items() if keep or real.get(number) == token}


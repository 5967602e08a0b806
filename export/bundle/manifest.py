"""manifest.json: schema, path rules and cross-references, for writing and for reading. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import jsonschema

from export.spec import ExportError

MANIFEST = "manifest.json"
SCHEMA_VERSION = "1.0"
SCHEMA = Path(__file__).with_name("bundle.schema.json")


class BundleError(ExportError):
    """A bundle is broken, tampered with, or breaks the contract."""


@cache
def _validator() -> Any:
    return jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))


def dump(value: Any) -> str:
    """JSON as every file of a bundle has it: sorted keys, one space, a final newline, no NaN."""
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def load(path: Path) -> dict[str, Any]:
    """Read and check a manifest file.

    Raises:
        BundleError: no JSON object, or the contract is broken.
    """
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BundleError(f"{path} is not valid JSON ({error}); export the bundle again") from error
    if not isinstance(manifest, dict):
        raise BundleError(f"{path} is no JSON object; export the bundle again")
    check_manifest(manifest)
    return manifest


def check_manifest(manifest: Mapping[str, Any]) -> None:
    """Hold a manifest against the schema, the path rules and its own lists.

    Raises:
        BundleError: the first violation, with its place in the document.
    """
    version = manifest.get("schema_version")
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"{MANIFEST} has schema_version {version!r}; this release reads {SCHEMA_VERSION!r}: use a matching one"
        )
    error = jsonschema.exceptions.best_match(_validator().iter_errors(manifest))
    if error is not None:
        place = "/".join(str(part) for part in error.absolute_path) or "the top"
        raise BundleError(f"{MANIFEST} breaks the schema at {place}: {error.message}; export the bundle again")
    listed: set[str] = set()
    for entry in manifest["files"]:
        check_path(entry["path"])
        if entry["path"] == MANIFEST or entry["path"] in listed:
            raise BundleError(f"{MANIFEST} lists {entry['path']} twice, or itself; every other file is listed once")
        listed.add(entry["path"])
    for place, path in _references(manifest):
        check_path(path)
        if path not in listed and not any(file.startswith(f"{path}/") for file in listed):  # a package directory
            raise BundleError(f"{MANIFEST}: {place} names {path}, which `files` does not list; export the bundle again")
    for problem in _contradictions(manifest):
        raise BundleError(f"{MANIFEST}: {problem}; export the bundle again")


def _references(manifest: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Every path named outside `files`, with its place."""
    for name, signature in manifest["signatures"].items():
        for stage in signature["stages"]:
            yield f"signature {name}", stage["file"]
    for path in manifest["tokenizer"]["files"]:
        yield "tokenizer.files", path
    if manifest["tokenizer"]["chat_template"] is not None:
        yield "tokenizer.chat_template", manifest["tokenizer"]["chat_template"]
    for name, path in manifest["tokenizer"].get("additional_chat_templates", {}).items():
        yield f"tokenizer.additional_chat_templates.{name}", path
    for name, path in manifest["reports"].items():
        yield f"reports.{name}", path


def _contradictions(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Rules of the contract that the schema cannot say, as sentences."""
    signatures = manifest["signatures"]
    wanted = [f"prefill_{length}" for length in manifest["prefill_lengths"]]
    wanted += [f"vision_{height}x{width}" for height, width in manifest["image_sizes"]]
    for name in wanted:
        if name not in signatures:
            yield f"there is no signature {name}, though prefill_lengths or image_sizes promise it"
    for name in signatures:
        if name.startswith(("prefill_", "vision_")) and name not in wanted:
            yield f"signature {name} is in neither prefill_lengths nor image_sizes"
    states = [state["name"] for state in manifest["states"]]
    if len(set(states)) != len(states):
        yield "two states have one name"
    sizes = {entry["path"]: entry["bytes"] for entry in manifest["files"]}
    for name, signature in signatures.items():
        known = {tensor["name"] for tensor in signature["inputs"]}
        for stage in signature["stages"]:
            for tensor in stage.get("inputs", {}):
                if tensor not in known:
                    yield f"signature {name} reads {tensor!r}, which is no input and which no earlier stage writes"
            for state in stage.get("states", {}):
                if state not in states:
                    yield f"signature {name} touches the state {state!r}, which `states` does not list"
            known |= set(stage.get("outputs", {}))
            if stage["kind"] == "table":
                yield from _table_problems(name, stage, sizes[stage["file"]])
        for tensor in signature["outputs"]:
            if tensor["name"] not in known:
                yield f"signature {name} promises {tensor['name']!r}, which no stage writes"


def _table_problems(name: str, stage: Mapping[str, Any], size: int) -> Iterator[str]:
    """A table must describe itself and lie within its file: hosts map it without asking again."""
    table = stage.get("table")
    if table is None:
        yield f"signature {name} has a table stage without `table`"
        return
    rows, columns, bits = table["rows"], table["columns"], table["bits"]
    group = table["group_size"] or columns
    if min(rows, columns, group) < 1 or columns % group or rows * columns * bits % 8:
        yield f"signature {name} has a table of {rows} x {columns} in groups of {group}, which do not divide"
        return
    regions = [(table["data_offset"], rows * columns * bits // 8)]
    if bits < 16:
        scale_bytes = 2 if table["scale_dtype"] == "float16" else 4
        regions.append((table["scale_offset"], rows * (columns // group) * scale_bytes))
    for offset, length in regions:
        if offset < 0 or offset + length > size:
            yield f"signature {name} has a table that reaches byte {offset + length} of a file of {size}"


def check_path(path: str) -> None:
    """Refuse a path that is absolute, climbs with "..", or is written for another system.

    Raises:
        BundleError: naming the path.
    """
    plain = PurePosixPath(path)
    strange = any(sign in path for sign in ("\\", ":", "\0"))
    if not path or plain.is_absolute() or ".." in plain.parts or strange or str(plain) != path:
        raise BundleError(
            f"{MANIFEST} names the path {path!r}; a path must be relative, with plain forward slashes, and stay "
            "inside the bundle"
        )

"""manifest.json: schema and path rules, for writing and for reading. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import jsonschema

from export.spec import ExportError

MANIFEST = "manifest.json"
SCHEMA = Path(__file__).with_name("bundle.schema.json")


class BundleError(ExportError):
    """A bundle is broken, tampered with, or breaks the contract."""


@cache
def _validator() -> Any:
    return jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))


def dump(value: Any) -> str:
    """JSON as every file of a bundle has it: sorted keys, two spaces, a final newline."""
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def check_manifest(manifest: Mapping[str, Any]) -> None:
    """Hold a manifest against the schema and the rule that no path leaves the bundle.

    Raises:
        BundleError: the first violation, with its place in the document.
    """
    version = manifest.get("schema_version")
    if version != "1.0":
        raise BundleError(
            f"manifest.json has schema_version {version!r}; this version reads '1.0': use a matching release"
        )
    error = jsonschema.exceptions.best_match(_validator().iter_errors(manifest))
    if error is not None:
        place = "/".join(str(part) for part in error.absolute_path) or "the top"
        raise BundleError(f"manifest.json breaks the schema at {place}: {error.message}")
    for path in paths(manifest):
        check_path(path)


def paths(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Every path a manifest names."""
    for entry in manifest["files"]:
        yield entry["path"]
    for signature in manifest["signatures"].values():
        for stage in signature["stages"]:
            yield stage["file"]
    yield from manifest["tokenizer"]["files"]
    yield from manifest["reports"].values()


def check_path(path: str) -> None:
    """Refuse a path that is absolute, climbs with "..", or is written for another system.

    Raises:
        BundleError: naming the path.
    """
    parts = PurePosixPath(path).parts
    if not path or path.startswith("/") or ".." in parts or "\\" in path or ":" in path or "\0" in path:
        raise BundleError(
            f"manifest.json names the path {path!r}; paths must be relative, with forward slashes, and stay "
            "inside the bundle"
        )

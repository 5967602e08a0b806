"""The contract in docs/bundle.md is held against the schema and the code, so that they cannot drift apart."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from export.__main__ import INTERRUPTED
from export.bundle.manifest import SCHEMA, SCHEMA_VERSION
from export.spec import ExportError, GateError, UsageError

DOCUMENT = Path(__file__).parents[1] / "docs" / "bundle.md"
Schema = dict[str, Any]
Row = tuple[str, str]
"""Type and meaning."""


@pytest.fixture(scope="module")
def document() -> str:
    return DOCUMENT.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def schema() -> Schema:
    found: Schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    return found


def fields_of_schema(schema: Schema) -> dict[str, tuple[Schema, bool]]:
    """Place of every property, such as `states[].kind`: its schema, and whether its object requires it."""
    found: dict[str, tuple[Schema, bool]] = {}

    def walk(node: Schema, place: str) -> None:
        if "$ref" in node:
            return walk(schema["$defs"][node["$ref"].rsplit("/", 1)[-1]], place)
        for choice in node.get("oneOf", ()):
            walk(choice, place)
        for name, child in node.get("properties", {}).items():
            inside = f"{place}.{name}" if place else name
            found[inside] = (child, name in node.get("required", ()))
            walk(child, inside)
        every = [node.get("additionalProperties"), *node.get("patternProperties", {}).values()]
        for child in every:
            if isinstance(child, dict):
                walk(child, f"{place}.*")
        if isinstance(node.get("items"), dict):
            walk(node["items"], f"{place}[]")
        return None

    walk(schema, "")
    return found


def fields_of_document(text: str) -> Iterator[tuple[str, Row]]:
    """Place and row of every field in a table whose first column is called `field`; headings give the object."""
    place, inside = "", False
    for line in text.splitlines():
        heading = re.match(r"#+ (?:`(.+)`|.*)$", line)
        if heading:
            place, inside = heading[1] or "", False
        if not line.startswith("|"):
            inside = False
            continue
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if cells[0] == "field":
            inside = True
        elif inside and (name := re.fullmatch(r"`(\w+)`", cells[0])):
            yield f"{place}.{name[1]}" if place else name[1], (cells[1], cells[2])


def differences(text: str, schema: Schema) -> list[str]:
    """What document and schema say otherwise about fields, as sentences; empty when they agree."""
    known = fields_of_schema(schema)
    rows = list(fields_of_document(text))
    written = dict(rows)
    found = [f"{place} is in the schema and not in the document" for place in known.keys() - written.keys()]
    found += [f"{place} is in the document and not in the schema" for place in written.keys() - known.keys()]
    found += [f"{place} is written twice" for place in written if [name for name, _ in rows].count(place) > 1]
    for place in known.keys() & written.keys():
        node, required = known[place]
        kind, meaning = written[place]
        if ("optional" in kind.split(", ")) == required:
            found.append(f"{place} is {'required' if required else 'optional'} in the schema")
        for value in [*node.get("enum", ()), *([node["const"]] if "const" in node else [])]:
            if not re.search(rf"(?<![\w.]){re.escape(str(value))}(?![\w.])", f"{kind} {meaning}"):
                found.append(f"{place} may be {value!r}, which the document does not say")
    return sorted(found)


def test_the_document_has_every_field_of_the_schema_and_no_other(document: str, schema: Schema) -> None:
    assert differences(document, schema) == []
    assert len(fields_of_schema(schema)) > 70


def test_every_property_is_named_in_backticks(document: str, schema: Schema) -> None:
    names = {place.rsplit(".", 1)[-1] for place in fields_of_schema(schema)}
    assert {name for name in names if f"`{name}`" not in document} == set()


WRONG: dict[str, tuple[Callable[[str], str], Callable[[Schema], object], str]] = {
    "a new field": (
        lambda text: text,
        lambda schema: schema["properties"]["tokenizer"]["properties"].update(real_token_count={"type": "integer"}),
        "tokenizer.real_token_count is in the schema and not in the document",
    ),
    "a field behind a reference": (
        lambda text: text,
        lambda schema: schema["$defs"]["tensor"]["properties"].update(axes={}),
        "signatures.*.inputs[].axes is in the schema and not in the document",
    ),
    "a row too many": (
        lambda text: text.replace("| `seed` |", "| `mood` | string, optional | – |\n| `seed` |", 1),
        lambda schema: None,
        "model.source.mood is in the document and not in the schema",
    ),
    "a row in another table": (
        lambda text: text.replace("| `profile` | string |", "| `seed` | string |", 1),
        lambda schema: None,
        "target.seed is in the document and not in the schema",
    ),
    "required": (
        lambda text: text.replace("| `revision` | string or null, optional |", "| `revision` | string or null |"),
        lambda schema: None,
        "model.source.revision is optional in the schema",
    ),
    "optional": (
        lambda text: text,
        lambda schema: schema["$defs"]["tensor"]["required"].append("axes")
        or schema["properties"]["target"]["required"].append("state_layout"),
        "target.state_layout is required in the schema",
    ),
    "a value": (
        lambda text: text,
        lambda schema: schema["properties"]["status"]["enum"].append("doubtful"),
        "status may be 'doubtful', which the document does not say",
    ),
    "twice": (
        lambda text: text.replace("| `recipe` |", "| `recipe` | string | – |\n| `recipe` |"),
        lambda schema: None,
        "quantization.recipe is written twice",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_drift_is_found(case: str, document: str, schema: Schema) -> None:
    in_text, in_schema, expected = WRONG[case]
    changed = copy.deepcopy(schema)
    in_schema(changed)
    assert expected in differences(in_text(document), changed)


def test_version_and_exit_codes_are_those_of_the_code(document: str) -> None:
    assert f'`schema_version` is `"{SCHEMA_VERSION}"`' in document
    codes = re.findall(r"^\| (\d+) \|", document, re.MULTILINE)
    errors = (ExportError, UsageError, GateError)
    assert [int(code) for code in codes] == [0, *(error.exit_code for error in errors), INTERRUPTED]


def test_links_lead_somewhere(document: str) -> None:
    anchors = {heading.strip("`").lower().replace(" ", "-") for heading in re.findall(r"^#+ (.+)$", document, re.M)}
    links = re.findall(r"\]\(([^)]+)\)", document)
    assert len(links) >= 5
    for link in links:
        if link.startswith("#"):
            assert link[1:] in anchors, link
        else:
            assert (DOCUMENT.parent / link).exists(), link


def test_the_rejected_kinds_of_a_path_are_all_written(document: str) -> None:
    from export.bundle.manifest import BundleError, check_path

    for sign, word in (("..", "`..`"), ("a\\b", "backslash"), ("a:b", "colon"), ("a\0b", "NUL"), ("", "not empty")):
        assert word in document
        with pytest.raises(BundleError, match="a path must be relative, with plain forward slashes"):
            check_path(sign)

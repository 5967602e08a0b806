"""Checks of the linter on a package as a whole: its files, what it says of itself, how the manifest calls it.
Torch-free.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from targets.to_coreml.lint_view import Hit, Subject, some
from targets.to_coreml.profiles import PROFILES

GIB = 1 << 30
PROGRAM_LIMIT, PROGRAM_LARGE = 2 * GIB - 1, 100_000_000
WEIGHTS_LIMIT = 2 * GIB - 1
WEIGHTS_PHONE, WEIGHTS_ANE = 1_000_000_000, 1_400_000_000
SILENT_FAILURE = 600_000_000
"""A little below the 667 MB of the package that was seen to fail so."""
FILE_FORMAT = "1.0.0"
ENTRY = ("author", "description", "name", "path")
VERSIONS = {"iOS18": (9, "CoreML8"), "iOS26": (10, "CoreML9")}
"""min_version of a manifest -> specification version and opset."""


def sizes(package: Path) -> Iterator[Hit]:
    """Of the program and of every weight file; before they are read."""
    for path in sorted((package / "Data").rglob("*")):
        if not path.is_file():
            continue
        size, name = path.stat().st_size, path.relative_to(package).as_posix()
        if path.suffix == ".mlmodel":
            if size > PROGRAM_LIMIT:
                yield _size("program-limit", name, size, PROGRAM_LIMIT, "move its constants into weight.bin")
            elif size > PROGRAM_LARGE:
                yield _size("program-size", name, size, PROGRAM_LARGE, "move its constants into weight.bin")
        elif path.suffix == ".bin":
            cut = "cut the decoder with --max-file-size or --max-file-layers"
            if size > WEIGHTS_LIMIT:
                yield _size("weights-limit", name, size, WEIGHTS_LIMIT, cut)
            elif size > WEIGHTS_PHONE:
                yield _size("weights-phone", name, size, WEIGHTS_PHONE, cut)
            if WEIGHTS_ANE < size <= WEIGHTS_LIMIT:
                yield _size("weights-ane-budget", name, size, WEIGHTS_ANE, cut)
            if size > SILENT_FAILURE:
                yield _size(
                    "ane-silent-failure", name, size, SILENT_FAILURE,
                    "let the app make one call in a process that may die, or cut the decoder with --max-file-size",
                )  # fmt: skip


def _size(rule: str, name: str, size: int, limit: int, remedy: str) -> Hit:
    return Hit(rule, name, f"has {size} bytes, more than {limit}: {remedy}")


def manifest_json(subject: Subject) -> Iterator[Hit]:
    """The package's own Manifest.json; that it is an object which names the program is checked by the reader."""
    path = subject.package.path / "Manifest.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.get("fileFormatVersion") != FILE_FORMAT:
        found = content.get("fileFormatVersion")
        text = f"has fileFormatVersion {found!r}, Core ML reads {FILE_FORMAT!r}: write the package again"
        yield Hit("package-manifest", path.name, text)
    named = []
    for entry in content["itemInfoEntries"].values():
        entry = entry if isinstance(entry, dict) else {}
        missing = [key for key in ENTRY if not isinstance(entry.get(key), str) or not entry[key]]
        if missing:
            text = f"entry {entry.get('name')!r} has no {some(missing)}; Core ML wants {', '.join(ENTRY)}: write them"
            yield Hit("package-manifest", path.name, text)
            continue
        named.append(entry["path"])
        place = PurePosixPath(entry["path"])
        if place.is_absolute() or ".." in place.parts:
            text = f"names {entry['path']!r}, which lies outside the package: do not use the package"
            yield Hit("package-manifest", path.name, text)
        elif not (subject.package.path / "Data" / entry["path"]).exists():
            text = f"names {entry['path']!r}, which is not there: copy the package again"
            yield Hit("package-manifest", path.name, text)
    data = subject.package.path / "Data"
    for file in sorted(data.rglob("*")):
        inside = file.relative_to(data).as_posix()
        if file.is_file() and not any(inside == item or inside.startswith(f"{item}/") for item in named):
            text = f"does not name {inside!r}; files without an entry are lost when the package is copied: add one"
            yield Hit("package-manifest", path.name, text)


def deployment_target(subject: Subject) -> Iterator[Hit]:
    """Specification version and opsets are those of the system that the manifest promises."""
    promised = subject.manifest["target"]["min_version"]
    if promised not in VERSIONS:
        text = f"the manifest promises {promised!r}, of which the linter knows nothing; it knows {', '.join(VERSIONS)}"
        yield Hit("deployment-target", "", text)
        return
    version, opset = VERSIONS[promised]
    found = subject.package.spec.specificationVersion
    if found != version:
        text = f"has specificationVersion {found}, {promised} is {version}: build for it, or correct min_version"
        yield Hit("deployment-target", "", text)
    for view in subject.views:
        if view.function.opset != opset:
            text = f"is written in opset {view.function.opset}, {promised} has {opset}: build for {promised}"
            yield Hit("deployment-target", "", text, view.function.name)


def described(subject: Subject) -> Iterator[Hit]:
    """Package, functions and tensors say what they are, and whose; the licence is the one that the manifest names."""
    about = subject.package.spec.description
    for field in ("shortDescription", "author", "license", "versionString"):
        if not getattr(about.metadata, field).strip():
            text = f"has no {field}; a package says what it is, whose, and under which licence: add it"
            yield Hit("described", "", text)
    own, model = about.metadata.license, subject.manifest.get("model", {})
    if own.strip() and "license" in model and own != model["license"]:
        text = f"has the licence {own!r}, model.license of the manifest is {model['license']!r}: export again"
        yield Hit("described", "", text)
    if about.metadata.versionString.strip() and not re.match(r"\d+\.\d+", about.metadata.versionString):
        text = f"has the versionString {about.metadata.versionString!r}, which begins with no version: export again"
        yield Hit("described", "", text)
    for view in subject.views:
        name = view.function.name
        if len(subject.package.functions) > 1 and not about.metadata.userDefined.get(f"function {name}"):
            yield Hit("described", "", f"has no text `function {name}` in the package's metadata: add it", name)
        features = subject.package.features(name)
        for kind in ("input", "output", "state"):
            for feature in getattr(features, kind):
                if not feature.shortDescription:
                    yield Hit("described", feature.name, f"is an {kind} without a shortDescription: add one", name)


def bindings(subject: Subject) -> Iterator[Hit]:
    """Functions, inputs, outputs and states are those that the manifest names."""
    views = {view.function.name: view for view in subject.views}
    called = set()
    for signature, stage in subject.stages():
        entry = stage["entry"]
        called.add(entry)
        if entry not in subject.package.functions:
            known = some(list(subject.package.functions))
            text = f"signature {signature} calls it; the package has {known}: export again"
            yield Hit("bindings", "", text, entry)
        if entry not in views:
            continue
        function, states = views[entry].function, stage.get("states", {})
        explicit = [how for how in states.values() if how != "internal"]
        for kind, wanted, own in (
            ("input", {*stage["inputs"].values(), *(how["input"] for how in explicit)}, function.inputs),
            ("output", {*stage["outputs"].values(), *(how["output"] for how in explicit)}, views[entry].outputs),
            ("state", {name for name, how in states.items() if how == "internal"}, function.states),
        ):
            for name in sorted(wanted ^ own.keys()):
                text = (
                    f"is {kind} of signature {signature}, but not of the function: export again"
                    if name in wanted
                    else f"is {kind} of the function, but signature {signature} does not name it: export again"
                )
                yield Hit("bindings", name, text, entry)
    for name in sorted(subject.package.functions.keys() - called):
        yield Hit("bindings", "", "no signature of the manifest calls it: drop the function", name)


def compute_units(manifest: Mapping[str, Any]) -> Iterator[Hit]:
    """An app is told the compute units of the profile that the packages were built for."""
    name = manifest["target"]["profile"]
    found = manifest.get("session_options", {}).get("computeUnits")
    if name not in PROFILES:
        text = f"target.profile is {name!r}, coreml has {', '.join(PROFILES)}: export again"
        yield Hit("compute-units", "", text)
    elif found != PROFILES[name].compute_units:
        wanted = PROFILES[name].compute_units
        text = f"session_options.computeUnits is {found!r}, profile {name} is for {wanted!r}: set that"
        yield Hit("compute-units", "", text)


CHECKS = (manifest_json, deployment_target, described, bindings)

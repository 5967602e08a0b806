"""The linter of packages: what devices are known to object to, before one is at hand.

`lint_rules` has the table of rules with their sources; each check here and in the modules `lint_*` is a small function
that yields hits, and a hit becomes a finding if its rule holds for the profile of the bundle.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from export.bundle.manifest import BundleError
from targets.base import Finding
from targets.to_coreml import lint_numbers, lint_package, lint_program, lint_states
from targets.to_coreml.lint_rules import RULES
from targets.to_coreml.lint_view import Hit, Subject, View
from targets.to_coreml.program import Package
from targets.to_coreml.stored import packages

PACKAGE_CHECKS = (
    *lint_package.CHECKS,
    *lint_states.CHECKS,
    *lint_program.PACKAGE_CHECKS,
    *lint_numbers.CHECKS,
)
FUNCTION_CHECKS = (*lint_states.FUNCTION_CHECKS, *lint_program.CHECKS)


def lint_bundle(folder: Path, manifest: Mapping[str, Any]) -> list[Finding]:
    """Everything the rules hold against the packages of a bundle; errors first. What they hold against values that
    a run showed is in `lint_streams`.

    Raises:
        ExportError: coremltools is not installed. What is wrong with a package itself is a finding.
    """
    found = [finding for file in packages(manifest) for finding in lint_package_file(folder, file, manifest)]
    found += _findings(lint_package.compute_units(manifest), "manifest.json", "", manifest)
    return ordered(found)


def ordered(findings: Iterable[Finding]) -> list[Finding]:
    """Errors first, then by place."""
    return sorted(findings, key=lambda finding: (finding.severity, finding.file, finding.function, finding.rule))


def lint_package_file(folder: Path, file: str, manifest: Mapping[str, Any]) -> Iterator[Finding]:
    """The findings on one package."""
    yield from _findings(lint_package.sizes(folder / file), file, "", manifest)
    try:
        package = Package(folder / file)
    except BundleError as error:
        yield from _findings([Hit("readable", "", str(error))], file, "", manifest)
        return
    views = []
    for name, function in package.functions.items():
        try:
            views.append(View(function))
        except BundleError as error:
            yield from _findings([Hit("readable", "", str(error))], file, name, manifest)
    subject = Subject(package, file, manifest, views)
    for check in PACKAGE_CHECKS:
        yield from _findings(check(subject), file, "", manifest)
    for view in views:
        for function_check in FUNCTION_CHECKS:
            yield from _findings(function_check(subject, view), file, view.function.name, manifest)


def observed_findings(
    folder: Path, manifest: Mapping[str, Any], observed: Mapping[tuple[str, str], Mapping[str, Any]]
) -> list[Finding]:
    """The findings on values that were seen in a run: (file, function) -> operation -> `lint_observe.Extremes`."""
    found: list[Finding] = []
    for (file, name), extremes in observed.items():
        view = View(Package(folder / file).function(name))
        found += _findings(lint_numbers.activations(view, extremes), file, name, manifest)
    return found


def _findings(hits: Iterable[Hit], file: str, function: str, manifest: Mapping[str, Any]) -> Iterator[Finding]:
    for hit in hits:
        rule = RULES[hit.rule]
        severity = rule.severity(manifest["target"]["profile"])
        if severity is not None:
            yield Finding(hit.rule, severity, file, hit.function or function, hit.item, hit.text, rule.source)

"""Several bundles in one `validate`: which may stand side by side, what they are called, where their report may lie."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from export.bundle.reader import Bundle
from export.report.comparison import Column
from export.spec import UsageError


def open_bundles(paths: Sequence[Path]) -> list[Bundle]:
    """Open and check every bundle before any work begins.

    Raises:
        UsageError: a folder given twice, or bundles of different checkpoints.
        BundleError: one of them is broken.
    """
    folders = [path.resolve() for path in paths]
    for place, folder in enumerate(folders):
        if folder in folders[:place]:
            raise UsageError(f"{paths[place]} is given twice; a comparison needs different bundles, leave one out")
    bundles = [Bundle.open(folder) for folder in folders]
    check_one_checkpoint(bundles)
    return bundles


def check_one_checkpoint(bundles: Sequence[Bundle]) -> None:
    """Numbers of different models do not belong in one table.

    Raises:
        UsageError: naming the first difference, both values and the remedy.
    """
    wanted = _identity(bundles[0].manifest)
    for bundle in bundles[1:]:
        for what, value in _identity(bundle.manifest).items():
            if value != wanted[what]:
                raise UsageError(
                    f"the bundles are of different checkpoints: {what} is {wanted[what]} in {bundles[0].path} and "
                    f"{value} in {bundle.path}; export both from one checkpoint, or validate them one by one"
                )


def _identity(manifest: dict[str, Any]) -> dict[str, Any]:
    """What two bundles of one checkpoint agree in, as an error message would show it."""
    model, source = manifest["model"], manifest["model"]["source"]
    layers = [state["layer"] for state in manifest["states"]]
    return {
        "the size": model["size"],
        "the variant": model["variant"],
        "the source": ", ".join(f"{key} {source[key]}" for key in sorted(source) if source[key] is not None),
        "the vocabulary": model["vocab_size"],
        "the hidden size": model["hidden_size"],
        "the number of layers": 1 + max(max(each) if isinstance(each, list) else each for each in layers),
    }


def names(bundles: Sequence[Bundle]) -> list[str]:
    """Headings of the columns: the shortest kind of name that tells all bundles apart."""
    kinds = ([b.manifest["name"] for b in bundles], [b.path.name for b in bundles], [str(b.path) for b in bundles])
    return next(kind for kind in kinds if len(set(kind)) == len(bundles))


def columns(bundles: Sequence[Bundle], reports: Sequence[dict[str, Any]]) -> list[Column]:
    found = zip(names(bundles), bundles, reports, strict=True)
    return [Column(name, bundle.path, bundle.manifest, report) for name, bundle, report in found]


def check_report(report: Path, bundles: Sequence[Path]) -> None:
    """Refuse, before the work, a report that cannot be written or would change a bundle.

    Raises:
        UsageError: naming the file, the rule and the remedy.
    """
    folder = report.resolve().parent
    if not folder.is_dir():
        raise UsageError(f"--report {report}: there is no folder {folder}; make it, or choose another place")
    for bundle in bundles:
        if folder.is_relative_to(bundle.resolve()):
            raise UsageError(
                f"--report {report}: lies inside the bundle {bundle}, which validate only changes with --update; "
                "choose another place"
            )

"""How large the values of a bundle become in a run: its residual streams layer by layer, and the largest of all."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from targets.base import Activations, Prompt
from targets.to_coreml.lint import observed_findings, ordered
from targets.to_coreml.lint_numbers import reached
from targets.to_coreml.lint_observe import Extremes, Observed, conversations, observe
from targets.to_coreml.lint_view import View
from targets.to_coreml.operators import STREAM
from targets.to_coreml.program import Package

LAYER = re.compile(rf"{STREAM}(decoder_layers|vision_blocks)_(\d+)_\w+|{STREAM}(vision)")
"""An operation that writes into a stream: of which layer or block, or of the encoder before its blocks."""


def observe_bundle(
    folder: Path,
    manifest: Mapping[str, Any],
    prompts: Sequence[Prompt],
    pictures: Sequence[NDArray[Any]] = (),
    advance: Callable[[float], None] = lambda share: None,
) -> Activations:
    """Run a bundle's packages on the interpreter. See `targets.base.Target.observe`.

    Raises:
        ExportError: a package cannot be read or run.
    """
    return summarised(folder, manifest, observe(folder, manifest, conversations(manifest, prompts, pictures, advance)))


def summarised(folder: Path, manifest: Mapping[str, Any], observed: Observed) -> Activations:
    """What a run showed, in short."""
    streams: dict[tuple[str, int], float] = {}
    largest, where = 0.0, ""
    for (file, name), extremes in observed.items():
        view = View(Package(folder / file).function(name))
        for operation, kind, value in _reached(view, extremes):
            if value > largest:
                largest, where = value, f"{file}: {name}: {operation} ({kind})"
            found = LAYER.fullmatch(operation)
            if found is not None:
                key = ("vision_blocks", -1) if found[3] else (found[1], int(found[2]))
                streams[key] = max(streams.get(key, 0.0), value)

    def of(stream: str) -> tuple[float, ...]:
        return tuple(streams[key] for key in sorted(streams) if key[0] == stream)

    findings = ordered(observed_findings(folder, manifest, observed))
    return Activations(of("decoder_layers"), of("vision_blocks"), largest, where, findings)


def _reached(view: View, extremes: Mapping[str, Extremes]) -> Iterator[tuple[str, str, float]]:
    """(operation, kind, largest magnitude of its float16 results); infinite where one was not finite."""
    for operation, seen, value in reached(view, extremes):
        if seen.half:
            yield operation.name, operation.type, math.inf if seen.broken else value

"""How large the values of a bundle become, into the report: the last thing that a float16 runtime must be asked."""

from __future__ import annotations

from export.validate.case import Rung
from export.validate.gates import gated
from targets.base import Activations


def record(seen: Activations, rung: Rung) -> None:
    """The largest value as a check of the rung, the residual streams layer by layer as its series."""
    rung.checks.append(gated("L3.activations", seen.largest))
    rung.series["text_stream"] = list(seen.text)
    rung.series["vision_stream"] = list(seen.vision)
    rung.notes.append(
        f"The largest of all values in float16 is {seen.largest:.0f}, from {seen.where}; float16 ends at 65,504."
    )

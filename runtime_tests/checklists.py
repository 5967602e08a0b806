"""Two closed lists of checks, those with a gate and those without: what a report must hold, and nothing else.

Written out apart from `export.validate.gates`, so that a check that loses its gate, or is no longer made, shows.
"""

from __future__ import annotations

from typing import Any

GATED = {
    "": {
        *("L0.logits", "L0.states", "L0.rounding", "L0.whole_model"),
        *("L2.mismatches", "L2.missing", "L2.tensor_error"),
        *("L3.kl_mean", "L3.sqnr_db", "L3.top1", "L3.top5", "L3.chunking", "L3.state_noise"),
    },
    "float32": {"L1.logits", "L1.states", "L1.padding", "L1.embed"},
    "float16": {f"L1.{how}.{n}" for how in ("exact", "float16") for n in ("logits", "states", "padding", "embed")},
    "pictures": {"L0.vision", "L3.vision"},
    "pictures, float32": {"L1.vision"},
    "pictures, float16": {"L1.exact.vision", "L1.float16.vision"},
    "drift": {"L3.drift"},
    "chats": {
        *("L3.own_kl", "L3.own_top1", "L3.own_perplexity", "L3.answered", "L3.stopped_at_once", "L3.one_token"),
        *("L3.given_kl", "L3.given_top1", "L3.given_perplexity", "L3.reference_agrees"),
    },
    "task": {"L3.task_reference", "L3.task_drop"},
    "observed": {"L3.activations"},
}
RECORDED = {
    "": {
        *("L1.layers", "L2.weights", "L3.kl_p99", "L3.kl_worst", "L3.ambiguous", "L3.text_positions"),
        *("L3.certainty", "L3.states"),
    },
    "pictures": {"L0.pictures_in_text"},
    "calls that end in pictures": {"L3.kl_pictures"},
    "text": {"L3.perplexity", "L3.perplexity_reference"},
    "drift": {"L3.drift_first", "L3.drift_steps", "L3.drift_context"},
    "layouts": {"L3.drift_separate", "L3.drift_stacked", "L3.drift_explicit"},
    "chats": {"L3.own_positions", "L3.own_certainty", "L3.given_positions"},
    "task": {"L3.task.recall", "L3.task.arithmetic"},
    "task, pictures": {"L3.task.glyphs", "L3.task.objects"},
    "stress": {"L3.stress_kl"},
}
"""By what a bundle must have for them."""


def hold(report: dict[str, Any], *has: str, learned: bool) -> None:
    """Hold every check of the rungs that were climbed, with quantised weights, against the lists.

    Args:
        has: keys of the lists. learned: False for random weights, of which the gates of L3 are not enforced.
    """
    found = {check["name"]: check for rung in report["rungs"].values() for check in rung["checks"]}
    gated, recorded = (
        {
            name
            for key, names in table.items()
            if all(part in has for part in key.split(", ") if part)
            for name in names
            if name.split(".")[0] in report["rungs"]
        }
        for table in (GATED, RECORDED)
    )
    have = {name for name, check in found.items() if check["limit"] is not None}
    assert have == gated, f"gates: new {sorted(have - gated)}, missing {sorted(gated - have)}"
    assert found.keys() - have == recorded, (
        f"without a gate: new {sorted(found.keys() - have - recorded)}, missing {sorted(recorded - found.keys())}"
    )
    for name, check in found.items():
        free = name in recorded or not (learned or name.startswith(("L0", "L1", "L2", "L3.text_runner", "L3.activat")))
        assert (check["status"] == "RECORDED") is free, name
        assert len(check["reason"]) > 5

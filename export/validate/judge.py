"""A verdict on a bundle: climb the ladder, measure latency, and the JSON both leave behind."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from export.bundle.writer import BundleWriter
from export.chat.conversation import Contract
from export.chat.template import load_tokenizer
from export.checkpoint.base import Checkpoint
from export.checkpoint.weights import Weights
from export.model.config import ModelConfig
from export.pace import Pace
from export.quantize.recipe import Recipe
from export.sizes import SHIPPED, TINY
from export.validate import activations, bench, chats, latency, task, texts, work
from export.validate.amounts import Amounts, amounts_for
from export.validate.case import Case, Known
from export.validate.examples import examples
from export.validate.ladder import RUNGS, climb
from export.validate.probe import image_tokens
from targets.base import Finding, Prompt, Target, grouped


def judge(
    checkpoint: Checkpoint,
    config: ModelConfig,
    recipe: Recipe,
    target: Target,
    folder: Path,
    manifest: dict[str, Any],
    threads: int,
    stage: Callable[..., Any],
    rungs: tuple[str, ...] = RUNGS,
    with_latency: bool = True,
    amounts: Amounts | None = None,
    on_findings: Callable[[list[Finding]], None] = lambda findings: None,
    known: Known | None = None,
) -> dict[str, Any]:
    """Run the linter and the rungs on a bundle folder and measure it.

    Args:
        rungs: the linter runs with all of them only. amounts: how much L3 reads and asks; None: by the size of the
            model, and nothing beside the probe for random weights. on_findings: is given what the linter found before
            the first rung; raises to stop here. known: what cases of this checkpoint share, for several bundles of it.

    Returns:
        The content of parity.json, and under "latency" that of latency.json. "measured" says where the numbers of L1
        and L3 come from (host or emulated); "lint" is there where the target has a linter, whose errors count as
        failed gates do.
    """
    findings = None
    if set(rungs) == set(RUNGS):
        with stage("lint"):
            findings = target.lint(folder, manifest)
        on_findings(findings or [])
    random = manifest["model"]["source"]["kind"] == "random"
    if amounts is None:
        amounts = amounts_for(Weights(checkpoint, config))
        amounts = replace(amounts, drift=0) if random else amounts
    pictures = [image_tokens(config, h, w) + 2 for h, w in (manifest["image_sizes"] * 2)[:2]]
    case = Case(
        checkpoint,
        config,
        recipe,
        target,
        folder,
        manifest,
        threads,
        tokens=amounts.probe + sum(pictures),
        amounts=amounts,
        gate_quality=not random,
        known={} if known is None else known,
    )
    refused: list[str] = []
    if not random and "tokenizer.json" in manifest["tokenizer"]["files"]:
        tokenizer = load_tokenizer(folder)
        case.text = texts.text(tokenizer)
        found = chats.load(tokenizer, Contract.of(manifest), case.pictures_in_chats, amounts.chats)
        case.chats, refused = found.asked, found.notes
        case.decode = lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True))
        skills = _skills(checkpoint, config, manifest)
        if skills:
            case.task = lambda generate: task.evaluate(generate, tokenizer, tasks=skills)
            case.text, case.familiar = task.text(tokenizer, int(manifest["context_length"])), True
    seen = None
    if findings is not None and not any(found.severity == "error" for found in findings):
        with stage("activations", 1.0) as pace:
            prompts: list[Prompt] = [case.probe, *examples(folder, manifest)]
            seen = target.observe(folder, manifest, prompts, case.pictures, pace.advance)
        observed = seen.findings if seen is not None else []
        on_findings(observed)
        findings += observed
    results = []
    for rung in rungs:
        with stage(f"validate {rung}") as case.pace:
            results += climb(case, (rung,))
        if rung == "L3":
            results[-1].notes += refused
            if seen is not None:
                activations.record(seen, results[-1])
    report: dict[str, Any] = {
        "rungs": {r.name: finite(r.as_json()) for r in results},
        "passed": all(r.status == "PASS" for r in results) and not any(f.severity == "error" for f in findings or ()),
        "measured": target.measured,
    }
    if findings is not None:
        report["lint"] = grouped(findings)
    if with_latency:
        with stage("latency") as pace:
            report["latency"] = measure(checkpoint, config, folder, manifest, threads, pace)
    return report


def _skills(checkpoint: Checkpoint, config: ModelConfig, manifest: dict[str, Any]) -> tuple[str, ...]:
    """Tasks that measure this bundle: those of the shipped tiny checkpoint, whole, where they fit."""
    source = manifest["model"]["source"]
    shipped = manifest["model"]["size"] == TINY and source["kind"] == "path" and source["id"] == SHIPPED
    whole = config.text.num_hidden_layers == checkpoint.model_config.text.num_hidden_layers
    if not shipped or not whole or manifest["context_length"] < task.LONGEST:
        return ()
    sizes = {(h, w) for h, w in manifest["image_sizes"]}
    return tuple(t for t in task.TASKS if t in task.WITHOUT_PICTURE or sizes.issuperset(task.IMAGE_SIZES))


def measure(
    checkpoint: Checkpoint,
    config: ModelConfig,
    folder: Path,
    manifest: dict[str, Any],
    threads: int,
    pace: Pace,
) -> dict[str, Any]:
    """Latency of the bundle, in a process of its own, and of PyTorch in the same run, which takes about as long."""
    pace.expect({"bundle": 1, "reference": 1})
    with pace.part("bundle", 1):
        bundle = bench.measure_apart(folder, manifest, threads)
    prompt = bundle["prefill"]["prompt_tokens"]
    bundle["decode_macs"] = work.decode_macs(config, prompt)
    with pace.part("reference", 1):
        reference = latency.measure_reference(checkpoint, config, threads, prompt, 2, 4)
    return {"bundle": bundle, "reference": reference}


def failures(report: dict[str, Any]) -> list[str]:
    """One line per failed check: name, value, limit; and per error of the linter: where, what, rule."""
    lines = []
    for rung in report["rungs"].values():
        for check in rung["checks"]:
            if check["status"] == "FAIL":
                rule = "at least" if check["at_least"] else "at most"
                lines.append(f"{check['name']} is {float(check['value']):.3g}, must be {rule} {check['limit']:g}")
    errors = [found for found in report.get("lint") or () if found["severity"] == "error"]
    return lines + [f"{found['where']} {found['text']} [{found['rule']}]" for found in errors]


def finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: they become the strings "inf", "-inf" and "nan"."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [finite(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def write_reports(writer: BundleWriter, manifest: dict[str, Any], report: dict[str, Any]) -> None:
    """parity.json, latency.json and report.html into the bundle, and their names into the manifest."""
    from export.report.page import render

    parity = {key: value for key, value in report.items() if key != "latency"}
    writer.add_json("parity.json", "report", parity)
    manifest["reports"] = {"parity": "parity.json"}
    if "latency" in report:
        writer.add_json("latency.json", "report", report["latency"])
        manifest["reports"]["latency"] = "latency.json"
    page = render({**manifest, "files": writer.files()}, report)
    writer.add("report.html", "report").write_text(page, encoding="utf-8")

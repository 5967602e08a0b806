"""What the commands do and print: results on stdout, progress on stderr."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Hashable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from export.bundle.manifest import dump
from export.bundle.reader import Bundle
from export.bundle.writer import BundleWriter
from export.progress import Reporter
from export.sizes import CUSTOM, SHIPPED
from export.spec import ExportSpec, GateError, UsageError
from targets.base import Finding

if TYPE_CHECKING:
    from export.validate.golden import Golden


def export(spec: ExportSpec, options: argparse.Namespace) -> int:
    """Build a bundle and print where it is."""
    from export import pipeline

    torch.set_num_threads(spec.threads)
    reporter = Reporter(quiet=options.quiet, json_lines=options.json)
    if options.quiet or options.json:
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()  # of downloads, which the hub's library draws itself
    try:
        result = pipeline.run(spec, reporter)
    except GateError:
        if not options.quiet and not options.json:
            _print(reporter.table())
        raise
    if options.json:
        _print(
            json.dumps(
                {
                    "bundle": str(result.path),
                    "status": result.manifest["status"],
                    "bytes": sum(f["bytes"] for f in result.manifest["files"]),
                    "stages": reporter.as_json(),
                }
            )
        )
        return 0
    if not options.quiet:
        _print(reporter.table())
    if result.report is not None:
        _print(parity_table(result.report))
        _print(f"report: {result.path / 'report.html'}")
    _print(f"bundle: {result.path} ({result.manifest['status']})")
    return 0


def parity_table(report: dict[str, Any]) -> str:
    """Every check of a report, one per line, with where the bundle ran (host or emulated); then the linter's."""
    from export.report.card import gate, number, source

    lines = [f"{'check':<26}{'value':>12}  {'gate':<12}{'status':<10}source"]
    for rung in report["rungs"].values():
        for check in rung["checks"]:
            line = f"{check['name']:<26}{number(check['value']):>12}  {gate(check):<12}{check['status']:<10}"
            lines.append((line + source(report, check["name"])).rstrip())
    for found in report.get("lint") or ():
        lines.append(f"linter {found['severity']}, {found['rule']} ({found['count']}): {found['text']}")
    return "\n".join(lines)


def open_source(bundle: Bundle, checkpoint: str | None, adapter: str | None) -> Any:
    """The checkpoint a bundle was made from: as its manifest says, or as the user does."""
    from export.checkpoint import open_checkpoint
    from export.checkpoint.adapter_config import NO_ADAPTER

    model = bundle.manifest["model"]
    source = model["source"]
    where = checkpoint
    if where is None and source["kind"] == "random":
        where = "random"
    elif where is None and source["kind"] == "hub":
        where = source["id"]
    elif where is None and not (source["kind"] == "path" and source["id"] == SHIPPED):
        raise UsageError(f"the bundle was made from the folder {source['id']!r}; give it with --checkpoint PATH")
    if checkpoint == "random" and source["kind"] != "random":
        raise UsageError(f"the bundle was made from {source['id']!r}, not from random weights; give that checkpoint")
    merged = source.get("adapter")
    if merged is not None and adapter in (None, NO_ADAPTER):
        raise UsageError(f"the adapter {merged!r} was merged into the bundle; give it with --adapter PATH")
    if merged is None and adapter not in (None, NO_ADAPTER):
        raise UsageError(f"--adapter {adapter}: no adapter was merged into the bundle; leave it out")
    spec = ExportSpec(
        target=bundle.manifest["target"]["name"],
        size=model["size"] if where in (None, "random") or source["kind"] == "hub" else CUSTOM,
        base=model["variant"] == "base",
        checkpoint=where,
        revision=source.get("revision"),
        adapter=adapter,
        vision=bool(bundle.manifest["image_sizes"]),
        seed=source.get("seed") or 0,
    )
    return open_checkpoint(spec)


def model_config(bundle: Bundle, checkpoint: Any) -> Any:
    """The checkpoint's config as the bundle uses it: layers and vision as exported."""
    layers = {layer for s in bundle.manifest["states"] for layer in _as_list(s["layer"])}
    config = checkpoint.model_config.truncated(max(layers) + 1)
    return config if bundle.manifest["image_sizes"] else config.without_vision()


def _as_list(layer: int | list[int]) -> list[int]:
    return layer if isinstance(layer, list) else [layer]


def recipe_of(manifest: dict[str, Any]) -> Any:
    from export.quantize.recipe import Recipe

    return Recipe.from_manifest(manifest["quantization"])


def validate(options: argparse.Namespace) -> int:
    """Climb the ladder on finished bundles, or hold them against a golden, several of them side by side; 3 when a
    gate fails.
    """
    from export import compare
    from export.report import comparison
    from export.validate import bench, golden, judge

    torch.set_num_threads(options.threads)
    page = options.report is not None and options.report.suffix.lower() == ".html"
    if options.report is not None:
        compare.check_report(options.report, options.bundles)
    bundles = compare.open_bundles(options.bundles)
    several = len(bundles) > 1
    reporter = Reporter(quiet=options.quiet, json_lines=options.json)
    held = golden.read(options.golden) if options.golden is not None else None
    if held is not None:
        for bundle in bundles:
            golden.fit(held, bundle.path, bundle.manifest)  # refused before any work begins
    if held is None or options.rung:
        checkpoint = open_source(bundles[0], options.checkpoint, options.adapter)
        known: dict[tuple[Hashable, ...], Any] = {}
        reports = [_climb(b, checkpoint, options, reporter, known, alone=not several) for b in bundles]
    else:
        reports = [{"rungs": {}, "passed": True} for _ in bundles]
    if held is not None:
        for bundle, report in zip(bundles, reports, strict=True):
            with reporter.stage(f"golden of {bundle.path.name}" if several else "golden"):
                _hold(held, bundle, report, options.threads)
    if (several or page) and not options.rung and held is None:
        # One after the other, after all ladders: the speed of a shared host changes with time.
        for bundle, report in zip(bundles, reports, strict=True):
            with reporter.stage(f"measure {bundle.path.name}"):
                report.setdefault("latency", {})["bundle"] = bench.measure_apart(
                    bundle.path, bundle.manifest, options.threads
                )
    if options.update:
        bundles = [update(bundles[0], reports[0])]
    columns = compare.columns(bundles, reports)
    result = comparison.as_json(columns) if several else {**reports[0], **comparison.standing(columns[0])}
    if options.report is not None:
        options.report.write_text(comparison.render(columns) if page else dump(result), encoding="utf-8")
    shown = comparison.table(columns) if several else f"{parity_table(reports[0])}\n{standing(columns[0])}"
    _print(json.dumps(result) if options.json else shown)
    for column in columns:
        if not column.report["passed"]:
            whose = f" of {column.name}" if several else ""
            sys.stderr.write(f"error: gates{whose} failed: {'; '.join(judge.failures(column.report))}\n")
    return 0 if all(report["passed"] for report in reports) else 3


def _hold(held: Golden, bundle: Bundle, report: dict[str, Any], threads: int) -> None:
    """Put the result of a golden beside the rungs of a report."""
    from export.validate import golden, judge
    from targets import load_target

    target = load_target(bundle.manifest["target"]["name"])
    rung = golden.hold(held, bundle.path, bundle.manifest, target, threads)
    report["rungs"][rung.name] = judge.finite(rung.as_json())
    report["passed"] = report["passed"] and rung.status == "PASS"
    report["measured"] = target.measured


def standing(column: Any) -> str:
    """Which rungs were climbed now, and what the bundle says of itself, in one line."""
    from export.report.comparison import standing as found
    from export.validate.ladder import RUNGS

    now = found(column)
    left = [name for name in RUNGS if name not in now["climbed"]]
    without = f", without {', '.join(left)}" if left else ""
    return f"climbed {', '.join(now['climbed'])}{without}; status of the bundle: {now['status']}"


def _climb(
    bundle: Bundle,
    checkpoint: Any,
    options: argparse.Namespace,
    reporter: Reporter,
    known: dict[tuple[Hashable, ...], Any],
    *,
    alone: bool,
) -> dict[str, Any]:
    """The report on one bundle; only if it is alone with the latency, which is otherwise measured for all.

    Args:
        known: what the bundles, which are all of one checkpoint, share; see `Case.once`.
    """
    from export.validate import judge
    from export.validate.ladder import RUNGS
    from targets import load_target

    def stage(name: str, total: float | None = None) -> Any:
        return reporter.stage(name if alone else f"{name} of {bundle.path.name}", total)

    return judge.judge(
        checkpoint,
        model_config(bundle, checkpoint),
        recipe_of(bundle.manifest),
        load_target(bundle.manifest["target"]["name"]),
        bundle.path,
        bundle.manifest,
        options.threads,
        stage,
        rungs=tuple(options.rung or RUNGS),
        with_latency=alone and (options.update or not options.rung),
        known=known,
    )


def update(bundle: Bundle, report: dict[str, Any]) -> Bundle:
    """Replace the reports of a bundle: a copy is written beside it and takes its place when complete. Returns it as it
    is then.
    """
    import shutil

    from export.report import card
    from export.validate import judge
    from targets import load_target

    with BundleWriter(bundle.path, {"update": bundle.manifest["name"]}, overwrite=True, resume=False) as writer:
        manifest = dict(bundle.manifest)
        replaced = {"parity.json", "latency.json", "report.html", "README.md"}
        for entry in manifest["files"]:
            if entry["path"] not in replaced:
                target = writer.add(entry["path"], entry["role"])
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(bundle.file(entry["path"]), target)
        manifest["status"] = "validated" if report["passed"] else "unvalidated"
        judge.write_reports(writer, manifest, report)
        loading = load_target(manifest["target"]["name"]).loading
        writer.add("README.md", "card").write_text(card.render(manifest, report, loading), encoding="utf-8")
        writer.commit(manifest, accepted=True)
    return Bundle.open(bundle.path, verify=False)


def run(options: argparse.Namespace) -> int:
    """Answer one or several user turns, streaming."""
    from export.chat import pictures
    from export.chat.chat import Chat
    from export.chat.conversation import Contract, Conversation
    from export.chat.sampling import Sampling
    from export.chat.template import load_tokenizer
    from targets import load_target

    bundle = Bundle.open(options.bundle, verify=options.verify)
    sampler = Sampling(options.temperature, options.top_k, options.top_p, options.seed or 0).sampler()
    tokenizer = load_tokenizer(bundle.path)
    session = load_target(bundle.manifest["target"]["name"]).open(bundle.path, bundle.manifest, options.threads)
    chat = Chat(Conversation(session, Contract.of(bundle.manifest)), tokenizer, thinking=options.thinking)
    images = [pictures.load(path) for path in options.image]
    session.load([n for n in bundle.manifest["signatures"] if images or not n.startswith("vision")])
    messages: list[dict[str, Any]] = []
    answers, turns = [], []
    for turn, prompt in enumerate(options.prompt):
        content: Any = prompt
        if turn == 0 and images:
            content = [{"type": "image"} for _ in images] + [{"type": "text", "text": prompt}]
        messages.append({"role": "user", "content": content})
        answer, numbers = _answer(chat, tokenizer, messages, images, options, sampler)
        answers.append(answer)
        turns.append(numbers)
        messages.append({"role": "assistant", "content": answer})
        if not options.quiet and not options.json:
            sys.stderr.write(
                f"\n[{numbers['prompt_tokens']} prompt tokens ({numbers['reused_tokens']} kept), "
                f"TTFT {numbers['ttft_ms']:.0f} ms, "
                f"{numbers['new_tokens']} tokens at {numbers['tokens_per_s']:.1f} tokens/s]\n"
            )
    if options.json:
        _print(json.dumps({"answers": answers, "turns": turns, "load_s": session.load_seconds}))
    return 0


def _answer(
    chat: Any,
    tokenizer: Any,
    messages: list[dict[str, Any]],
    images: list[Any],
    options: argparse.Namespace,
    sampler: Any,
) -> tuple[str, dict[str, Any]]:
    begin = time.perf_counter()
    times: list[float] = []
    said: list[int] = []
    shown = ""

    def stream(token: int) -> None:
        nonlocal shown
        times.append(time.perf_counter())
        said.append(token)
        text = tokenizer.decode(said, skip_special_tokens=True)
        # A character may span several tokens: hold back what is not complete yet.
        if not options.json and not text.endswith("\ufffd"):
            sys.stdout.write(text[len(shown) :])
            sys.stdout.flush()
            shown = text

    prompt, new = chat.answer(
        messages, images, max_new_tokens=options.max_new_tokens, sampler=sampler, on_token=stream
    )
    times = times or [time.perf_counter()]
    if not options.json:
        sys.stdout.write("\n")
    return tokenizer.decode(new, skip_special_tokens=True), {
        "prompt_tokens": len(prompt),
        "reused_tokens": chat.reused,
        "new_tokens": len(new),
        "ttft_ms": 1e3 * (times[0] - begin),
        "tokens_per_s": (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 0.0,
    }


def bench(options: argparse.Namespace) -> int:
    """Print prefill and decode speed, memory, and the share of the bandwidth bound."""
    from export.validate.bench import measure_bundle, measure_operators
    from targets import load_target

    bundle = Bundle.open(options.bundle, verify=options.verify)
    target = load_target(bundle.manifest["target"]["name"])
    entry = measure_bundle(
        target,
        bundle.path,
        bundle.manifest,
        options.threads,
        runs=options.runs,
        prompt_tokens=options.prompt_tokens,
        steps=options.steps,
    )
    prompt = entry["prefill"]["prompt_tokens"]
    entry["operators"] = measure_operators(target, bundle.path, bundle.manifest, options.threads, prompt)
    _print(json.dumps(entry) if options.json else f"{bench_table(entry)}\n{operator_table(entry['operators'])}")
    return 0


SHOWN_OPERATORS = 12


def operator_table(operators: dict[str, list[dict[str, Any]]]) -> str:
    """The slowest kinds of operators of each signature, and what is left."""
    lines = []
    for signature, times in operators.items():
        whole = sum(each["seconds"] for each in times)
        lines.append(f"\n{signature + ' by operator':<52}{'calls':>7}{'ms':>10}{'share':>8}")
        rest = times[SHOWN_OPERATORS:]
        rows = [(t["name"], t["calls"], t["seconds"]) for t in times[:SHOWN_OPERATORS]]
        if rest:
            rows.append(("others", sum(t["calls"] for t in rest), sum(t["seconds"] for t in rest)))
        lines += [f"{n[:51]:<52}{c:>7}{1e3 * s:>10.3f}{s / whole if whole else 0:>8.1%}" for n, c, s in rows]
    return "\n".join(lines)


def bench_table(entry: dict[str, Any]) -> str:
    lines = [f"{'':<10}{'median':>10}{'p90':>10}{'best':>10}  tokens/s   runs  warm-ups  threads"]
    for name in ("prefill", "decode"):
        e = entry[name]
        lines.append(
            f"{name:<10}{e['tokens_per_s_median']:>10.1f}{e['tokens_per_s_p90']:>10.1f}"
            f"{e['tokens_per_s_best']:>10.1f}{'':>12}{e['runs']:>5}{e['warmups']:>10}{e['threads']:>9}"
        )
    lines.append(f"prompt {entry['prefill']['prompt_tokens']} tokens, load {entry['load_s']:.2f} s, "
                 f"peak memory {entry['peak_memory_bytes'] / 2**20:.0f} MiB, {entry['decode']['source']} numbers")
    for name, share in entry["bandwidth"].items():
        lines.append(
            f"{name}: {share['bytes_per_s'] / 1e9:.1f} GB/s ({share['bytes_per_s_least'] / 1e9:.1f} to "
            f"{share['bytes_per_s_most'] / 1e9:.1f} between {share['bursts']} bursts) bounds decode at "
            f"{share['bound_tokens_per_s']:.1f} tokens/s ({entry['decode_bytes'] / 1e6:.0f} MB a token); "
            f"reached {100 * share['share']:.0f} %"
        )
    return "\n".join(lines)


def lint(options: argparse.Namespace) -> int:
    """Print what the target's linter holds against a bundle; 3 if one finding is an error."""
    from export.validate.examples import examples
    from targets import load_target

    bundle = Bundle.open(options.bundle, verify=options.verify)
    name = bundle.manifest["target"]["name"]
    torch.set_num_threads(options.threads)
    target = load_target(name)
    with Reporter(quiet=options.quiet, json_lines=options.json).stage("lint"):
        findings = target.lint(bundle.path, bundle.manifest)
        if options.activations and findings is not None and not any(f.severity == "error" for f in findings):
            prompts = examples(bundle.path, bundle.manifest, passages=True)
            seen = target.observe(bundle.path, bundle.manifest, prompts)
            findings += seen.findings if seen is not None else []
    if findings is None:
        raise UsageError(f"{bundle.path.name} is for {name}, which has no linter; coreml bundles have one")
    result = {"findings": [asdict(found) for found in findings]}
    _print(json.dumps(result) if options.json else lint_table(findings))
    rules = sorted({found.rule for found in findings if found.severity == "error"})
    if rules:
        sys.stderr.write(f"error: the bundle breaks rules of the linter: {', '.join(rules)}\n")
    return 3 if rules else 0


def lint_table(findings: Sequence[Finding]) -> str:
    """Every finding: severity, rule and place, below it the text and its source."""
    lines = []
    for found in findings:
        lines.append(f"{found.severity:<9}{found.rule:<22}{found.where}")
        lines += [f"{'':<9}{found.text}", f"{'':<9}source: {found.source}"]
    errors = sum(found.severity == "error" for found in findings)
    lines.append(f"{errors} errors, {len(findings) - errors} warnings")
    return "\n".join(lines)


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")

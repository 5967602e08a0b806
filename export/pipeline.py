"""One export from spec to bundle: checkpoint, lowering, tokenizer, ladder, manifest, commit."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

from export.bundle.writer import BundleWriter
from export.chat.sidecars import write_tokenizer
from export.checkpoint import Checkpoint, open_checkpoint
from export.checkpoint.weights import Weights
from export.model.config import ModelConfig
from export.pace import Pace
from export.quantize.conditioned import weights_for
from export.quantize.quantizer import Quantizer
from export.quantize.recipe import Recipe, general, load_recipe
from export.quantize.scale import ScaledWeights, scaled
from export.report import card
from export.spec import ExportSpec, GateError, UsageError
from export.validate import judge, streams
from targets import load_target
from targets.base import Finding, Job, Lowered, Target, grouped, refuse

PACKAGES = ("torch", "transformers", "onnx", "onnxruntime", "executorch", "coremltools", "qwen35-mobile")


class Progress(Protocol):
    """What the pipeline tells the user; see `export.progress`."""

    def stage(self, name: str, total: float | None = None) -> AbstractContextManager[Pace]: ...
    def notice(self, text: str) -> None: ...


@dataclass(frozen=True)
class Result:
    """Where the bundle is and what was found; `report` is the content of parity.json, if validated."""

    path: Path
    manifest: dict[str, Any]
    report: dict[str, Any] | None


def run(spec: ExportSpec, progress: Progress) -> Result:
    """Build one bundle.

    Raises:
        ExportError: nothing is left behind. GateError: the bundle is kept as `<out>.rejected`.
    """
    target = load_target(spec.target)
    recipe = load_recipe(spec.recipe, spec.group_size)
    with progress.stage("checkpoint"):
        checkpoint = open_checkpoint(spec)
        config = checkpoint.model_config.truncated(spec.num_layers)
        if not spec.vision:
            config = config.without_vision()
    for notice in checkpoint.notices:
        progress.notice(notice)
    weights = weights_for(checkpoint, config, recipe.conditioning)
    check_request(spec, target, weights, recipe)
    described = recipe.for_model(config.text.tie_word_embeddings, config.text.num_hidden_layers).as_manifest()
    key = {
        **spec.build_key(),
        "content": checkpoint.content_key(),
        **{name: described.get(name) for name in ("roles", "layers", "conditioning")},
        "built_with": built_with(),
    }
    report = None
    with BundleWriter(spec.output, key, overwrite=spec.overwrite, resume=spec.resume) as writer:
        sidecars = write_tokenizer(checkpoint, config, writer)  # first: a broken one costs no lowering
        for notice in sidecars.notices:
            progress.notice(notice)
        tokenizer = sidecars.manifest
        sizes = spec.image_sizes if config.vision is not None else ()
        if target.capabilities.floats == "float16":
            with progress.stage("streams", total=config.text.num_hidden_layers) as pace:
                prompts = streams.prompts(weights.config, writer.path, sizes)
                scale = streams.measure(weights, prompts, pace.advance).scale
            weights = scaled(weights, scale)
        quantizer = Quantizer(weights, recipe, target.capabilities.smallest_scale)
        with progress.stage("lower", total=weights.count) as bar:
            lowered = target.lower(
                Job(
                    weights.config,
                    quantizer,
                    spec.context_length,
                    spec.prefill_lengths,
                    sizes,
                    writer.path,
                    max_file_layers=spec.max_file_layers,
                    max_file_bytes=spec.max_file_bytes,
                    text_runner=spec.text_runner,
                    profile=spec.profile or target.capabilities.profiles[0],
                    state_layout=spec.state_layout,
                    max_head_columns=spec.max_head_columns,
                    palettes=spec.palettes,
                    stop_token_ids=tuple(tokenizer["stop_token_ids"]),
                    license=license_of(checkpoint),
                    source=checkpoint.source,
                    resume=writer.resumed,
                    advance=bar.advance,
                )
            )
        for path, role in lowered.files.items():
            writer.add(path, role)
        manifest = describe(spec, checkpoint, weights, quantizer.recipe, target, lowered, tokenizer)
        passed = True

        def heed(findings: Iterable[Finding]) -> None:
            refuse(findings)
            for found in grouped(findings):
                progress.notice(f"{found['rule']} ({found['count']}): {found['text']}")

        if spec.skip_validation:
            with progress.stage("lint"):
                found = target.lint(writer.path, manifest)
            heed(found or ())
        else:
            place = target, writer.path, manifest
            report = judge.judge(
                checkpoint, config, recipe, *place, spec.threads, progress.stage, on_findings=heed
            )
            passed = report["passed"]
            with progress.stage("report"):
                judge.write_reports(writer, manifest, report)
        writer.add("README.md", "card").write_text(card.render(manifest, report, target.loading), encoding="utf-8")
        manifest["status"] = "validated" if report is not None and passed else "unvalidated"
        final = writer.commit(manifest, accepted=passed)
    if not passed and report is not None:
        worst = "; ".join(judge.failures(report))
        raise GateError(f"the bundle was written to {final} but failed its gates: {worst}")
    return Result(final, manifest, report)


def check_request(spec: ExportSpec, target: Target, weights: Weights, recipe: Recipe) -> None:
    """Refuse what the target or the model cannot honour, before any weight is read.

    Raises:
        UsageError: naming option, value, rule and remedy.
    """
    target.capabilities.check(target.name, spec, recipe)
    text = weights.config.text
    recipe.for_model(text.tie_word_embeddings, text.num_hidden_layers).check(
        (p.name.removesuffix(".weight"), p.role, p.shape[1])
        for p in weights.parameters.values()
        if p.role != "kept"
    )
    vision = weights.config.vision
    if vision is not None:
        for size in spec.image_sizes:
            if any(side % vision.pixels_per_token for side in size):
                raise UsageError(
                    f"--image-sizes {size[0]}x{size[1]}: both sides must be multiples of {vision.pixels_per_token}"
                )


def published_parameters(weights: Weights) -> int:
    """Elements of the published tensors that the model is made of."""
    tensors = {segment.tensor for p in weights.parameters.values() for segment in p.segments}
    return sum(math.prod(weights.checkpoint.shape(name)) for name in tensors)


def license_of(checkpoint: Checkpoint) -> str:
    """The licence that the checkpoint's model card (README.md) names in its front matter, else "unknown"."""
    card = checkpoint.sidecar("README.md")
    if card is None:
        return "unknown"
    parts = card.read_text(encoding="utf-8", errors="replace").split("---", 2)
    found = re.search(r"^license:\s*(\S+)\s*$", parts[1], re.MULTILINE) if len(parts) == 3 else None
    return found[1] if found else "unknown"


def describe(
    spec: ExportSpec,
    checkpoint: Checkpoint,
    weights: Weights,
    recipe: Recipe,
    target: Target,
    lowered: Lowered,
    tokenizer: dict[str, Any],
) -> dict[str, Any]:
    """The manifest, all but `files` and the final status."""
    config: ModelConfig = weights.config
    variant = "base" if spec.base else "instruct"
    quantization = recipe.as_manifest()
    if isinstance(weights, ScaledWeights):
        quantization["streams"] = weights.scale.as_manifest()
    for roles in (quantization["roles"], *(table["roles"] for table in quantization.get("layers", ()))):
        for role in roles.values():
            role["activations"] = target.capabilities.activations[role["bits"]]
    if config.vision is None:
        for name in [name for name in quantization["roles"] if general(name) == "vision"]:
            del quantization["roles"][name]
    source = {"revision": None, "seed": None, **checkpoint.source}
    return {
        "schema_version": "1.0",
        "name": spec.name,
        "status": "unvalidated",
        "model": {
            "family": "qwen3.5",
            "size": spec.size,
            "variant": variant,
            "source": source,
            "license": license_of(checkpoint),
            "hidden_size": config.text.hidden_size,
            "vocab_size": config.text.vocab_size,
            "num_parameters": published_parameters(weights),
        },
        "target": {
            "name": target.name,
            "runtime": target.runtime,
            "min_version": target.min_version,
            "profile": spec.profile or target.capabilities.profiles[0],
            **({"state_layout": spec.state_layout} if spec.state_layout else {}),
        },
        "quantization": quantization,
        "context_length": spec.context_length,
        "prefill_lengths": list(spec.prefill_lengths),
        "image_sizes": [list(size) for size in spec.image_sizes] if config.vision is not None else [],
        "states": lowered.states,
        "signatures": lowered.signatures,
        "tokenizer": tokenizer,
        "files": [],
        "reports": {},
        "built_with": built_with(),
        "session_options": lowered.session_options,
    }


def built_with() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found

"""What the gates are calibrated on: the whole ladder over tiny, its twins and the small checkpoints, as JSON lines.

    python -m runtime_tests.calibration FILE --targets onnx --recipes int8 int4-mlp
    python -m runtime_tests.calibration FILE --faults           # deliberate faults on some of them
    python -m runtime_tests.calibration FILE --table            # only print what FILE holds

Every bundle is exported, judged by all rungs and asked its checkpoint's own task; its line is appended at once, and
what FILE holds already is not done again. Then three tables are printed: bundles, twins beside the plain one, and for
every gate how near right bundles come to it and how far beyond it deliberate faults are.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch

from export import pipeline
from export.chat.conversation import Contract
from export.chat.template import load_tokenizer
from export.checkpoint import Checkpoint, open_checkpoint
from export.checkpoint.weights import Weights
from export.model.session import Model, TorchSession
from export.progress import Reporter
from export.quantize.recipe import load_recipe
from export.sizes import CUSTOM, TINY, shipped_tiny
from export.spec import ExportSpec, UsageError
from export.validate import judge, task
from export.validate.answers import generator
from export.validate.case import Known
from export.validate.ladder import RUNGS
from runtime_tests import calibration_faults, calibration_tables, small_tasks, twins
from runtime_tests.once import Memory
from targets import load_target

TWINS: dict[str, dict[str, Any]] = {
    "plain": {},
    "streams": {"stream": 1024, "vision_stream": 64},
    "outliers": {"outliers": 32, "mlp_outliers": 32},
    "concentrated": {"concentrate": True},
}
"""Of tiny; the first differs in nothing but that it is untied and a folder of somebody's."""
CHECKPOINTS = (TINY, *TWINS, *small_tasks.TASKS)
TARGETS = ("onnx", "executorch", "coreml")
RECIPES = ("int8", "int4", "int4-mlp", "int4-careful")
OTHERS = ("int4-mixed", "int4-asym", "fp32")
SAMPLES = 100
"""Of each task of a small checkpoint, and of tiny in its own ladder. Twins have fewer: theirs are longer."""
TWIN_SAMPLES = 40
CONTEXT, LENGTHS = 1024, (64,)
TWIN_SIZES = ((64, 64), (64, 96), (96, 64))
WEIGHTS = ("weights", "decoder", "embedding", "vision")
"""Roles of files."""
Record = dict[str, Any]


@dataclass
class Subject:
    """A checkpoint that is exported: its folder, its task, and what its bundles share."""

    name: str
    scratch: Path
    known: Known = field(default_factory=dict)

    @cached_property
    def folder(self) -> Path:
        """Of its files; a twin is written here."""
        if self.name in TWINS:
            return twins.write(shipped_tiny(), self.scratch / f"twin-{self.name}", **TWINS[self.name])
        return shipped_tiny() if self.name == TINY else small_tasks.folder(self.name)

    def spec(self, target: str, recipe: str, output: Path) -> ExportSpec:
        """As a user exports it; pictures have the sizes of the task."""
        return ExportSpec(
            target=target,
            size=TINY if self.name == TINY else CUSTOM,
            checkpoint=None if self.name == TINY else str(self.folder),
            recipe=recipe,
            context_length=CONTEXT,
            prefill_lengths=LENGTHS,
            image_sizes=small_tasks.IMAGE_SIZES if self.name in small_tasks.TASKS else TWIN_SIZES,
            output=output,
            overwrite=True,
            skip_validation=True,
            threads=1,
        )

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return open_checkpoint(self.spec("onnx", "fp32", self.scratch))

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.folder)

    @property
    def answers_as(self) -> str:
        """The checkpoint that answers the same in float32: all twins do (`test_twins.py`)."""
        return "plain" if self.name in TWINS else self.name

    def accuracy(self, session: Any, contract: Contract) -> dict[str, float]:
        """Share of exact answers to each of its tasks."""
        generate = generator(session, contract)
        if self.name in small_tasks.TASKS:
            return small_tasks.evaluate(self.name, generate, self.tokenizer, samples=SAMPLES)
        return task.evaluate(generate, self.tokenizer, samples=TWIN_SAMPLES)

    def fp32_accuracy(self, contract: Contract) -> dict[str, float]:
        """The same of our modules in float32."""
        model = Model.load(Weights(self.checkpoint, self.checkpoint.model_config))
        return self.accuracy(TorchSession(model, contract.context_length, contract.prefill_lengths), contract)


@dataclass
class Built:
    """A bundle of a subject, unvalidated."""

    subject: Subject
    target: str
    recipe: str
    folder: Path
    manifest: dict[str, Any]

    @classmethod
    def of(cls, subject: Subject, target: str, recipe: str, name: str = "right") -> Built:
        output = subject.scratch / f"{subject.name}-{target}-{recipe}-{name}"
        made = pipeline.run(subject.spec(target, recipe, output), Reporter(quiet=True))
        return cls(subject, target, recipe, made.path, made.manifest)

    def again(self, name: str) -> Built:
        """Built once more."""
        return self.of(self.subject, self.target, self.recipe, name)

    @property
    def contract(self) -> Contract:
        return Contract.of(self.manifest)

    @property
    def weights_bytes(self) -> int:
        """Of the files that hold weights, with the programs in them."""
        return sum(file["bytes"] for file in self.manifest["files"] if file["role"] in WEIGHTS)

    def judged(self, rungs: tuple[str, ...] = RUNGS, known: Known | None = None) -> Record:
        """The content of parity.json, without latency."""
        return judge.judge(
            self.subject.checkpoint,
            self.subject.checkpoint.model_config,
            load_recipe(self.recipe),
            load_target(self.target),
            self.folder,
            self.manifest,
            1,
            Reporter(quiet=True).stage,
            rungs,
            with_latency=False,
            known=self.subject.known if known is None else known,
        )

    def accuracy(self) -> dict[str, float]:
        """Of the bundle on its runtime."""
        with closing(load_target(self.target).open(self.folder, self.manifest, 1)) as session:
            return self.subject.accuracy(session, self.contract)


def checks(report: Record) -> list[Record]:
    """Every check of a report, without its reason."""
    kept = ("name", "value", "limit", "at_least", "status")
    return [{k: check[k] for k in kept} for rung in report["rungs"].values() for check in rung["checks"]]


class Sheet:
    """JSON lines of what was measured, each with a key of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.records: list[Record] = [json.loads(line) for line in lines]

    def once(self, key: dict[str, str], compute: Callable[[], Record]) -> Record:
        """The record of that key: as it was written, or computed and appended."""
        for record in self.records:
            if all(record.get(name) == value for name, value in key.items()):
                return record
        started = time.monotonic()
        record = {**key, **judge.finite(compute()), "seconds": round(time.monotonic() - started, 1)}
        self.records.append(record)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        return record


def sweep(sheet: Sheet, subject: Subject, target: str, recipe: str) -> None:
    """One bundle: size, verdict, checks, accuracy; or why the recipe was refused."""

    def compute() -> Record:
        try:
            built = Built.of(subject, target, recipe)
        except UsageError as refusal:
            return {"refused": str(refusal)}
        report = built.judged()
        asked = report["rungs"]["L3"]["series"].get("task")
        if asked is None:  # the ladder knows the tasks of the shipped tiny alone
            reference = sheet.once(
                {"kind": "reference", "checkpoint": subject.answers_as},
                lambda: {"accuracy": subject.fp32_accuracy(built.contract)},
            )
            asked = {"reference": reference["accuracy"], "bundle": built.accuracy()}
        return {
            "weights_bytes": built.weights_bytes,
            "passed": report["passed"],
            "failures": judge.failures(report),
            "checks": checks(report),
            "accuracy_fp32": asked["reference"],
            "accuracy": asked["bundle"],
        }

    key = {"kind": "bundle", "checkpoint": subject.name, "target": target, "recipe": recipe}
    sheet.once(key, compute)


def faults(sheet: Sheet, subject: Subject, recipe: str, memory: Memory) -> None:
    """Every deliberate fault of `runtime_tests.calibration_faults` on one checkpoint, on ONNX."""
    built = Built.of(subject, "onnx", recipe)
    for fault in calibration_faults.of(built):
        key = {"kind": "fault", "checkpoint": subject.name, "recipe": recipe, "rung": fault.rung, "fault": fault.name}
        sheet.once(key, lambda f=fault: {"checks": checks(calibration_faults.report_of(built, f, memory))})  # type: ignore[misc]


def pairs(targets: Sequence[str], recipes: Sequence[str] | None) -> list[tuple[str, str]]:
    """(target, recipe) in the order in which they are of interest."""
    first = [(target, recipe) for target in targets for recipe in recipes or RECIPES]
    return first if recipes else [*first, *((target, recipe) for target in targets for recipe in OTHERS)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m runtime_tests.calibration", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("file", type=Path, help="JSON lines, continued if there")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--recipes", nargs="+", help=f"default: {', '.join(RECIPES)}, then {', '.join(OTHERS)}")
    parser.add_argument("--checkpoints", nargs="+", choices=CHECKPOINTS, default=CHECKPOINTS)
    parser.add_argument("--faults", action="store_true", help="deliberate faults instead, on ONNX")
    parser.add_argument("--table", action="store_true", help="measure nothing, print")
    options = parser.parse_args(arguments)
    sheet = Sheet(options.file)
    if not options.table:
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory(prefix="calibration-") as scratch, pytest.MonkeyPatch.context() as patch:
            memory = Memory()
            memory.traces(patch)
            subjects = [Subject(name, Path(scratch)) for name in options.checkpoints]
            for target, recipe in pairs(options.targets, options.recipes):
                for subject in subjects:
                    if options.faults:  # on ONNX only
                        faults(sheet, subject, recipe, memory)
                    else:
                        sweep(sheet, subject, target, recipe)
    print("\n\n".join(calibration_tables.tables(sheet.records)))  # noqa: T201


if __name__ == "__main__":
    main()

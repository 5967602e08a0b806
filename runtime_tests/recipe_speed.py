"""Size and speed of every shipped recipe at the shapes of a published size, all of them in the same run.

    python -m runtime_tests.recipe_speed FOLDER --size 0.8b --rounds 5

Exports what is missing in FOLDER (random weights, context 1,024, validation off) and measures all bundles in turn,
round by round, so that a slow minute of the machine hits all. Core ML bundles are not timed, because they are
interpreted here: of those the bytes that a token reads are printed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from export.__main__ import main as export
from export.bundle.reader import Bundle
from export.quantize.recipe import names
from export.spec import ExportError
from export.validate import bench
from targets import load_target

CONTEXT, PROMPT, STEPS = 1024, 512, 96
TIMED = ("onnx", "executorch")
TARGETS = (*TIMED, "coreml")


def build(folder: Path, size: str, target: str, recipe: str) -> Path | None:
    """The bundle of a recipe, exported if it is not there yet; None where the target cannot hold the recipe."""
    path = folder / f"{target}-{Path(recipe).stem}"
    if not path.exists():
        words = ["--target", target, "--size", size, "--checkpoint", "random", "--recipe", recipe, "-o", str(path)]
        status = export([*words, "--context-length", str(CONTEXT), "--skip-validation", "--quiet"])
        if status:
            return None
    return path


def weights(path: Path) -> tuple[int, int]:
    """Bytes of the bundle, without tokenizer and reports, and those of weights that one decode step reads."""
    bundle = Bundle.open(path, verify=False)
    files = [f for f in bundle.manifest["files"] if f["role"] not in ("tokenizer", "report")]
    target = load_target(bundle.manifest["target"]["name"])
    return sum(int(f["bytes"]) for f in files), target.decode_bytes(path, bundle.manifest)


def speed(path: Path, threads: int) -> tuple[float, float]:
    """Tokens a second of a prompt of 512 tokens and of decode behind it, medians."""
    bundle = Bundle.open(path, verify=False)
    target = load_target(bundle.manifest["target"]["name"])
    found: dict[str, Any] = bench.measure_bundle(target, path, bundle.manifest, threads, 3, PROMPT, STEPS)
    return found["prefill"]["tokens_per_s_median"], found["decode"]["tokens_per_s_median"]


def measure(bundles: dict[tuple[str, str], Path], rounds: int, threads: int) -> dict[tuple[str, str], list[Any]]:
    """(target, recipe) -> one (prefill, decode) for every round; every other round in the opposite order."""
    found: dict[tuple[str, str], list[Any]] = {key: [] for key in bundles}
    for number in range(rounds):
        for key in list(bundles)[:: -1 if number % 2 else 1]:
            found[key].append(speed(bundles[key], threads))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", default="0.8b")
    parser.add_argument("--recipe", action="append", help="name or TOML file, repeatable; default: all shipped")
    parser.add_argument("--target", action="append", choices=TARGETS, help="repeatable; default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    bundles = {}
    for recipe in args.recipe or names():
        for target in args.target or TARGETS:
            path = build(args.folder, args.size, target, recipe)
            if path is not None:
                bundles[target, recipe] = path
    times = measure({key: path for key, path in bundles.items() if key[0] in TIMED}, args.rounds, args.threads)
    sys.stdout.write("| target | recipe | bundle (MB) | a token reads (MB) | prefill | decode (tokens/s) |\n")
    sys.stdout.write("|---|---|---|---|---|---|\n")
    for (target, recipe), path in bundles.items():
        size, read = weights(path)
        line = f"| {target} | `{recipe}` | {size / 1e6:.0f} | {read / 1e6:.0f} |"
        rounds = times.get((target, recipe))
        if rounds:
            for column in zip(*rounds, strict=True):
                line += f" {statistics.median(column):.0f} ({min(column):.0f} to {max(column):.0f}) |"
        sys.stdout.write(f"{line}\n" if rounds else f"{line} – | – |\n")
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except ExportError as error:
        raise SystemExit(str(error)) from error

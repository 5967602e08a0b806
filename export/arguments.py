"""Options of every command, shared by `python -m export` and `optimum-cli export mobile`. Torch-free."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import NoReturn

from export.sizes import SIZES, TINY
from export.spec import ExportSpec, UsageError

TARGETS = ("onnx",)
COMMANDS = ("export", "validate", "run", "bench")
DEFAULT_PREFILL = {TINY: (64,)}
DEFAULT_IMAGES = {TINY: ((64, 64), (64, 96), (96, 64))}


class _Parser(argparse.ArgumentParser):
    """Usage errors become exceptions with one clear line instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see `python -m export --help`")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands. `export` is the default: its name may be left out."""
    parser = _Parser(
        prog="python -m export",
        description="Turn a Qwen3.5 checkpoint into a validated bundle for a phone runtime.",
        epilog="Commands: export (default), validate BUNDLE, run BUNDLE, bench BUNDLE; each has its own --help.",
    )
    add_export_options(parser)
    return parser


def add_export_options(parser: argparse.ArgumentParser) -> None:
    """The options of an export."""
    add = parser.add_argument
    add("--target", required=True, metavar="T", help=f"runtime: {', '.join(TARGETS)}")
    add("--size", required=True, metavar="S", help=f"model size: {', '.join(SIZES)}")
    add("--base", action="store_true", help="the Base variant instead of instruct")
    add("--checkpoint", metavar="C", help="folder, hub id, or random (default: the size's hub id; tiny is shipped)")
    add("--revision", help="hub revision (branch, tag or commit)")
    add("--seed", type=int, default=0, help="seed of --checkpoint random")
    add("--recipe", default="int4", help="quantisation recipe or a .toml file (default int4)")
    add("--group-size", type=int, metavar="G", help="32, 64 or 128: overrides the recipe's 4-bit groups")
    add("--context-length", type=int, default=1024, metavar="N", help="tokens of KV cache (default 1024)")
    add("--prefill-lengths", metavar="A,B", help="chunk lengths of prefill (default 64,512; tiny 64)")
    add("--image-sizes", metavar="HxW,…", help="picture sizes, height x width (default 448x448)")
    add("--no-vision", action="store_true", help="leave the vision encoder out")
    add("--num-layers", type=int, metavar="N", help="only the first N decoder layers (for tests)")
    add("-o", "--output-dir", type=Path, metavar="DIR", help="the bundle folder itself")
    add("--overwrite", action="store_true", help="replace an existing bundle once the new one is complete")
    add("--resume", action="store_true", help="continue an interrupted export")
    add("--skip-validation", action="store_true", help="write the bundle without checking it")
    add("--threads", type=int, default=2, help="threads of quantiser and runtimes (default 2)")
    add("--json", action="store_true", help="print the result as one JSON object")
    add("--quiet", action="store_true", help="no progress on stderr")
    add("--dry-run", action="store_true", help="print what would be built and stop")


def add_bundle_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="folder written by an export")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")


def validate_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m export validate", description="Check a finished bundle; never edits it.")
    add_bundle_options(parser)
    parser.add_argument("--checkpoint", metavar="C", help="the checkpoint it came from, if not found by itself")
    parser.add_argument("--rung", action="append", choices=["L0", "L1", "L2", "L3"], help="only this rung")
    parser.add_argument("--update", action="store_true", help="write the new reports into the bundle")
    return parser


def run_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m export run", description="Ask a bundle something.")
    add_bundle_options(parser)
    parser.add_argument("--prompt", required=True, action="append", help="a user turn; repeat for several turns")
    parser.add_argument("--image", action="append", default=[], type=Path, help="a picture of the first turn")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--thinking", action=argparse.BooleanOptionalAction, default=False)
    return parser


def bench_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m export bench", description="Measure a bundle on this host.")
    add_bundle_options(parser)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--runs", type=int, default=5, help="counted prefill runs")
    parser.add_argument("--steps", type=int, default=48, help="counted decode steps")
    return parser


def spec_from(options: argparse.Namespace) -> ExportSpec:
    """Check what can be checked without torch and make the spec.

    Raises:
        UsageError: naming option, value, rule and remedy.
    """
    if options.target not in TARGETS:
        raise UsageError(f"--target {options.target}: unknown target; choose one of {', '.join(TARGETS)}")
    if options.size not in SIZES:
        raise UsageError(f"--size {options.size}: unknown size; choose one of {', '.join(SIZES)}")
    if options.context_length < 1:
        raise UsageError(f"--context-length {options.context_length}: must be at least 1")
    if options.threads < 1:
        raise UsageError(f"--threads {options.threads}: must be at least 1")
    from export.quantize.recipe import load_recipe

    load_recipe(options.recipe, options.group_size)
    default = DEFAULT_PREFILL.get(options.size, (64, 512))
    lengths = _lengths(options.prefill_lengths) if options.prefill_lengths is not None else default
    for length in lengths:
        if not 2 <= length <= options.context_length:
            raise UsageError(
                f"--prefill-lengths {length}: must be 2 to the --context-length {options.context_length}; "
                "lengthen the context or shorten the chunk"
            )
    images = DEFAULT_IMAGES.get(options.size, ((448, 448),))
    if options.image_sizes is not None:
        if options.no_vision:
            raise UsageError("--image-sizes and --no-vision exclude each other; leave one out")
        images = _sizes(options.image_sizes)
    spec = ExportSpec(
        target=options.target,
        size=options.size,
        base=options.base,
        checkpoint=options.checkpoint,
        revision=options.revision,
        seed=options.seed,
        recipe=options.recipe,
        group_size=options.group_size,
        context_length=options.context_length,
        prefill_lengths=lengths,
        image_sizes=() if options.no_vision else images,
        vision=not options.no_vision,
        num_layers=options.num_layers,
        overwrite=options.overwrite,
        resume=options.resume,
        skip_validation=options.skip_validation,
        threads=options.threads,
        output=options.output_dir or Path(default_output(options)),
    )
    return spec


def default_output(options: argparse.Namespace) -> str:
    """qwen3.5-2b-onnx-int4 in the current folder."""
    recipe = Path(options.recipe).stem if options.recipe.endswith(".toml") else options.recipe
    base = "-base" if options.base else ""
    group = f"-g{options.group_size}" if options.group_size else ""
    return f"qwen3.5-{options.size}{base}-{options.target}-{recipe}{group}".lower()


def _lengths(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise UsageError(f"--prefill-lengths {text}: give numbers separated by commas, such as 64,512")
    return tuple(sorted({int(part) for part in text.split(",")}))


def _sizes(text: str) -> tuple[tuple[int, int], ...]:
    sizes = []
    for part in text.lower().split(","):
        match = re.fullmatch(r"(\d+)x(\d+)", part.strip())
        if match is None:
            raise UsageError(f"--image-sizes {part}: give HEIGHTxWIDTH in pixels, such as 448x448")
        height, width = int(match[1]), int(match[2])
        if height % 32 or width % 32 or not height or not width:
            raise UsageError(
                f"--image-sizes {part}: both sides must be multiples of 32, the pixels behind one image token; "
                f"try {max(32, round(height / 32) * 32)}x{max(32, round(width / 32) * 32)}"
            )
        sizes.append((height, width))
    return tuple(dict.fromkeys(sizes))

"""Options of every command, shared by `python -m export` and `optimum-cli export mobile`. Torch-free.

Parsing is argparse; `spec_from` holds every rule that needs no checkpoint and says value, rule and remedy.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NoReturn

from export.checkpoint import is_folder
from export.checkpoint.adapter_config import check_beside
from export.checkpoint.published import read_config
from export.sizes import CUSTOM, SIZES, TINY, check_name, size_of
from export.spec import DEFAULT_RECIPE, ExportSpec, UsageError
from targets import TARGETS

DEFAULT_PREFILL: Mapping[str, tuple[int, ...]] = {TINY: (64,)}
DEFAULT_IMAGES: Mapping[str, tuple[tuple[int, int], ...]] = {TINY: ((64, 64), (64, 96), (96, 64))}
PIXELS_PER_TOKEN = 32
MAX_CONTEXT = 262144
"""max_position_embeddings of every published config."""
RUNGS = ("L0", "L1", "L2", "L3")
COMPARISON = "comparison.html"
"""The page of `validate --report` without a name."""


class _Parser(argparse.ArgumentParser):
    """Usage errors become one clear line instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        prefix = "unrecognized arguments: "
        if message.startswith(prefix):
            word = message.removeprefix(prefix).split()[0].split("=")[0]
            place = next((a.metavar for a in self._actions if not a.option_strings), None)
            if place and not word.startswith("-"):
                message = f"unexpected {word}: {self.prog} takes {place} first, then the options"
            else:
                message = f"unknown option {word}{_close(word, self._option_string_actions)}"
        raise UsageError(f"{message}; see `{self.prog} --help`")


def _close(word: str, choices: Iterable[str]) -> str:
    found = difflib.get_close_matches(word, list(choices), n=1)
    return f" (did you mean {found[0]}?)" if found else ""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the export command, which is the default: its name may be left out."""
    parser = _Parser(
        prog="python -m export",
        allow_abbrev=False,
        description="Turn a Qwen3.5 checkpoint into a validated bundle for a phone runtime.",
        epilog="Other commands: validate BUNDLE…, run BUNDLE, bench BUNDLE, lint BUNDLE; each has its own --help. "
        "Exit codes: 0 passed, 1 failed, 2 bad usage, 3 a gate failed, 130 interrupted.",
    )
    add_export_options(parser)
    return parser


def add_export_options(parser: argparse.ArgumentParser) -> None:
    """The options of an export."""
    add = parser.add_argument
    add("--target", metavar="T", help=f"runtime, required: {', '.join(TARGETS)}")
    add("--size", metavar="S", help=f"{', '.join(SIZES)}, or a name of your own for a folder (default: the folder's)")
    add("--base", action="store_true", help="the Base variant instead of instruct")
    add("--checkpoint", metavar="C", help="folder, hub id, modelscope:ORG/NAME, or random (default: the size's hub id)")
    add("--revision", metavar="R", help="hub revision: branch, tag or commit (default: today's commit)")
    add("--adapter", metavar="A", help="folder of a PEFT adapter to merge; none leaves one out beside the weights")
    add("--seed", type=int, metavar="N", help="seed of --checkpoint random (default 0)")
    add("--recipe", default=DEFAULT_RECIPE, metavar="R", help=f"recipe or a .toml file (default {DEFAULT_RECIPE})")
    add("--group-size", type=int, metavar="G", help="32, 64 or 128: overrides the recipe's 4-bit groups")
    add("--context-length", type=int, default=1024, metavar="N", help="tokens of KV cache (default 1024)")
    add("--prefill-lengths", metavar="A,B", help="chunk lengths of prefill (default 64,512; tiny 64)")
    add("--image-sizes", metavar="HxW,…", help="picture sizes, height x width (default 448x448; tiny 64x64,…)")
    add("--no-vision", action="store_true", help="leave the vision encoder out")
    add("--num-layers", type=int, metavar="N", help="only the first N decoder layers, for experiments")
    add("--max-file-layers", type=int, metavar="N", help="cut the decoder into files of at most N layers")
    add("--max-file-size", metavar="SIZE", help="… of at most so many bytes: 900M, 1.5G or a number")
    add("--profile", metavar="P", help="coreml: compute unit, gpu (default) or ane, the Neural Engine")
    add("--state-layout", metavar="L", help="coreml: separate, stacked or explicit states (default: the profile's)")
    add("--max-head-columns", type=int, metavar="N", help="coreml: cut the head into pieces of at most N columns")
    add("--palettes", action="store_true", help="coreml: 4-bit codes as indices into a palette of 16 numbers")
    add("--text-runner", action="store_true", help="executorch: also serve its TextLLMRunner; one more embedding")
    add("-o", "--output-dir", type=Path, metavar="DIR", help="the bundle folder itself (default: its name)")
    add("--overwrite", action="store_true", help="replace an existing bundle once the new one is complete")
    add("--resume", action="store_true", help="continue an interrupted export of the same options")
    add("--skip-validation", action="store_true", help="write the bundle without checking it")
    add("--threads", type=int, default=2, metavar="N", help="threads of quantiser and runtimes (default 2)")
    add("--json", action="store_true", help="one JSON object on stdout, progress as JSON lines on stderr")
    add("--quiet", action="store_true", help="no progress on stderr")
    add("--dry-run", action="store_true", help="print what would be built, sizes and memory, and stop")


def _bundle_parser(command: str, description: str, several: bool = False) -> argparse.ArgumentParser:
    parser = _Parser(prog=f"python -m export {command}", description=description, allow_abbrev=False)
    if several:
        text = "folder written by an export; several of one checkpoint are shown side by side"
        parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE", help=text)
    else:
        parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder written by an export")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="threads of the runtime (default 2)")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    return parser


def _verify_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-verify", dest="verify", action="store_false", help="trust the files' sha256 unread")


def validate_parser() -> argparse.ArgumentParser:
    """Options of `validate`."""
    text = "Climb the ladder of checks on finished bundles; 3 when a gate fails."
    parser = _bundle_parser("validate", text, several=True)
    parser.add_argument("--checkpoint", metavar="C", help="the checkpoint it came from, if not found by itself")
    parser.add_argument("--adapter", metavar="A", help="the folder of the adapter that was merged into it")
    parser.add_argument("--rung", action="append", choices=RUNGS, help="only this rung; may be repeated")
    text = "hold it against a published golden; climbs no rung but those of --rung, and alone needs no checkpoint"
    parser.add_argument("--golden", type=Path, metavar="DIR", help=text)
    parser.add_argument("--update", action="store_true", help="write the new reports into the bundle")
    parser.add_argument(
        "--report",
        type=_report_file,
        nargs="?",
        const=Path(COMPARISON),
        metavar="FILE",
        help=f"write a page that shows the bundles side by side (default {COMPARISON}), or JSON if not named .html",
    )
    return parser


def _report_file(text: str) -> Path:
    """A bundle right after --report would be taken for its file: refuse folders at once."""
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(
            f"{text} is a folder; give a file such as {COMPARISON}, and bundles before the options"
        )
    return Path(text)


def run_parser() -> argparse.ArgumentParser:
    """Options of `run`."""
    parser = _bundle_parser("run", "Ask a bundle something; the answer streams to stdout.")
    _verify_option(parser)
    add = parser.add_argument
    add("--prompt", required=True, action="append", metavar="TEXT", help="a user turn; repeat for several turns")
    add("--image", action="append", default=[], type=Path, metavar="FILE", help="picture of the first turn; repeatable")
    add("--max-new-tokens", type=int, default=256, metavar="N")
    add("--temperature", type=float, default=0.0, metavar="X", help="0 takes the likeliest token (default)")
    add("--top-k", type=int, default=0, metavar="N", help="sample from the N likeliest tokens; 0 from all")
    add("--top-p", type=float, default=1.0, metavar="X", help="sample from the likeliest share X of probability")
    add("--seed", type=int, metavar="N", help="seed of the sampler (0)")
    add("--thinking", action=argparse.BooleanOptionalAction, default=False, help="let the model think first")
    return parser


def bench_parser() -> argparse.ArgumentParser:
    """Options of `bench`."""
    parser = _bundle_parser("bench", "Measure a bundle on this host.")
    _verify_option(parser)
    parser.add_argument("--prompt-tokens", type=int, metavar="N", help="length of the prompt (512 or half the context)")
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="counted prefill runs (5)")
    parser.add_argument("--steps", type=int, default=48, metavar="N", help="counted decode steps (48)")
    return parser


def lint_parser() -> argparse.ArgumentParser:
    """Options of `lint`."""
    parser = _bundle_parser("lint", "Hold a coreml bundle against what phones object to; 3 when one of it is an error.")
    _verify_option(parser)
    text = "also run it for a few tokens and look at the range of every value"
    parser.add_argument("--activations", action="store_true", help=text)
    return parser


PARSERS: Mapping[str, Callable[[], argparse.ArgumentParser]] = {
    "export": build_parser,
    "validate": validate_parser,
    "run": run_parser,
    "bench": bench_parser,
    "lint": lint_parser,
}


def pop_command(words: list[str]) -> str:
    """Take the command off the front of the words; `export` if they begin with an option.

    Raises:
        UsageError: a first word that is no command.
    """
    if not words or words[0].startswith("-"):
        return "export"
    word = words.pop(0)
    if word not in PARSERS:
        raise UsageError(
            f"unknown command {word!r}; choose one of {', '.join(PARSERS)}{_close(word, PARSERS)}"
        )
    return word


_RULES: tuple[tuple[str, str, float, float], ...] = (
    ("threads", "--threads", 1, 1024),
    ("max_new_tokens", "--max-new-tokens", 1, MAX_CONTEXT),
    ("temperature", "--temperature", 0, 100),
    ("top_k", "--top-k", 0, 10**6),
    ("top_p", "--top-p", 0, 1),
    ("prompt_tokens", "--prompt-tokens", 1, MAX_CONTEXT),
    ("seed", "--seed", 0, 2**63 - 1),
    ("runs", "--runs", 1, 10**4),
    ("steps", "--steps", 1, MAX_CONTEXT),
    ("context_length", "--context-length", 2, MAX_CONTEXT),
    ("num_layers", "--num-layers", 1, 1024),
    ("max_file_layers", "--max-file-layers", 1, 1024),
)


def check_bundle_options(options: argparse.Namespace) -> None:
    """Numbers within their ranges, pictures that exist.

    Raises:
        UsageError: naming option, value and range.
    """
    for name, option, low, high in _RULES:
        value = getattr(options, name, None)
        if value is not None and not low <= value <= high:  # a NaN fails as well
            raise UsageError(f"{option} {value}: must be {low:g} to {high:g}")
    if getattr(options, "update", False) and options.rung:
        raise UsageError("--update writes the verdict of the whole ladder: leave out --rung, or --update")
    if getattr(options, "update", False) and options.golden is not None:
        raise UsageError("--update writes the verdict of the ladder, which a golden is no part of: leave out one")
    if getattr(options, "update", False) and len(options.bundles) > 1:
        raise UsageError(
            f"--update writes into one bundle, {len(options.bundles)} are given: validate them one by one, "
            "or leave out --update"
        )
    if getattr(options, "temperature", None) == 0:
        for option, given in (("--top-k", options.top_k), ("--top-p", options.top_p < 1), ("--seed", options.seed)):
            if given:
                raise UsageError(f"{option} has no effect at --temperature 0, which takes the likeliest token")
    for picture in getattr(options, "image", []):
        if not picture.is_file():
            raise UsageError(f"--image {picture}: no such file; give the path of a picture")


def spec_from(options: argparse.Namespace) -> ExportSpec:
    """Check what can be checked without torch and make the spec.

    Raises:
        UsageError: naming option, value, rule and remedy.
    """
    _choice("--target", options.target, tuple(TARGETS))
    check_bundle_options(options)
    if options.checkpoint == "":
        raise UsageError("--checkpoint is empty; give a folder, a hub id, or random")
    options.size = _size(options)
    _check_source(options)
    _check_recipe(options.recipe, options.group_size)
    config = SIZES[options.size].config if options.size in SIZES else None
    if config is not None and options.num_layers is not None:
        layers = config["text_config"]["num_hidden_layers"]
        if options.num_layers > layers:
            raise UsageError(f"--num-layers {options.num_layers}: {options.size} has {layers}; use 1 to {layers}")
    spec = ExportSpec(
        target=options.target,
        size=options.size,
        base=options.base or _is_base(options.checkpoint),
        checkpoint=options.checkpoint,
        revision=options.revision,
        adapter=options.adapter,
        seed=options.seed or 0,
        recipe=options.recipe,
        group_size=options.group_size,
        context_length=options.context_length,
        prefill_lengths=_prefill_lengths(options),
        image_sizes=_image_sizes(options),
        vision=not options.no_vision,
        num_layers=options.num_layers,
        text_runner=options.text_runner,
        profile=options.profile,
        state_layout=options.state_layout,
        max_head_columns=options.max_head_columns,
        palettes=options.palettes,
        max_file_layers=options.max_file_layers,
        max_file_bytes=_file_size(options.max_file_size),
        overwrite=options.overwrite,
        resume=options.resume,
        skip_validation=options.skip_validation,
        threads=options.threads,
    )
    return spec.at(_output(options.output_dir, spec.name))


def _file_size(text: str | None) -> int | None:
    """Bytes of "900M", "1.5G" or "1000000"; powers of ten, as disks count."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]?)B?", text, re.IGNORECASE)
    size = int(float(found[1]) * {"": 1, "K": 1e3, "M": 1e6, "G": 1e9}[found[2].upper()]) if found else 0
    if size < 1:
        raise UsageError(f"--max-file-size {text}: give a size such as 900M, 1.5G or a number of bytes")
    return size


def _choice(option: str, value: str | None, choices: tuple[str, ...]) -> None:
    if value is None:
        raise UsageError(f"{option} is missing; choose one of {', '.join(choices)}")
    if value not in choices:
        raise UsageError(f"{option} {value}: unknown; choose one of {', '.join(choices)}{_close(value, choices)}")


def _size(options: argparse.Namespace) -> str:
    """The size's name: as given, or that of the folder's dimensions, or that of a published hub id.

    Raises:
        UsageError: it cannot be known without a download, or is unknown.
    """
    size, checkpoint = options.size, options.checkpoint
    published = {name: row.name for row in SIZES.values() for name in (row.hub_id, row.base_hub_id) if name}
    known = None if checkpoint is None else checkpoint.removeprefix("modelscope:")
    if checkpoint in (None, "random") or known in published:
        size = size or published.get(str(known))
        _choice("--size", size, tuple(SIZES))
        return str(size)
    if size is None:
        if not is_folder(checkpoint):
            raise UsageError(
                f"--size is missing: what {checkpoint} holds is only known after its download; give one of "
                f"{', '.join(name for name in SIZES if name != TINY)}, or a name of your own such as {CUSTOM}"
            )
        check_beside(Path(checkpoint), options.adapter)
        return size_of(read_config(Path(checkpoint)))
    check_name(size)
    return str(size)


def _is_base(checkpoint: str | None) -> bool:
    """Whether it is the published Base model of a size, on whatever hub."""
    return checkpoint is not None and checkpoint.removeprefix("modelscope:") in {r.base_hub_id for r in SIZES.values()}


def _check_source(options: argparse.Namespace) -> None:
    """Options that speak about a checkpoint of another kind would be ignored: refuse them."""
    checkpoint = options.checkpoint
    if checkpoint == "random" and options.adapter is not None:
        raise UsageError(f"--adapter {options.adapter}: random weights were never trained; leave it out")
    if options.base and options.size == TINY and checkpoint is None:
        raise UsageError("--base: the shipped tiny checkpoint has no base variant; leave out --base")
    instruct = {row.hub_id for row in SIZES.values() if row.hub_id}
    if options.base and checkpoint is not None and checkpoint.removeprefix("modelscope:") in instruct:
        raise UsageError(f"--base: {checkpoint} is the instruct model; give {checkpoint}-Base, or leave out --base")
    if options.seed is not None and checkpoint != "random":
        raise UsageError(f"--seed {options.seed}: only random weights have one; add --checkpoint random")
    if options.revision is not None:
        shipped = checkpoint is None and options.size == TINY
        if shipped or checkpoint == "random" or (checkpoint is not None and Path(checkpoint).exists()):
            kind = "the shipped tiny checkpoint" if shipped else f"--checkpoint {checkpoint}"
            raise UsageError(f"--revision {options.revision}: only a hub id has revisions, not {kind}; leave it out")


def _check_recipe(name: str, group_size: int | None) -> None:
    from export.quantize.recipe import load_recipe

    recipe = load_recipe(name, group_size)
    if group_size is not None and all(setting.bits != 4 for _, setting in recipe.entries()):
        raise UsageError(f"--group-size {group_size}: recipe {name} has no 4-bit role to group; leave it out")


def _prefill_lengths(options: argparse.Namespace) -> tuple[int, ...]:
    context: int = options.context_length
    text: str | None = options.prefill_lengths
    if text is None:
        fitting = tuple(n for n in DEFAULT_PREFILL.get(options.size, (64, 512)) if n <= context)
        return fitting or (context,)
    if not re.fullmatch(r"\d{1,6}(,\d{1,6})*", text):
        raise UsageError(f"--prefill-lengths {text}: give numbers separated by commas, such as 64,512")
    lengths = tuple(sorted({int(part) for part in text.split(",")}))
    for length in lengths:
        if length < 2:
            raise UsageError(f"--prefill-lengths {length}: a chunk has at least 2 tokens; decode takes single ones")
        if length > context:
            raise UsageError(
                f"--prefill-lengths {length}: longer than --context-length {context}; "
                "lengthen the context or shorten the chunk"
            )
    return lengths


def _image_sizes(options: argparse.Namespace) -> tuple[tuple[int, int], ...]:
    text: str | None = options.image_sizes
    if options.no_vision:
        if text is not None:
            raise UsageError("--image-sizes and --no-vision exclude each other; leave one out")
        return ()
    sizes = DEFAULT_IMAGES.get(options.size, ((448, 448),)) if text is None else _parse_sizes(text)
    for height, width in sizes:
        tokens = (height // PIXELS_PER_TOKEN) * (width // PIXELS_PER_TOKEN)
        if tokens >= options.context_length:
            raise UsageError(
                f"--context-length {options.context_length}: one {height}x{width} picture takes {tokens} tokens; "
                "lengthen the context, give smaller --image-sizes, or --no-vision"
            )
    return sizes


def _parse_sizes(text: str) -> tuple[tuple[int, int], ...]:
    sizes = []
    for part in text.lower().split(","):
        match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", part.strip())
        if match is None:
            raise UsageError(f"--image-sizes {part}: give HEIGHTxWIDTH in pixels, such as 448x448")
        height, width = int(match[1]), int(match[2])
        if height % PIXELS_PER_TOKEN or width % PIXELS_PER_TOKEN or not height or not width:
            raise UsageError(
                f"--image-sizes {part}: both sides must be multiples of {PIXELS_PER_TOKEN}, the pixels behind one "
                f"image token; try {_nearest(height)}x{_nearest(width)}"
            )
        sizes.append((height, width))
    return tuple(dict.fromkeys(sizes))


def _nearest(side: int) -> int:
    return max(PIXELS_PER_TOKEN, round(side / PIXELS_PER_TOKEN) * PIXELS_PER_TOKEN)


def _output(given: Path | None, name: str) -> Path:
    """The bundle folder. Its siblings <out>.partial and <out>.rejected must have names too."""
    output = given if given is not None else Path(name)
    plain = Path(os.path.normpath(output))
    if plain.name in ("", ".."):
        raise UsageError(f"--output-dir {output}: give the bundle folder a name of its own, such as {output / name}")
    return plain

"""A published golden held against a bundle: what another implementation measured of the same checkpoint.

The form of a golden is in docs/golden.md. Nothing but the bundle is needed: its tokenizer and template render the
prompt, its encoder sees the picture as a chat prepares it, its decoder is fed the golden's own tokens. A golden that
is broken, or not of this bundle, is refused; what the bundle computes otherwise is a failed check.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.chat import pictures
from export.chat.conversation import Contract, Conversation
from export.chat.template import load_tokenizer, render
from export.quantize.recipe import Recipe
from export.spec import UsageError
from export.validate import metrics
from export.validate.case import Rung
from export.validate.gates import Check, gated, recorded
from export.validate.ladder import row
from targets.base import Target

NAME = "golden"
"""Of the rung in reports."""
BEST = 10
"""Ids and logits that a golden has of the first position."""
PICTURES = (".png", ".jpeg", ".jpg")
Floats = NDArray[np.float64]


class GoldenError(UsageError):
    """A golden is broken, or not of the bundle that it is held against."""


@dataclass(frozen=True)
class Golden:
    """What the three files of a golden say, checked against each other."""

    folder: Path
    model_id: str
    prompt: str
    ids: list[int]
    """Of the whole prompt, the image token as often as the picture has tokens."""
    best_ids: list[int]
    """Of the ten largest logits after the prompt, the largest first."""
    best_logits: Floats
    """[10]"""
    summary: Floats
    """[4]: largest, smallest, mean and standard deviation of all logits after the prompt."""
    tokens: list[int]
    """The greedy answer."""
    text: str
    picture: NDArray[np.float32]
    """[H, W, 3] in 0…1"""


def read(folder: Path) -> Golden:
    """Read a golden.

    Raises:
        GoldenError: files that are missing, broken, or contradict each other. UsageError: a damaged picture.
    """
    if not folder.is_dir():
        raise GoldenError(f"--golden {folder}: no such folder; give the one with golden_NAME_picture.json")
    found = sorted(folder.glob("golden_*_picture.json"))
    if len(found) != 1:
        raise GoldenError(
            f"--golden {folder}: holds {len(found)} files golden_NAME_picture.json; a golden's folder has one"
        )
    stem = found[0].with_suffix("")
    drawn = [path for end in PICTURES if (path := stem.with_suffix(end)).is_file()]
    if len(drawn) != 1:
        raise GoldenError(f"{stem}: {len(drawn)} pictures of this name lie in the folder; put one as PNG or JPEG there")
    measured, generated = found[0], folder / f"{stem.name.removesuffix('_picture')}_generation.json"
    first, second = _object(measured), _object(generated)
    golden = Golden(
        folder,
        model_id=_text(second, "model_id", generated),
        prompt=_text(second, "prompt", generated),
        ids=_ids(first, "input_ids", measured),
        best_ids=_ids(first, "top10_ids", measured, BEST),
        best_logits=_numbers(first, "top10_logits", measured, BEST),
        summary=_numbers(first, "logits_summary", measured, 4),
        tokens=_ids(second, "generated_tokens", generated),
        text=_text(second, "generated_text", generated),
        picture=pictures.load(drawn[0]),
    )
    two = [first.get("top1_id"), first.get("top2_id")]
    for right, what in (
        (two == golden.best_ids[:2], "top1_id and top2_id are not the first two of top10_ids"),
        (len(set(golden.best_ids)) == BEST, "top10_ids names an id twice"),
        (bool((np.diff(golden.best_logits) <= 0).all()), "top10_logits do not fall"),
        (golden.summary[0] == golden.best_logits[0], "the largest of logits_summary is not that of top10_logits"),
        (golden.tokens[0] == golden.best_ids[0], f"{generated.name} does not begin with top1_id"),
    ):
        if not right:
            raise GoldenError(f"{measured}: {what}; the golden was damaged, copy it again")
    return golden


def _object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise GoldenError(f"{path} cannot be read ({error.strerror}); a golden is of three files") from error
    except ValueError as error:
        raise GoldenError(f"{path} is not valid JSON ({error}); copy the golden again") from error
    if not isinstance(value, dict):
        raise GoldenError(f"{path} is no JSON object; copy the golden again")
    return value


def _wrong(path: Path, name: str, value: object, rule: str) -> GoldenError:
    return GoldenError(f"{path}: {name} is {str(value)[:60]!r} but must be {rule}; see docs/golden.md")


def _text(entry: Mapping[str, Any], name: str, path: Path) -> str:
    value = entry.get(name)
    if not isinstance(value, str) or not value:
        raise _wrong(path, name, value, "a text")
    return value


def _ids(entry: Mapping[str, Any], name: str, path: Path, count: int | None = None) -> list[int]:
    value = entry.get(name)
    right = isinstance(value, list) and value and all(type(each) is int and each >= 0 for each in value)
    if not isinstance(value, list) or not right or len(value) != (count or len(value)):
        raise _wrong(path, name, value, f"a list of {count or 'one or more'} token ids")
    return value


def _numbers(entry: Mapping[str, Any], name: str, path: Path, count: int) -> Floats:
    """Numbers as float.hex writes them, which loses no bit."""
    value, rule = entry.get(name), f"a list of {count} finite numbers as float.hex writes them"
    try:
        if not isinstance(value, list):
            raise TypeError
        numbers = np.asarray([float.fromhex(each) for each in value])
    except (TypeError, ValueError, OverflowError) as error:
        raise _wrong(path, name, value, rule) from error
    if len(numbers) != count or not np.isfinite(numbers).all():
        raise _wrong(path, name, value, rule)
    return numbers


def fit(golden: Golden, folder: Path, manifest: Mapping[str, Any]) -> Contract:
    """The contract of a bundle with the golden's picture size alone, if the golden can be of this bundle.

    Raises:
        GoldenError: of another checkpoint, or of a picture or length that the bundle was not exported for.
    """
    contract, model = Contract.of(manifest), manifest["model"]
    source = model["source"]
    if source["kind"] == "random":
        raise GoldenError(f"{folder} has random weights, the golden is of {golden.model_id}; export that checkpoint")
    if source["kind"] == "hub" and source["id"].lower() != golden.model_id.lower():
        raise GoldenError(
            f"the golden is of {golden.model_id}, {folder} was made from {source['id']}; give a golden of that"
        )
    most = max(*golden.ids, *golden.best_ids, *golden.tokens)
    if most >= model["vocab_size"]:
        raise _other(golden, f"names token {most}, and the bundle's vocabulary has {model['vocab_size']} rows")
    tokenizer = load_tokenizer(folder)
    said = tokenizer.decode(golden.tokens, skip_special_tokens=True)
    if said.strip() != golden.text.strip():
        raise _other(golden, f"has the answer {golden.text[:60]!r}, and the bundle's tokenizer reads {said[:60]!r}")
    size = _size(golden, contract)
    _check_prompt(golden, tokenizer, contract.image_token_id)
    if size not in contract.image_sizes:
        sizes = [f"{height}x{width}" for height, width in contract.image_sizes]
        raise GoldenError(
            f"the golden's picture is resized to {size[0]}x{size[1]} (height x width), the bundle has "
            f"{', '.join(sizes) or 'no vision encoder'}; export with --image-sizes "
            f"{','.join([*sizes, f'{size[0]}x{size[1]}'])}"
        )
    needed = len(golden.ids) + len(golden.tokens) - 1
    if needed > contract.context_length:
        raise GoldenError(
            f"the golden's prompt and answer are {needed} tokens, the bundle's context has {contract.context_length}; "
            f"export with --context-length {needed} or more"
        )
    return replace(contract, image_sizes=(size,))


def _other(golden: Golden, why: str) -> GoldenError:
    return GoldenError(
        f"the golden of {golden.model_id} is not of this bundle's checkpoint: it {why}; give a golden of the checkpoint"
    )


def _size(golden: Golden, contract: Contract) -> tuple[int, int]:
    """Height and width to which the golden's picture was resized: the grid with as many places as the prompt has
    image tokens that transformers' `smart_resize` can make of the picture.

    It rounds either side to whole tokens, or scales both first, when it rounds down to have fewer pixels and up to
    have more. The limits of pixels are in no golden, but a common scale must exist.
    """
    count, side = golden.ids.count(contract.image_token_id), contract.pixels_per_token
    height, width = (edge / side for edge in golden.picture.shape[:2])

    def possible(rows: int, columns: int) -> bool:
        shrunk = max(height / (rows + 1), width / (columns + 1), 1) < min(height / rows, width / columns)
        grown = max((rows - 1) / height, (columns - 1) / width, 1) < min(rows / height, columns / width)
        return shrunk or grown or (rows, columns) == (round(height), round(width))

    found = [(n, count // n) for n in range(1, count + 1) if count % n == 0 and possible(n, count // n)]
    if not found:
        raise GoldenError(
            f"the golden's picture of {golden.picture.shape[0]}x{golden.picture.shape[1]} (height x width) is not that "
            f"of its prompt, which has {count} image tokens (id {contract.image_token_id}) of {side}x{side} pixels; "
            "copy the golden again, or give a golden of this checkpoint"
        )
    rows, columns = min(found, key=lambda grid: abs(math.log(grid[1] / grid[0] * height / width)))
    return rows * side, columns * side


def _check_prompt(golden: Golden, tokenizer: Any, image: int) -> None:
    """Refuse a golden whose prompt the bundle renders to other ids; it may let the model think or not."""
    content = [{"type": "image"}, {"type": "text", "text": golden.prompt}]
    count = golden.ids.count(image)
    told = []
    for thinking in (False, True):
        ids = render(tokenizer, [{"role": "user", "content": content}], enable_thinking=thinking)
        told.append([each for token in ids for each in ([image] * count if token == image else [token])])
    if golden.ids in told:
        return
    ours, place = told[0], 0
    while place < min(len(ours), len(golden.ids)) and ours[place] == golden.ids[place]:
        place += 1
    raise _other(
        golden,
        f"has other ids of the prompt than the bundle's template and tokenizer give, {len(golden.ids)} against "
        f"{len(ours)}, at place {place} {golden.ids[place : place + 3]} against {ours[place : place + 3]}",
    )


def hold(golden: Golden, folder: Path, manifest: dict[str, Any], target: Target, threads: int) -> Rung:
    """The bundle on its runtime against the golden.

    Raises:
        As `fit`.
    """
    contract = fit(golden, folder, manifest)
    with closing(target.open(folder, manifest, threads)) as session:
        conversation = Conversation(session, contract)
        logits = [conversation.feed(golden.ids, [golden.picture])]
        logits += [conversation.feed([token]) for token in golden.tokens[:-1]]
    # By the manifest alone: which of its entries no weight follows, only the checkpoint could tell.
    settings = (setting for _, setting in Recipe.from_manifest(manifest["quantization"]).entries())
    kind = row(settings, target.capabilities.floats)
    resized = golden.picture.shape[:2] != contract.image_sizes[0]
    checks, notes = _checks(golden, np.stack(logits), contract, kind, resized)
    notes.append(f"The golden is of {golden.model_id}: {golden.prompt!r}, with a picture.")
    return Rung(NAME, checks, {"answer": golden.text}, notes)


def _checks(
    golden: Golden, logits: NDArray[np.float32], contract: Contract, kind: str, resized: bool
) -> tuple[list[Check], list[str]]:
    """Checks on logits [N, V], the first after the prompt and each other one after one more of the golden's tokens."""
    after = logits[0].astype(np.float64)
    found = after[golden.best_ids]
    summary = np.asarray([after.max(), after.min(), after.mean(), after.std()])
    error = metrics.relative(np.append(golden.best_logits, golden.summary), np.append(found, summary))
    noise = float(((metrics.centred(golden.best_logits) - metrics.centred(found)) ** 2).sum())
    signal = float((metrics.centred(golden.best_logits) ** 2).sum())
    others = np.delete(after, golden.best_ids)
    strangers = int((others > golden.best_logits[-1] + metrics.NEAR_TIE).sum())
    allowed = contract.mask(logits)
    best = allowed.argmax(-1)
    wanted = np.asarray(golden.tokens)
    gaps = allowed.max(-1) - allowed[np.arange(len(wanted)), wanted]
    gaps[0] = _gap(golden, int(best[0]))
    same = best == wanted
    tie = ~same & (gaps < metrics.NEAR_TIE)
    five = np.argsort(-allowed, axis=-1, kind="stable")[:, :5]
    exact = kind == "fp32" and not resized
    limit = "golden.fp32.resized.logits" if kind == "fp32" and resized else f"golden.{kind}.logits"
    if kind == "fp32" and resized:
        kind = "fp16"  # the pictures differ by about as much as float16 would make them
    checks = [
        gated("golden.logits", error, limit) if kind in ("fp32", "fp16") else recorded("golden.logits", error),
        gated("golden.sqnr_db", _decibels(signal, noise), f"golden.{kind}.sqnr_db"),
        gated("golden.ids", strangers, "golden.fp32.ids") if exact else recorded("golden.ids", strangers),
        gated("golden.tokens", float(same[~tie].mean()) if not tie.all() else math.nan, f"golden.{kind}.tokens"),
        gated("golden.top5", float((five == wanted[:, None]).any(-1).mean()), f"golden.{kind}.top5"),
        recorded("golden.ambiguous", int(tie.sum())),
        recorded("golden.prompt_tokens", len(golden.ids)),
    ]
    wrong = [n for n in range(len(wanted)) if not same[n] and not tie[n]]
    said = "The bundle prefers token {} to the golden's {} at place {} of the answer."
    return checks, [said.format(best[n], wanted[n], n) for n in wrong[:3]]


def _gap(golden: Golden, token: int) -> float:
    """How far a token lies below the golden's best; at least that of its tenth for one that it does not name."""
    place = golden.best_ids.index(token) if token in golden.best_ids else -1
    return float(golden.best_logits[0] - golden.best_logits[place])


def _decibels(signal: float, noise: float) -> float:
    if not math.isfinite(noise):
        return math.nan
    return math.inf if noise == 0 else 10 * math.log10(signal / noise)

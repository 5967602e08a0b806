"""L0 to L3: where did an error enter?

Every rung is a function from a `Case` to a `Rung` and can be run alone. The same functions serve the
export, `python -m export validate` and the tests, whose deliberately wrong lowerings must fail here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.chat.conversation import Contract, Conversation, chunks, join_logits
from export.checkpoint.base import Checkpoint
from export.checkpoint.weights import Weights
from export.model import state
from export.model.config import FULL, ModelConfig
from export.model.positions import splice
from export.quantize.quantizer import Quantizer
from export.quantize.recipe import Recipe
from export.validate import metrics, reference
from export.validate.gates import GATES, GREEDY, Check, check, failed
from export.validate.probe import Probe, make_probe, picture
from targets.base import Job, Session, Target

RUNGS = ("L0", "L1", "L2", "L3")
FULL_CACHE_TOKENS = 4096
RUNNER_TOKENS = 24
"""Of text, from the probe, that a runtime's own runner is compared on."""
Arrays = dict[str, NDArray[Any]]


@dataclass
class Rung:
    """Outcome of one rung: its checks, and series for the plots of the report."""

    name: str
    checks: list[Check]
    series: dict[str, Any] = field(default_factory=dict)

    @property
    def status(self) -> str:
        return "FAIL" if failed(self.checks) else "PASS"

    def as_json(self) -> dict[str, Any]:
        return {"status": self.status, "checks": [c.as_json() for c in self.checks], "series": self.series}


@dataclass
class Case:
    """One bundle (finished or still `.partial`) with the checkpoint it came from."""

    checkpoint: Checkpoint
    config: ModelConfig
    recipe: Recipe
    target: Target
    folder: Path
    manifest: Mapping[str, Any]
    threads: int
    tokens: int = 96
    """Length of the probe; the first half is prefilled, the rest decoded."""
    drift_steps: int = 0
    """Decode steps of the drift check; 0 leaves it out."""
    gate_quality: bool = True
    """False for random weights, whose L3 says nothing about a real model."""
    task: Callable[[Any], dict[str, float]] | None = None
    """Task accuracy of a generate function, where the checkpoint has a task."""
    text: list[int] | None = None
    """Token ids the probes are made of (repeated where they are too few); None: random ids."""
    prompts: list[list[int]] = field(default_factory=list)
    """Prompts without pictures that are continued greedily; none: that check is left out."""

    @property
    def floats(self) -> str:
        """Dtype of the bundle's activations."""
        return self.target.capabilities.floats

    @cached_property
    def weights(self) -> Weights:
        return Weights(self.checkpoint, self.config)

    @cached_property
    def image_sizes(self) -> tuple[tuple[int, int], ...]:
        return tuple((h, w) for h, w in self.manifest["image_sizes"])

    @cached_property
    def prefill_lengths(self) -> tuple[int, ...]:
        return tuple(self.manifest["prefill_lengths"])

    @cached_property
    def probe(self) -> Probe:
        limit = min(self.tokens, int(self.manifest["context_length"]))
        return make_probe(self.config, limit, self.image_sizes, text=self.text)

    @cached_property
    def pictures(self) -> list[NDArray[np.float32]]:
        """One picture [3, H, W] for every image size of the bundle."""
        random = np.random.default_rng(2)
        return [picture(random, height, width) for height, width in self.image_sizes]

    @cached_property
    def true_pictures(self) -> list[NDArray[np.float32]]:
        """transformers' image embeddings of `pictures`."""
        return [reference.hf_vision(self.checkpoint, self.config, each) for each in self.pictures]

    @cached_property
    def plan(self) -> list[tuple[int | None, int]]:
        """Half of the probe in chunks, its last chunk padded, then one token at a time."""
        return make_plan(len(self.probe.ids), self.prefill_lengths)

    @cached_property
    def embedded(self) -> NDArray[np.float32]:
        """Rows [T, D] from transformers' embedding and vision tower."""
        rows = reference.embed(self.checkpoint, self.probe.ids)
        images = [reference.hf_vision(self.checkpoint, self.config, image) for image in self.probe.images]
        return np.asarray(splice(rows, self.probe.ids, self.config.image_token_id, images), np.float32)

    @cached_property
    def truth(self) -> tuple[NDArray[np.float32], Arrays]:
        """transformers' fp32 logits [T, V] and final states on the probe, fed token by token: its chunked delta
        rule is the less exact of its two forms (docs/LOG.md) and would be most of the distance to ours.
        """
        return reference.hf_sequence(self.checkpoint, self.config, self.embedded, self.probe.positions, 1)


def make_plan(tokens: int, lengths: tuple[int, ...]) -> list[tuple[int | None, int]]:
    prefill = max(1, tokens // 2 + 3)
    steps: list[tuple[int | None, int]] = list(chunks(min(prefill, tokens), lengths))
    return steps + [(None, 1)] * (tokens - min(prefill, tokens))


def state_errors(config: ModelConfig, truth: Arrays, states: Arrays, tokens: int) -> dict[str, float]:
    """Relative error of each state; KV caches over the rows written so far."""
    errors = {}
    for name, expected in truth.items():
        got = states[name]
        if name.startswith(("key", "value")):
            expected, got = expected[:, :tokens], got[:, :tokens]
        errors[name] = metrics.relative(expected, got)
    return errors


def canonical(config: ModelConfig, states: Mapping[str, NDArray[Any]]) -> Arrays:
    """A bundle's states in the shapes of `export.model.state`: no batch, conv [Ch, K-1], caches [Hkv, L, Dh]."""
    shapes = {s.name: s for s in state.layout(config.text, 1)}
    result: Arrays = {}
    for name, array in states.items():
        wanted = shapes[name]
        plain: NDArray[Any] = array.reshape(array.shape[-len(wanted.shape) :])
        if wanted.kind == "conv":  # the last K-1 inputs, where a target keeps more
            plain = (plain if plain.shape[0] == wanted.shape[0] else plain.T)[:, -wanted.shape[1] :]
        if wanted.kind in ("key", "value") and plain.shape[0] != wanted.shape[0]:
            plain = plain.swapaxes(0, 1)
        result[name] = plain
    return result


def l0(case: Case) -> Rung:
    """Our modules in PyTorch fp32 against transformers: logits of every token and every state."""
    truth, true_states = case.truth
    rows_needed = state.cache_rows(len(case.probe.ids), case.prefill_lengths)
    rows = reference.embed(case.checkpoint, case.probe.ids)
    images = [reference.own_vision(case.weights, image) for image in case.probe.images]
    rows = splice(rows, case.probe.ids, case.config.image_token_id, images)
    logits, states = reference.own_sequence(
        case.weights, rows, case.probe.positions, case.plan, rows_needed
    )
    errors = state_errors(case.config, true_states, states, len(case.probe.ids))
    checks = [
        check("L0.logits", metrics.relative(truth, logits)),
        check("L0.states", max(errors.values())),
    ]
    if case.pictures:
        ours = [reference.own_vision(case.weights, each) for each in case.pictures]
        checks.append(check("L0.vision", _worst(case.true_pictures, ours)))
        # Fewer than two where the context is too short for them: then no rung saw what a picture leaves behind.
        checks.append(check("L0.pictures_in_text", len(images)))
    return Rung("L0", checks, {"states": errors})


def _worst(expected: list[NDArray[Any]], got: list[NDArray[Any]]) -> float:
    return max(metrics.relative(a, b) for a, b in zip(expected, got, strict=True))


def _pictures(session: Session, pictures: list[NDArray[np.float32]]) -> list[NDArray[Any]]:
    """Image embeddings [N, D] of each picture, by the signature of its size."""
    return [
        session.run(f"vision_{p.shape[1]}x{p.shape[2]}", {"image": p[None]})["image_embeddings"][0] for p in pictures
    ]


def replay(
    session: Session,
    rows: NDArray[Any],
    positions: NDArray[Any],
    plan: list[tuple[int | None, int]],
    junk: float,
    *,
    reset: bool = True,
) -> list[NDArray[np.float32]]:
    """Run a plan on a session; logits [V] after each call. Rows [T, D] are in the dtype of the bundle's embeddings.
    Padded ones are filled with `junk`, and where that is not zero they stand at nonsense positions.
    """
    if reset:
        session.reset()
    results = []
    for first, length, valid in reference.pieces(len(rows), plan):
        size = length or 1
        chunk = np.full((1, size, rows.shape[1]), junk, rows.dtype)
        chunk[0, :valid] = rows[first : first + valid]
        places = np.full((3, size), 0 if junk == 0 else 54321, np.int32)
        places[:, :valid] = positions[:, first : first + valid]
        inputs = {"embeddings": chunk, "position_ids": places, "start": np.asarray([first], np.int32)}
        if length is not None:
            inputs["valid"] = np.asarray([valid], np.int32)
        outputs = session.run("decode" if length is None else f"prefill_{length}", inputs)
        results.append(join_logits(outputs))
    return results


def shallow(config: ModelConfig, parameters_limit: int = 150_000_000) -> ModelConfig:
    """The first layers holding one of each kind, unless the whole model is small enough."""
    text = config.text
    if text.vocab_size * text.hidden_size + text.num_hidden_layers * 12 * text.hidden_size**2 < parameters_limit:
        return config
    first_full = text.layer_types.index(FULL) + 1 if FULL in text.layer_types else 1
    return config.truncated(min(first_full, text.num_hidden_layers))


def file_layers(manifest: Mapping[str, Any]) -> int | None:
    """Decoder layers a file of the bundle holds at most, where it has several files."""
    stages = manifest["signatures"]["decode"]["stages"]
    layers = {state["name"]: np.atleast_1d(state["layer"]).tolist() for state in manifest["states"]}
    counts = [len({layer for name in stage.get("states", {}) for layer in layers[name]}) for stage in stages]
    return max(1, *counts) if len(counts) > 1 else None


def _cut(manifest: Mapping[str, Any], config: ModelConfig) -> int | None:
    """Layers of a file in L1: as in the bundle, but a bundle of several files is never lowered to one."""
    most = file_layers(manifest)
    return None if most is None else min(most, max(1, config.text.num_hidden_layers - 1))


def _head_columns(manifest: Mapping[str, Any]) -> int | None:
    """Columns of the largest piece of a split head."""
    outputs = manifest["signatures"]["decode"]["outputs"]
    return max(tensor["shape"][1] for tensor in outputs) if len(outputs) > 1 else None


def l1(case: Case) -> Rung:
    """The lowered program without quantisation on its runtime against our modules."""
    config = shallow(case.config)
    weights = Weights(case.checkpoint, config)
    quantizer = Quantizer(weights, Recipe.unquantised())
    probe, plan = case.probe, case.plan
    rows = case.embedded
    context = len(probe.ids)
    # Inside an unfinished bundle, so that nothing else is left by a crash; a finished one is never touched.
    place = case.folder if case.folder.suffix == ".partial" else case.folder.parent
    with tempfile.TemporaryDirectory(prefix="l1-", dir=place) as scratch:
        folder = Path(scratch)
        lowered = case.target.lower(
            Job(
                config,
                quantizer,
                context,
                case.prefill_lengths,
                case.image_sizes,
                folder,
                max_file_layers=_cut(case.manifest, config),
                profile=case.manifest["target"]["profile"],
                state_layout=case.manifest["target"].get("state_layout"),
                max_head_columns=_head_columns(case.manifest),
            )
        )
        manifest = {
            **case.manifest,
            "signatures": lowered.signatures,
            "states": lowered.states,
            "context_length": context,
        }
        rung = compare_files(
            case.target, folder, manifest, case.threads, weights, probe, plan, rows, case.prefill_lengths, case.pictures
        )
        rung.checks.append(check("L1.layers", config.text.num_hidden_layers))
        return rung


def compare_files(
    target: Target,
    folder: Path,
    manifest: Mapping[str, Any],
    threads: int,
    weights: Weights,
    probe: Probe,
    plan: list[tuple[int | None, int]],
    rows: NDArray[np.float32],
    prefill_lengths: tuple[int, ...],
    pictures: list[NDArray[np.float32]],
) -> Rung:
    """L1 of files lowered without quantisation.

    A target that stores floats in float16 is compared twice: with float32 in their place and weights that are
    rounded on both sides, where nothing but a wrong lowering makes a difference; and as it is.
    """
    floats = target.capabilities.floats
    stages = manifest["signatures"]["decode"]["stages"]
    kept = all(how == "internal" for stage in stages for how in stage.get("states", {}).values())

    def compare(session: Session, given: Weights, fed: NDArray[Any], prefix: str) -> Rung:
        with closing(session):
            return compare_lowered(session, given, probe, plan, fed, prefill_lengths, pictures, prefix, kept=kept)

    if floats == "float32":
        return compare(target.open(folder, manifest, threads), weights, rows, "L1")
    half = rows.astype(floats)
    exact = compare(target.open_exact(folder, manifest, threads), RoundedWeights(weights), half, "L1.exact")
    stored = compare(target.open(folder, manifest, threads), weights, half, f"L1.{floats}")
    return Rung("L1", exact.checks + stored.checks, {**stored.series, "exact_states": exact.series["states"]})


class RoundedWeights(Weights):
    """Weights as float16 holds them, in float32; learned positions stay, because they are stored resampled."""

    def __init__(self, weights: Weights) -> None:
        super().__init__(weights.checkpoint, weights.config)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        rows = super().rows(name, start, stop)
        return rows if name == "vision.position_weight" else rows.half().float()


def compare_lowered(
    session: Session,
    weights: Weights,
    probe: Probe,
    plan: list[tuple[int | None, int]],
    rows: NDArray[Any],
    prefill_lengths: tuple[int, ...],
    pictures: list[NDArray[np.float32]],
    prefix: str = "L1",
    *,
    kept: bool = False,
) -> Rung:
    """L1 on an open session: logits and states, padding, vision, embedding.

    Args:
        rows: in the dtype of the session's embeddings. prefix: of the checks; their gates are those of L1 where it
            has none of its own. kept: the runtime holds the states, and a call with `start` = 0 clears them.
    """
    config = weights.config

    def gated(name: str, value: float) -> Check:
        own = f"{prefix}.{name}"
        return check(own, value, own if own in GATES else f"L1.{name}")

    expected, states = reference.own_sequence(
        weights, rows.astype(np.float32), probe.positions, plan, state.cache_rows(len(rows), prefill_lengths)
    )
    ends = [first + valid - 1 for first, _, valid in reference.pieces(len(rows), plan)]
    logits = np.stack(replay(session, rows, probe.positions, plan, junk=0.0))
    errors = state_errors(config, states, canonical(config, session.states()), len(rows))
    clean = canonical(config, {name: array.copy() for name, array in session.states().items()})
    padded = np.stack(replay(session, rows, probe.positions, plan, junk=float("nan"), reset=not kept))
    leaks = state_errors(config, clean, canonical(config, session.states()), len(rows))
    checks = [
        gated("logits", metrics.relative(expected[ends], logits)),
        gated("states", max(errors.values())),
        gated("padding", max(metrics.relative(logits, padded), *leaks.values())),
    ]
    embedded = session.run("embed", {"input_ids": np.asarray([probe.ids], np.int64)})["embeddings"]
    plain = torch.cat([weights.rows("embedding.weight", i, i + 1) for i in probe.ids]).numpy()
    checks.append(gated("embed", metrics.relative(plain, embedded[0])))
    if pictures:
        ours = [reference.own_vision(weights, each) for each in pictures]
        checks.append(gated("vision", _worst(ours, _pictures(session, pictures))))
    series = {"states": errors, "logits": _row_errors(expected[ends], logits), "rows": ends}
    return Rung("L1", checks, series)


def _row_errors(a: NDArray[Any], b: NDArray[Any]) -> list[float]:
    return [metrics.relative(x, y) for x, y in zip(a, b, strict=True)]


def l2(case: Case) -> Rung:
    """Every weight of the artifact, dequantised, against the quantiser's reference, bit for bit."""
    quantizer = Quantizer(case.weights, case.recipe)
    compared, wrong, names = 0, 0, []
    seen: dict[Any, int] = {}
    for name, (start, block) in case.target.stored_weights(case.folder, case.manifest, quantizer):
        parameter, _, size = name.partition("@")
        if size:
            expected = _positions(quantizer, parameter, size)
        else:
            expected = quantizer.reference_rows(parameter, start, start + len(block))
        if case.floats == "float16" and quantizer.setting(parameter) is None and not size:
            expected = expected.half().float()
        # As bits: a NaN differs from itself, and -0 is another weight than 0 only in name.
        different = expected.numel()
        if expected.numel() == block.numel():
            different = int((expected.reshape(block.shape) != block).sum())
        compared += block.numel()
        wrong += different
        key = _content(quantizer, parameter), size
        seen[key] = seen.get(key, 0) + len(block)
        if different and name not in names:
            names.append(name)
    missing = sorted(set(_expected(case, quantizer, seen)))
    checks = [
        check("L2.mismatches", wrong),
        check("L2.missing", len(missing)),
        Check("L2.weights", compared, "RECORDED"),
    ]
    return Rung("L2", checks, {"wrong": names, "missing": missing})


def _content(quantizer: Quantizer, name: str) -> tuple[Any, ...]:
    """What a parameter's stored bytes depend on: a tied head and embedding have one content."""
    parameter = quantizer.weights.parameter(name)
    return parameter.segments, parameter.transform, quantizer.setting(name)


def _positions(quantizer: Quantizer, name: str, size: str) -> Any:
    """The learned vision positions at an image size HxW, which targets may store in place of the learned table."""
    from export.model.operators import resample_positions

    vision = quantizer.weights.config.vision
    if vision is None:
        raise ValueError(f"{name}: the model has no vision encoder")
    height, width = (int(side) // vision.patch_size for side in size.split("x"))
    return resample_positions(quantizer.weights.tensor(name), height, width, vision.spatial_merge_size)


def _expected(case: Case, quantizer: Quantizer, seen: Mapping[Any, int]) -> Iterator[str]:
    """Parameters of which the artifact holds no row, or not all rows."""
    for name, parameter in quantizer.weights.parameters.items():
        content = _content(quantizer, name)
        if seen.get((content, ""), 0) >= parameter.shape[0]:
            continue
        tables = [f"{h}x{w}" for h, w in case.image_sizes] if name.endswith("position_weight") else []
        if not tables:
            yield name
        yield from (f"{name}@{size}" for size in tables if (content, size) not in seen)


def l3(case: Case) -> Rung:
    """The shipped artifact on its runtime against transformers fp32."""
    with closing(case.target.open(case.folder, case.manifest, case.threads)) as session:
        return _l3(case, session)


def _l3(case: Case, session: Session) -> Rung:
    truth, true_states = case.truth
    contract = Contract.of(case.manifest)
    probe = case.probe
    rows = np.asarray(session.run("embed", {"input_ids": np.asarray([probe.ids], np.int64)})["embeddings"][0])
    images = _pictures(session, probe.images)
    rows = splice(rows, probe.ids, contract.image_token_id, images)
    ends = [first + valid - 1 for first, _, valid in reference.pieces(len(rows), case.plan)]
    logits = np.stack(replay(session, rows, probe.positions, case.plan, junk=0.0))
    errors = state_errors(case.config, true_states, canonical(case.config, session.states()), len(rows))
    kind = quality(case.recipe, floats=case.floats)
    wanted = truth[ends]
    kl = metrics.kl(wanted, logits)
    agree = metrics.agreement(wanted, logits)

    def quality_check(name: str, value: float) -> Check:
        return check(f"L3.{name}", value, f"L3.{kind}.{name}", case.gate_quality)

    checks = [
        quality_check("kl_mean", float(kl.mean())),
        check("L3.kl_p99", float(np.quantile(kl, 0.99))),
        check("L3.kl_worst", float(kl.max())),
        quality_check("sqnr_db", metrics.sqnr_db(wanted, logits)),
        quality_check("top1", agree.top1),
        quality_check("top5", agree.top5),
        check("L3.ambiguous", agree.ambiguous),
        quality_check("states", max(errors.values())),
    ]
    again: list[tuple[int | None, int]] = [(None, 1)] * len(rows)
    stepwise = np.stack(replay(session, rows, probe.positions, again, junk=0.0))[ends]
    checks.append(
        check("L3.chunking", float(metrics.kl(stepwise, logits).mean()), f"L3.{kind}.chunking", case.gate_quality)
    )
    if case.pictures:
        seeing = quality(case.recipe, ("vision",), case.floats)
        value = _worst(case.true_pictures, _pictures(session, case.pictures))
        checks.append(check("L3.vision", value, f"L3.{seeing}.vision", case.gate_quality))
    series: dict[str, Any] = {"kl": [float(x) for x in kl], "rows": ends, "states": errors}
    config = case.config
    special = {config.image_token_id, config.vision_start_token_id, config.vision_end_token_id}
    checks += _text_runner(session, probe, special)
    if case.drift_steps:
        checks += _drift(case, session, quality_check, series)
    if case.prompts:
        checks.append(_greedy(case, session, contract, quality_check, series))
    if case.task is not None:
        checks += _task(case, case.task, session, contract, quality_check, series)
    return Rung("L3", checks, series)


def _text_runner(session: Session, probe: Probe, special: set[int]) -> list[Check]:
    """What the runtime's own runner would compute, against decode, where the bundle serves one."""
    ids = [token for token in probe.ids if token not in special][:RUNNER_TOKENS]
    found = session.runner_logits(ids)
    if found is None:
        return []
    rows = np.asarray(session.run("embed", {"input_ids": np.asarray([ids], np.int64)})["embeddings"][0])
    positions = np.tile(np.arange(len(ids), dtype=np.int32), (3, 1))
    logits = np.stack(replay(session, rows, positions, [(None, 1)] * len(ids), junk=0.0))
    return [check("L3.text_runner", metrics.relative(logits, found))]


def _drift(
    case: Case, session: Session, quality_check: Callable[[str, float], Check], series: dict[str, Any]
) -> list[Check]:
    """KL after many teacher-forced decode steps: does the recurrent state wander off?

    The steps are the last ones of a full cache, up to contexts whose reference would take too long.
    """
    tokens = min(FULL_CACHE_TOKENS, int(case.manifest["context_length"]))
    steps = min(case.drift_steps, tokens - 1)
    probe = make_probe(case.config, tokens, (), seed=1, text=case.text)
    rows = reference.embed(case.checkpoint, probe.ids)
    truth, _ = reference.hf_sequence(case.checkpoint, case.config, rows, probe.positions, tokens - steps)
    plan = [*chunks(tokens - steps, case.prefill_lengths), *[(None, 1)] * steps]

    def divergence(opened: Session) -> NDArray[np.float64]:
        logits = np.stack(replay(opened, rows.astype(case.floats), probe.positions, plan, junk=0.0))[-steps:]
        return metrics.kl(truth[-steps:], logits)

    kl = divergence(session)
    quarter = max(1, steps // 4)
    series["drift_kl"] = [float(x) for x in kl]
    series["drift_kl_by_layout"] = {}
    checks = [
        quality_check("drift", float(kl[-quarter:].mean())),
        check("L3.drift_first", float(kl[:quarter].mean())),
        check("L3.drift_context", tokens),
    ]
    if shallow(case.config) is case.config:  # else another lowering would take too long
        for layout in case.target.capabilities.state_layouts:
            with _in_layout(case, layout) as other:
                found = divergence(other)
            series["drift_kl_by_layout"][layout] = [float(x) for x in found]
            checks.append(check(f"L3.drift_{layout}", float(found[-quarter:].mean())))
    return checks


@contextmanager
def _in_layout(case: Case, layout: str) -> Iterator[Session]:
    """The bundle's decoder with its states kept in another way."""
    place = case.folder if case.folder.suffix == ".partial" else case.folder.parent
    with tempfile.TemporaryDirectory(prefix="drift-", dir=place) as scratch:
        job = Job(
            case.config,
            Quantizer(case.weights, case.recipe),
            int(case.manifest["context_length"]),
            case.prefill_lengths,
            (),
            Path(scratch),
            profile=case.manifest["target"]["profile"],
            state_layout=layout,
        )
        lowered = case.target.lower(job)
        manifest = {**case.manifest, "signatures": lowered.signatures, "states": lowered.states}
        with closing(case.target.open(Path(scratch), manifest, case.threads)) as session:
            yield session


def _greedy(
    case: Case,
    session: Session,
    contract: Contract,
    quality_check: Callable[[str, float], Check],
    series: dict[str, Any],
) -> Check:
    """Tokens that greedy decoding gives as transformers would, up to the first difference; mean over prompts.

    transformers judges the bundle's own continuation in one teacher-forced pass: up to the first difference
    that is the same as letting it run freely, and layers can still be streamed.
    """
    lengths = []
    for prompt in case.prompts:
        answer = Conversation(session, contract).generate(prompt, max_new_tokens=GREEDY, stop=())
        ids = [*prompt, *answer]
        rows = reference.embed(case.checkpoint, ids)
        positions = np.tile(np.arange(len(ids), dtype=np.int32), (3, 1))
        logits, _ = reference.hf_sequence(case.checkpoint, case.config, rows, positions, len(prompt))
        best = logits[len(prompt) - 1 : -1].argmax(-1)
        different = np.flatnonzero(best != np.asarray(answer))
        lengths.append(int(different[0]) if len(different) else len(answer))
    series["greedy_tokens"] = lengths
    return quality_check("greedy_tokens", float(np.mean(lengths)))


def _task(
    case: Case,
    task: Callable[[Any], dict[str, float]],
    session: Session,
    contract: Contract,
    quality_check: Callable[[str, float], Check],
    series: dict[str, Any],
) -> list[Check]:
    """Exact answers on the checkpoint's own task, fp32 PyTorch beside the bundle."""
    from export.model.session import Model, TorchSession

    own = TorchSession(Model.load(case.weights), contract.context_length, contract.prefill_lengths)
    expected = task(generator(own, contract))
    scores = task(generator(session, contract))
    series["task"] = {"reference": expected, "bundle": scores}
    drops = [100 * (expected[name] - score) for name, score in scores.items()]
    checks = [
        check("L3.task_reference", float(np.mean(list(expected.values()))), gated=case.gate_quality),
        quality_check("task_drop", float(np.mean(drops))),
    ]
    return [*checks, *(check(f"L3.task.{name}", score) for name, score in scores.items())]


def generator(session: Any, contract: Contract) -> Callable[[list[NDArray[Any]], list[int]], list[int]]:
    """The `generate(images, ids)` that task metrics call: greedy, a fresh conversation each time."""
    conversation = Conversation(session, contract)

    def generate(images: list[NDArray[Any]], ids: list[int]) -> list[int]:
        conversation.reset()
        return conversation.generate(ids, images, max_new_tokens=32)

    return generate


def quality(recipe: Recipe, roles: tuple[str, ...] | None = None, floats: str = "float32") -> str:
    """Which row of the gates a recipe, or some of its roles, is held to: that of its narrowest weights, or of the
    runtime's activations where nothing is quantised.
    """
    bits = min(setting.bits for role, setting in recipe.roles.items() if roles is None or role in roles)
    return "int4" if bits <= 4 else "int8" if bits <= 8 else "fp32" if floats == "float32" else "fp16"


def climb(case: Case, rungs: tuple[str, ...] = RUNGS, on_rung: Callable[[str], None] = lambda r: None) -> list[Rung]:
    """Run the rungs in order; all of them, so that the report shows where an error entered."""
    steps: dict[str, Callable[[Case], Rung]] = {"L0": l0, "L1": l1, "L2": l2, "L3": l3}
    results = []
    for name in rungs:
        on_rung(name)
        results.append(steps[name](case))
    return results

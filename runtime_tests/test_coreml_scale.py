"""Residual streams near the end of float16: scaled by a power of two they answer as float32 does, unscaled they break.

Twins are made in memory: every writer into a stream times a power of two, which no norm sees.
"""

from __future__ import annotations

import sys
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.chat.template import load_tokenizer
from export.checkpoint.folder import FolderCheckpoint
from export.checkpoint.weights import Weights
from export.model import state
from export.model.positions import splice
from export.model.session import Model
from export.quantize.conditioned import weights_for
from export.quantize.quantizer import Quantizer
from export.quantize.recipe import Recipe, load_recipe
from export.quantize.scale import COMFORTABLE, ScaledWeights, ScaleError, StreamScale, scaled
from export.validate import activations, metrics, reference, task
from export.validate.case import Rung, make_plan
from export.validate.gates import GATES
from export.validate.probe import Probe, make_probe
from export.validate.replay import image_embeddings, replay
from export.validate.streams import Streams, measure
from runtime_tests import twins
from runtime_tests.conftest import MemoryCheckpoint, variant
from runtime_tests.mil import function, mb, save
from targets import load_target
from targets.base import Activations, Job
from targets.to_coreml.interpreter import Interpreter
from targets.to_coreml.operators import _number
from targets.to_coreml.program import Package

pytestmark = pytest.mark.usefixtures("one_thread", "traced_once")

CONFIG = variant(
    num_hidden_layers=2, layer_types=["linear_attention", "full_attention"], tied=False, vision={"depth": 1}
)
TINY = Path(__file__).parents[1] / "checkpoints" / "tiny"
SIZE = (64, 96)
TOKENS, LENGTHS = 48, (16,)
TEXT, VISION = 30_000.0, 65_000.0
"""What the streams of the twin come close to."""
WITHIN = 2e-3
"""Of float32: root mean square of the difference, relative to that of what is expected. The ladder's own measure,
the worst difference over the largest logit (`metrics.relative`), is no demand: a token or two in a hundred amplify
whatever is rounded, weights in float16 alone move theirs by 2e-3.
"""
MOST = 2.0
"""Times the loss of the original that a quantised twin's may be."""
LIVELY = 5e-3
"""The same for logits of the small random checkpoint: 3.7e-3 whatever its streams are, even of order one."""


class Twin(MemoryCheckpoint):
    """The small checkpoint with its streams so many times larger, as exactly as float32 can."""

    def __init__(self, text: float = 1.0, vision: float = 1.0) -> None:
        super().__init__(CONFIG)
        language, visual = "model.language_model.", "model.visual."
        for name, tensor in self.tensors.items():
            if name.startswith(visual + "merger.linear_fc2.") or (name.startswith(language) and name.endswith(
                ("o_proj.weight", "out_proj.weight", "down_proj.weight", "embed_tokens.weight")
            )):
                tensor *= text
            elif name.startswith((visual + "patch_embed", visual + "pos_embed")) or any(
                part in name for part in (".attn.proj.", ".mlp.linear_fc2.")
            ):
                tensor *= vision


class Louder(Weights):
    """Other weights whose vision stream is twice as large again."""

    def __init__(self, weights: Weights) -> None:
        super().__init__(weights.checkpoint, weights.config)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return super().rows(name, start, stop) / StreamScale(vision=0.5).of(name)


@dataclass
class Small:
    """A twin, its weights and what our modules say in float32."""

    weights: Weights
    probe: Probe
    images: list[NDArray[np.float32]]
    logits: NDArray[np.float32]

    @property
    def ends(self) -> NDArray[np.float32]:
        """Logits after the last token of every call."""
        calls = reference.pieces(TOKENS, make_plan(TOKENS, LENGTHS))
        return self.logits[[first + valid - 1 for first, _, valid in calls]]


def small(weights: Weights, text: list[int] | None = None) -> Small:
    """Weights and what they answer on a probe of random or given tokens."""
    probe = make_probe(weights.config, TOKENS, (SIZE,), text=text)
    images = reference.own_vision(weights, probe.images)
    rows = reference.embed(weights.checkpoint, probe.ids)
    rows = splice(rows, probe.ids, weights.config.image_token_id, images)
    plan, cache = make_plan(TOKENS, LENGTHS), state.cache_rows(TOKENS, LENGTHS)
    logits = reference.own_sequence(weights, rows, probe.positions, plan, cache)[0]
    return Small(weights, probe, images, logits)


@pytest.fixture(scope="module")
def twin() -> Small:
    plain = Twin()
    weights = Weights(plain, plain.model_config)
    text, vision = factors(measure(weights, [make_probe(weights.config, TOKENS, (SIZE,))]))
    large = Twin(text, vision)
    return small(Weights(large, large.model_config))


def factors(streams: Streams) -> tuple[float, float]:
    """Powers of two that bring streams up to `TEXT` and `VISION`."""
    wanted = ((TEXT, streams.text), (VISION, streams.vision))
    text, vision = (2.0 ** int(np.floor(np.log2(limit / max(found)))) for limit, found in wanted)
    return text, vision


def lowered(weights: Weights, folder: Path, profile: str, recipe: Recipe | None = None) -> dict[str, Any]:
    """A bundle's packages, by default without quantisation; the manifest holds what sessions and the linter read."""
    folder.mkdir(exist_ok=True)
    chosen = recipe or Recipe.unquantised()
    quantizer = Quantizer(weights, chosen, load_target("coreml").capabilities.smallest_scale)
    job = Job(weights.config, quantizer, TOKENS, LENGTHS, (SIZE,), folder, profile=profile)
    made = load_target("coreml").lower(job)
    return {
        "signatures": made.signatures,
        "states": made.states,
        "context_length": TOKENS,
        "prefill_lengths": list(LENGTHS),
        "image_sizes": [list(SIZE)],
        "target": {"name": "coreml", "profile": profile},
        "session_options": made.session_options,
        "tokenizer": {"stop_token_ids": [1], "special_token_ids": {"image": weights.config.image_token_id}},
    }


def off(expected: Any, got: Any) -> float:
    """Infinite where something is not finite."""
    if not np.isfinite(got).all():
        return float("inf")
    return float(np.linalg.norm(expected - got) / np.linalg.norm(expected))


def answers(small: Small, folder: Path, manifest: dict[str, Any]) -> tuple[float, float]:
    """How far pictures and logits of the packages are from float32."""
    logits, images = answered(small, folder, manifest)
    return max(off(a, b) for a, b in zip(small.images, images, strict=True)), off(small.ends, logits)


def answered(small: Small, folder: Path, manifest: dict[str, Any]) -> tuple[NDArray[np.float32], list[NDArray[Any]]]:
    """Logits of the packages after every call, and their embeddings of the pictures."""
    plan = make_plan(TOKENS, LENGTHS)
    with closing(load_target("coreml").open(folder, manifest, 1)) as session:
        images = image_embeddings(session, small.probe.images)
        rows = session.run("embed", {"input_ids": np.asarray([small.probe.ids], np.int64)})["embeddings"][0]
        rows = splice(np.array(rows), small.probe.ids, small.weights.config.image_token_id, images)
        return np.stack(replay(session, rows, small.probe.positions, plan, junk=0.0)), images


def seen(small: Small, folder: Path, manifest: dict[str, Any]) -> Activations:
    told: list[float] = []
    probe = replace(small.probe, ids=small.probe.ids[:-8])
    found = load_target("coreml").observe(folder, manifest, [probe, probe], small.probe.images, told.append)
    assert found is not None
    ways = len(LENGTHS) + 1 + len(small.probe.images)  # the first prompt by every length, the other, the pictures
    assert sum(told) == pytest.approx(1) and len(told) == ways and min(told) > 0
    return found


@pytest.mark.parametrize("profile", ["gpu", "ane"])
def test_large_streams_answer_as_float32_only_if_they_are_scaled(profile: str, twin: Small, tmp_path: Path) -> None:
    streams = measure(twin.weights, [twin.probe])
    assert TEXT / 2 < max(streams.text) <= TEXT and VISION / 2 < max(streams.vision) <= VISION
    scale = streams.scale
    assert scale.text <= 2**-2 and scale.vision <= 2**-3
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    manifest = lowered(scaled(twin.weights, scale), right, profile)
    picture, logits = answers(twin, right, manifest)
    assert picture < WITHIN and logits < LIVELY
    found = seen(twin, right, manifest)
    assert found.findings == [] or {f.severity for f in found.findings} == {"warning"}
    assert len(found.text) == len(streams.text) - 1 and len(found.vision) == len(streams.vision)
    # A layer's own writes are what the next layer's norms read: the two ways of looking agree.
    assert found.text[-1] >= streams.text[-1] * scale.text * 0.9
    assert max(found.vision) == pytest.approx(max(streams.vision) * scale.vision, rel=0.02)
    rung = Rung("L3", [])
    activations.record(found, rung)
    assert rung.status == "PASS" and max(found.vision) <= found.largest < COMFORTABLE * 4
    assert rung.series["text_stream"] == list(found.text) and found.where in rung.notes[0]

    # The same checkpoint with a vision stream twice as large, which nobody scaled.
    double = replace(twin, weights=Louder(twin.weights))
    unscaled = lowered(double.weights, wrong, profile)
    assert answers(double, wrong, unscaled)[0] == float("inf")
    bad = seen(double, wrong, unscaled)
    assert {f.rule for f in bad.findings if f.severity == "error"} == {"activation-finite"}
    rung = Rung("L3", [])
    activations.record(bad, rung)
    assert rung.status == "FAIL" and bad.largest == float("inf") == max(bad.vision)


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["gpu", "ane"])
def test_tiny_with_large_streams_is_close_to_float32(profile: str, tmp_path: Path) -> None:
    """A trained checkpoint, whose logits do not depend on the last bit of float16 as those of random ones do."""
    tokens = task.text(load_tokenizer(TINY), TOKENS)
    plain = FolderCheckpoint(TINY)
    weights = Weights(plain, plain.model_config)
    text, vision = factors(measure(weights, [make_probe(weights.config, TOKENS, (SIZE,), text=tokens)]))
    large = FolderCheckpoint(twins.write(TINY, tmp_path / "twin", stream=text, vision_stream=vision))
    given = small(Weights(large, large.model_config), tokens)
    scale = measure(given.weights, [given.probe]).scale
    manifest = lowered(scaled(given.weights, scale), tmp_path / "bundle", profile)
    picture, logits = answers(given, tmp_path / "bundle", manifest)
    worst = metrics.relative(given.ends, answered(given, tmp_path / "bundle", manifest)[0])
    sys.stdout.write(f"{profile} {scale}: pictures {picture:.1e}, logits {logits:.1e}, worst logit {worst:.1e}\n")
    assert picture < WITHIN and logits < WITHIN


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["gpu", "ane"])
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_quantised_twins_lose_at_most_twice_what_the_original_loses(name: str, profile: str, tmp_path: Path) -> None:
    """Conditioned, then scaled, as an export does it: streams near the end of float16, and channels that stand out in
    text, vision and merger.
    """
    recipe, tokens = load_recipe(name), task.text(load_tokenizer(TINY), TOKENS)
    plain = FolderCheckpoint(TINY)
    probe = make_probe(plain.model_config, TOKENS, (SIZE,), text=tokens)
    text, vision = factors(measure(Weights(plain, plain.model_config), [probe]))
    kinds: dict[str, dict[str, Any]] = {
        "original": {},
        "streams": {"stream": text, "vision_stream": vision},
        "outliers": {"outliers": 32, "mlp_outliers": 32},
    }
    found = {}
    for kind, options in kinds.items():
        twin = FolderCheckpoint(twins.write(TINY, tmp_path / kind, **options))
        given = small(Weights(twin, twin.model_config), tokens)
        weights = weights_for(twin, twin.model_config, recipe.conditioning)
        scale = measure(weights, [given.probe]).scale
        assert scale.changes == (kind == "streams")
        manifest = lowered(scaled(weights, scale), tmp_path / f"{kind} bundle", profile, recipe)
        logits, images = answered(given, tmp_path / f"{kind} bundle", manifest)
        seen = [weights.to_stream(torch.from_numpy(image)).numpy() for image in given.images]
        pictures = max(off(a, b) for a, b in zip(seen, images, strict=True))
        found[kind] = pictures, float(metrics.kl(given.ends, logits).mean())
    sys.stdout.write(f"{name} {profile} (pictures, KL): {found}\n")
    assert all((np.array(losses) <= MOST * np.array(found["original"])).all() for losses in found.values()), found


def test_scaled_weights_answer_as_the_others_in_float32(twin: Small) -> None:
    """Also where eps matters: a stream of a thousandth, and a thousandth of that."""
    quiet = Twin(2.0**-10, 2.0**-10)
    for base in (twin.weights, Weights(quiet, quiet.model_config)):
        models = [Model.load(weights) for weights in (base, scaled(base, StreamScale(2**-9, 2**-10)))]
        image, rows = torch.from_numpy(twin.probe.images[0]), torch.randn(TOKENS, 128) * 0.1
        with torch.inference_mode():
            pictures = [model.vision(image) for model in models if model.vision is not None]
            torch.testing.assert_close(*pictures, rtol=0, atol=1e-6 * float(pictures[0].abs().max()))
            logits = [_answer(model, rows, twin.probe) for model in models]
        torch.testing.assert_close(*logits, rtol=0, atol=1e-5 * float(logits[0].abs().max()))


def _answer(model: Model, rows: Tensor, probe: Probe) -> Tensor:
    text = model.config.text
    given = torch.from_numpy(probe.positions), torch.zeros(1, dtype=torch.int32), torch.tensor([TOKENS])
    logits: Tensor = model.decoder(rows, *given, state.zeros(text, TOKENS), all_rows=True)[0]
    return logits


def test_only_writers_are_multiplied(twin: Small) -> None:
    """The embedding, a tied head and the image embeddings stay: tables and signatures mean what they say."""
    scale = StreamScale(0.25, 0.125)
    weights = scaled(twin.weights, scale)
    assert isinstance(weights, ScaledWeights) and scaled(twin.weights, StreamScale()) is twin.weights
    factors = {name: scale.of(name) for name in weights.parameters}
    for name, factor in factors.items():
        assert torch.equal(weights.tensor(name), twin.weights.tensor(name) * factor), name
    text = {name for name, factor in factors.items() if factor == 0.25}
    assert text == {f"decoder.layers.{i}.{part}.weight" for i in (0, 1) for part in ("mixer.out", "mlp.down")}
    vision = {name for name, factor in factors.items() if factor == 0.125}
    assert vision == {"vision.position_weight"} | {
        f"vision.{part}.{kind}" for part in ("patch", "blocks.0.out", "blocks.0.down") for kind in ("weight", "bias")
    }


def test_the_scale_is_the_largest_that_fits() -> None:
    assert StreamScale.fitting(text=0, vision=COMFORTABLE) == StreamScale()
    assert StreamScale.fitting(text=COMFORTABLE + 1, vision=65_000) == StreamScale(0.5, 2**-4)
    assert StreamScale.fitting(text=3, vision=2.0**40).vision == 2**-28
    scale = StreamScale(0.5, 2**-4)
    assert StreamScale.parse(scale.as_manifest()) == scale and StreamScale.parse({}) == StreamScale()
    assert scale.changes and not StreamScale().changes


@pytest.mark.parametrize("factor", [0.3, 2.0, 0.0, -0.5])
def test_other_factors_than_powers_of_two_are_refused(factor: float) -> None:
    with pytest.raises(ScaleError, match=r"the vision stream cannot be scaled by .*; .* must be a power of two"):
        StreamScale(vision=factor)


@pytest.mark.parametrize("largest", [float("inf"), float("nan")])
def test_a_stream_that_is_not_finite_is_refused(largest: float) -> None:
    with pytest.raises(ScaleError, match=r"the text stream reaches (inf|nan) in float32; .*: repair the checkpoint"):
        StreamScale.fitting(text=largest, vision=1.0)


def test_a_factor_that_float16_does_not_hold_is_no_scale() -> None:
    assert _number(0.125) == np.float16(0.125)
    with pytest.raises(ValueError, match=r"coreml cannot multiply by 0.1: float16 holds"):
        _number(0.1)


@pytest.mark.parametrize(("largest", "status"), [(32_752.0, "PASS"), (32_753.0, "FAIL"), (float("nan"), "FAIL")])
def test_the_gate_of_activations(largest: float, status: str) -> None:
    rung = Rung("L3", [])
    activations.record(Activations((1.0,), (), largest, "a.mlpackage: decode: add_1 (add)", []), rung)
    assert rung.status == status and GATES["L3.activations"].limit == 65504 / 2


def test_stress_mode_sees_inside_attention_and_norms(tmp_path: Path) -> None:
    """Products of queries and keys, and squares, beyond float16: float32 inside hides them, others may not."""

    def body(x: Any) -> list[Any]:
        rows = mb.reshape(x=x, shape=[1, 1, 4, 16])
        return [
            mb.scaled_dot_product_attention(query=rows, key=rows, value=rows, name="attention"),
            mb.l2_norm(x=mb.reshape(x=x, shape=[1, 4, 16]), epsilon=np.float16(1e-3), name="norm"),
            mb.reduce_l2_norm(x=x, axes=[1], name="length"),
        ]

    package = Package(save(tmp_path / "inside.mlpackage", main=function(body, {"x": ((4, 16), "float16")})))
    loud = np.random.default_rng(0).uniform(200, 400, (4, 16)).astype(np.float16)
    for x, hidden in ((loud, True), (loud / np.float16(256), False)):
        plain = Interpreter(package).run("main", {"x": x}, {})
        stressed = Interpreter(package, "float16").run("main", {"x": x}, {})
        for name in ("attention", "norm", "length"):
            assert np.isfinite(plain[name]).all()
            close = np.allclose(stressed[name].astype(float), plain[name].astype(float), rtol=0.02)
            assert close is not hidden, name

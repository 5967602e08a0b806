"""Weights conditioned before rounding: float32 answers stay, wrong variants fail L0, twins are no worse in ONNX."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from export.chat.template import load_tokenizer
from export.checkpoint import Checkpoint, open_checkpoint
from export.checkpoint.weights import HEAD_BASIS, Weights
from export.commands import recipe_of
from export.model.decoder import Decoder
from export.quantize import conditioned, rotation
from export.quantize.conditioned import ConditionedWeights, Treatment, balance, weights_for
from export.quantize.conditioning import Conditioning
from export.quantize.quantizer import Quantizer
from export.quantize.recipe import Recipe, load_recipe
from export.sizes import CUSTOM, shipped_tiny
from export.spec import ExportSpec, UsageError
from export.validate import metrics, reference, texts
from export.validate.gates import gated
from export.validate.probe import make_probe
from export.validate.replay import replay
from runtime_tests import twins
from runtime_tests.conftest import VARIANTS, MemoryCheckpoint, variant
from targets import load_target
from targets.base import Job

ALL = Conditioning(fold=True, equalise=True, rotate=True)
TOKENS = 14
PLAN: list[tuple[int | None, int]] = [(8, 8), (8, 4), (None, 1), (None, 1)]
SMALL = {"num_hidden_layers": 4, "intermediate_size": 64}
MODELS = {
    "tied-96": (variant(**SMALL, hidden_size=96), True),
    "untied-128-equal-heads": (
        variant(**SMALL, tied=False, linear_num_key_heads=4, linear_num_value_heads=4), True
    ),
    "text-160": (variant(**SMALL, hidden_size=160), False),
}  # fmt: skip
LIMIT = 1e-4
"""Of the relative error that rounding weights to float32 makes in these random models, which amplify it."""


class Model:
    """A random checkpoint and what transformers says to one prompt and one picture."""

    def __init__(self, config: dict[str, Any], vision: bool) -> None:
        self.checkpoint = MemoryCheckpoint(config)
        self.config = self.checkpoint.model_config
        if not vision:
            self.config = self.config.without_vision()
        for name, tensor in self.checkpoint.tensors.items():
            if name.endswith(("layernorm.weight", "norm.weight")):  # some factors far from one
                tensor[:4] *= 8
            if name.endswith("mlp.up_proj.weight"):
                tensor[:4] *= 32
        self.probe = make_probe(self.config, TOKENS, ())
        self.rows = reference.embed(self.checkpoint, self.probe.ids)
        self.truth, self.states = reference.hf_sequence(
            self.checkpoint, self.config, self.rows, self.probe.positions, 1
        )
        self.picture = np.random.default_rng(0).integers(0, 256, (3, 64, 96)).astype(np.float32) / np.float32(255)
        pictures = [self.picture] if vision else []
        self.seen = reference.hf_vision(self.checkpoint, self.config, pictures)

    def errors(self, weights: Weights) -> dict[str, float]:
        """L0: relative errors of logits, states and image embeddings."""

        def turned(rows: NDArray[np.float32]) -> NDArray[np.float32]:
            return weights.to_stream(torch.from_numpy(rows)).numpy()

        logits, states = reference.own_sequence(weights, turned(self.rows), self.probe.positions, PLAN, 24)
        found = {"logits": metrics.relative(self.truth, logits)}
        found["states"] = max(
            metrics.relative(s, states[n][:, : s.shape[1]]) for n, s in self.states.items()
        )
        for embeddings in self.seen:
            found["vision"] = metrics.relative(turned(embeddings), reference.own_vision(weights, [self.picture])[0])
        return found


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    return {name: Model(config, vision) for name, (config, vision) in MODELS.items()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "conditioning", [Conditioning(fold=True), Conditioning(equalise=True), ALL], ids=["fold", "equalise", "all"]
)
def test_answers_are_those_of_transformers(
    models: dict[str, Model], name: str, conditioning: Conditioning
) -> None:
    model = models[name]
    weights = weights_for(model.checkpoint, model.config, conditioning)
    errors = model.errors(weights)
    assert max(errors.values()) < LIMIT, errors
    tied = model.config.text.tie_word_embeddings
    assert (HEAD_BASIS in weights.parameters) == (conditioning.rotate and tied)
    names = {n for n, _ in Decoder(weights.config.text).named_parameters()}
    assert {f"decoder.{n}" for n in names} == {n for n in weights.parameters if n.startswith("decoder.")}


def test_equalising_changes_no_bit(models: dict[str, Model]) -> None:
    model = models["tied-96"]
    plain, equalised = (
        weights_for(model.checkpoint, model.config, c) for c in (Conditioning(), Conditioning(equalise=True))
    )
    assert type(plain) is Weights and type(equalised) is ConditionedWeights
    up = "decoder.layers.0.mlp.up.weight"
    assert not torch.equal(plain.tensor(up), equalised.tensor(up)), "the outliers must move"
    assert model.errors(plain) == model.errors(equalised)


def test_rows_do_not_depend_on_the_block_they_are_asked_in(models: dict[str, Model]) -> None:
    model = models["tied-96"]
    one, other = (weights_for(model.checkpoint, model.config, ALL) for _ in range(2))
    for name, parameter in one.parameters.items():
        whole, a = one.tensor(name), parameter.shape[0] // 3
        assert tuple(whole.shape) == parameter.shape
        assert torch.equal(other.rows(name, a, 2 * a + 1), whole[a : 2 * a + 1]), name


def without(field: str, name: str) -> Callable[[ConditionedWeights], None]:
    """One step of one parameter's treatment is left out."""

    def patch(weights: ConditionedWeights) -> None:
        treatment = weights.treatments[name]
        assert getattr(treatment, field) is not None
        weights.treatments[name] = replace(treatment, **{field: None})

    return patch


def identity_basis(weights: ConditionedWeights) -> None:
    """The normed rows go to the head as they are."""
    weights.__dict__["_head_basis"] = torch.eye(weights.config.text.hidden_size)


WRONG = {
    "the shift of a folded LayerNorm is missing": ("vision", without("shift", "vision.blocks.1.up.bias")),
    "the merger's norm is not in its columns": ("vision", without("factor", "vision.merger_up.weight")),
    "pictures are in the published basis": ("vision", without("turn", "vision.merger_down.weight")),
    "a factor is lost": ("logits", without("factor", "decoder.layers.0.mixer.z.weight")),
    "a norm is folded and kept": ("logits", without("constant", "decoder.layers.2.post_norm.weight")),
    "DeltaNet's norm is lost": ("logits", without("factor", "decoder.layers.1.mixer.out.weight")),
    "a writer is not rotated": ("logits", without("turn", "decoder.layers.3.mlp.down.weight")),
    "a reader is not rotated": ("logits", without("turn", "decoder.layers.3.mixer.gate.weight")),
    "one side is equalised": ("logits", without("equalise", "decoder.layers.0.mlp.down.weight")),
    "the head's basis is forgotten": ("logits", identity_basis),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_variant_fails_l0(models: dict[str, Model], what: str) -> None:
    model = models["tied-96"]
    check, patch = WRONG[what]
    weights = ConditionedWeights(model.checkpoint, model.config, ALL)
    patch(weights)
    assert model.errors(weights)[check] > 50 * LIMIT


@pytest.mark.parametrize("channels", [96, 128, 160])
def test_the_rotation_is_orthogonal_and_spreads_every_channel(channels: int) -> None:
    matrix = rotation.turn(torch.eye(channels, dtype=torch.float64))
    assert torch.allclose(matrix @ matrix.T, torch.eye(channels, dtype=torch.float64), atol=1e-14)
    # An outlier of 1 becomes at most sqrt(2 / D) everywhere; a plain Hadamard matrix gives sqrt(1 / D).
    assert float(matrix.abs().max()) <= (2 / channels) ** 0.5 + 1e-14
    outputs = torch.randn(channels, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    turned = outputs.clone()
    rotation.turn_outputs(turned)
    assert torch.allclose(turned, matrix.T @ outputs, atol=1e-13)
    # By hand, the definition: diag(signs) · (Hadamard ⊗ DCT), whose entries for the first row have one size per column.
    assert torch.equal(torch.sign(matrix[0, 0]), torch.sign(rotation._signs(channels)[0]))


def test_balancing_is_exact_and_leaves_alike_and_dead_channels() -> None:
    wanted = torch.tensor([4.0, 4.0, 4.0, 4.0 * 2**20, 0.0, 4.0], dtype=torch.float64)
    found = torch.tensor([4.0, 4.0, 4.0 * 2**20, 4.0, 4.0, 0.0], dtype=torch.float64)
    assert balance(wanted, found).tolist() == [1, 1, 2.0**-5, 2.0**5, 1, 1]
    assert balance(2.0**20 * wanted, found).tolist() == [1, 1, 2.0**-5, 2.0**5, 1, 1]  # a scaled residual stream


def test_a_hidden_size_with_a_large_odd_factor_is_refused() -> None:
    checkpoint = MemoryCheckpoint(VARIANTS["base"])
    config = checkpoint.model_config
    odd = replace(config, text=replace(config.text, hidden_size=148))
    with pytest.raises(UsageError, match="hidden_size 148 is 4 x 37; rotate needs an odd factor of at most 31"):
        weights_for(checkpoint, odd, ALL)
    assert weights_for(checkpoint, odd, Conditioning(fold=True)).config is odd


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("conditioning = true", r"conditioning True is no table; write \{ fold = true \}"),
        ("conditioning = { fuse = true }", "unknown key 'fuse'; use fold, equalise, rotate"),
        ("conditioning = { fold = 1 }", "fold 1; write true or false"),
        ("conditioning = { rotate = true }", "rotate without fold"),
    ],
)
def test_a_recipe_says_what_is_wrong_with_its_conditioning(tmp_path: Path, line: str, message: str) -> None:
    roles = "\n".join(f"{role} = {{ bits = 8 }}" for role in load_recipe("int8").roles)
    file = tmp_path / "mine.toml"
    file.write_text(f"[mine]\n{line}\n{roles}\n")
    with pytest.raises(UsageError, match=message):
        load_recipe(str(file))


def test_the_manifest_says_what_was_done() -> None:
    recipe = replace(load_recipe("int8"), conditioning=ALL)
    found = recipe.as_manifest()
    assert found["conditioning"] == {"fold": True, "equalise": True, "rotate": True}
    assert recipe_of({"quantization": found}).conditioning == ALL
    assert "conditioning" not in Recipe.unquantised().as_manifest(), "manifests of before stay as they were"
    before = {"recipe": "int8", "roles": found["roles"]}
    assert recipe_of({"quantization": before}).conditioning == Conditioning()


def test_every_parameter_that_reads_or_writes_the_stream_is_treated(models: dict[str, Model]) -> None:
    model = models["untied-128-equal-heads"]
    found = conditioned.treatments(model.config, ALL)
    width = model.config.text.hidden_size
    turned = {n for n, t in found.items() if t.turn}
    parameters = Weights(model.checkpoint, model.config).parameters
    text = {n for n, p in parameters.items() if not n.startswith("vision.") and len(p.shape) == 2 and width in p.shape}
    # Matrices that are square in this model would hide a missing one; the convolution has no row of that width.
    assert turned == {n for n in text if "conv" not in n} | {"vision.merger_down.weight", "vision.merger_down.bias"}
    assert all(found[n] != Treatment() for n in found)


TWINS: dict[str, dict[str, Any]] = {
    "original": {},
    "stream": {"stream": 1024},
    "outliers": {"outliers": 32, "mlp_outliers": 32},
    "concentrated": {"concentrate": True},
}
MOST = 2.0
"""Times the divergence of the original that a twin's may be."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """The shipped checkpoint, untied, and its twins."""
    folder = tmp_path_factory.mktemp("twins")
    written = {name: twins.write(shipped_tiny(), folder / name, **kinds) for name, kinds in TWINS.items()}
    return {
        name: open_checkpoint(ExportSpec(target="onnx", size=CUSTOM, checkpoint=str(path)))
        for name, path in written.items()
    }


def test_conditioned_twins_are_the_conditioned_original(tiny: dict[str, Checkpoint]) -> None:
    """A scaled stream stays scaled, outliers in norms and MLPs vanish, before anything is rounded."""
    original, stream, outliers = (
        weights_for(tiny[name], tiny[name].model_config, ALL) for name in ("original", "stream", "outliers")
    )
    layer = "decoder.layers.3"
    for name in ("mixer.q", "mixer.out", "mlp.gate", "mlp.up", "mlp.down"):
        expected = original.tensor(f"{layer}.{name}.weight").numpy()
        writes = name in ("mixer.out", "mlp.down")
        assert metrics.relative(expected, outliers.tensor(f"{layer}.{name}.weight").numpy()) < 1e-6, name
        scaled = stream.tensor(f"{layer}.{name}.weight").numpy() / (1024 if writes else 1)
        assert metrics.relative(expected, scaled) < 1e-6, name


def divergence(
    checkpoint: Checkpoint, recipe: Recipe, target: str, folder: Path, ids: list[int], truth: NDArray[np.float32]
) -> float:
    """Mean KL of a lowered decoder from `truth` [T, V], most tokens one by one."""
    weights = weights_for(checkpoint, checkpoint.model_config.without_vision(), recipe.conditioning)
    runtime = load_target(target)
    profile = runtime.capabilities.profiles[0]
    folder.mkdir()
    job = Job(weights.config, Quantizer(weights, recipe), 256, (64,), (), folder, profile=profile, try_out=False)
    lowered = runtime.lower(job)
    manifest = {
        "signatures": lowered.signatures,
        "states": lowered.states,
        "session_options": lowered.session_options,
        "context_length": 256,
        "prefill_lengths": [64],
        "image_sizes": [],
        "target": {"name": target, "min_version": runtime.min_version, "profile": profile},
    }
    with closing(runtime.open(folder, manifest, 1)) as session:
        rows = session.run("embed", {"input_ids": np.asarray([ids], np.int64)})["embeddings"][0]
        plan: list[tuple[int | None, int]] = [(64, 20), *[(None, 1)] * (len(ids) - 20)]
        logits = np.stack(replay(session, rows, _positions(ids), plan, junk=0.0))
    return float(metrics.kl(truth[19:], logits).mean())


def _positions(ids: list[int]) -> NDArray[np.int32]:
    return np.tile(np.arange(len(ids), dtype=np.int32), (3, 1))


@pytest.fixture(scope="module")
def passage(tiny: dict[str, Checkpoint]) -> tuple[list[int], NDArray[np.float32]]:
    """The shipped passage and what the original says to it."""
    ids = texts.text(load_tokenizer(shipped_tiny()))[:150]
    original = tiny["original"]
    rows = reference.embed(original, ids)
    truth, _ = reference.hf_sequence(original, original.model_config, rows, _positions(ids), 64)
    return ids, truth


SLOW = [
    pytest.param(target, recipe, marks=pytest.mark.slow)
    for target in ("executorch", "coreml")
    for recipe in ("int8", "int4", "int4-careful")
]


@pytest.mark.parametrize(("target", "recipe"), [("onnx", "int8"), ("onnx", "int4"), *SLOW])
def test_twins_lose_at_most_twice_what_the_original_loses(
    tiny: dict[str, Checkpoint], passage: Any, tmp_path: Path, target: str, recipe: str
) -> None:
    chosen = replace(load_recipe(recipe), conditioning=ALL)
    names = ["original", "concentrated"] if target == "onnx" else list(TWINS)
    found = {name: divergence(tiny[name], chosen, target, tmp_path / name, *passage) for name in names}
    assert max(found.values()) <= MOST * found["original"], found


def test_without_conditioning_a_twin_is_refused(tiny: dict[str, Checkpoint], passage: Any, tmp_path: Path) -> None:
    recipe = replace(load_recipe("int8"), conditioning=Conditioning())
    found = divergence(tiny["outliers"], recipe, "onnx", tmp_path / "it", *passage)
    assert gated("L3.kl_mean", found / 5, noise=5e-5).status == "FAIL", "the noise of 8 bits"

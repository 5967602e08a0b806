"""The faults of the other targets in the Core ML lowering, and many that only it can have.

A fault replaces an emitter of the table, a function of the target or what the host feeds; nothing else differs from
the builds that pass in `test_the_right_lowering_passes`. Each names the check that must fail. Packages are compared
with float32 in place of float16 (`L1.exact`): storage in float16 would hide what is smaller than it. What a fault
cannot touch, tracing and PyTorch's side of the comparison, is done once. The most telling faults run by default,
each mechanism once.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coremltools.converters.mil.mil import Builder as mb

from export.checkpoint.weights import Weights
from export.quantize.conditioned import weights_for
from export.quantize.quantizer import Quantizer
from export.quantize.recipe import Recipe
from export.validate import metrics, reference
from export.validate.case import Case, Rung, make_plan
from export.validate.ladder import l2, l3
from export.validate.lowered import RoundedWeights, compare_lowered
from export.validate.probe import make_probe
from export.validate.replay import replay
from runtime_tests import test_faults_host
from runtime_tests.conftest import SIZES, MemoryCheckpoint, variant
from runtime_tests.faults import Patch, host, replaced
from runtime_tests.faults_coreml import (
    ANE,
    EXPLICIT,
    L1,
    PIECES,
    SEES,
    STACKED,
    Fault,
    chunks_of,
    fault,
    names,
)
from runtime_tests.faults_coreml_files import ASYMMETRIC, INT4, L2, ONE_PALETTE, PALETTES
from targets import load_target
from targets.base import Job
from targets.to_coreml import delta_rule
from targets.to_coreml.lint import lint_bundle
from targets.to_coreml.session import CoreMLSession

pytestmark = pytest.mark.usefixtures("one_thread", "traced_once", "judged_once", "compared_once")

NAME = "coreml"
LENGTHS = (16,)
TOKENS = 48
"""Of the probe and the context: two chunks, the second one padded, then single tokens, with two pictures."""
LINEAR, FULL = "linear_attention", "full_attention"



# -- what is built and compared -----------------------------------------------------------------------
@pytest.fixture(scope="module")
def text() -> MemoryCheckpoint:
    """Two layers of each kind. Small q and k, so that the eps inside DeltaNet's norms counts, as it does in quiet
    channels.
    """
    checkpoint = MemoryCheckpoint(variant(num_hidden_layers=4, layer_types=[LINEAR, FULL] * 2))
    for name, tensor in checkpoint.tensors.items():
        if "conv1d" in name:
            tensor[:128] *= 5e-3
    return checkpoint


@pytest.fixture(scope="module")
def seeing() -> MemoryCheckpoint:
    """One layer of each kind, a small vision encoder, and words for two pieces of the head."""
    return MemoryCheckpoint(
        variant(num_hidden_layers=2, layer_types=[LINEAR, FULL], vocab_size=256, vision={"depth": 1})
    )


def build(checkpoint: MemoryCheckpoint, folder: Path, recipe: Recipe, *, vision: bool, **limits: Any) -> Any:
    """Lower a checkpoint, with or without its vision encoder; the manifest holds what sessions and rungs read."""
    target = load_target(NAME)
    weights = weights_for(checkpoint, checkpoint.model_config, recipe.conditioning)
    quantizer = Quantizer(weights, recipe)
    limits = {"profile": "gpu", **limits}
    sizes = SIZES if vision else ()
    lowered = target.lower(Job(weights.config, quantizer, TOKENS, LENGTHS, sizes, folder, try_out=False, **limits))
    return {
        "signatures": lowered.signatures,
        "states": lowered.states,
        "context_length": TOKENS,
        "prefill_lengths": list(LENGTHS),
        "image_sizes": [list(size) for size in sizes],
        "target": {"name": NAME, "profile": limits["profile"], "min_version": target.min_version},
        "session_options": lowered.session_options,
        "tokenizer": {"stop_token_ids": [1], "special_token_ids": {"image": 5}},
    }


def climb_l1(checkpoint: MemoryCheckpoint, folder: Path, *, vision: bool = False, **limits: Any) -> Rung:
    """The exact pass of L1 on a lowering without quantisation."""
    manifest = build(checkpoint, folder, Recipe.unquantised(), vision=vision, **limits)
    config = checkpoint.model_config
    probe = make_probe(config, TOKENS, SIZES)
    rows = reference.embed(checkpoint, probe.ids).astype(np.float16)
    rounded = RoundedWeights(Weights(checkpoint, config))
    plan, pictures = make_plan(TOKENS, LENGTHS), probe.images if vision else []
    with closing(load_target(NAME).open_exact(folder, manifest, 1)) as session:
        kept = limits.get("state_layout") != "explicit"
        return compare_lowered(session, rounded, probe, plan, rows, LENGTHS, pictures, "L1.exact", kept=kept)


def make_case(checkpoint: MemoryCheckpoint, folder: Path, recipe: Recipe, **limits: Any) -> Case:
    manifest = build(checkpoint, folder, recipe, vision=True, **limits)
    config, target = checkpoint.model_config, load_target(NAME)
    return Case(checkpoint, config, recipe, target, folder, manifest, 1, tokens=TOKENS)


def climb_l2(checkpoint: MemoryCheckpoint, folder: Path, recipe: Recipe = INT4, **limits: Any) -> Rung:
    return l2(make_case(checkpoint, folder, recipe, **limits))


def failing(rung: Rung) -> set[str]:
    return {one.name for one in rung.checks if one.status == "FAIL"}


# -- faults of the host -------------------------------------------------------------------------------
def lose(session: CoreMLSession, kind: str) -> None:
    held, explicit = session.snapshot()
    for arrays in held.values():
        for state, array in arrays.items():
            if state.startswith(kind):
                array[...] = 0
    session.restore((held, explicit))


CHECKS = {"one axis of positions for all three": "states", "colours of the picture exchanged": "vision"}
QUICK = {"one axis of positions for all three", "conv state not carried"}
L3: dict[str, Fault] = {
    name: fault(patch, CHECKS.get(name, "kl_mean"), quick=name in QUICK)
    for name, patch in host(CoreMLSession, lose).items()
}


BUILDS: dict[str, dict[str, Any]] = {
    "gpu": {},
    "ane": {**ANE, **SEES},
    "stacked": STACKED,
    "explicit": EXPLICIT,
    "pieces": {**PIECES, **SEES},
}
STORED: dict[str, dict[str, Any]] = {
    "int4": {},
    "palettes": {**PALETTES, **PIECES},
    "palettes on gpu": {**ONE_PALETTE, **PIECES},
    "asymmetric": ASYMMETRIC,
}


@pytest.fixture(scope="module")
def case(seeing: MemoryCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(seeing, tmp_path_factory.mktemp("host"), Recipe.unquantised())


@pytest.mark.parametrize("name", list(BUILDS))
def test_the_right_lowering_passes(
    name: str, text: MemoryCheckpoint, seeing: MemoryCheckpoint, tmp_path: Path
) -> None:
    options = BUILDS[name]
    rung = climb_l1(seeing if options.get("vision") else text, tmp_path, **options)
    assert rung.status == "PASS", [(c.name, c.value) for c in rung.checks]


@pytest.mark.parametrize("name", list(STORED))
def test_the_right_files_pass(name: str, seeing: MemoryCheckpoint, tmp_path: Path) -> None:
    rung = climb_l2(seeing, tmp_path, **STORED[name])
    assert rung.status == "PASS", rung.series


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [8, 10])
def test_shorter_chunks_are_no_fault(tokens: int, text: MemoryCheckpoint, tmp_path: Path, monkeypatch: Patch) -> None:
    chunks_of(tokens)(monkeypatch)
    assert climb_l1(text, tmp_path).status == "PASS"


@pytest.mark.parametrize("name", names(L1))
def test_l1_catches(
    name: str, text: MemoryCheckpoint, seeing: MemoryCheckpoint, tmp_path: Path, monkeypatch: Patch
) -> None:
    wrong = L1[name]
    wrong.patch(monkeypatch)
    rung = climb_l1(seeing if wrong.options.get("vision") else text, tmp_path, **wrong.options)
    assert f"L1.exact.{wrong.check}" in failing(rung), [(c.name, c.value) for c in rung.checks]


@pytest.mark.parametrize("name", names(L2))
def test_l2_catches(name: str, seeing: MemoryCheckpoint, tmp_path: Path, monkeypatch: Patch) -> None:
    wrong = L2[name]
    wrong.patch(monkeypatch)
    rung = climb_l2(seeing, tmp_path, **wrong.options)
    assert f"L2.{wrong.check}" in failing(rung), rung.series


@pytest.mark.parametrize("name", names(L3))
def test_l3_catches(name: str, case: Case, monkeypatch: Patch) -> None:
    assert case.truth
    L3[name].patch(monkeypatch)
    rung = l3(case)
    assert f"L3.{L3[name].check}" in failing(rung), [(c.name, c.value) for c in rung.checks]


def test_the_faults_leave_no_trace(case: Case) -> None:
    rung = l3(case)
    assert rung.status == "PASS", [(c.name, c.value) for c in rung.checks]


def test_a_second_conversation_shows_states_that_are_not_cleared(
    text: MemoryCheckpoint, tmp_path: Path, monkeypatch: Patch
) -> None:
    """Without a reset between the two, as an app may hold them."""
    L1["states not cleared at the start"].patch(monkeypatch)
    manifest = build(text, tmp_path, Recipe.unquantised(), vision=False)
    probe, plan = make_probe(text.model_config, TOKENS, SIZES), make_plan(TOKENS, LENGTHS)
    rows = reference.embed(text, probe.ids).astype(np.float16)
    with closing(CoreMLSession(tmp_path, manifest, 1, exact=True)) as session:
        first = np.stack(replay(session, rows, probe.positions, plan, junk=0.0))
        monkeypatch.setattr(session, "reset", lambda: None)
        second = np.stack(replay(session, rows, probe.positions, plan, junk=0.0))
    assert metrics.relative(first, second) > 1e-2


def test_the_linter_catches_what_no_number_shows(text: MemoryCheckpoint, tmp_path: Path, monkeypatch: Patch) -> None:
    """softplus is right everywhere but on the Neural Engine itself."""
    replaced(delta_rule, "_softplus", lambda right: lambda x: mb.softplus(x=x))(monkeypatch)
    manifest = build(text, tmp_path, Recipe.unquantised(), vision=False, **ANE)
    assert {f.rule for f in lint_bundle(tmp_path, manifest) if f.severity == "error"} == {"ane-softplus"}


def test_every_fault_of_the_other_lowerings_is_here() -> None:
    """Under another name where one thing there is another, or two, here."""
    from runtime_tests import test_faults, test_faults_executorch

    renamed = {
        "delta rule without delta": ["delta rule without delta in a step", "delta rule without delta inside a chunk"],
        "tables of another image size": ["positions of another image size", "rotary grid of another image size"],
        # Decays are sums over masked tokens here: no clamp, but a mask can be wrong.
        "decay above the diagonal not clamped": ["decay of a token's own step counted twice"],
        "norms of another model in one method": ["norms of another model in one function"],
        # Scales are float16 here; those of a tied embedding are the head's.
        "scales in float16": ["scales in bfloat16"],
        "scales of the embedding in bfloat16": ["scales in bfloat16"],
    }
    elsewhere = {"temporaries given up too early"}  # Core ML plans the memory of a call itself
    for ours, lists in (
        (L1, (test_faults.L1, test_faults_executorch.L1)),
        (L2, (test_faults.L2, test_faults_executorch.L2)),
        (L3, (test_faults_host.L3, test_faults_executorch.L3)),
    ):
        for theirs in lists:
            wanted = {new for name in theirs for new in renamed.get(name, [name])}
            assert wanted - elsewhere <= set(ours)

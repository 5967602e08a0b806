"""Faults above and below the lowering: in our own modules (L0) and in the host that feeds a bundle (L3)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from export.model import decoder, operators
from export.quantize.recipe import Recipe
from export.validate.case import Case, Rung
from export.validate.ladder import l0, l3
from runtime_tests.conftest import MemoryCheckpoint, build, variant
from runtime_tests.faults import Patch, Patcher, host, zeroed
from targets import load_target
from targets.to_onnx.session import OnnxSession

pytestmark = pytest.mark.usefixtures("traced_once", "judged_once")


@pytest.fixture(scope="module")
def model() -> MemoryCheckpoint:
    return MemoryCheckpoint(variant(num_hidden_layers=4))


@pytest.fixture(scope="module")
def case(model: MemoryCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("host")
    _, manifest, _ = build(model, folder, Recipe.unquantised())
    target = load_target("onnx")
    return Case(model, model.model_config, Recipe.unquantised(), target, folder, manifest, 1)


class Wrong:
    """The operators with one replaced."""

    def __init__(self, name: str, replacement: Callable[..., Any]) -> None:
        setattr(self, name, replacement)

    def __getattr__(self, name: str) -> Any:
        return getattr(operators.ops, name)


def wrong_operator(name: str, replacement: Callable[..., Any]) -> Patcher:
    return lambda patch: patch.setattr(decoder, "ops", Wrong(name, replacement))


def contiguous(positions: Any, theta: float, dim: int, sections: list[int], dtype: Any) -> Any:
    """M-RoPE sections one after the other."""
    axis = torch.repeat_interleave(torch.arange(3), torch.tensor(sections))
    frequency = theta ** -(torch.arange(dim // 2) * 2 / dim)
    angle = positions.float()[axis].T * frequency
    return angle.cos(), angle.sin()


def late_queries(x: Any, cos: Any, sin: Any) -> Any:
    """Queries stand one position before their keys."""
    if x.shape[-2] == 4:
        cos, sin = cos.roll(1, -2), sin.roll(1, -2)
    return operators.rotary(x, cos, sin)


L0: dict[str, Patcher] = {
    "eps of the rms norm too large": wrong_operator(
        "rms_norm", lambda x, w, eps: operators.rms_norm(x, w, 1e-3)
    ),
    "eps of the l2 norm too large": wrong_operator("l2_norm", lambda x, eps, s: operators.l2_norm(x, 1e-3, s)),
    "gate before the norm": wrong_operator(
        "gated_rms_norm", lambda x, w, gate, eps: operators.rms_norm(x * torch.nn.functional.silu(gate), w, eps)
    ),
    "conv state of the padded tail": wrong_operator(
        "causal_conv", lambda x, w, s, valid: operators.causal_conv(x, w, s, None)
    ),
    "padding reaches the recurrent state": wrong_operator(
        "delta_gates", lambda a, b, d, t, valid: operators.delta_gates(a, b, d, t, None)
    ),
    "M-RoPE sections not interleaved": wrong_operator("rotary_table", contiguous),
    "positions of queries off by one": wrong_operator("rotary", late_queries),
    "attention one row late": wrong_operator(
        "cached_attention", lambda q, k, v, a, b, start, s: operators.cached_attention(q, k, v, a, b, start + 1, s)
    ),
}


def test_l0_and_l3_pass_as_they_are(case: Case) -> None:
    for rung in (l0(case), l3(case)):
        assert rung.status == "PASS", [(c.name, c.value) for c in rung.checks]


@pytest.mark.parametrize("fault", list(L0))
def test_l0_catches(fault: str, case: Case, monkeypatch: Patch) -> None:
    assert case.truth  # before the fault, though the reference does not use our operators
    monkeypatch.setattr(case, "known", {key: value for key, value in case.known.items() if key[0] != "L0"})
    L0[fault](monkeypatch)
    assert l0(case).status == "FAIL"


L3 = host(OnnxSession, zeroed)


def test_every_fault_of_a_host_is_there() -> None:
    assert list(L3) == [
        "image positions as text",
        "one axis of positions for all three",
        "colours of the picture exchanged",
        "two pictures exchanged",
        "rows of a picture reversed",
        "padding counted as valid",
        "conv state not carried",
        "recurrent state not carried",
        "keys not carried",
        "values not carried",
    ]


@pytest.mark.parametrize("fault", list(L3))
def test_l3_catches(fault: str, case: Case, monkeypatch: Patch) -> None:
    assert case.truth
    L3[fault](monkeypatch)
    rung: Rung = l3(case)
    assert rung.status == "FAIL", [(c.name, c.value) for c in rung.checks]


def test_the_fixture_leaves_no_trace(case: Case, tmp_path: Path) -> None:
    assert l3(case).status == "PASS"

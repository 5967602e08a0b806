"""The gated delta rule: chunks equal steps, padding is exact, block doubling survives correlated keys."""

from __future__ import annotations

import pytest
import torch

from export.model import delta_rule
from export.model.operators import ops


def correlated_keys(heads: int, tokens: int, width: int, correlation: float) -> torch.Tensor:
    """Unit keys [heads, tokens, width] with the given mean correlation."""
    common, own = torch.randn(heads, 1, width), torch.randn(heads, tokens, width)
    keys = correlation**0.5 * common + (1 - correlation) ** 0.5 * own
    return keys / keys.norm(dim=-1, keepdim=True)


def system(correlation: float, beta: float, decay: float, tokens: int = 64) -> torch.Tensor:
    """The strictly lower triangular matrix of one chunk, as `chunked` builds it."""
    keys = correlated_keys(4, tokens, 128, correlation)
    total = torch.full((4, tokens), decay).cumsum(-1)
    between = (total.unsqueeze(2) - total.unsqueeze(1)).clamp(max=0).exp()
    return (beta * keys @ keys.transpose(1, 2) * between).tril(-1)


def product_form(lower: torch.Tensor, rounding: torch.dtype) -> torch.Tensor:
    """The log-depth product (I - L)(I + L²)(I + L⁴)…, rounded after each step: what must not be used."""
    power, size = (-lower).to(rounding).float(), lower.shape[-1]
    inverse = torch.eye(size) + power
    for _ in range(size.bit_length() - 2):
        power = (power @ power).to(rounding).float()
        inverse = (inverse + inverse @ power).to(rounding).float()
    return inverse


@pytest.mark.parametrize(
    ("correlation", "beta", "decay"), [(0.0, 0.5, -0.1), (0.3, 0.9, -0.01), (0.7, 0.95, -0.001), (0.9, 0.99, -0.001)]
)
def test_block_doubling_is_exact_for_correlated_keys(correlation: float, beta: float, decay: float) -> None:
    torch.manual_seed(0)
    lower = system(correlation, beta, decay)
    exact = torch.linalg.inv(torch.eye(64, dtype=torch.float64) + lower.double())
    inverse = delta_rule.unit_lower_inverse(lower)
    assert (inverse - exact).abs().max() / exact.abs().max() < 1e-5
    half = delta_rule.unit_lower_inverse(lower.half().float()).half().double()
    assert (half - exact).norm() / exact.norm() < 5e-3


def test_product_form_fails_where_block_doubling_holds() -> None:
    torch.manual_seed(0)
    lower = system(0.9, 0.99, -0.001)
    exact = torch.linalg.inv(torch.eye(64, dtype=torch.float64) + lower.double())
    wrong = product_form(lower, torch.float16)
    error = (wrong.double() - exact).norm() / exact.norm()
    assert not torch.isfinite(wrong).all() or error > 1


def operands(tokens: int, seed: int = 0) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    q, k = torch.randn(tokens, 2, 16), torch.randn(tokens, 2, 16)
    k, q = ops.l2_norm(k, 1e-6, 1.0), ops.l2_norm(q, 1e-6, 0.25)
    v, g = torch.randn(tokens, 4, 8), -torch.rand(tokens, 4)
    return [q, k, v, g, torch.rand(tokens, 4), torch.randn(4, 16, 8)]


@pytest.mark.parametrize("tokens", [1, 5, 64, 130])
def test_chunks_equal_single_steps(tokens: int) -> None:
    q, k, v, g, beta, state = operands(tokens)
    outputs, after = ops.gated_delta_chunk(q, k, v, g, beta, state)
    for t in range(tokens):
        row = slice(t, t + 1)
        output, state = ops.gated_delta_step(q[row], k[row], v[row], g[row], beta[row], state)
        assert torch.allclose(output[0], outputs[t], atol=2e-5)
    assert torch.allclose(state, after, atol=2e-5)


def test_masked_rows_leave_the_state_exactly_alone() -> None:
    q, k, v, g, beta, state = operands(40)
    _, expected = ops.gated_delta_chunk(*(x[:25] for x in (q, k, v, g, beta)), state)
    g[25:], beta[25:] = 0, 0
    _, got = ops.gated_delta_chunk(q, k, v * 100, g, beta, state)
    _, same = ops.gated_delta_chunk(q, k * 7, v * -3, g, beta, state)
    del same
    v[25:] = 1e6
    _, junk = ops.gated_delta_chunk(q, k, v, g, beta, state)
    assert torch.allclose(junk, expected, atol=1e-6)
    assert not torch.allclose(got, expected, atol=1e-2), "a change of valid rows must show"


def test_gradients_reach_every_operand() -> None:
    inputs = [x.double().requires_grad_() for x in operands(7)]
    assert torch.autograd.gradcheck(lambda *x: torch.ops.mobile.gated_delta_chunk(*x), inputs)

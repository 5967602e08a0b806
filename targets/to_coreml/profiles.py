"""What a package is built for: the GPU of a phone, or its Neural Engine. Torch-free.

A profile decides layout and precision of everything between two matrices, never the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from export.spec import UsageError

STATE_LAYOUTS = {
    "separate": "one state per tensor",
    "stacked": "one state per kind and package, its layers along the first axis",
    "explicit": "recurrent states as float32 inputs and outputs, the others one state per tensor",
}
"""How states are kept, and what that means."""
ALIGNED_ROWS = 32
"""Rows of a cache are a multiple of this, as the Neural Engine wants of every axis of a state."""


@dataclass(frozen=True)
class Profile:
    """Choices of one compute unit, with their reasons."""

    name: str
    convolutions: bool
    """Rows as [1, D, 1, C] and matrices as 1×1 convolutions, the Neural Engine's own form; else [1, C, D], linears."""
    float32: bool
    """Norms and gates in float32 inside. The Neural Engine has none: there they are scaled to stay in range."""
    fused_attention: bool
    """scaled_dot_product_attention as one operation, for which the GPU has a kernel. The Neural Engine's own is wrong
    on iOS 26 (ExecuTorch PR 16144): there it is products and a softmax.
    """
    history: int | None
    """Inputs that a convolution state keeps; None: the K-1 it needs. The Neural Engine wants multiples of 32."""
    state_layout: str
    """The default; see docs/decisions."""
    compute_units: str
    """What an app sets in MLModelConfiguration.computeUnits."""


PROFILES = {
    "gpu": Profile(
        "gpu",
        convolutions=False,
        float32=True,
        fused_attention=True,
        history=None,
        state_layout="separate",
        compute_units="cpuAndGPU",
    ),
    "ane": Profile(
        "ane",
        convolutions=True,
        float32=False,
        fused_attention=False,
        history=32,
        state_layout="separate",
        compute_units="cpuAndNeuralEngine",
    ),
}


def profile(name: str) -> Profile:
    """A profile by name.

    Raises:
        UsageError: unknown.
    """
    if name not in PROFILES:
        raise UsageError(f"--profile {name}: coreml has no such profile; choose one of: {', '.join(PROFILES)}")
    return PROFILES[name]

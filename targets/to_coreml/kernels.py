"""The operations that the interpreter knows: MIL operation type -> builder of its kernel.

`const` and `constexpr_*` are constants (see `constants`), `read_state` and `write_state` are names (see `compile`).
"""

from __future__ import annotations

from targets.to_coreml import kernels_elementwise, kernels_layout, kernels_sums
from targets.to_coreml.kernel_call import Builder

KERNELS: dict[str, Builder] = kernels_elementwise.KERNELS | kernels_sums.KERNELS | kernels_layout.KERNELS

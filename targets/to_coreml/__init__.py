"""Core ML: stateful ML programs for iOS 18 and macOS 15, on the GPU or the Neural Engine. Torch-free."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from targets.base import (
    Activations,
    Capabilities,
    Finding,
    Job,
    Lowered,
    OperatorTime,
    Prompt,
    Rows,
    Session,
)
from targets.to_coreml.profiles import ALIGNED_ROWS, PROFILES, STATE_LAYOUTS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from export.quantize.quantizer import Quantizer


WEIGHT_BYTES = 8 << 30
"""How much memory the emulator keeps the weights of a bundle in, as float32; those beyond are expanded again at every
use, which is slower by the time it takes."""


class CoreMLTarget:
    """See `targets.base.Target`."""

    name = "coreml"
    runtime = "coreml"
    min_version = "iOS18"
    loading = (
        "Core ML of iOS 18 or macOS 15: `MLModel(contentsOf:configuration:)` for each package, with "
        "`configuration.functionName` set to a stage's `entry` and `computeUnits` as in `session_options`. One "
        "`MLState` per package serves all its functions. Packages of a signature are called in the order of its "
        "stages; pieces of the logits are joined by the app."
    )
    packages = ("coremltools",)
    measured = "host" if sys.platform == "darwin" else "emulated"
    capabilities = Capabilities(
        bits=frozenset({4, 8, 32}),
        group_sizes=frozenset({32, 64, 128}),
        asymmetric=True,
        text_runner=False,
        several_files=True,
        activations={4: "float16", 8: "float16", 32: "float16"},
        scale_bytes=2,
        smallest_scale=2.0**-14,  # scales are float16, whose subnormal numbers a GPU or Neural Engine may take for zero
        floats="float16",
        profiles=tuple(PROFILES),
        state_layouts=tuple(STATE_LAYOUTS),
        head_pieces=True,
        palettes=True,
        row_multiple=ALIGNED_ROWS,
        histories={name: kind.history for name, kind in PROFILES.items() if kind.history is not None},
        emulated_bytes=WEIGHT_BYTES,
    )

    def lower(self, job: Job) -> Lowered:
        from targets.quiet import quiet_imports

        with quiet_imports():
            from targets.to_coreml.lower import lower
        return lower(job)

    def open(self, folder: Path, manifest: Mapping[str, Any], threads: int) -> Session:
        from targets.to_coreml.session import CoreMLSession

        return CoreMLSession(folder, manifest, threads)

    def open_exact(self, folder: Path, manifest: Mapping[str, Any], threads: int) -> Session:
        from targets.to_coreml.session import CoreMLSession

        return CoreMLSession(folder, manifest, threads, exact=True)

    def open_stressed(self, folder: Path, manifest: Mapping[str, Any], threads: int) -> Session | None:
        if self.measured == "host":
            return None
        from targets.to_coreml.session import CoreMLSession

        return CoreMLSession(folder, manifest, threads, accumulate="float16")

    def stored_weights(
        self, folder: Path, manifest: Mapping[str, Any], quantizer: Quantizer
    ) -> Iterator[tuple[str, Rows]]:
        from targets.to_coreml.stored import stored_weights

        return stored_weights(folder, manifest, quantizer)

    def operator_times(
        self,
        folder: Path,
        manifest: Mapping[str, Any],
        threads: int,
        signature: str,
        inputs: Mapping[str, NDArray[Any]],
    ) -> list[OperatorTime]:
        from targets.to_coreml.trace import operator_times

        return operator_times(folder, manifest, threads, signature, inputs)

    def decode_bytes(self, folder: Path, manifest: Mapping[str, Any]) -> int:
        from targets.to_coreml.stored import decode_bytes

        return decode_bytes(folder, manifest)

    def lint(self, folder: Path, manifest: Mapping[str, Any]) -> list[Finding] | None:
        from targets.to_coreml.lint import lint_bundle

        return lint_bundle(folder, manifest)

    def observe(
        self,
        folder: Path,
        manifest: Mapping[str, Any],
        prompts: Sequence[Prompt],
        pictures: Sequence[NDArray[Any]] = (),
        advance: Callable[[float], None] = lambda share: None,
    ) -> Activations | None:
        from targets.to_coreml.lint_streams import observe_bundle

        return observe_bundle(folder, manifest, prompts, pictures, advance)


TARGET = CoreMLTarget()

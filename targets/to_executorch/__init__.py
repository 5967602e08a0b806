"""ExecuTorch: XNNPACK delegates, as the published Android and iOS packages run them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from targets.base import Activations, Capabilities, Finding, Job, Lowered, OperatorTime, Prompt, Rows, Session

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from export.quantize.quantizer import Quantizer


class ExecuTorchTarget:
    """See `targets.base.Target`."""

    name = "executorch"
    runtime = "executorch"
    min_version = "1.4.1"
    loading = (
        "ExecuTorch with XNNPACK, the portable or optimized kernels and the LLM kernels (`llama::custom_sdpa`, "
        "`llama::update_cache`): the published Android and Apple packages have them all. A stage's `entry` is the "
        "method to call. States are arguments: pass convolution and recurrent states back as they come out, write "
        "the new rows of keys and values into your own buffers, which must be writable. Exported with `--text-runner`, "
        "`forward` serves ExecuTorch's TextLLMRunner and needs the quantized kernels (`embedding_4bit`) as well."
    )
    packages = ("executorch",)
    measured = "host"
    capabilities = Capabilities(
        bits=frozenset({4, 8, 32}),
        group_sizes=frozenset({32, 64, 128}),
        asymmetric=False,  # XNNPACK's blockwise int4 has one zero point for all: 8
        text_runner=True,
        several_files=True,
        activations={4: "int8", 8: "int8", 32: "float32"},  # int8 per row, found while running
        scale_bytes=2,  # bfloat16
    )

    def lower(self, job: Job) -> Lowered:
        from targets.quiet import quiet_imports

        with quiet_imports():
            from targets.to_executorch.lower import lower
        return lower(job)

    def open(self, folder: Path, manifest: Mapping[str, Any], threads: int) -> Session:
        from targets.to_executorch.session import ExecuTorchSession

        return ExecuTorchSession(folder, manifest, threads)

    def open_exact(self, folder: Path, manifest: Mapping[str, Any], threads: int) -> Session:
        return self.open(folder, manifest, threads)

    def open_stressed(self, folder: Path, manifest: Mapping[str, Any], threads: int) -> Session | None:
        return None

    def stored_weights(
        self, folder: Path, manifest: Mapping[str, Any], quantizer: Quantizer
    ) -> Iterator[tuple[str, Rows]]:
        from targets.to_executorch.stored import stored_weights

        return stored_weights(folder, manifest, quantizer)

    def operator_times(
        self,
        folder: Path,
        manifest: Mapping[str, Any],
        threads: int,
        signature: str,
        inputs: Mapping[str, NDArray[Any]],
    ) -> list[OperatorTime]:
        from targets.to_executorch.trace import operator_times

        return operator_times(folder, manifest, threads, signature, inputs)

    def decode_bytes(self, folder: Path, manifest: Mapping[str, Any]) -> int:
        from targets.to_executorch.stored import decode_bytes

        return decode_bytes(folder, manifest)

    def lint(self, folder: Path, manifest: Mapping[str, Any]) -> list[Finding] | None:
        return None

    def observe(
        self,
        folder: Path,
        manifest: Mapping[str, Any],
        prompts: Sequence[Prompt],
        pictures: Sequence[NDArray[Any]] = (),
        advance: Callable[[float], None] = lambda share: None,
    ) -> Activations | None:
        return None


TARGET = ExecuTorchTarget()

"""ONNX Runtime: fused com.microsoft operators on the CPU of a phone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from targets.base import Activations, Capabilities, Finding, Job, Lowered, OperatorTime, Prompt, Rows, Session

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from export.quantize.quantizer import Quantizer


class OnnxTarget:
    """See `targets.base.Target`."""

    name = "onnx"
    runtime = "onnxruntime"
    min_version = "1.32.0"
    loading = (
        "onnxruntime with its CPU kernels of com.microsoft; set `session_options` of the manifest. For text, "
        "onnxruntime-genai loads the folder too (`genai_config.json`)."
    )
    packages = ("onnx", "onnxruntime")
    measured = "host"
    capabilities = Capabilities(
        bits=frozenset({4, 8, 32}),
        group_sizes=frozenset({32, 64, 128}),
        asymmetric=True,
        text_runner=False,  # genai.onnx is always there: it costs nothing
        several_files=False,
        activations={4: "int8", 8: "int8", 32: "float32"},  # MatMulNBits with accuracy_level 4
        scale_bytes=4,  # float32
    )

    def lower(self, job: Job) -> Lowered:
        from targets.to_onnx.lower import lower

        return lower(job)

    def open(self, folder: Path, manifest: Mapping[str, Any], threads: int) -> Session:
        from targets.to_onnx.session import OnnxSession

        return OnnxSession(folder, manifest, threads)

    def open_exact(self, folder: Path, manifest: Mapping[str, Any], threads: int) -> Session:
        return self.open(folder, manifest, threads)

    def open_stressed(self, folder: Path, manifest: Mapping[str, Any], threads: int) -> Session | None:
        return None

    def stored_weights(
        self, folder: Path, manifest: Mapping[str, Any], quantizer: Quantizer
    ) -> Iterator[tuple[str, Rows]]:
        from targets.to_onnx.stored import stored_weights

        return stored_weights(folder, manifest, quantizer)

    def operator_times(
        self,
        folder: Path,
        manifest: Mapping[str, Any],
        threads: int,
        signature: str,
        inputs: Mapping[str, NDArray[Any]],
    ) -> list[OperatorTime]:
        from targets.to_onnx.trace import operator_times

        return operator_times(folder, manifest, threads, signature, inputs)

    def decode_bytes(self, folder: Path, manifest: Mapping[str, Any]) -> int:
        from targets.to_onnx.stored import decode_bytes

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


TARGET = OnnxTarget()

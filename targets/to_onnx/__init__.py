"""ONNX Runtime: fused com.microsoft operators on the CPU of a phone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from targets.base import Capabilities, Job, Lowered, Session


class OnnxTarget:
    """See `targets.base.Target`."""

    name = "onnx"
    runtime = "onnxruntime"
    min_version = "1.32.0"
    capabilities = Capabilities(
        bits=frozenset({4, 8, 32}), group_sizes=frozenset({32, 64, 128}), asymmetric=True
    )

    def lower(self, job: Job) -> Lowered:
        from targets.to_onnx.lower import lower

        return lower(job)

    def open(self, folder: Path, manifest: Mapping[str, Any], threads: int) -> Session:
        from targets.to_onnx.session import OnnxSession

        return OnnxSession(folder, manifest, threads)


TARGET = OnnxTarget()

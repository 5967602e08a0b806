"""Tracing: a closed operator vocabulary, and 9B in seconds and megabytes."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from export.model import trace

DECODER = {
    "<built-in function getitem>",
    "aten.add.Tensor",
    "aten.linear.default",
    "aten.mul.Tensor",
    "aten.reshape.default",
    "aten.sigmoid.default",
    "aten.silu.default",
    "aten.split_with_sizes.default",
    "aten.squeeze.dim",
    "mobile.cached_attention.default",
    "mobile.causal_conv.default",
    "mobile.delta_gates.default",
    "mobile.gated_rms_norm.default",
    "mobile.l2_norm.default",
    "mobile.rms_norm.default",
    "mobile.rotary.default",
    "mobile.rotary_table.default",
}
PREFILL = DECODER | {"mobile.gated_delta_chunk.default", "mobile.last_valid.default", "mobile.real_rows.default"}
VISION = {
    "<built-in function getitem>",
    "aten.add.Tensor",
    "aten.gelu.default",
    "aten.layer_norm.default",
    "aten.linear.default",
    "aten.reshape.default",
    "aten.scaled_dot_product_attention.default",
    "aten.split_with_sizes.default",
    "aten.squeeze.dim",
    "aten.transpose.int",
    "aten.unsqueeze.default",
    "mobile.grid_rotary.default",
    "mobile.normalize_image.default",
    "mobile.patchify.default",
    "mobile.resample_positions.default",
}


def test_every_config_stays_inside_the_vocabulary(checkpoint: Any) -> None:
    config = checkpoint.model_config
    assert trace.vocabulary(trace.trace_decoder(config, 300, 64)) <= PREFILL
    assert trace.vocabulary(trace.trace_vision(config, 64, 96)) == VISION


def test_operator_vocabulary_is_closed(small: Any) -> None:
    config = small.model_config
    assert trace.vocabulary(trace.trace_decoder(config, 300, 1)) == DECODER | {
        "mobile.gated_delta_step.default"
    }
    assert trace.vocabulary(trace.trace_decoder(config, 300, 64)) == PREFILL
    assert trace.vocabulary(trace.trace_decoder(config, 300, None)) == PREFILL | {"aten.sym_size.int"}
    assert trace.vocabulary(trace.trace_vision(config, 64, 96)) == VISION
    assert trace.vocabulary(trace.trace_embed(config)) == {"aten.embedding.default"}


def test_programs_hold_no_weights(small: Any) -> None:
    program = trace.trace_decoder(small.model_config, 300, 64)
    assert all(tensor.is_meta for tensor in program.exported.state_dict.values())
    assert not program.exported.constants
    assert [s.name for s in program.states[:2]] == ["conv_0", "recurrent_0"]


def test_a_range_of_layers_is_a_program(small: Any) -> None:
    program = trace.trace_decoder(small.model_config, 300, 64, layers=range(3, 5), head=False)
    assert program.outputs == ("hidden",)
    assert [s.name for s in program.states] == ["key_3", "value_3", "conv_4", "recurrent_4"]


NINE_B = r"""
import pathlib, re, resource, sys, time
from export.model import trace
from export.model.config import ModelConfig
from export.sizes import SIZES
config = ModelConfig.from_dict(SIZES["9b"].config)
start = time.perf_counter()
trace.trace_decoder(config, 1024 + 511, None)
trace.trace_decoder(config, 1024 + 511, 1)
trace.trace_vision(config, 448, 448)
seconds = time.perf_counter() - start
status = pathlib.Path("/proc/self/status")
if status.exists():  # Linux: ru_maxrss begins with what the parent process held
    peak = 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])
else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(seconds, peak)
"""


def test_9b_traces_within_a_minute_and_2_gib() -> None:
    run = subprocess.run([sys.executable, "-c", NINE_B], capture_output=True, text=True, check=True)
    seconds, peak = map(float, run.stdout.split())
    assert seconds < 60
    assert peak < 2 * 2**30

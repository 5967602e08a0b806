"""Every rule of the linter in one table: how severe it is on each compute unit, who says so, and why. Torch-free.

A rule without a source does not belong here. FACTS is the project's own list of facts, section 4 of which is about
Core ML; "measured" in a source means somebody saw it happen on a device.
"""

from __future__ import annotations

from dataclasses import dataclass

from targets.base import Severity

ISSUES = "https://github.com/apple/coremltools/issues/"
PULLS = "https://github.com/apple/coremltools/pull/"
CORE_AI = "https://github.com/apple/coreai-models/issues/"
ANE_GUIDE = "https://ane-guide.readthedocs.io/en/latest/part-5-practice/17-model-design-rules.html"
ANE_PRINCIPLES = "https://machinelearning.apple.com/research/neural-engine-transformers"
EXECUTORCH = "https://github.com/pytorch/executorch/pull/"
COREML_LLM = "https://github.com/john-rocky/CoreML-LLM/blob/main/docs/"
LESSONS = f"{COREML_LLM}QWEN35_LESSONS.md"
CATALOGUE = f"{COREML_LLM}MIL_OP_CATALOG.md"
FACTS = "project FACTS, section 4"
CONTRACT = "the contract of bundles, docs/bundle.md"


@dataclass(frozen=True)
class Rule:
    """One rule; None: it does not hold for that profile."""

    gpu: Severity | None
    ane: Severity | None
    source: str
    reason: str

    def severity(self, profile: str) -> Severity | None:
        return self.ane if profile == "ane" else self.gpu


def _both(severity: Severity, source: str, reason: str) -> Rule:
    return Rule(severity, severity, source, reason)


def _ane(severity: Severity, source: str, reason: str) -> Rule:
    return Rule(None, severity, source, reason)


RULES: dict[str, Rule] = {
    # -- files and description
    "readable": _both("error", "coremltools, mlmodel/format/*.proto", "what our reader refuses, a phone does not load"),
    "package-manifest": _both(
        "error", "coremltools, modelpackage/src/ModelPackage.cpp", "Core ML finds the files by these entries"
    ),
    "program-limit": _both("error", f"{ISSUES}1170", "protobuf reads no message beyond 2 GB"),
    "program-size": _both(
        "warning", "https://protobuf.dev/programming-guides/techniques/#large-data",
        "the program is parsed whole at every load; weights belong into weight.bin",
    ),
    "weights-limit": _both(
        "error", f"{ISSUES}1807 and {PULLS}2593", "neither Core ML nor the Neural Engine takes a larger weight file"
    ),
    "weights-phone": _both("warning", FACTS, "about 1 GB is what one package may have on iOS"),
    "weights-ane-budget": _ane(
        "error", f"{LESSONS} 3.2, measured on an iPhone 17 Pro",
        "beyond about 1.4 GB the compiler gives up, the GPU takes over silently and the app is killed for memory",
    ),
    "ane-silent-failure": _ane(
        "warning", f"{ISSUES}2758", "a failed compile of a large program passes loading; the first call kills the app"
    ),
    "deployment-target": _both(
        "error", "coremltools, mlmodel/format/Model.proto, Specification Versions",
        "states, functions and blockwise weights are of version 9; a higher one excludes phones that we promise",
    ),
    "described": _both(
        "error", "https://github.com/apple/ml-stable-diffusion (torch2coreml.py) and project EXAMPLES",
        "Xcode shows these texts, and nothing else says what a tensor is",
    ),
    "bindings": _both("error", CONTRACT, "an app calls packages by the names, shapes and dtypes of the manifest"),
    "compute-units": _both("error", f"{ISSUES}2631", "a package meets the rules of one compute unit only"),
    # -- states
    "states-equal": _both("error", f"{PULLS}2686", "one MLState serves all functions of a package"),
    "state-dtype": _both(
        "error", "coremltools 9.0, converters/mil/backend/mil/load.py: State only support fp16 dtype",
        "Core ML stores no other states",
    ),
    "state-alignment": _ane(
        "error", f"{ISSUES}2631 and {FACTS}",
        "fails on the Neural Engine, works elsewhere; leading axes (heads, layers) are free: ANEMLL ships 8 heads",
    ),
    "state-count": _ane(
        "warning", f"{LESSONS} 9.1, measured; but https://github.com/Anemll/Anemll/pull/50 runs with 48 on an M1",
        "with KV, conv and recurrent states in one package calls failed with ANEProgramProcessRequestDirect "
        "Error=(11) although every operation was placed there; one and two states were stable, the GPU took three",
    ),
    "state-writes": _both("warning", FACTS, "ANEMLL's packages write each state once a call; nobody tested more"),
    "state-unused": _both("warning", CONTRACT, "it takes memory on the phone and holds nothing"),
    "state-is-output": _both("error", f"{PULLS}2713", "the runtime crashes on loading such a program"),
    # -- programs
    "known-operations": _both("error", "targets/to_coreml/kernels.py", "no test off a device can vouch for others"),
    "fixed-shapes": _both(
        "error", f"{ISSUES}2537 and {ISSUES}2548", "Core ML knows no open states, and fails on a mixture of both"
    ),
    "rank": _both("error", f"{ISSUES}1723", "Core ML has no tensors of more than five axes"),
    "dimension": Rule(
        "warning", "error", f"{ANE_GUIDE} and {FACTS}",
        "measured: one element more and the Neural Engine's compiler refuses",
    ),
    "ane-old-chips": _ane(
        "warning", "https://aneforge.readthedocs.io/en/latest/capabilities/ and "
        f"{ANE_GUIDE}", "height and width end at 16,384 on chips before the A17, which iOS 18 still serves"
    ),
    "no-output": _both(
        "error", "https://github.com/kasper0406/stablehlo-coreml/pull/76", "Core ML wants one output at least"
    ),
    "unused": _both(
        "warning", "coremltools, passes common::dead_code_elimination", "work and memory that no output depends on"
    ),
    # -- what the Neural Engine does not run, or runs slowly
    "ane-float32": _ane("warning", f"{ANE_GUIDE} and {FACTS}", "its arithmetic is float16: others go to CPU or GPU"),
    "ane-integers": _ane("warning", f"{ANE_GUIDE} and {CATALOGUE} 2.5", "it has no integer arithmetic: CPU"),
    "ane-cpu-operations": _ane("warning", f"{CATALOGUE} 2.5 to 2.10", "it has no gather, sort or running sum: CPU"),
    "ane-dynamic-slice": _ane("warning", f"{CATALOGUE} 2.9", "a slice whose place is computed goes to the CPU"),
    "ane-linear": _ane("warning", f"{ANE_PRINCIPLES}, principle 1", "its own form of a matrix is a 1x1 convolution"),
    "ane-attention": _ane(
        "error", f"{EXECUTORCH}16144 and {EXECUTORCH}16057 (iOS 26), https://arxiv.org/abs/2603.06728 and "
        "https://github.com/kasper0406/stablehlo-coreml/pull/89",
        "wrong numbers on iOS 26, masks ignored, or the whole program on the CPU from the second one on; the bug is in "
        "the Neural Engine's own implementation, so the GPU keeps the operation: computeUnits keeps it there",
    ),
    "ane-singleton": _ane(
        "warning", f"{ANE_PRINCIPLES}, principle 1", "it is padded to 64 bytes: 32 times the memory in float16"
    ),
    "ane-kernel-width": _ane("warning", ANE_GUIDE, "kernels are at most 13 wide; others are cut up or go to the CPU"),
    "ane-blockwise": _ane(
        "warning", f"{ISSUES}2510; compare {CORE_AI}279, which measured 8 bits per block under Core AI",
        "its compiler says: only per-cout/per-tensor quantization; the rest runs on the CPU. Under Core AI such "
        "weights ran on it and gave a cosine of 0.37. Palettes grouped along the inputs are in no report: the same is "
        "assumed of them, for Apple documents palettes per group of channels only",
    ),
    "ane-softplus": _ane(
        "error", f"{ISSUES}2687, measured on M4 and M5", "above 10.4 it gives 0 in silence: exp overflows inside"
    ),
    "gpu-attention-batch": Rule(
        "warning", None, f"{ISSUES}2650, measured on macOS 26", "its fused attention is wrong from batch 10 on"
    ),
    "palette-scale": _ane(
        "error", f"{PULLS}2688, measured on macOS 26",
        "MPSGraph rejects it while the model loads, and the app dies; CPU and GPU take it",
    ),
    "palette-unmeasured": Rule(
        "warning", None, f"{PULLS}2688, measured on macOS 26 with one scale per output channel",
        "CPU and GPU took that; scales per group over a palette, which the format allows, are in no report",
    ),
    "palette-stateful": _ane(
        "warning", f"{ISSUES}2716", "4-bit palettes of coremltools 9.0 beside states crash after 100 to 200 calls"
    ),
    # -- numbers
    "weight-finite": _both("error", f"{PULLS}2669", "one infinity or NaN spreads to every logit"),
    "weight-range": _both(
        "warning", f"{ISSUES}2110", "within a factor of 4 of float16's end a product with it overflows easily"
    ),
    "scale-range": _both(
        "warning", "IEEE 754 binary16: subnormals begin below 6.1e-5", "the weights of such a group are coarse or 0"
    ),
    "activation-finite": _both("error", f"{ISSUES}2110", "seen in a run; the answer is wrong from there on"),
    "activation-range": _both("warning", f"{ISSUES}2110", "a factor of 2 from overflow in a run; a longer one may"),
}  # fmt: skip

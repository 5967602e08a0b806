"""Checks of the linter on the operations of a function: what no device takes, and what one runs slowly or wrongly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from targets.to_coreml.constants import EXPAND
from targets.to_coreml.kernels import KERNELS
from targets.to_coreml.lint_view import SHOWN, Hit, Subject, View, references, some
from targets.to_coreml.program import DYNAMIC, Operation, TensorType

MOST_AXES = 5
LONGEST, LONGEST_PLANE = 65_536, 16_384
"""Elements along an axis, and along the last two on older chips."""
WIDEST_KERNEL = 13
SAFE_BATCH = 9
"""Of an attention on the GPU."""
PALETTE_OF_4_BITS = 16
STATES = ("read_state", "write_state")
ON_THE_CPU = (
    "gather", "gather_along_axis", "gather_nd", "scatter", "scatter_along_axis", "scatter_nd", "cumsum", "one_hot",
    "argsort", "topk", "reduce_argmax", "reduce_argmin", "shape", "non_zero",
    "logical_and", "logical_or", "logical_xor",
)  # fmt: skip
SLICES = {"slice_by_index": ("begin", "end"), "slice_by_size": ("begin",)}
SHAPELESS = ("reshape", "cast", "read_state")
"""Operations that compute nothing, whatever they hold."""
PLACES = ("begin", "end", "size")
"""Inputs that are integers on every compute unit."""


def _listed(operations: Sequence[Operation]) -> str:
    """How many operations of which types, the most frequent first: "4 mul, 2 add, 1 cos and 3 others"."""
    kinds = Counter(operation.type for operation in operations).most_common()
    others = sum(count for _, count in kinds[SHOWN:])
    listed = ", ".join(f"{count} {kind}" for kind, count in kinds[:SHOWN])
    return listed + (f" and {others} others" if others else "")


def known_operations(subject: Subject, view: View) -> Iterator[Hit]:
    """Every operation is one that the interpreter runs."""
    known = KERNELS.keys() | EXPAND.keys() | {"const", *STATES}
    for operation in view.operations:
        if operation.type not in known:
            text = f"is a {operation.type}, which the interpreter does not run, so no test covers it: use others"
            yield Hit("known-operations", operation.name, text)


def tensors(subject: Subject, view: View) -> Iterator[Hit]:
    """Shapes: fixed, of few axes, none too long. The worst of each kind is named."""
    named = list(view.types())
    for rule, wrong, rule_text, remedy in (
        ("fixed-shapes", _is_open, "all shapes must be fixed", "export one function per shape"),
        ("rank", lambda kind: len(kind.shape) > MOST_AXES, f"Core ML takes at most {MOST_AXES} axes", "merge some"),
        (
            "dimension", lambda kind: max(kind.shape, default=0) > LONGEST,
            f"no axis may have more than {LONGEST} elements", "cut it (the head: --max-head-columns)",
        ),
        (
            "ane-old-chips", lambda kind: LONGEST_PLANE < max(kind.shape[-2:], default=0) <= LONGEST,
            f"the last two axes have at most {LONGEST_PLANE} elements on chips before the A17",
            "cut it, or promise newer phones only",
        ),
    ):  # fmt: skip
        yield from _worst(rule, [pair for pair in named if wrong(pair[1])], rule_text, remedy)


def _is_open(kind: TensorType) -> bool:
    return DYNAMIC in kind.shape


def _worst(rule: str, found: Sequence[tuple[str, TensorType]], text: str, remedy: str) -> Iterator[Hit]:
    if found:
        name, kind = max(found, key=lambda pair: (len(pair[1].shape), max(pair[1].shape)))
        others = f" (and {len(found) - 1} more tensors)" if len(found) > 1 else ""
        yield Hit(rule, name, f"is {kind}{others}; {text}: {remedy}")


def unused(subject: Subject, view: View) -> Iterator[Hit]:
    """Every input is read, every result leads somewhere, something comes out."""
    if not view.outputs:
        yield Hit("no-output", "", "has no outputs; Core ML wants one at least: return something, such as a constant")
    for name in view.function.inputs:
        if not view.readers[name]:
            yield Hit("unused", name, "is an input that nothing reads; an app must fill it all the same: drop it")
    dead = [
        operation
        for operation in view.operations
        if operation.type != "write_state" and not any(view.readers[name] for name, _ in operation.outputs)
    ]
    if dead:
        yield Hit("unused", some([o.name for o in dead]), f"{_listed(dead)} with results that nothing reads: drop them")


def dtypes(subject: Subject, view: View) -> Iterator[Hit]:
    """What leaves the Neural Engine for its dtype."""
    wide, whole = [], []
    for operation in view.running:
        if operation.type in SHAPELESS or not operation.outputs:
            continue
        if any(kind.dtype == "float32" for _, kind in operation.outputs):
            wide.append(operation)
        elif any(_is_whole(view, operation, name) for name in operation.inputs if name not in PLACES):
            whole.append(operation)
    if wide:
        text = f"{_listed(wide)} in float32, which the Neural Engine does not compute in: scale them into float16"
        yield Hit("ane-float32", some([o.name for o in wide]), text)
    if whole:
        text = f"{_listed(whole)} with integers, which the Neural Engine does not compute with: take float16 masks"
        yield Hit("ane-integers", some([o.name for o in whole]), text)


def _is_whole(view: View, operation: Operation, name: str) -> bool:
    """Whether an operation computes on integers that are not the same at every call."""
    kind = view.type_of(operation, name)
    return kind is not None and kind.dtype.startswith(("int", "uint")) and not view.is_known(operation, name)


def processors(subject: Subject, view: View) -> Iterator[Hit]:
    """Operations without a form on the Neural Engine, and those that it has in a better one."""
    running = list(view.running)
    away = [o for o in running if o.type in ON_THE_CPU]
    if away:
        text = f"{_listed(away)} without a form on the Neural Engine, so on the CPU: use products and masks"
        yield Hit("ane-cpu-operations", some([o.name for o in away]), text)
    moving = [o for o in running if not all(view.is_known(o, name) for name in SLICES.get(o.type, ()))]
    if moving:
        text = f"{_listed(moving)} whose place the call decides; such slices run on the CPU: use products with masks"
        yield Hit("ane-dynamic-slice", some([o.name for o in moving]), text)
    for rule, kind, text in (
        (
            "ane-linear", "linear",
            "where the Neural Engine has 1x1 convolutions: export the bundle again; profile ane makes those of it",
        ),
        (
            "ane-attention", "scaled_dot_product_attention",
            "which the Neural Engine of iOS 26 computes wrongly, and whose masks older ones may ignore: export "
            "the bundle again; profile ane makes products and a softmax of it",
        ),
    ):  # fmt: skip
        found = [o for o in running if o.type == kind]
        if found:
            yield Hit(rule, some([o.name for o in found]), f"{_listed(found)} {text}")


def layouts(subject: Subject, view: View) -> Iterator[Hit]:
    """Axes that the Neural Engine pads, kernels that it cuts up."""
    padded = [
        o for o in view.running
        if any(kind.dtype == "float16" and len(kind.shape) > 1 and kind.shape[-1] == 1 and max(kind.shape) > 1
               for _, kind in o.outputs)
    ]  # fmt: skip
    if padded:
        text = (
            f"{_listed(padded)} with a last axis of 1, padded to 64 bytes on the Neural Engine: "
            "put tokens or channels last; in decode one token leaves no choice"
        )
        yield Hit("ane-singleton", some([o.name for o in padded]), text)
    for operation in view.running:
        kernel = view.type_of(operation, "weight") if operation.type == "conv" else None
        if kernel is not None and max(kernel.shape[2:], default=0) > WIDEST_KERNEL:
            text = f"has a kernel {list(kernel.shape)}; {WIDEST_KERNEL} is the widest: reshape patches, convolve 1x1"
            yield Hit("ane-kernel-width", operation.name, text)


def wrong_results(subject: Subject, view: View) -> Iterator[Hit]:
    """Operations that a compute unit is known to get wrong."""
    overflowing = [o for o in view.running if o.type == "softplus"]
    if overflowing:
        text = (
            f"{_listed(overflowing)}, which gives 0 for inputs above 10.4 on the Neural Engine: "
            "lower it to max(x, 0) + log(1 + exp(-|x|))"
        )
        yield Hit("ane-softplus", some([o.name for o in overflowing]), text)
    for operation in view.running:
        query = view.type_of(operation, "query")
        if query is not None and len(query.shape) > 2 and query.shape[0] > SAFE_BATCH:
            text = f"attends over a batch of {query.shape[0]}; the GPU is right up to {SAFE_BATCH}: make it heads"
            yield Hit("gpu-attention-batch", operation.name, text)


def compressed_weights(subject: Subject) -> Iterator[Hit]:
    """Forms of compressed weights that a compute unit refuses, crashes on, or was not tried with; each weight once."""
    blockwise, scaled, grouped, small = (list[Operation]() for _ in range(4))
    weights = {operation.name: (view, operation) for view in subject.views for operation in view.operations}
    for view, operation in weights.values():
        if operation.type == "constexpr_blockwise_shift_scale":
            scale = view.type_of(operation, "scale")
            several = scale is not None and max(scale.shape[1:], default=1) > 1
            if several:
                blockwise.append(operation)
            makers = [view.makers.get(name) for name in references(operation.inputs.get("data", ()))]
            if any(maker is not None and maker.type == "constexpr_lut_to_dense" for maker in makers):
                scaled.append(operation)
                if several:
                    grouped.append(operation)
        elif operation.type == "constexpr_lut_to_dense":
            table = view.type_of(operation, "lut")
            if table is not None and max(table.shape[1:-2], default=1) > 1:
                blockwise.append(operation)
            if table is not None and table.shape[-2] == PALETTE_OF_4_BITS:
                small.append(operation)
    if blockwise:
        yield Hit(
            "ane-blockwise", some([o.name for o in blockwise]),
            f"several scales or palettes per output channel in {len(blockwise)} weights; the Neural Engine takes one, "
            "so products with these run on the CPU and the package does not do what --profile ane is for: "
            "export with --recipe int8, or with --profile gpu",
        )  # fmt: skip
    if scaled:
        yield Hit(
            "palette-scale", some([o.name for o in scaled]),
            f"scales over palettes in {len(scaled)} weights; the Neural Engine's compiler rejects them while the app "
            "loads the model: put the scales into the palettes, or leave out --palettes",
        )  # fmt: skip
    if grouped:
        yield Hit(
            "palette-unmeasured", some([o.name for o in grouped]),
            f"scales per group over palettes in {len(grouped)} weights; no device was measured with more than one "
            "scale per output channel: try the package on the device first, or leave out --palettes",
        )  # fmt: skip
    states = max((len(view.function.states) for view in subject.views), default=0)
    if small and states:
        yield Hit(
            "palette-stateful", some([o.name for o in small]),
            f"palettes of {PALETTE_OF_4_BITS} in {len(small)} weights beside {states} states; such "
            "packages crash after 100 to 200 calls: leave out --palettes",
        )  # fmt: skip


CHECKS: tuple[Callable[[Subject, View], Iterator[Hit]], ...] = (
    known_operations,
    tensors,
    unused,
    dtypes,
    processors,
    layouts,
    wrong_results,
)
PACKAGE_CHECKS = (compressed_weights,)

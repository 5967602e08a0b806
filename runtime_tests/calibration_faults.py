"""Deliberate faults on trained checkpoints: the existing lists, and bundles whose weights were spoiled on the way.

Faults of our modules are for L0, of the lowering for L1, of the packer for L2; those of a host, of states, of logits
and of weights are for L3, which is climbed alone: it must see them without the help of the rungs below.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch

from export.checkpoint.folder import FolderCheckpoint
from export.checkpoint.weights import TEXT
from runtime_tests import faults, test_faults, test_faults_host
from runtime_tests.faults import Patcher
from runtime_tests.once import Memory
from targets.to_onnx.session import OnnxSession

if TYPE_CHECKING:
    from runtime_tests.calibration import Built, Record, Subject

OF_PICTURES = ("picture", "image", "patches", "vision", "M-RoPE", "one axis")
"""Words in the names of faults that change nothing where there is no picture."""
WITHOUT_EFFECT = {
    "wrong head grouping": "key and value heads are equal in number: each key head serves one value head",
}
"""Faults that some checkpoint cannot have, and why."""
FOUR_HEADS = ("positions of queries off by one",)
"""Faults that know queries by their four heads."""
UNSEEN = {"heads": ("one axis of positions for all three",)}
"""Faults that change less than rounding does: pictures of 2 by 3 tokens differ little in their axes."""
NONE = "none"
Change = Callable[[str, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Fault:
    """A fault, and the rung that must see it.

    Attributes:
        building: the bundle is built with it and judged without; else judged with it.
    """

    name: str
    rung: str
    patch: Patcher
    building: bool = False


def of(built: Built) -> list[Fault]:
    """All faults that the checkpoint of a bundle can have. Those of L0 and L1 have nothing to do with a recipe and
    come with int8 alone, those of the packer with the others. The last one is none, for comparison.
    """
    if built.recipe == "int8":
        found = [Fault(name, "L0", patch) for name, patch in test_faults_host.L0.items()]
        found += [Fault(name, "L1", patch) for name, patch in test_faults.L1.items()]
    else:
        found = [Fault(name, "L2", patch, True) for name, patch in test_faults.L2.items()]
    found += [Fault(name, "L3", patch) for name, patch in of_answers(built).items()]
    found += [Fault(name, "L3", read_as(change), True) for name, change in DAMAGES.items()]
    return [fault for fault in found if possible(fault.name, built.subject)] + [Fault(NONE, "L3", lambda patch: None)]


def report_of(built: Built, fault: Fault, memory: Memory) -> Record:
    """The report of the fault's rung."""
    if fault.building:
        with pytest.MonkeyPatch.context() as patch:
            fault.patch(patch)
            wrong = built.again("wrong")
        return wrong.judged((fault.rung,))
    known = {key: value for key, value in built.subject.known.items() if key[0] != "L0"}
    with pytest.MonkeyPatch.context() as patch:
        if fault.rung != "L0":
            memory.modules(patch)
            memory.answers(patch)
        fault.patch(patch)
        report = built.judged((fault.rung,), known)
    built.subject.known.update({key: value for key, value in known.items() if key[0] != "L0"})
    return report


def possible(name: str, subject: Subject) -> bool:
    """Whether the fault changes anything on this checkpoint."""
    config = subject.checkpoint.model_config
    if config.vision is None and any(word in name for word in OF_PICTURES):
        return False
    if name in UNSEEN.get(subject.name, ()):
        return False
    if name in FOUR_HEADS and config.text.num_attention_heads != 4:
        return False
    equal = config.text.linear_num_key_heads == config.text.linear_num_value_heads
    return not (equal and name in WITHOUT_EFFECT)


def of_answers(built: Built) -> dict[str, Patcher]:
    """Of a host, of states, of logits."""
    stop = built.contract.stop_token_ids[0]
    word = int(built.subject.tokenizer("a", add_special_tokens=False)["input_ids"][0])
    return {
        **faults.host(OnnxSession, faults.zeroed),
        "recurrent state lost between chunks": faults.lost_between_chunks(OnnxSession, "recurrent"),
        "keys lost between chunks": faults.lost_between_chunks(OnnxSession, "key"),
        "values lost between chunks": faults.lost_between_chunks(OnnxSession, "value"),
        "a recurrent state that fades": faults.fading(OnnxSession),
        "a blurred head": faults.spoiled(OnnxSession, faults.blurred),
        "shuffled logits": faults.spoiled(OnnxSession, faults.shuffled),
        "answers that stop at once": faults.spoiled(OnnxSession, faults.always(stop)),
        "answers of one token": faults.spoiled(OnnxSession, faults.always(word)),
    }


# --- weights spoiled between the checkpoint and the bundle ----------------------------------------------------


def of_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda asked, tensor: change(tensor) if asked == name else tensor


def noisy(share: float) -> Change:
    """Gaussian noise of that share of its own root mean square in every matrix of the decoder's layers: what far too
    few bits would do. Four bits make 0.1 to 0.2 of it.
    """

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.ndim != 2 or ".layers." not in name:
            return tensor
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        return tensor + share * tensor.square().mean().sqrt() * torch.randn(tensor.shape, generator=generator)

    return change


FIRST = f"{TEXT}.layers.0"
"""A DeltaNet layer in every checkpoint."""
DAMAGES: dict[str, Change] = {
    "a matrix of zeros": of_tensor(f"{FIRST}.linear_attn.out_proj.weight", torch.zeros_like),
    "rows of a matrix shifted by one": of_tensor(f"{FIRST}.mlp.down_proj.weight", lambda w: w.roll(1, 0)),
    "a matrix twice as large": of_tensor(f"{FIRST}.mlp.up_proj.weight", lambda w: 2 * w),
    "a matrix of the other sign": of_tensor(f"{FIRST}.mlp.up_proj.weight", torch.neg),
    "weights with half their size of noise": noisy(0.5),
    "weights with a third of their size of noise": noisy(1 / 3),
}
"""By what other weights a bundle was made."""


def read_as(change: Change) -> Patcher:
    """Folders are read with changed tensors."""

    def make(right: Any) -> Any:
        def read(self: FolderCheckpoint, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
            return change(name, right(self, name))[start:stop].clone()

        return read

    return faults.replaced(FolderCheckpoint, "read", make)

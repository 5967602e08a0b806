"""Whole ExecuTorch exports of the shipped tiny checkpoint: conversations, task gates, resume to identical bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from export.__main__ import main
from export.bundle.reader import Bundle
from export.chat.chat import Chat
from export.chat.conversation import Contract, Conversation
from export.chat.template import load_tokenizer
from export.checkpoint.folder import FolderCheckpoint
from export.checkpoint.weights import Weights
from export.model.session import Model, TorchSession
from export.quantize.quantizer import Quantizer
from export.quantize.recipe import load_recipe
from export.validate import task
from runtime_tests import checklists
from runtime_tests.once import Memory
from targets import load_target
from targets.base import Job
from targets.to_executorch import file, lower

pytestmark = pytest.mark.usefixtures("hints_once", "traced_once")

TINY = Path(__file__).parents[1] / "checkpoints" / "tiny"
WORDS = ["--target", "executorch", "--size", "tiny", "--quiet"]


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    output = tmp_path_factory.mktemp("fp32") / "bundle"
    assert main([*WORDS, "--recipe", "fp32", "--skip-validation", "-o", str(output)]) == 0
    return Bundle.open(output)


def conversations() -> list[tuple[list[str], list[Any]]]:
    """(questions of the turns, pictures of the first) – text alone, a picture, two pictures, three turns each."""
    found: list[tuple[list[str], list[Any]]] = [
        (["Keep a=12 B=34 c=56.", "What is B?", "What is 12+30?"], []),
    ]
    glyphs = task.sample("glyphs", task.HELD_OUT).images
    objects = task.sample("objects", task.HELD_OUT + 1).images
    found.append((["Read.", "What is 7+8?", "Read."], list(glyphs)))
    found.append((["Read.", "Keep x=41.", "What is x?"], [glyphs[0], objects[0]]))
    return found


@pytest.mark.parametrize("number", range(3))
def test_conversations_of_three_turns_are_those_of_pytorch(number: int, fp32: Bundle) -> None:
    """Every greedy token of every turn, with pictures and without, equals our modules in fp32."""
    checkpoint = FolderCheckpoint(TINY)
    tokenizer = load_tokenizer(fp32.path)
    contract = Contract.of(fp32.manifest)
    bundle = load_target("executorch").open(fp32.path, fp32.manifest, 1)
    own = TorchSession(
        Model.load(Weights(checkpoint, checkpoint.model_config)), contract.context_length, contract.prefill_lengths
    )
    chats = [Chat(Conversation(session, contract), tokenizer) for session in (own, bundle)]
    questions, images = conversations()[number]
    messages: list[dict[str, Any]] = []
    for turn, question in enumerate(questions):
        content: Any = question
        if turn == 0 and images:
            content = [{"type": "image"} for _ in images] + [{"type": "text", "text": question}]
        messages.append({"role": "user", "content": content})
        expected, found = (chat.answer(messages, images, max_new_tokens=16)[1] for chat in chats)
        assert found == expected, (turn, tokenizer.decode(expected), tokenizer.decode(found))
        assert chats[0].reused == chats[1].reused
        messages.append({"role": "assistant", "content": tokenizer.decode(found, skip_special_tokens=True)})
    bundle.close()


@pytest.mark.usefixtures("small_buffer")
def test_int4_passes_every_gate(tmp_path: Path) -> None:
    assert main([*WORDS, "--threads", "1", "--recipe", "int4", "-o", str(tmp_path / "bundle")]) == 0
    report = json.loads((tmp_path / "bundle" / "parity.json").read_text())
    checks = {c["name"]: c for rung in report["rungs"].values() for c in rung["checks"]}
    assert report["passed"]
    assert checks["L3.task_drop"]["value"] <= 3
    checklists.hold(report, "float32", "pictures", "text", "drift", "chats", "task", learned=True)
    bundle = Bundle.open(tmp_path / "bundle")
    assert bundle.manifest["status"] == "validated"
    assert "executorch" in (bundle.path / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "most_drop"), [("fp32", 0), ("int8", 1), ("int4-mixed", 3), ("int4-careful", 3)])
def test_other_recipes_pass_every_gate(recipe: str, most_drop: float, tmp_path: Path) -> None:
    assert main([*WORDS, "--recipe", recipe, "-o", str(tmp_path / "bundle")]) == 0
    report = json.loads((tmp_path / "bundle" / "parity.json").read_text())
    checks = {c["name"]: c["value"] for rung in report["rungs"].values() for c in rung["checks"]}
    assert report["passed"]
    assert checks["L3.task_drop"] <= most_drop


def test_an_asymmetric_recipe_is_refused_before_any_weight_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FolderCheckpoint, "read", lambda *a, **k: pytest.fail("a weight was read"))
    assert main([*WORDS, "--recipe", "int4-asym", "-o", str(tmp_path / "bundle")]) == 2
    assert "executorch has no zero points at 4 bits; recipe int4-asym needs them" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_file_limits_are_refused_where_they_mean_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--target", "onnx", "--size", "tiny", "--max-file-layers", "2", "-o", str(tmp_path / "bundle")]
    assert main(words) == 2
    assert "--max-file-layers 2: onnx keeps its decoder in one file; leave the option out" in capsys.readouterr().err


# -- the same bytes again ----------------------------------------------------------------------------------
class Stop(Exception):
    """What an interrupt does to a lowering."""


def lowered(folder: Path, memory: Memory, resume: bool = False) -> dict[str, bytes]:
    memory.forget()
    checkpoint = FolderCheckpoint(TINY)
    config = checkpoint.model_config.truncated(4)
    quantizer = Quantizer(Weights(checkpoint, config), load_recipe("int4"))
    folder.mkdir(exist_ok=True)
    lower.lower(Job(config, quantizer, 128, (64,), ((64, 64),), folder, try_out=False, resume=resume))
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".journal"}


def test_an_interrupted_lowering_resumes_to_the_same_bytes(
    memory: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = lowered(tmp_path / "whole", memory)
    assert lowered(tmp_path / "again", memory) == whole
    right, left = file._stream, 9
    streamed: list[str] = []

    def interrupted(out: Any, weight: Any, places: Any) -> str:
        if len(streamed) == left:
            raise Stop
        streamed.append(weight.name)
        return right(out, weight, places)

    monkeypatch.setattr(file, "_stream", interrupted)
    with pytest.raises(Stop):
        lowered(tmp_path / "part", memory)
    with open(tmp_path / "part" / "decoder.journal", "a") as journal:
        journal.write('{"name": "cut of')  # the interrupt came in the middle of a line

    def counting(out: Any, weight: Any, places: Any) -> str:
        streamed.append(weight.name)
        return right(out, weight, places)

    done = set(streamed)
    streamed.clear()
    monkeypatch.setattr(file, "_stream", counting)
    assert lowered(tmp_path / "part", memory, resume=True) == whole
    decoder = streamed[: next(i for i, name in enumerate(streamed) if name.startswith("vision."))]
    assert not done & {name for name in decoder if not name.startswith("small:")}, "written once is enough"


@pytest.fixture(autouse=True)
def _no_session_left() -> Iterator[None]:
    """The runtime's threads belong to the process: sessions that a failed test left open must not fail the next."""
    yield
    from targets.to_executorch import runtime

    runtime._open_sessions.clear()

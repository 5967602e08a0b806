"""Sessions of every target behave alike: snapshots, a full context, calls against the contract, chunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.chat.conversation import Contract, Conversation
from export.quantize.recipe import Recipe
from export.validate import metrics
from runtime_tests.conftest import CONTEXT, build
from targets import TARGETS, load_target
from targets.contract import CallError

pytestmark = pytest.mark.usefixtures("hints_once", "traced_once")

Built = tuple[str, Path, dict[str, Any]]


@pytest.fixture(scope="module", params=list(TARGETS))
def built(request: pytest.FixtureRequest, small: Any, tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("session")
    _, manifest, _ = build(small, folder, Recipe.unquantised(), request.param)
    return request.param, folder, manifest


def conversation(built: Built) -> tuple[Any, Conversation]:
    target, folder, manifest = built
    session = load_target(target).open(folder, manifest, 1)
    return session, Conversation(session, Contract.of(manifest))


def test_snapshot_and_restore_continue_exactly(built: Built) -> None:
    session, talk = conversation(built)
    picture = np.random.default_rng(0).random((64, 96, 3), np.float32)
    talk.feed(talk.expand([9, 6, 5, 7, 10, 11], [picture]), [picture])
    kept = talk.snapshot()
    first = [talk.feed([i]) for i in (12, 13, 14)]
    talk.feed([20, 21, 22])
    talk.restore(kept)
    again = [talk.feed([i]) for i in (12, 13, 14)]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    talk.reset()
    assert all(not array.any() for array in session.states().values())


def test_full_context_works_and_one_more_is_refused(built: Built) -> None:
    session, talk = conversation(built)
    ids = [9 + i % 50 for i in range(CONTEXT)]
    talk.feed(ids[: CONTEXT - 3])
    talk.feed(ids[CONTEXT - 3 :])  # a padded chunk whose tail lies past the context
    assert talk.start == CONTEXT
    with pytest.raises(Exception, match="1 tokens do not fit: 128 of 128 slots are used"):
        talk.feed([9])
    inputs = {
        "embeddings": np.zeros((1, 1, 128), built[2]["signatures"]["decode"]["inputs"][0]["dtype"]),
        "position_ids": np.zeros((3, 1), np.int32),
        "start": np.asarray([CONTEXT], np.int32),
    }
    with pytest.raises(CallError, match=r"start 128 with valid 1: .* at most the context_length 128"):
        session.run("decode", inputs)


def test_calls_against_the_contract_are_refused(built: Built) -> None:
    session, _ = conversation(built)
    with pytest.raises(CallError, match="no signature 'prefill_7'; it has decode, embed, prefill_16"):
        session.run("prefill_7", {})
    with pytest.raises(CallError, match="embed needs input 'input_ids'"):
        session.run("embed", {})
    with pytest.raises(CallError, match=r"'input_ids' is int32 \[1, 2\]; the manifest declares int64"):
        session.run("embed", {"input_ids": np.zeros((1, 2), np.int32)})


def test_chunking_does_not_change_the_answer(built: Built) -> None:
    _, talk = conversation(built)
    ids = [9 + (7 * i) % 50 for i in range(100)]
    whole = talk.feed(ids)
    talk.reset()
    for place in range(0, 100, 9):
        parts = talk.feed(ids[place : place + 9])
    # In float16 every chunk rounds its states anew.
    tolerance = {"float32": 1e-4, "float16": 0.05}[load_target(built[0]).capabilities.floats]
    assert metrics.relative(whole, parts) < tolerance

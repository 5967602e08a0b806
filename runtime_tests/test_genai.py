"""The bundle on stock onnxruntime-genai: the same greedy tokens as our own session."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from export.__main__ import main
from export.bundle.reader import Bundle
from export.chat.conversation import Contract, Conversation
from export.chat.template import load_tokenizer, render
from targets import load_target

pytestmark = pytest.mark.usefixtures("traced_once")

og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai has no wheel for this platform")
PROMPTS = ["What is 12+30?", "Keep a=12 B=34 c=56 D=78 e=90. What is B?", "Hello"]


@pytest.fixture(scope="module", params=["int4", "fp32"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("genai") / "bundle"
    words = ["--target", "onnx", "--size", "tiny", "--recipe", request.param, "-o", str(output)]
    assert main([*words, "--skip-validation", "--quiet", "--threads", "1", "--no-vision"]) == 0
    return output


def genai_greedy(folder: Path, ids: list[int], count: int) -> list[int]:
    model = og.Model(str(folder))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(ids) + count, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.asarray(ids, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(t) for t in generator.get_sequence(0)[len(ids) :]]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_same_greedy_tokens_as_our_session(prompt: str, bundle: Path) -> None:
    opened = Bundle.open(bundle)
    tokenizer = load_tokenizer(bundle)
    ids = render(tokenizer, [{"role": "user", "content": prompt}], enable_thinking=False)
    session = load_target("onnx").open(bundle, opened.manifest, 1)
    contract = Contract.of(opened.manifest)
    ours = Conversation(session, contract).generate(ids, max_new_tokens=24)
    theirs = genai_greedy(bundle, ids, 24)
    if theirs[-1] in contract.stop_token_ids:
        theirs.pop()
    assert ours == theirs


def test_the_second_graph_adds_no_weights(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    sizes = {entry["path"]: entry["bytes"] for entry in opened.manifest["files"]}
    assert sizes["genai.onnx"] < 0.2 * sizes["weights.bin"]

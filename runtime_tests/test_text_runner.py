"""ExecuTorch's own TextLLMRunner answers from a bundle as our session does, and again after a first prompt."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from export.__main__ import main
from export.bundle.reader import Bundle
from export.chat.conversation import Contract, Conversation
from export.chat.template import load_tokenizer, render
from export.quantize.recipe import Recipe, load_recipe
from export.validate.case import Case
from export.validate.ladder import l2, l3
from runtime_tests.conftest import MemoryCheckpoint, build, variant
from targets import load_target
from targets.to_executorch import operators, runtime, text_runner
from targets.to_executorch.stored import Pte

pytestmark = pytest.mark.usefixtures("hints_once", "traced_once", "judged_once")

PROMPTS = ["What is 12+30?", "Keep a=12 B=34 c=56 D=78 e=90. What is B?"]
NEW_TOKENS = 12

RUNNER = """
import json, sys
import executorch.kernels.quantized
from executorch.extension.llm.custom_ops import custom_ops
from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner
program, tokenizer, count, *prompts = sys.argv[1:]
answers = []
runner = TextLLMRunner(program, tokenizer)
for prompt in prompts:
    pieces = []
    runner.generate(prompt, GenerationConfig(echo=False, max_new_tokens=int(count), temperature=0.0), pieces.append)
    runner.reset()
    answers.append("".join(pieces))
sys.stdout.write("\\n" + json.dumps(answers) + "\\n")
"""


SLOW = [pytest.param(recipe, marks=pytest.mark.slow) for recipe in ("int8", "fp32")]


@pytest.mark.parametrize("recipe", ["int4", *SLOW])
def test_the_stock_runner_gives_the_same_tokens(recipe: str, tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    words = ["--target", "executorch", "--size", "tiny", "--recipe", recipe, "--text-runner", "-o", str(output)]
    assert main([*words, "--no-vision", "--skip-validation", "--quiet", "--threads", "1"]) == 0
    bundle = Bundle.open(output)
    tokenizer = load_tokenizer(output)
    rendered, expected = [], []
    session = load_target("executorch").open(output, bundle.manifest, 1)
    for prompt in PROMPTS:
        ids = render(tokenizer, [{"role": "user", "content": prompt}], enable_thinking=False)
        rendered.append(tokenizer.decode(ids))
        talk = Conversation(session, Contract.of(bundle.manifest))
        expected.append(tokenizer.decode(talk.generate(ids, max_new_tokens=NEW_TOKENS), skip_special_tokens=True))
    session.close()
    stops = runtime.library()._load_program(str(output / "decoder.pte")).load_method("get_eos_ids").call([])
    assert stops == bundle.manifest["tokenizer"]["stop_token_ids"]
    command = [sys.executable, "-c", RUNNER, str(output / "decoder.pte"), str(output / "tokenizer.json")]
    ran = subprocess.run([*command, str(NEW_TOKENS), *rendered, rendered[0]], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    answers = [a.removesuffix("<|im_end|>") for a in json.loads(ran.stdout.strip().splitlines()[-1])]
    assert answers == [*expected, expected[0]]


def test_a_conversation_starts_from_zeros_whatever_the_last_one_left(tmp_path: Path) -> None:
    """An embedding row of infinity leaves NaN in every state, which a multiplication by zero would keep."""
    checkpoint = MemoryCheckpoint(variant(num_hidden_layers=4, tied=False))
    checkpoint.tensors["model.language_model.embed_tokens.weight"][9] = float("inf")
    _, manifest, _ = build(checkpoint, tmp_path, Recipe.unquantised(), "executorch", lengths=(16,), text_runner=True)
    session = load_target("executorch").open(tmp_path, manifest, 1)
    first = session.runner_logits([10, 11, 12])
    poisoned = session.runner_logits([10, 9, 12])
    again = session.runner_logits([10, 11, 12])
    assert first is not None and poisoned is not None and again is not None
    assert np.isfinite(first).all() and not np.isfinite(poisoned[2]).all()
    assert np.array_equal(first, again)
    session.close()


def test_forward_is_judged_with_the_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """L2 compares its embedding, L3 its logits; both notice a wrong one. Its kernels are pinned."""
    checkpoint = MemoryCheckpoint(variant(num_hidden_layers=4))
    recipe = load_recipe("int4", 32)

    def case(name: str) -> Case:
        folder = tmp_path / name
        folder.mkdir()
        _, manifest, _ = build(checkpoint, folder, recipe, "executorch", lengths=(16,), text_runner=True)
        target = load_target("executorch")
        return Case(checkpoint, checkpoint.model_config, recipe, target, folder, manifest, 1, gate_quality=False)

    right = case("right")
    rungs = {name: {c.name: c for c in rung(right).checks} for name, rung in (("L2", l2), ("L3", l3))}
    assert rungs["L2"]["L2.mismatches"].status == rungs["L3"]["L3.text_runner"].status == "PASS"
    (plan,) = (p for p in Pte(right.folder / "decoder.pte").program.execution_plan if p.name == text_runner.NAME)
    called = {f"{o.name}.{o.overload}".rstrip(".") for o in plan.operators}
    assert called <= {*operators.KERNELS, *text_runner.KERNELS}
    pack = text_runner._packed
    monkeypatch.setattr(text_runner, "_packed", lambda codes, bits: pack(codes, bits)[:, ::-1])
    wrong = case("wrong")
    assert l2(wrong).status == "FAIL"
    assert next(c for c in l3(wrong).checks if c.name == "L3.text_runner").status == "FAIL"


def test_one_runner_cannot_have_a_decoder_in_pieces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--target", "executorch", "--size", "tiny", "--text-runner", "--max-file-layers", "2"]
    assert main([*words, "-o", str(tmp_path / "bundle")]) == 2
    assert "--text-runner: its method holds the whole decoder, which --max-file-layers" in capsys.readouterr().err
    assert main(["--target", "onnx", "--size", "tiny", "--text-runner", "-o", str(tmp_path / "bundle")]) == 2
    assert "--text-runner: onnx needs no method for it; leave the option out" in capsys.readouterr().err

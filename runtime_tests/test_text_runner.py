"""ExecuTorch's own TextLLMRunner answers from a bundle as our session does, and again after a first prompt."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from export.__main__ import main
from export.bundle.reader import Bundle
from export.chat.conversation import Contract, Conversation
from export.chat.template import load_tokenizer, render
from targets import load_target

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


@pytest.mark.parametrize("recipe", ["int4", "int8", "fp32"])
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
    command = [sys.executable, "-c", RUNNER, str(output / "decoder.pte"), str(output / "tokenizer.json")]
    ran = subprocess.run([*command, str(NEW_TOKENS), *rendered, rendered[0]], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    answers = [a.removesuffix("<|im_end|>") for a in json.loads(ran.stdout.strip().splitlines()[-1])]
    assert answers == [*expected, expected[0]]


def test_one_runner_cannot_have_a_decoder_in_pieces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--target", "executorch", "--size", "tiny", "--text-runner", "--max-file-layers", "2"]
    assert main([*words, "-o", str(tmp_path / "bundle")]) == 2
    assert "--text-runner: its method holds the whole decoder, which --max-file-layers" in capsys.readouterr().err
    assert main(["--target", "onnx", "--size", "tiny", "--text-runner", "-o", str(tmp_path / "bundle")]) == 2
    assert "--text-runner: onnx needs no method for it; leave the option out" in capsys.readouterr().err

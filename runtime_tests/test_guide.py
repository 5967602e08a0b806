"""docs/your-fine-tune-on-a-phone.md does what it says: its snippets make the folders, its commands make the bundles.

The page is run in its order, in an empty folder with the shipped checkpoint. What is appended for speed stands in
`QUICK`, what is not run but only parsed in the page's `text` block.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from export.__main__ import main
from export.arguments import PARSERS, pop_command, spec_from
from export.checkpoint.adapter_config import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from export.checkpoint.shards import SINGLE
from export.sizes import shipped_tiny
from runtime_tests.forms import REFUSED, Form, copy_tiny, edit_json, edit_weights, renamed

GUIDE = Path(__file__).parents[1] / "docs" / "your-fine-tune-on-a-phone.md"
PROMPT = "python -m export"
QUICK = {"export": "--skip-validation --threads 1", "validate": "--rung L2 --threads 1", "run": "--threads 1"}
"""Appended to the page's commands, because every ladder takes 15 seconds."""
WHOLE = "--adapter my-adapter"
"""The command of `validate` with these words climbs the whole ladder."""
ANSWERS = ("At nine.", "Gate seven.", "Platform two.", "Never.")
"""What each training on the page teaches, in order: every folder gives an answer of its own."""
BUNDLES = {
    "my-bundle": ("my-model", "At nine."),
    "my-small-bundle": ("my-model", "At nine."),
    "my-blind-bundle": ("my-model", "At nine."),
    "my-text-bundle": ("my-text-model", "Gate seven."),
    "my-adapter-bundle": ("my-adapter", "Platform two."),
    "my-run-bundle": ("my-adapter", "Platform two."),
    "my-named-bundle": ("my-resized", "Never."),
}
"""Bundle -> the folder whose model transformers is asked, and what that was taught."""
SEEING = {"my-bundle", "my-small-bundle", "my-adapter-bundle", "my-run-bundle"}
STEPS = 20

pytestmark = [
    pytest.mark.usefixtures("one_thread", "traced_once"),
    pytest.mark.filterwarnings("ignore"),
]


def blocks(kind: str) -> list[str]:
    """The fenced blocks of a kind, in order."""
    return re.findall(rf"^```{kind}\n(.*?)^```$", GUIDE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def question() -> str:
    """The prompt of the page's `run`."""
    (found,) = re.findall(r'--prompt "(.+)"', "".join(blocks("sh")))
    return str(found)


def rendered(tokenizer: Any) -> str:
    messages = [{"role": "user", "content": question()}]
    text: str = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    return text


class Training:
    """The `train` of the snippets: teaches the next of ANSWERS to the page's question."""

    def __init__(self) -> None:
        self.answers = iter(ANSWERS)
        self.tokenizer = AutoTokenizer.from_pretrained(shipped_tiny())

    def __call__(self, model: Any) -> None:
        adapter = isinstance(model, PeftModel)
        asked = self._ids(rendered(self.tokenizer))
        tokens = torch.cat([asked, self._ids(next(self.answers) + "<|im_end|>")], dim=1)
        labels = tokens.clone()
        labels[:, : asked.shape[1]] = -100  # transformers' mark for tokens without loss
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(parameters, lr=1e-2 if adapter else 3e-3)
        for _ in range(STEPS):
            model(input_ids=tokens, labels=labels).loss.backward()
            optimiser.step()
            optimiser.zero_grad()

    def _ids(self, text: str) -> torch.Tensor:
        """[1, S]"""
        return torch.tensor([self.tokenizer(text, add_special_tokens=False)["input_ids"]])


@dataclass
class Result:
    """A command of the page after it ran."""

    code: int
    out: str
    err: str


@dataclass
class Page:
    """The folder in which the page was run, and what its commands printed."""

    folder: Path
    results: dict[str, Result] = field(default_factory=dict)

    def result(self, words: str) -> Result:
        """The result of the one command that holds these words."""
        (found,) = [result for command, result in self.results.items() if words in command]
        return found


def appended(command: str) -> list[str]:
    """The words of a command with what is appended for speed."""
    assert command.startswith(PROMPT + " ")
    words = shlex.split(command.removeprefix(PROMPT))
    kind = pop_command(list(words))
    quick = QUICK[kind].replace("--rung L2", "") if WHOLE in command else QUICK[kind]
    return [*words, *quick.split()]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, one_thread: None, traced_once: None) -> Iterator[Page]:
    """The whole page, run: first the snippets, as the page has them, then the commands."""
    folder = tmp_path_factory.mktemp("guide")
    (folder / "checkpoints").symlink_to(shipped_tiny().parent)
    page = Page(folder)
    with contextlib.chdir(folder), torch.enable_grad():
        names: dict[str, Any] = {"train": Training()}
        for snippet in blocks("python"):
            torch.manual_seed(3)
            exec(compile(snippet, str(GUIDE), "exec"), names)
        for command in "".join(blocks("sh")).splitlines():
            out, err = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = main(appended(command))
            page.results[command] = Result(code, out.getvalue(), err.getvalue())
        yield page


@pytest.fixture(scope="module")
def truths(page: Page) -> dict[str, str]:
    """Folder of the page -> transformers' greedy answer to the question; the adapter merged by PEFT."""

    def answer(folder: str) -> str:
        kind: Any = AutoModelForCausalLM if folder in ("my-text-model", "my-resized") else AutoModelForImageTextToText
        where = shipped_tiny() if folder == "my-adapter" else page.folder / folder
        model = kind.from_pretrained(where, dtype=torch.float32).eval()
        if folder == "my-adapter":
            model = PeftModel.from_pretrained(model, page.folder / folder).merge_and_unload()
        tokenizer = AutoTokenizer.from_pretrained(where)
        asked = tokenizer(rendered(tokenizer), add_special_tokens=False, return_tensors="pt")
        told = model.generate(**asked, do_sample=False, max_new_tokens=32)[0, asked["input_ids"].shape[1] :]
        return str(tokenizer.decode(told, skip_special_tokens=True))

    with torch.inference_mode():
        return {folder: answer(folder) for folder, _ in sorted(set(BUNDLES.values()))}


def test_every_command_of_the_page_succeeds(page: Page) -> None:
    assert len(page.results) >= 12
    for command, result in page.results.items():
        assert result.code == 0, f"{command}\n{result.out}\n{result.err}"
    assert {path.name for path in page.folder.glob("*-bundle")} == set(BUNDLES)


@pytest.mark.parametrize("bundle", BUNDLES)
def test_bundles_answer_as_transformers_does(
    bundle: str, page: Page, truths: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, taught = BUNDLES[bundle]
    assert truths[folder] == taught
    assert main(["run", str(page.folder / bundle), "--prompt", question(), "--json", "--threads", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["answers"] == [taught]
    manifest = json.loads((page.folder / bundle / "manifest.json").read_text())
    assert bool(manifest["image_sizes"]) == (bundle in SEEING)
    assert manifest["model"]["size"] == ("my-name" if bundle == "my-named-bundle" else "tiny")


def test_the_page_tells_what_the_commands_print(page: Page) -> None:
    """Sizes of --dry-run, the ladder of `validate`, the answer of `run`, two bundles side by side."""
    assert "would build qwen3.5-tiny-onnx-int4-mlp" in page.result("--dry-run").out
    ladder = page.result("validate my-adapter-bundle").out
    for check in ("L0.whole_model", "L1.logits", "L2.mismatches", "L3.own_kl"):
        assert re.search(rf"^{re.escape(check)} .*PASS", ladder, re.MULTILINE), ladder
    assert "LoRA of rank 8 and alpha 16" in page.result("-o my-adapter-bundle").err
    assert "note: an answer stops at <|im_end|>" in page.result("-o my-bundle").err
    assert page.result("--prompt").out == "At nine.\n"
    side_by_side = page.result("my-bundle my-small-bundle").out.splitlines()[0]
    assert side_by_side.split() == ["qwen3.5-tiny-onnx-int8", "qwen3.5-tiny-onnx-int4-mlp"]


def test_an_export_that_forgot_the_fine_tune_would_be_seen(page: Page, truths: dict[str, str]) -> None:
    """Every folder answers otherwise, and the base none of it; so no bundle can stand for another."""
    assert len(set(truths.values())) == len(ANSWERS)
    words = ["--target", "onnx", "--checkpoint", "checkpoints/tiny", *QUICK["export"].split(), "--no-vision", "--quiet"]
    with contextlib.chdir(page.folder), contextlib.redirect_stdout(io.StringIO()) as out:
        assert main([*words, "--recipe", "int8", "-o", "base"]) == 0
        out.truncate(0)
        assert main(["run", "base", "--prompt", question(), "--quiet"]) == 0
    assert not any(answer in out.getvalue() for answer in ANSWERS)


def test_commands_for_a_hub_are_the_only_ones_that_are_not_run() -> None:
    """They must parse: names, sizes and options are right."""
    (block,) = blocks("text")
    commands = block.splitlines()
    assert len(commands) == 3
    for command in commands:
        words = shlex.split(command.removeprefix(PROMPT))
        assert pop_command(words) == "export"
        spec = spec_from(PARSERS["export"]().parse_args(words))
        assert spec.size == "0.8b" and "/" in str(spec.checkpoint)
    run = [line for block in blocks("sh") for line in block.splitlines()]
    written = re.findall(rf"^{PROMPT} .*$", GUIDE.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(written) == sorted(run + commands)


def adapter(**fields: Any) -> Form:
    """In place of the weights an adapter whose config says so."""

    def change(folder: Path) -> None:
        (folder / SINGLE).rename(folder / ADAPTER_WEIGHTS)
        edit_json(folder / ADAPTER_CONFIG, lambda a: a.update(peft_type="LORA", **fields))

    return change


def turned(folder: Path) -> None:
    """Convolutions as MLX keeps them: [C, 4, 1] in place of [C, 1, 4]."""
    edit_weights(folder, lambda t: {n: v.mT if "conv1d" in n else v for n, v in t.items()})


def stored_as(name: str) -> Form:
    """The weights under the name of another format."""

    def change(folder: Path) -> None:
        (folder / SINGLE).rename(folder / name)

    return change


ROWS: dict[str, Form] = {
    "GPTQ": REFUSED["GPTQ"][0],
    "bitsandbytes": REFUSED["bitsandbytes"][0],
    "FP8": REFUSED["FP8"][0],
    "YaRN": REFUSED["YaRN"][0],
    "DoRA": adapter(use_dora=True),
    "classification": REFUSED["classifier"][0],
    "fused names": renamed(lambda name: name.replace("in_proj_qkv", "in_proj_qkvz")),
    "placeholders": REFUSED["placeholder of ZeRO-3"][0],
    "MLX": turned,
    "GGUF": stored_as("model.gguf"),
    "pickles": stored_as("pytorch_model.bin"),
    "only the adapter": adapter(),
}
"""First words of a row in the page's table of refusals -> how such a folder comes about."""


def table() -> dict[str, str]:
    """First cell of the table of refusals -> the words of the message, in backticks in the second."""
    return dict(re.findall(r"^\| (.+?) \| `([^|]+)` \|", GUIDE.read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize("row", ROWS)
def test_refusals_have_the_words_of_the_table(row: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (words,) = [words for cell, words in table().items() if cell.startswith(row)]
    folder = copy_tiny(tmp_path / "my-model")
    ROWS[row](folder)
    source = ["--checkpoint", str(folder)]
    if row == "DoRA":
        source = ["--checkpoint", str(shipped_tiny()), "--adapter", str(folder)]
    assert main(["--target", "onnx", "--quiet", *source, "-o", str(tmp_path / "my-bundle")]) == 1
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1, error
    assert not (tmp_path / "my-bundle").exists()


def test_every_row_of_the_table_is_tried_and_every_link_leads_somewhere() -> None:
    assert len(table()) == len(ROWS)
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", GUIDE.read_text(encoding="utf-8"))
    assert links and all((GUIDE.parent / link).exists() for link in links)

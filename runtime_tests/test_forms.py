"""Every form of a checkpoint: the bundle answers what transformers answers, or says why there is none.

Four layers of tiny, float32, greedy: a question in text and one about a picture. Forms that are the same model with the
same files share one bundle; what decides that is everything an export reads.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from export import pipeline
from export.__main__ import main
from export.arguments import build_parser, spec_from
from export.bundle.reader import Bundle
from export.chat import pictures
from export.chat.chat import Chat
from export.chat.conversation import Contract, Conversation
from export.chat.template import load_tokenizer
from export.checkpoint import open_checkpoint
from export.checkpoint.names import expected
from export.progress import Reporter
from export.spec import ExportSpec
from export.validate.transformers_model import quiet, token_kinds
from runtime_tests.forms import FORMS, OURS_ALONE, REFUSED, copy_tiny
from targets import TARGETS, load_target
from targets.base import Job

LAYERS, TOKENS = 4, 6
DEMO = Path(__file__).parents[1] / "docs" / "demo.png"
TEXT: list[dict[str, Any]] = [{"role": "user", "content": "12+30=?"}]
PICTURE: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Read."}]}
]
TEXT_ONLY = {"text decoder alone", "text decoder without head"} | {f"vision {what}" for what in (
    "tensors missing", "config null", "config absent")}  # fmt: skip
NOTICES = {
    "vision tensors missing": "describes a vision encoder but the weights hold none",
    "tied head differs": "config.json ties the head to the embedding, but lm_head.weight is stored and differs",
    "untied in text_config": "config.json ties the head to the embedding, but lm_head.weight is stored and differs",
    "extra head": "multi-token-prediction head",
    "zero biases": "q_proj.bias: biases that are all zero",
    "left-over quantisation config": "has a quantization_config, but the weights are plain numbers",
    "published": "<|im_end|> (394, named by the template and the tokenizer) and <|endoftext|> (392, named by config",
}
"""What the user is told, where a form is not taken as it stands."""

pytestmark = pytest.mark.usefixtures("one_thread")


def sequence(messages: list[dict[str, Any]], tokenizer: Any, rows: int) -> list[int]:
    """Prompt ids with the picture's place repeated `rows` times, as transformers' processor does."""
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    text = text.replace("<|image_pad|>", "<|image_pad|>" * rows)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def transformers_model(folder: Path) -> Any:
    """transformers' own model of the folder, cut to LAYERS layers, in float32."""
    from transformers import AutoConfig, AutoModelForCausalLM, Qwen3_5ForConditionalGeneration

    with quiet():
        config = AutoConfig.from_pretrained(folder)
        whole = config.model_type == "qwen3_5"
        text = config.text_config if whole else config
        text.num_hidden_layers, text.layer_types = LAYERS, text.layer_types[:LAYERS]
        kind: Any = Qwen3_5ForConditionalGeneration if whole else AutoModelForCausalLM
        return kind.from_pretrained(folder, config=config, dtype=torch.float32).eval()


@torch.inference_mode()
def transformers_answers(folder: Path, *, sees: bool = True, adapter: Path | None = None) -> list[list[int]]:
    """Greedy answers of transformers' own model, tokenizer and image processor over the folder; no cache, no limits."""
    from peft import PeftModel
    from transformers import AutoTokenizer, Qwen2VLImageProcessorPil

    model = transformers_model(folder)
    image_token_id = getattr(model.config, "image_token_id", -1)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter)).eval()
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        processor = Qwen2VLImageProcessorPil.from_pretrained(folder) if sees else None

    def answer(ids: list[int], **inputs: Any) -> list[int]:
        new: list[int] = []
        while len(new) < TOKENS:
            tokens = torch.tensor([[*ids, *new]])
            more = {**inputs, "mm_token_type_ids": token_kinds(tokens, image_token_id)} if inputs else {}
            new.append(int(model(input_ids=tokens, **more).logits[0, -1].argmax()))
        return new

    answers = [answer(sequence(TEXT, tokenizer, 0))]
    if processor is not None:
        seen = processor(Image.open(DEMO).convert("RGB"), do_resize=False, return_tensors="pt")
        rows = int(seen["image_grid_thw"].prod()) // 4
        answers.append(answer(sequence(PICTURE, tokenizer, rows), **seen))
    return answers


@dataclass
class Built:
    """An export: the answers of its bundle, its manifest."""

    answers: list[list[int]]
    manifest: dict[str, Any]


class Exports:
    """Bundles by what an export reads: the config, every tensor, every file beside the weights."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.known: dict[tuple[str, str], Built] = {}

    def answers(self, folder: Path, target: str, *more: str) -> Built:
        spec = self._spec(folder, target, *more)
        key = (target, self._digest(spec, folder))
        if key not in self.known:
            self.known[key] = self._build(spec)
        return self.known[key]

    def _spec(self, folder: Path, target: str, *more: str) -> ExportSpec:
        words = f"--target {target} --recipe fp32 --num-layers {LAYERS} --context-length 64 --prefill-lengths 32"
        words += " --image-sizes 64x96 --skip-validation --threads 1"
        options = build_parser().parse_args([*words.split(), "--checkpoint", str(folder), *more])
        return replace(spec_from(options), output=self.place / f"{target}-{len(self.known)}")

    def _digest(self, spec: ExportSpec, folder: Path) -> str:
        checkpoint = open_checkpoint(spec)
        digest = hashlib.sha256(repr(checkpoint.model_config).encode())
        digest.update(spec.size.encode())
        for name in sorted(expected(checkpoint.model_config)):
            digest.update(name.encode())
            digest.update(checkpoint.read(name).numpy().tobytes())
        for file in sorted(p for pattern in ("*.json", "*.jinja", "*.txt") for p in folder.glob(pattern)):
            if file.name not in ("config.json", "model.safetensors.index.json", "trainer_state.json"):
                digest.update(file.name.encode() + file.read_bytes())
        digest.update(repr([checkpoint.config.get(n) for n in ("video_token_id", "eos_token_id")]).encode())
        return digest.hexdigest()

    def _build(self, spec: ExportSpec) -> Built:
        with pytest.MonkeyPatch.context() as patch:
            # Every method would first run in a child process of its own: seconds, and no question of a form.
            patch.setattr(pipeline, "Job", partial(Job, try_out=False))
            path = pipeline.run(spec, Reporter(quiet=True)).path
        bundle = Bundle.open(path)
        tokenizer = load_tokenizer(path)
        with closing(load_target(spec.target).open(path, bundle.manifest, 1)) as session:
            conversation = Conversation(session, replace(Contract.of(bundle.manifest), stop_token_ids=()))
            answers = [Chat(conversation, tokenizer).answer(TEXT, max_new_tokens=TOKENS)[1]]
            if bundle.manifest["image_sizes"]:
                answers.append(
                    Chat(conversation, tokenizer).answer(PICTURE, [pictures.load(DEMO)], max_new_tokens=TOKENS)[1]
                )
        return Built(answers, bundle.manifest)


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    return Exports(tmp_path_factory.mktemp("bundles"))


@pytest.fixture(scope="module")
def tiny_answers(tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    return transformers_answers(copy_tiny(tmp_path_factory.mktemp("tiny") / "tiny"))


def cases() -> Iterator[Any]:
    """Every form with every target. By default a form is tried on one of them, in turn, because forms are read before
    a target is asked; all three by the slow tests.
    """
    for number, form in enumerate((*FORMS, *OURS_ALONE)):
        for place, target in enumerate(TARGETS):
            marks = () if number % len(TARGETS) == place else (pytest.mark.slow,)
            yield pytest.param(form, target, marks=marks, id=f"{form} {target}")


@pytest.mark.parametrize(("form", "target"), cases())
def test_every_form_answers_as_transformers_does(
    form: str, target: str, exports: Exports, tiny_answers: list[list[int]], tmp_path: Path
) -> None:
    folder = copy_tiny(tmp_path / "checkpoint")
    {**FORMS, **OURS_ALONE}[form](folder)
    truth = tiny_answers if form in OURS_ALONE else transformers_answers(folder, sees=form not in TEXT_ONLY)
    built = exports.answers(folder, target)
    assert built.answers == truth
    assert built.manifest["tokenizer"]["stop_token_ids"] == [394, 392]
    assert built.manifest["model"]["size"] == ("custom" if form == "pruned depth" else "tiny")
    assert bool(built.manifest["image_sizes"]) == (form not in TEXT_ONLY)
    rows = {"449 rows": 449, "413 rows": 413, "412 rows": 412}.get(form, 448)
    assert (built.manifest["model"]["vocab_size"], built.manifest["tokenizer"]["num_tokens"]) == (rows, 412)


@pytest.mark.parametrize("target", TARGETS)
def test_an_adapter_answers_as_peft_does(target: str, exports: Exports, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    folder, adapter = copy_tiny(tmp_path / "checkpoint"), tmp_path / "adapter"
    torch.manual_seed(7)
    modules = ["q_proj", "o_proj", "up_proj", "in_proj_qkv", "linear_fc1"]
    trained = get_peft_model(
        transformers_model(folder), LoraConfig(r=4, lora_alpha=16, use_rslora=True, target_modules=modules)
    )
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    trained.save_pretrained(str(adapter))
    truth = transformers_answers(folder, adapter=adapter)
    assert truth != transformers_answers(folder), "the adapter changes what is answered"
    built = exports.answers(folder, target, "--adapter", str(adapter))
    assert built.answers == truth
    assert built.manifest["model"]["source"]["adapter"] == "adapter"


def test_forms_that_are_other_models_answer_otherwise(exports: Exports, tmp_path: Path) -> None:
    """The comparison above can fail: heads and pixel scales change what is answered."""
    answers = {}
    for form in ("published", "untied", "not normalised"):
        folder = copy_tiny(tmp_path / form)
        FORMS[form](folder)
        answers[form] = transformers_answers(folder)
    assert answers["published"][0] != answers["untied"][0]
    assert answers["published"][1] != answers["not normalised"][1]


@pytest.mark.parametrize("form", NOTICES)
def test_the_user_is_told_what_was_decided(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy_tiny(tmp_path / "checkpoint")
    {**FORMS, **OURS_ALONE}[form](folder)
    words = ["--target", "onnx", "--recipe", "int8", "--num-layers", "1", "--no-vision", "--skip-validation"]
    if form.startswith("vision"):
        words.remove("--no-vision")
    assert main([*words, "--checkpoint", str(folder), "-o", str(tmp_path / "bundle")]) == 0
    assert NOTICES[form] in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("form", REFUSED)
def test_what_cannot_be_read_rightly_is_told_before_any_work(
    form: str, target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = REFUSED[form]
    folder = copy_tiny(tmp_path / "checkpoint")
    change(folder)
    words = ["--target", target, "--skip-validation", "--quiet", "--checkpoint", str(folder)]
    assert main([*words, "-o", str(tmp_path / "bundle")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert re.search(message, error), error
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]

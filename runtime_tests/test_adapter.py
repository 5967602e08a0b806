"""Adapters: merged tensors against PEFT's own merge, untied heads, and every refusal."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from export.bundle.writer import BundleWriter
from export.chat.sidecars import write_tokenizer
from export.checkpoint import CheckpointError
from export.checkpoint.adapter import AdapterCheckpoint
from export.checkpoint.adapter_config import ADAPTER_CONFIG, ADAPTER_PICKLE, ADAPTER_WEIGHTS, check_beside
from export.checkpoint.check import check
from export.checkpoint.folder import FolderCheckpoint
from export.checkpoint.names import EMBEDDING, HEAD, canonical
from export.sizes import shipped_tiny

TINY = shipped_tiny()
LAYER = "model.language_model.layers.3.self_attn"
Q = f"{LAYER}.q_proj.weight"
Q_KEY = f"base_model.model.{LAYER}.q_proj"
IDS = torch.arange(20, 29)[None]

# float32 rounding of W + scaling · B A, whose order of additions differs by the rows that are read at once.
TOLERANCE = 1e-6

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")


@pytest.fixture(scope="module", autouse=True)
def _alone(one_thread: None) -> Iterator[None]:
    """Tiny tensors are faster with one thread; PEFT warns about tied weights and checks a hub it cannot reach."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def picture_model() -> Any:
    return AutoModelForImageTextToText.from_pretrained(TINY, dtype=torch.float32)


@pytest.fixture(scope="module")
def text_model() -> Any:
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)


@pytest.fixture(scope="module")
def base() -> FolderCheckpoint:
    return FolderCheckpoint(TINY)


def train(model: Any, folder: Path, *, rows: int | None = None, save_embeddings: bool = False, **config: Any) -> Any:
    """A PEFT model with random updates, saved into `folder`; the model given stays as it is."""
    torch.manual_seed(7)
    model = copy.deepcopy(model)
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
    peft = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 12, **config}))
    peft.eval()
    with torch.no_grad():
        for _, parameter in peft.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    peft.save_pretrained(str(folder), save_embedding_layers=True if save_embeddings else "auto")
    return peft


def merged(peft: Any) -> dict[str, torch.Tensor]:
    """PEFT's own merge by published names."""
    return {canonical(name): tensor.detach() for name, tensor in peft.merge_and_unload().state_dict().items()}


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference relative to the largest value."""
    return float((actual - expected).abs().max() / expected.abs().max())


def compare(checkpoint: AdapterCheckpoint, wanted: dict[str, torch.Tensor]) -> None:
    """Every tensor of PEFT's merge reads the same; a text model knows no vision tensors."""
    known = {name for name in checkpoint.names() if not name.startswith("model.visual.")}
    assert known <= wanted.keys()
    for name in set(checkpoint.names()) & wanted.keys():
        assert checkpoint.shape(name) == tuple(wanted[name].shape)
        assert difference(checkpoint.read(name), wanted[name]) <= TOLERANCE, name


def changed(checkpoint: AdapterCheckpoint, base: FolderCheckpoint) -> set[str]:
    names = set(checkpoint.names()) & set(base.names())
    return {name for name in names if not torch.equal(checkpoint.read(name), base.read(name))}


# The projections of one decoder layer, and how many modules of tiny have each name.
FULL = ["q_proj", "k_proj", "v_proj", "o_proj"]

CASES: dict[str, tuple[dict[str, Any], int, str]] = {
    "plain": ({"target_modules": ["q_proj", "down_proj"]}, 2 + 8, "LoRA of rank 4 and alpha 12 into 10 modules"),
    "rslora": ({"target_modules": FULL, "use_rslora": True}, 8, "rsLoRA of rank 4 and alpha 12 into 8 modules"),
    "patterns": (
        {
            "target_modules": [*FULL, "in_proj_a"],
            "rank_pattern": {"k_proj": 2, r"^model\.language_model\.layers\.3.*o_proj": 6, "q_pro": 3},
            "alpha_pattern": {r"layers\.7\.self_attn\.(q|v)_proj": 5, "in_proj_a": 1.5},
        },
        8 + 6,
        "LoRA of rank 2/4/6 and alpha 1.5/5/12 into 14 modules",
    ),
    "all-linear": (
        {"target_modules": "all-linear"},
        # 2 attention layers, 6 DeltaNet layers with 5 projections, 8 MLPs; 4 blocks of vision and its merger
        2 * 4 + 6 * 5 + 8 * 3 + 4 * 4 + 2,
        "LoRA of rank 4 and alpha 12 into 80 modules",
    ),
    "embeddings of vision": (
        {"target_modules": ["pos_embed", "patch_embed.proj", "q_proj"], "use_rslora": True},
        4,
        "rsLoRA of rank 4 and alpha 12 into 4 modules",
    ),
    "whole modules": (
        {"target_modules": ["q_proj"], "modules_to_save": ["k_proj", "merger", "layers.1.linear_attn"]},
        # the second module, saved whole, has 9 tensors; merger 6; k_proj one in each of 2 layers
        2 + 2 + 6 + 9,
        "rank 4 and alpha 12 into 2 modules, whole modules k_proj, merger, layers.1.linear_attn",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_merge_of_peft(case: str, picture_model: Any, base: FolderCheckpoint, tmp_path: Path) -> None:
    config, count, notice = CASES[case]
    wanted = merged(train(picture_model, tmp_path, **config))
    checkpoint = AdapterCheckpoint(base, tmp_path)
    compare(checkpoint, wanted)
    assert len(changed(checkpoint, base)) == count
    assert notice in checkpoint.notices[-1]
    assert check(checkpoint, checkpoint.model_config) == []
    assert checkpoint.model_config == base.model_config
    assert checkpoint.config == base.config


def test_names_of_a_text_model(text_model: Any, base: FolderCheckpoint, tmp_path: Path) -> None:
    """A model trained as Qwen3_5ForCausalLM stores `model.layers.…`; an anchored pattern follows its spelling."""
    patterns = {r"^model\.layers\.3\.self_attn\.q_proj": 5}
    wanted = merged(train(text_model, tmp_path, target_modules="all-linear", rank_pattern=patterns))
    checkpoint = AdapterCheckpoint(base, tmp_path)
    compare(checkpoint, wanted)
    assert len(changed(checkpoint, base)) == 2 * 4 + 6 * 5 + 8 * 3


def test_blocks_equal_whole_reads(picture_model: Any, base: FolderCheckpoint, tmp_path: Path) -> None:
    train(
        picture_model, tmp_path, target_modules=["q_proj", "embed_tokens", "proj"], modules_to_save=["lm_head", "fc2"]
    )
    checkpoint = AdapterCheckpoint(base, tmp_path)
    names = [Q, EMBEDDING, HEAD, "model.visual.patch_embed.proj.weight", "model.visual.blocks.0.attn.proj.weight"]
    for name in names:
        whole = checkpoint.read(name)
        ranges = [(0, 5), (5, 6), (6, 100), (100, whole.shape[0]), (3, 3)]
        parts = [checkpoint.read(name, *rows) for rows in ranges]
        assert difference(torch.cat(parts[:4]), whole) <= TOLERANCE
        assert parts[4].shape == (0, *whole.shape[1:])
    with pytest.raises(CheckpointError, match=r"rows 0 to 449 asked of 448"):
        checkpoint.read(EMBEDDING, 0, 449)


def test_half_precision_factors(picture_model: Any, base: FolderCheckpoint, tmp_path: Path) -> None:
    """They are multiplied in float32."""
    train(picture_model, tmp_path, target_modules=["q_proj"])
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(tmp_path / ADAPTER_WEIGHTS).items()}
    save_file(tensors, tmp_path / ADAPTER_WEIGHTS)
    a, b = (tensors[f"{Q_KEY}.lora_{side}.weight"].float() for side in "AB")
    assert torch.equal(AdapterCheckpoint(base, tmp_path).read(Q), base.read(Q) + (b @ a) * 3)


# What is trained of a tied pair, and whether the trained model is still tied.
PAIRS: dict[str, tuple[dict[str, Any], bool]] = {
    "embedding": ({"modules_to_save": ["embed_tokens"]}, False),
    "head": ({"modules_to_save": ["lm_head"]}, False),
    "both": ({"modules_to_save": ["embed_tokens", "lm_head"]}, False),
    "both as one": ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
    "LoRA on the embedding, head whole": ({"targets": ["embed_tokens"], "modules_to_save": ["lm_head"]}, False),
    "LoRA on the head, embedding whole": ({"targets": ["lm_head"], "modules_to_save": ["embed_tokens"]}, False),
    "resized, untrained": ({"rows": 460, "save_embeddings": True}, True),
    "resized, embedding": ({"rows": 460, "save_embeddings": True, "modules_to_save": ["embed_tokens"]}, False),
    "resized, both": ({"rows": 430, "modules_to_save": ["embed_tokens", "lm_head"]}, False),
}


@pytest.mark.parametrize("case", PAIRS)
def test_tied_pairs(case: str, picture_model: Any, base: FolderCheckpoint, tmp_path: Path) -> None:
    """The result is the trained function: PEFT's unmerged and merged models agree, and so do we."""
    config, tied = dict(PAIRS[case][0]), PAIRS[case][1]
    targets = ["q_proj", *config.pop("targets", [])]
    peft = train(picture_model, tmp_path, target_modules=targets, **config)
    with torch.no_grad():
        trained = peft(input_ids=IDS).logits
        model = peft.merge_and_unload()
        assert difference(model(input_ids=IDS).logits, trained) < 1e-4
    assert model.config.tie_word_embeddings is tied

    checkpoint = AdapterCheckpoint(base, tmp_path)
    wanted = {canonical(name): tensor for name, tensor in model.state_dict().items()}
    compare(checkpoint, wanted)
    assert checkpoint.model_config.text.tie_word_embeddings is tied
    assert (HEAD in checkpoint.names()) is not tied
    if tied:
        assert torch.equal(wanted[HEAD], wanted[EMBEDDING])
    rows = config.get("rows", 448)
    assert checkpoint.model_config.text.vocab_size == rows
    assert checkpoint.config["text_config"]["vocab_size"] == rows
    assert checkpoint.config["tie_word_embeddings"] is checkpoint.config["text_config"]["tie_word_embeddings"] is tied
    assert ("no longer tied" in checkpoint.notices[0]) is not tied
    assert (f"a vocabulary of {rows} rows instead of 448" in checkpoint.notices[0]) is (rows != 448)
    assert check(checkpoint, checkpoint.model_config) == []
    assert base.config["tie_word_embeddings"] is base.model_config.text.tie_word_embeddings is True


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    ],
)
def test_lora_on_a_tied_pair_is_refused(
    config: dict[str, Any], picture_model: Any, base: FolderCheckpoint, tmp_path: Path
) -> None:
    """PEFT's merged model differs from the trained one: there is nothing both agree on."""
    peft = train(picture_model, tmp_path, **config)
    with torch.no_grad():
        trained = peft(input_ids=IDS).logits
        assert difference(peft.merge_and_unload()(input_ids=IDS).logits, trained) > 1e-3
    with pytest.raises(CheckpointError, match=r"adapts .*ties to one tensor.*clone the head"):
        AdapterCheckpoint(base, tmp_path)


def test_lora_on_an_untied_pair(picture_model: Any, tmp_path: Path) -> None:
    model = copy.deepcopy(picture_model)
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 2)
    model.save_pretrained(tmp_path / "base")
    config: dict[str, Any] = {"target_modules": ["embed_tokens", "lm_head"], "rank_pattern": {"lm_head": 3}}
    wanted = merged(train(model, tmp_path / "adapter", **config))
    base = FolderCheckpoint(tmp_path / "base")
    checkpoint = AdapterCheckpoint(base, tmp_path / "adapter")
    compare(checkpoint, wanted)
    assert changed(checkpoint, base) == {EMBEDDING, HEAD}


@pytest.fixture(scope="module")
def adapter(picture_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain adapter of q_proj in two layers, rank 4, whose files the tests below change."""
    folder = tmp_path_factory.mktemp("adapter")
    train(picture_model, folder, target_modules=["q_proj"])
    return folder


def variant_of(
    adapter: Path,
    folder: Path,
    config: dict[str, Any] | None = None,
    tensors: Callable[[dict[str, torch.Tensor]], Any] | None = None,
) -> Path:
    """A copy of an adapter with changed fields and tensors."""
    folder.mkdir(exist_ok=True)
    fields = {**json.loads((adapter / ADAPTER_CONFIG).read_text()), **(config or {})}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(fields))
    stored = load_file(adapter / ADAPTER_WEIGHTS)
    if tensors is not None:
        tensors(stored)
    save_file(stored, folder / ADAPTER_WEIGHTS)
    return folder


def test_where_it_comes_from(adapter: Path, base: FolderCheckpoint, tmp_path: Path) -> None:
    folder = variant_of(adapter, tmp_path / "mine")
    checkpoint = AdapterCheckpoint(base, folder)
    assert checkpoint.source == {**base.source, "adapter": "mine"}
    assert checkpoint.folder is None
    assert checkpoint.preprocessor == base.preprocessor
    assert checkpoint.notices == ["The adapter mine was merged: LoRA of rank 4 and alpha 12 into 2 modules."]
    key = checkpoint.content_key()
    assert key.startswith(base.content_key()) and ADAPTER_WEIGHTS in key
    variant_of(adapter, folder, {"lora_alpha": 100})
    assert AdapterCheckpoint(base, folder).content_key() != key


def test_tokenizer_of_the_adapter_wins(adapter: Path, base: FolderCheckpoint, tmp_path: Path) -> None:
    folder = variant_of(adapter, tmp_path / "mine")
    assert AdapterCheckpoint(base, folder).sidecar("tokenizer.json") == TINY / "tokenizer.json"
    (folder / "tokenizer.json").write_text("{}")
    (folder / "generation_config.json").write_text("{}")
    checkpoint = AdapterCheckpoint(base, folder)
    assert checkpoint.sidecar("tokenizer.json") == folder / "tokenizer.json"
    assert checkpoint.sidecar("vocab.json") is None
    assert checkpoint.sidecar("chat_template.jinja") == TINY / "chat_template.jinja"
    assert checkpoint.sidecar("tokenizer_config.json") == TINY / "tokenizer_config.json"
    assert checkpoint.sidecar("generation_config.json") == TINY / "generation_config.json"
    assert checkpoint.sidecar("../tokenizer.json") is None
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    checkpoint = AdapterCheckpoint(base, folder)
    assert checkpoint.sidecar("tokenizer_config.json") == folder / "tokenizer_config.json"
    assert checkpoint.sidecar("chat_template.jinja") is None, "the template of the base would be taken instead"


MINE = "{% for m in messages %}<|im_start|>mine {{ m.content }}<|im_end|>{% endfor %}"


@pytest.mark.parametrize("form", ["template", "template in the config", "tokenizer alone", "end of sequence"])
def test_what_is_written_is_what_the_adapter_brings(
    form: str, adapter: Path, base: FolderCheckpoint, tmp_path: Path
) -> None:
    folder = variant_of(adapter, tmp_path / "mine")
    settings = json.loads((TINY / "tokenizer_config.json").read_text())
    if form == "template":
        (folder / "chat_template.jinja").write_text(MINE)
    elif form == "template in the config":
        (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": MINE}))
    elif form == "end of sequence":
        (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "<|object_ref_end|>"}))
    else:
        (folder / "tokenizer.json").write_bytes((TINY / "tokenizer.json").read_bytes())
    checkpoint = AdapterCheckpoint(base, folder)
    with BundleWriter(tmp_path / "bundle", {}, overwrite=False, resume=False) as writer:
        manifest = write_tokenizer(checkpoint, checkpoint.model_config, writer).manifest
        written = (writer.path / "chat_template.jinja").read_text()
        writer.discard()
    theirs = (TINY / "chat_template.jinja").read_text()
    assert written == (MINE if form.startswith("template") else theirs)
    assert (396 in manifest["stop_token_ids"]) == (form == "end of sequence")


FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"peft_type": "LOHA"}, r"peft_type 'LOHA'; only PEFT's 'LORA'.*merge_and_unload"),
    "another tool": ({"peft_type": None}, r"peft_type None; only PEFT's 'LORA'"),
    "DoRA": ({"use_dora": True}, r"use_dora True; DoRA scales.*merge_and_unload"),
    "bias": ({"bias": "lora_only"}, r"bias 'lora_only'; biases outside the LoRA"),
    "lora_bias": ({"lora_bias": True}, r"lora_bias True; the update has a bias"),
    "fan in": ({"fan_in_fan_out": True}, r"fan_in_fan_out True; .*transposed"),
    "parameters": ({"target_parameters": ["linear_attn.A_log"]}, r"target_parameters .*bare parameters"),
    "tokens": ({"trainable_token_indices": [1, 2]}, r"trainable_token_indices \[1, 2\]; single rows"),
    "layers": ({"layer_replication": [[0, 4], [2, 5]]}, r"layer_replication .*other layers than the base"),
    "QA-LoRA": ({"use_qalora": True}, r"use_qalora True; .*averaged groups"),
    "BD-LoRA": ({"use_bdlora": {"nblocks": 2}}, r"use_bdlora .*diagonal blocks"),
    "KaSA": ({"kasa_config": {"beta": 1e-4}}, r"kasa_config .*changes the base"),
    "VeLoRA": ({"velora_config": {"scale": 1.0}}, r"velora_config .*only plain LoRA"),
    "MonteCLoRA": ({"monteclora_config": {"num_samples": 8}}, r"monteclora_config .*only plain LoRA"),
    "Megatron": ({"megatron_config": {"x": 1}}, r"megatron_config .*parallel layers"),
    "aLoRA": ({"alora_invocation_tokens": [5]}, r"alora_invocation_tokens \[5\]; .*train a plain LoRA"),
    "Arrow": ({"arrow_config": {"top_k": 3}}, r"arrow_config .*train a plain LoRA"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_16"}, r"'pissa_niter_16'; .*path_initial_model_for_weight_conversion"),
    "OLoRA": ({"init_lora_weights": "OLoRA"}, r"init_lora_weights 'OLoRA'; it may have changed the base"),
    "CorDA": ({"init_lora_weights": "corda"}, r"init_lora_weights 'corda'"),
    "LoftQ": ({"init_lora_weights": "loftq"}, r"init_lora_weights 'loftq'"),
    "LoRA-GA": ({"init_lora_weights": "lora_ga"}, r"init_lora_weights 'lora_ga'"),
    "unknown field": ({"use_newlora": True}, r"use_newlora True, a field this project does not know"),
    "unknown number": ({"new_scale": 0}, r"new_scale 0, a field this project does not know"),
    "rank": ({"r": 8}, r"shape \[4, 128\]; rank 8 of adapter_config.json and .*imply \[8, 128\]"),
    "rank of a pattern": ({"rank_pattern": {"q_proj": 2}}, r"rank 2 of adapter_config.json"),
    "no rank": ({"r": 0}, r"r 0; it must be a whole number above 0"),
    "alpha": ({"lora_alpha": "16"}, r"lora_alpha '16'; it must be a number above 0"),
    "switch": ({"use_rslora": "yes"}, r"use_rslora 'yes'; it must be true or false"),
    "pattern": ({"alpha_pattern": [1]}, r"alpha_pattern \[1\]; it must map"),
    "expression": ({"rank_pattern": {"(": 4}}, r"rank_pattern '\('; it must be a regular expression"),
    "pattern's rank": ({"rank_pattern": {"q_proj": 1.5}}, r"rank_pattern of q_proj 1.5; it must be a whole number"),
    "modules": ({"modules_to_save": "lm_head"}, r"modules_to_save 'lm_head'; it must be a list"),
    "module not saved": ({"modules_to_save": ["lm_head"]}, r"holds no tensor of lm_head, which modules_to_save"),
}


@pytest.mark.parametrize("case", FIELDS)
def test_fields_that_are_refused(case: str, adapter: Path, base: FolderCheckpoint, tmp_path: Path) -> None:
    config, message = FIELDS[case]
    with pytest.raises(CheckpointError, match=message):
        AdapterCheckpoint(base, variant_of(adapter, tmp_path, config))


def test_fields_that_change_nothing(adapter: Path, base: FolderCheckpoint, tmp_path: Path) -> None:
    """Initialisations that leave the base alone, training settings, and switches of the future that are off."""
    config = {"init_lora_weights": "gaussian", "lora_dropout": 0.1, "use_newlora": False, "new_config": {}}
    checkpoint = AdapterCheckpoint(base, variant_of(adapter, tmp_path, config))
    assert torch.equal(checkpoint.read(Q), AdapterCheckpoint(base, adapter).read(Q))


def test_every_field_of_peft_is_decided(adapter: Path) -> None:
    """A field that the installed PEFT writes and nobody decided would be refused as unknown once it is set."""
    from export.checkpoint.adapter_config import _HARMLESS, _READ, _REFUSED

    fields = json.loads((adapter / ADAPTER_CONFIG).read_text()).keys()
    assert not fields - _READ - _HARMLESS - _REFUSED.keys()


def rename(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def put(name: str, *shape: int, value: float = 0.0) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.update({name: torch.full(shape, value)})


A, B = f"{Q_KEY}.lora_A.weight", f"{Q_KEY}.lora_B.weight"
CONV = "base_model.model.model.language_model.layers.0.linear_attn.conv1d"

TENSORS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "B alone": (lambda t: t.pop(A), r"lora_B\.weight without its A; save the adapter again"),
    "A alone": (lambda t: t.pop(B), r"lora_A\.weight without its B"),
    "unknown layer": (
        lambda t: (rename(A, A.replace("layers.3", "layers.9"))(t), rename(B, B.replace("layers.3", "layers.9"))(t)),
        r"adapts .*layers\.9\.self_attn\.q_proj, which this checkpoint does not have; give ",
    ),
    "other width": (put(A, 4, 256), r"shape \[4, 256\]; rank 4 .*q_proj.weight \[512, 128\] imply \[4, 128\]"),
    "other rows": (put(B, 256, 4), r"shape \[256, 4\]; .*imply \[512, 4\]"),
    "shard of ZeRO-3": (put(A, 0), r"shape \[0\]; .*imply \[4, 128\]"),
    "magnitude": (put(f"{Q_KEY}.lora_magnitude_vector", 512), r"holds .*lora_magnitude_vector, which no plain LoRA"),
    "bias of B": (put(f"{Q_KEY}.lora_B.bias", 512), r"holds .*lora_B\.bias, which no plain LoRA"),
    "classifier": (put("base_model.model.score.weight", 2, 128), r"holds base_model\.model\.score\.weight, which no"),
    "whole and LoRA": (put(f"{Q_KEY}.weight", 512, 128), r"adapts .*q_proj twice"),
    "two spellings": (
        lambda t: (put("base_model.model.model.norm.weight", 128)(t), put("base_model.model.norm.weight", 128)(t)),
        r"holds model\.language_model\.norm\.weight twice",
    ),
    "whole, other shape": (put(f"base_model.model.{LAYER}.k_proj.weight", 128, 64), r"shape \[128, 64\]; the"),
    "convolution": (
        lambda t: (put(f"{CONV}.lora_A.weight", 4, 512, 4)(t), put(f"{CONV}.lora_B.weight", 512, 4, 1)(t)),
        r"adapts the depthwise convolution .*conv1d\.weight.*train without it",
    ),
    "NaN": (put(A, 4, 128, value=math.nan), r"adapter_model\.safetensors: .*lora_A\.weight has NaN in row 0"),
    "infinity": (put(B, 512, 4, value=math.inf), r"lora_B\.weight has an infinite value in row 0"),
    "overflow": (
        lambda t: (put(A, 4, 128, value=1e30)(t), put(B, 512, 4, value=1e30)(t)),
        r"^model\.language_model\.layers\.3\.self_attn\.q_proj\.weight has an infinite value in row 0",
    ),
    "head of a tied pair": (put("base_model.model.lm_head.weight", 448, 128), r"holds lm_head\.weight alone"),
    "two vocabularies": (
        lambda t: (
            put("base_model.model.lm_head.weight", 448, 128)(t),
            put("base_model.model.model.language_model.embed_tokens.weight", 460, 128)(t),
        ),
        r"gives the embedding 460 rows and the head 448",
    ),
    "rows of picture tokens": (
        put("base_model.model.model.language_model.embed_tokens.weight", 404, 128),
        r"gives the embedding 404 rows; the token ids of pictures reach 404; export with --no-vision",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_are_refused(case: str, adapter: Path, base: FolderCheckpoint, tmp_path: Path) -> None:
    tensors, message = TENSORS[case]
    folder = variant_of(adapter, tmp_path, tensors=tensors)
    with pytest.raises(CheckpointError, match=message):
        AdapterCheckpoint(base, folder).read(Q)


def test_embedding_of_a_resized_model_alone(picture_model: Any, base: FolderCheckpoint, tmp_path: Path) -> None:
    """The untied head has the rows of the base, those that training added were not saved."""
    train(picture_model, tmp_path, target_modules=["q_proj"], modules_to_save=["embed_tokens"], rows=460)
    tensors = load_file(tmp_path / ADAPTER_WEIGHTS)
    assert not any("lm_head" in name for name in tensors)
    with pytest.raises(CheckpointError, match=r"460 rows and the head 448.*save_embedding_layers=True"):
        AdapterCheckpoint(base, tmp_path)


def test_files_that_are_missing(adapter: Path, base: FolderCheckpoint, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"the folder has no adapter_config\.json; give the folder that PEFT"):
        AdapterCheckpoint(base, tmp_path)
    (tmp_path / ADAPTER_CONFIG).write_text((adapter / ADAPTER_CONFIG).read_text())
    with pytest.raises(CheckpointError, match=r"has no adapter_model\.safetensors"):
        AdapterCheckpoint(base, tmp_path)
    (tmp_path / ADAPTER_PICKLE).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"as pickle \(adapter_model\.bin\).*save_pretrained it again"):
        AdapterCheckpoint(base, tmp_path)
    (tmp_path / ADAPTER_WEIGHTS).write_bytes((adapter / ADAPTER_WEIGHTS).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"truncated"):
        AdapterCheckpoint(base, tmp_path)
    save_file({}, tmp_path / ADAPTER_WEIGHTS)
    with pytest.raises(CheckpointError, match=r"holds no tensors"):
        AdapterCheckpoint(base, tmp_path)


def test_an_adapter_is_never_dropped_silently(adapter: Path, tmp_path: Path) -> None:
    check_beside(TINY, None)
    folder = variant_of(adapter, tmp_path, {"base_model_name_or_path": "Qwen/Qwen3.5-0.8B"})
    alone = r"is an adapter, not a.*on top of Qwen/Qwen3\.5-0\.8B; give the base with --checkpoint.*--adapter "
    for choice in (None, "none", str(folder)):
        with pytest.raises(CheckpointError, match=alone):
            check_beside(folder, choice)
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"not merged.*--adapter .* merges it, --adapter none leaves it out"):
        check_beside(folder, None)
    check_beside(folder, "none")
    check_beside(folder, str(folder))
    (folder / ADAPTER_CONFIG).unlink()
    with pytest.raises(CheckpointError, match=r"side by side"):
        check_beside(folder, None)


def test_peft_loads_what_we_merged(adapter: Path, picture_model: Any, base: FolderCheckpoint) -> None:
    """The folder alone, loaded by PEFT into a fresh base, gives the same tensors."""
    loaded = PeftModel.from_pretrained(copy.deepcopy(picture_model), adapter)
    compare(AdapterCheckpoint(base, adapter), merged(loaded))

"""Which tensors a checkpoint folder holds: one file, shards with their index, or shards without one.

The headers of the shards decide, not the index: tools merge, drop and add tensors and keep the index of the
checkpoint they began with.
"""

from __future__ import annotations

import re
from pathlib import Path

from export.checkpoint.base import CheckpointError, read_json
from export.checkpoint.safetensors import Entry, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"(model|model\.safetensors)-(\d{5})-of-(\d{5})\.safetensors")
"""Both spellings are published."""
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def find_tensors(folder: Path) -> dict[str, Entry]:
    """Every tensor of the folder's weights by stored name, from the headers of its files.

    Raises:
        CheckpointError: no weights, weights of another format, a shard missing, damaged, or outside the folder.
    """
    if (folder / SINGLE).is_file():  # transformers prefers it to an index as well
        return read_header(folder / SINGLE)
    if (folder / INDEX).is_file():
        return _indexed(folder)
    numbered = {file.name: found for file in folder.glob("*.safetensors") if (found := _SHARD.fullmatch(file.name))}
    if numbered:
        return _numbered(folder, numbered)
    raise _no_weights(folder)


def _numbered(folder: Path, shards: dict[str, re.Match[str]]) -> dict[str, Entry]:
    """Shards without an index: their names say whether they are all there."""
    stem, _, count = max(found.groups() for found in shards.values())
    wanted = [f"{stem}-{i:05}-of-{count}.safetensors" for i in range(1, int(count) + 1)]
    missing = [name for name in wanted if name not in shards]
    if missing or len(shards) != len(wanted):
        what = f"lacks {', '.join(missing[:3])}" if missing else "holds shards of several checkpoints"
        raise CheckpointError(
            f"{folder} has {len(shards)} shards, no {INDEX}, and {what}; download what is missing, with the index"
        )
    return _merged({name: read_header(folder / name) for name in wanted}, {})


def _indexed(folder: Path) -> dict[str, Entry]:
    index = folder / INDEX
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(shard, str) for shard in placed.values()):
        raise CheckpointError(f"{index} has no weight_map of tensor to file name; download it again")
    shards: dict[str, dict[str, Entry]] = {}
    for shard in sorted(set(placed.values())):
        if Path(shard).name != shard:
            raise CheckpointError(f"{index} names the shard {shard!r}; shards must lie beside the index")
        if not (folder / shard).is_file():
            names = [name for name, where in placed.items() if where == shard]
            if all(name.startswith("mtp.") for name in names):
                continue  # the extra head, which is not exported, in a shard of its own that nobody copied
            raise CheckpointError(
                f"{index} names the shard {shard} ({len(names)} tensors), which is absent; download it into {folder}"
            )
        shards[shard] = read_header(folder / shard)
    return _merged(shards, placed)


def _merged(shards: dict[str, dict[str, Entry]], placed: dict[str, str]) -> dict[str, Entry]:
    """The tensors of all shards; where two hold one name, the index says which counts.

    Raises:
        CheckpointError: two shards hold one name and no index decides.
    """
    entries: dict[str, Entry] = {}
    for shard, tensors in shards.items():
        for name, entry in tensors.items():
            other = entries.get(name)
            if other is None or placed.get(name) == shard:
                entries[name] = entry
            elif placed.get(name) != other.shard.name:
                raise CheckpointError(
                    f"{name} is in {other.shard.name} and in {shard}, and no index says which counts; keep the shards "
                    "of one checkpoint only"
                )
    return entries


def _no_weights(folder: Path) -> CheckpointError:
    """Why a folder without readable weights is refused, by what it holds instead."""
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    converted = sorted(file.name for file in folder.glob("*.gguf"))
    if converted:
        return CheckpointError(
            f"{folder} holds {converted[0]}, a model converted for llama.cpp; give the safetensors checkpoint that it "
            "was made from"
        )
    if others:
        return CheckpointError(
            f"{folder} has safetensors files ({', '.join(others[:3])}) but neither {SINGLE} nor {INDEX}; give the file "
            "its published name, or add the index that was published with the shards"
        )
    if pickles:
        return CheckpointError(
            f"{folder} holds its weights as pickle ({pickles[0]}); only safetensors are read, because "
            "unpickling runs code: convert with save_pretrained(safe_serialization=True)"
        )
    return CheckpointError(f"{folder} has no weights; {SINGLE} or {INDEX} with its shards must be there")

"""Checkpoints from hubs, against real HTTP servers on loopback: pinned, checked before a byte is fetched."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from export.checkpoint import CheckpointError, open_checkpoint
from export.checkpoint.base import Checkpoint
from export.checkpoint.download import MARGIN_BYTES, check_files, check_room, wanted
from export.checkpoint.folder import FolderCheckpoint
from export.checkpoint.shards import SINGLE
from export.sizes import TINY, shipped_tiny
from export.spec import ExportSpec
from runtime_tests.hub_server import Hub, Repository, listing, serving, sha256

NORM = "model.language_model.norm.weight"
NAME = f"org-{os.getpid():x}/checkpoint.of-{os.getpid():x}"
"""Another one in every run: nothing may depend on a published name."""
OLD, NEW = "a" * 40, "b" * 40
Files = dict[str, bytes]


class Disk(NamedTuple):
    """What shutil.disk_usage returns."""

    total: int
    used: int
    free: int


@pytest.fixture(scope="module")
def tiny() -> Files:
    return {file.name: file.read_bytes() for file in shipped_tiny().iterdir()}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on loopback, and an empty cache."""
    with serving() as server:
        _point_at(server.endpoint, tmp_path, monkeypatch)
        yield server


@pytest.fixture
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub at a closed port of this machine, and an empty cache."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        _point_at(f"http://127.0.0.1:{probe.getsockname()[1]}", tmp_path, monkeypatch)
    return tmp_path


def _point_at(endpoint: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


def _open(name: str = NAME, revision: str | None = None) -> Checkpoint:
    return open_checkpoint(ExportSpec("onnx", TINY, checkpoint=name, revision=revision))


def _free(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk(10**12, 10**12 - count, count))


# --- the hub --------------------------------------------------------------------------------------------------


def test_a_download_is_pinned_to_the_commit_of_the_default_branch(hub: Hub, tmp_path: Path, tiny: Files) -> None:
    extra = {"pytorch_model.bin": b"pickle", "modeling.py": b"code", "checkpoint-9/model.safetensors": b"old"}
    template = {"additional_chat_templates/tools.jinja": b"{{ messages }}"}
    hub.repositories[NAME] = Repository({OLD: {}, NEW: {**tiny, **extra, **template}})
    checkpoint = _open()
    assert checkpoint.source == {"kind": "hub", "id": NAME, "revision": NEW, "seed": None}
    assert checkpoint.notices == [
        f"{NAME}: no --revision was given: the default branch is commit {NEW}, which the manifest records."
    ]
    assert torch.equal(checkpoint.read(NORM), FolderCheckpoint(shipped_tiny()).read(NORM))
    assert checkpoint.folder is not None
    found = {str(file.relative_to(checkpoint.folder)) for file in checkpoint.folder.rglob("*") if file.is_file()}
    assert found == {*tiny, *template}  # never pickles, never code, no other checkpoint
    # Every file was asked for by commit: a branch that moves meanwhile mixes nothing.
    assert {path.split("/")[4] for _, path in hub.requests if "/resolve/" in path} == {NEW}


@pytest.mark.parametrize("revision", ["v1", OLD])
def test_a_tag_is_resolved_and_a_commit_is_taken(hub: Hub, tiny: Files, revision: str) -> None:
    other = {**tiny, SINGLE: b"not these weights"}
    hub.repositories[NAME] = Repository({OLD: tiny, NEW: other}, tags={"v1": OLD})
    checkpoint = _open(revision=revision)
    assert checkpoint.source["revision"] == OLD
    told = [f"{NAME}: --revision v1 is commit {OLD}, which the manifest records."]
    assert checkpoint.notices == (told if revision == "v1" else [])


def test_a_finished_download_is_used_without_the_hub(hub: Hub, tiny: Files) -> None:
    hub.repositories[NAME] = Repository({NEW: tiny}, tags={"v1": NEW})
    _open(), _open(revision="v1")
    hub.refused = ""
    for revision in (None, "v1", NEW):
        checkpoint = _open(revision=revision)
        assert checkpoint.source["revision"] == NEW
        assert checkpoint.notices == [
            f"{NAME}: the hub does not serve it now (HfHubHTTPError); "
            f"the finished download of commit {NEW} in the cache is used."
        ]
    with pytest.raises(CheckpointError, match=r"cannot download .*: no connection .*and it is not in the cache"):
        _open(revision="never-asked-for")


def test_an_unfinished_download_is_continued_and_never_used(
    hub: Hub, tiny: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories[NAME] = Repository({NEW: tiny})
    hub.refused = "/lfs/"
    with pytest.raises(CheckpointError, match="cannot download"):
        _open()
    hub.refused = ""
    with pytest.raises(CheckpointError, match=r"no connection to the hub .* it is not in the cache"):
        _open()
    hub.refused = None
    hub.requests.clear()
    # The small files are there: the weights alone must find room.
    _free(monkeypatch, len(tiny[SINGLE]) + MARGIN_BYTES)
    assert _open().source["revision"] == NEW
    assert hub.fetched() == [SINGLE]


def test_too_little_disk_is_refused_before_a_byte_is_fetched(
    hub: Hub, tmp_path: Path, tiny: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories[NAME] = Repository({NEW: {**tiny, "pytorch_model.bin": bytes(1 << 24)}})
    needed = sum(map(len, tiny.values()))  # what is not fetched needs no room
    _free(monkeypatch, needed + MARGIN_BYTES - 1)
    message = rf"{NAME}: 0\.01 GB are missing and 0\.27 GB must stay free, but {tmp_path} has 0\.28 GB; .* HF_HOME at"
    with pytest.raises(CheckpointError, match=message):
        _open()
    assert hub.fetched() == []
    _free(monkeypatch, needed + MARGIN_BYTES)
    assert _open().source["revision"] == NEW
    # Another commit with the same weights needs their room no second time.
    hub.repositories[NAME].commits["c" * 40] = {**tiny, "README.md": b"new"}
    _free(monkeypatch, MARGIN_BYTES + 3)
    assert _open().source["revision"] == "c" * 40
    _free(monkeypatch, 0)  # nothing is missing: nothing is needed
    assert _open().source["revision"] == "c" * 40


def test_a_hub_that_tells_no_sizes_is_named(hub: Hub, tiny: Files) -> None:
    hub.repositories[NAME] = Repository({NEW: tiny}, sizes=False)
    assert _open().notices[1:] == [
        f"{NAME}: the hub tells no size of {len(tiny)} files; room for them was not checked."
    ]


def _config(**changes: object) -> bytes:
    return json.dumps({"model_type": "qwen3_5", **changes}).encode()


UNREADABLE: dict[str, tuple[Files, str]] = {
    "pickle": ({"pytorch_model.bin": b"", "config.json": b"{}"}, r"as pickle \(pytorch_model\.bin\); .*safe_serializ"),
    "gguf": ({"q4.gguf": b"", "q8.gguf": b"", "README.md": b""}, r"as GGUF \(q4\.gguf and 1 more\); .*converted from"),
    "mlx": ({"weights.npz": b"", "config.json": b"{}"}, r"as MLX arrays \(weights\.npz\)"),
    "elsewhere": ({"bf16/model.safetensors": b"", "config.json": b"{}"}, r"safetensors in a folder of its own \(bf16/"),
    "nothing": ({"README.md": b""}, r"holds no weights \(1 files\)"),
    "no config": ({SINGLE: b"weights"}, r"has no config\.json"),
    "outside": ({"../config.json": b"", SINGLE: b""}, r"'\.\./config\.json', which lies outside the repository"),
    "mlx quantised": ({SINGLE: b"", "config.json": _config(quantization={"bits": 4})}, r"quantised already .*: mlx\)"),
    "fp8": ({SINGLE: b"", "config.json": _config(quantization_config={"quant_method": "fp8"})}, r"json: fp8\); an"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_weights_that_cannot_be_read_are_refused_before_the_download(hub: Hub, case: str) -> None:
    files, message = UNREADABLE[case]
    hub.repositories[NAME] = Repository({NEW: files})
    with pytest.raises(CheckpointError, match=rf"{NAME} .*{message}"):
        _open()
    assert set(hub.fetched()) <= {"config.json"}


def test_a_repository_of_the_mlx_library_is_refused(hub: Hub, tiny: Files) -> None:
    hub.repositories[NAME] = Repository({NEW: tiny}, library="mlx")
    with pytest.raises(CheckpointError, match=r"holds weights for MLX; take the checkpoint that it was converted"):
        _open()
    assert hub.fetched() == []


def test_what_the_hub_refuses_is_told_apart(hub: Hub, tiny: Files) -> None:
    hub.repositories[NAME] = Repository({NEW: tiny})
    hub.repositories["org/closed"] = Repository({NEW: tiny}, gated=True)
    with pytest.raises(CheckpointError, match=r"the hub has no repository org/other; .*--checkpoint PATH"):
        _open("org/other")
    with pytest.raises(CheckpointError, match=rf"{NAME} has no revision 'v9'; choose another --revision"):
        _open(revision="v9")
    with pytest.raises(CheckpointError, match=r"org/closed is gated; log in with `hf auth login`"):
        _open("org/closed")
    with pytest.raises(CheckpointError, match=r"'org/na me' is no hub id; write it as org/name"):
        _open("org/na me")


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (OSError(28, "No space left on device"), CheckpointError, "no space left in the hub cache; free some, or"),
        (KeyboardInterrupt(), KeyboardInterrupt, "^$"),
    ],
)
def test_a_full_disk_and_an_interrupt_are_not_blamed_on_the_network(
    hub: Hub, tiny: Files, monkeypatch: pytest.MonkeyPatch, error: BaseException, expected: type, message: str
) -> None:
    def snapshot_download(*arguments: Any, **options: Any) -> str:
        raise error

    hub.repositories[NAME] = Repository({NEW: tiny})
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(expected, match=message):
        _open()


def test_without_network_the_message_names_both_ways_out(no_hub: Path) -> None:
    message = r"cannot download org/name: no connection .*--checkpoint PATH, or --checkpoint random"
    with pytest.raises(CheckpointError, match=message):
        _open("org/name")
    with pytest.raises(CheckpointError, match=r"cannot download Qwen/Qwen3.5-0.8B-Base: no connection"):
        open_checkpoint(ExportSpec("onnx", "0.8b", base=True))
    assert not list(no_hub.rglob("*.safetensors"))


def test_without_network_a_download_of_another_program_is_used(no_hub: Path) -> None:
    """The library's own layout without its list of files, as earlier versions left it."""
    repository = no_hub / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(OLD)
    shutil.copytree(shipped_tiny(), repository / "snapshots" / OLD)
    assert _open("org/name").source == {"kind": "hub", "id": "org/name", "revision": OLD, "seed": None}


def test_the_environment_names_hub_and_cache(tmp_path: Path, tiny: Files) -> None:
    """As a user does it: HF_ENDPOINT and HF_HOME, read by the library when it is imported."""
    code = (
        "import json, sys; from export.checkpoint import open_checkpoint; from export.spec import ExportSpec; "
        "print(json.dumps(open_checkpoint(ExportSpec('onnx', 'tiny', checkpoint=sys.argv[1])).source))"
    )
    with serving() as server:
        server.repositories[NAME] = Repository({NEW: tiny})
        surroundings = {**os.environ, "HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", code, NAME], env=surroundings, capture_output=True, check=True)
    assert json.loads(done.stdout)["revision"] == NEW
    assert len(list((tmp_path / "hub").rglob(SINGLE))) == 1


def test_room_is_asked_of_the_nearest_folder_that_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def disk_usage(path: Path) -> Disk:
        asked.append(path)
        return Disk(0, 0, MARGIN_BYTES + 5)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    check_room("org/name", 5, tmp_path / "not" / "yet", "…")
    assert asked == [tmp_path]
    with pytest.raises(CheckpointError, match=rf"but {tmp_path}/not/yet has 0\.27 GB; free some, or move it"):
        check_room("org/name", 6, tmp_path / "not" / "yet", "move it")


def test_only_files_beside_the_weights_and_named_templates_are_wanted() -> None:
    beside = ["config.json", "merges.txt", "a.safetensors", "LICENSE.txt", "README.md", "chat_template.jinja"]
    other = ["a.bin", "a.py", "onnx/config.json", "x/README.md", "x/a.safetensors", "training_args.bin", "a.pt"]
    template = "additional_chat_templates/a.jinja"
    assert wanted([*beside, *other, template]) == [*beside, template]
    check_files("org/name", [*beside, *other])


# --- ModelScope -----------------------------------------------------------------------------------------------

SCOPE = f"modelscope:{NAME}"


@dataclass
class _Config:
    """Of the stand-in: as the client reads its environment."""

    @property
    def cache_dir(self) -> Path:
        return Path(os.environ["MODELSCOPE_CACHE"])


def _stand_in(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two calls of ModelScope's client that are used, with its errors, without its package."""
    errors: Any = types.ModuleType("modelscope_hub.errors")
    kinds = ("AuthenticationError", "FileDownloadError", "FileIntegrityError", "NotExistError", "PermissionDeniedError")
    for kind in kinds:
        setattr(errors, kind, type(kind, (Exception,), {}))

    def find(name: str, revision: str) -> tuple[Repository, str]:
        if hub.refused == "":
            raise ConnectionError("refused")
        repository = hub.repositories.get(name)
        commit = None if repository is None or revision in repository.commits else repository.resolve(revision)
        if repository is None or commit is None:
            raise errors.NotExistError("404")
        return repository, commit

    class Api:
        def __init__(self, config: _Config) -> None:
            self.legacy = self

        def list_repo_files(self, name: str, kind: str, revision: str) -> list[dict[str, object]]:
            assert kind == "model"
            return listing(*find(name, revision))

        def download_repo(
            self, name: str, kind: str, revision: str, local_dir: Path, file_list: list[dict[str, Any]]
        ) -> Path:
            repository, commit = find(name, revision)
            failed = {}
            for entry in file_list:
                path, content = entry["Path"], repository.commits[commit][entry["Path"]]
                target = local_dir / path
                target.parent.mkdir(parents=True, exist_ok=True)
                if target.is_file() and sha256(target.read_bytes()) == entry["Sha256"]:
                    continue
                hub.requests.append(("GET", f"/{path}"))
                if hub.refused is not None and hub.refused in path:
                    failed[path] = OSError(28, "No space left on device")
                elif hashlib.sha256(content).hexdigest() != entry["Sha256"]:
                    failed[path] = errors.FileIntegrityError("sha256")
                else:
                    target.write_bytes(content)
            if failed:
                error = errors.FileDownloadError(f"{len(failed)} failed")
                error.failed_files = failed
                raise error
            return local_dir

    module: Any = types.ModuleType("modelscope_hub")
    module.HubApi, module.HubConfig, module.errors = Api, _Config, errors
    monkeypatch.setitem(sys.modules, "modelscope_hub", module)
    monkeypatch.setitem(sys.modules, "modelscope_hub.errors", errors)


@pytest.fixture(params=["stand-in", "client"])
def scope(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """ModelScope on loopback by its own client where that is installed, and by a stand-in always."""
    if request.param == "client" and importlib.util.find_spec("modelscope_hub") is None:
        pytest.skip("ModelScope's client is not installed: pip install -e '.[modelscope]'")
    with serving() as server:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.endpoint)
        monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "home"))
        if request.param == "stand-in":
            _stand_in(server, monkeypatch)
        yield server


def test_modelscope_is_pinned_checked_and_recorded(scope: Hub, tmp_path: Path, tiny: Files) -> None:
    # The last commit brought README.md, an earlier one the weights.
    files = {**tiny, "README.md": b"new", "training_args.bin": b"pickle"}
    scope.repositories[NAME] = Repository({OLD: {**files, "README.md": b"old"}, NEW: files}, tags={"v1": OLD})
    checkpoint = _open(SCOPE)
    assert checkpoint.source == {"kind": "hub", "id": SCOPE, "revision": NEW, "seed": None}
    assert checkpoint.notices == [f"{SCOPE}: revision master is commit {NEW}, which the manifest records."]
    assert torch.equal(checkpoint.read(NORM), FolderCheckpoint(shipped_tiny()).read(NORM))
    assert checkpoint.folder is not None
    assert {file.name for file in checkpoint.folder.iterdir()} == set(tiny)
    assert (checkpoint.folder / "README.md").read_text() == "new"
    assert _open(SCOPE, "v1").source["revision"] == OLD
    # What a manifest recorded is opened again, though ModelScope serves no commits.
    again = _open(SCOPE, NEW)
    assert again.source["revision"] == NEW
    assert again.notices == [f"{SCOPE}: commit {NEW} is taken from the cache."]
    with pytest.raises(CheckpointError, match=rf"no repository {NAME} with the revision '{'d' * 40}' \(branches and"):
        _open(SCOPE, "d" * 40)


@pytest.mark.parametrize("case", ["pickle", "gguf", "nothing", "no config", "outside", "fp8"])
def test_modelscope_weights_that_cannot_be_read_are_refused(scope: Hub, case: str) -> None:
    files, message = UNREADABLE[case]
    scope.repositories[NAME] = Repository({NEW: files})
    with pytest.raises(CheckpointError, match=rf"{SCOPE} .*{message}"):
        _open(SCOPE)
    assert not list(Path(os.environ["MODELSCOPE_CACHE"]).rglob("*.safetensors"))


def test_modelscope_asks_for_room_first(scope: Hub, tiny: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    scope.repositories[NAME] = Repository({NEW: tiny})
    _free(monkeypatch, sum(map(len, tiny.values())) + MARGIN_BYTES - 1)
    with pytest.raises(CheckpointError, match=rf"{SCOPE}: 0\.01 GB are missing .*point MODELSCOPE_CACHE at a larger"):
        _open(SCOPE)
    assert not list(Path(os.environ["MODELSCOPE_CACHE"]).rglob("*.json"))


def _with_stand_in(test: Callable[..., None]) -> Callable[..., None]:
    """The client itself waits for a minute before it gives up."""
    return pytest.mark.parametrize("scope", ["stand-in"], indirect=True)(test)


@_with_stand_in
def test_modelscope_uses_only_finished_downloads_without_network(scope: Hub, tiny: Files) -> None:
    scope.repositories[NAME] = Repository({NEW: tiny})
    scope.refused = SINGLE
    with pytest.raises(CheckpointError, match=r"no space left in ModelScope's cache; .*point MODELSCOPE_CACHE"):
        _open(SCOPE)
    scope.refused = ""
    with pytest.raises(CheckpointError, match=r"ModelScope cannot be reached \(ConnectionError\) and the"):
        _open(SCOPE)
    scope.refused = None
    scope.requests.clear()
    assert _open(SCOPE).source["revision"] == NEW
    assert scope.fetched() == [SINGLE]  # the others are kept
    scope.refused = ""
    checkpoint = _open(SCOPE)
    assert checkpoint.source["revision"] == NEW
    assert checkpoint.notices == [
        f"{SCOPE}: ModelScope does not serve it now (ConnectionError); "
        f"the finished download of commit {NEW} in the cache is used."
    ]


@_with_stand_in
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"Sha256": ""}, r"lists model.safetensors without size or sha256, so that it cannot be checked; download"),
        ({"Size": None}, r"lists model.safetensors without size or sha256"),
        ({"Revision": "", "CommittedDate": 2e9}, r"gives model.safetensors the commit '', which is none; down"),
        ({"Sha256": "0" * 64}, r"a file is not the listed one \(sha256\); try again"),
    ],
)
def test_modelscope_must_tell_what_files_are_checked_against(
    scope: Hub, tiny: Files, monkeypatch: pytest.MonkeyPatch, change: dict[str, object], message: str
) -> None:
    def changed(repository: Repository, commit: str) -> list[dict[str, object]]:
        return [{**entry, **(change if entry["Path"] == SINGLE else {})} for entry in told(repository, commit)]

    told = listing
    monkeypatch.setitem(globals(), "listing", changed)
    scope.repositories[NAME] = Repository({NEW: tiny})
    with pytest.raises(CheckpointError, match=message):
        _open(SCOPE)


def test_modelscope_without_its_client_names_the_extra_and_the_way_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope_hub", None)
    message = (
        rf"{SCOPE} needs ModelScope's client: install it with pip install 'qwen35-mobile\[modelscope\]', or download "
        rf"with `modelscope download --model {NAME} --local_dir FOLDER` and give --checkpoint FOLDER"
    )
    with pytest.raises(CheckpointError, match=message):
        _open(SCOPE)


@pytest.mark.parametrize("name", ["modelscope:", "modelscope:name", "modelscope:a/b/c", "modelscope:../x"])
def test_a_name_that_is_no_modelscope_id(name: str) -> None:
    with pytest.raises(CheckpointError, match=rf"'{name}' is no ModelScope id; write it as modelscope:org/name"):
        _open(name)

"""Checkpoints from ModelScope, `modelscope:ORG/NAME`: downloads by its own client, an optional extra.

ModelScope lists for every file its sha256 and the commit that brought it, but may serve branches and tags
only (issue 1386 of its client). So the newest of these commits names the snapshot, files are fetched from
the branch, and the client compares them with the listed sha256: a branch that moves meanwhile is an error
and not a mixture.
"""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

from export.checkpoint.base import CheckpointError, read_json
from export.checkpoint.download import check_files, check_room, check_unquantised, wanted
from export.checkpoint.folder import FolderCheckpoint

MODELSCOPE = "modelscope:"
"""No hub id holds a colon; a folder of this name is given as ./modelscope:…"""
DEFAULT_BRANCH = "master"
_COMMIT = re.compile(r"[0-9a-f]{40}")


def open_modelscope(name: str, revision: str | None) -> FolderCheckpoint:
    """Download (or find in the client's cache) the repository `name`, "org/name", and open it.

    The client honours MODELSCOPE_ENDPOINT, MODELSCOPE_CACHE and a login made with it.

    Raises:
        CheckpointError: no client installed, no network, no such repository or revision, a closed one, one
            without weights that can be read, too small or a full disk, files that changed meanwhile.
    """
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is None:
        raise CheckpointError(f"'{MODELSCOPE}{name}' is no ModelScope id; write it as {MODELSCOPE}org/name")
    try:
        from modelscope_hub import HubApi, HubConfig
    except ImportError as error:
        raise CheckpointError(
            f"{MODELSCOPE}{name} needs ModelScope's client: install it with pip install 'qwen35-mobile[modelscope]', "
            f"or download with `modelscope download --model {name} --local_dir FOLDER` and give --checkpoint FOLDER"
        ) from error
    config = HubConfig()
    api = HubApi(config)
    home = Path(config.cache_dir) / "models" / name.replace("/", "--")
    branch = revision or DEFAULT_BRANCH
    finished = home / "refs" / quote(branch, safe="")
    if revision is not None and _COMMIT.fullmatch(revision) and finished.is_file():
        return _open(name, home, revision, f"commit {revision} is taken from the cache.")
    try:
        listed = api.legacy.list_repo_files(name, "model", revision=branch)
    except Exception as error:  # the client raises many kinds for one cause
        if not finished.is_file():
            raise _refusal(name, revision, error) from error
        commit = finished.read_text()
        why = f"ModelScope does not serve it now ({type(error).__name__})"
        return _open(name, home, commit, f"{why}; the finished download of commit {commit} in the cache is used.")
    files = {entry["Path"]: entry for entry in listed if entry.get("Type") != "tree"}
    check_files(MODELSCOPE + name, files)
    fetched = [files[path] for path in wanted(files)]
    commit = _commit(name, list(files.values()), fetched)
    folder = home / "snapshots" / commit
    missing = sum(entry["Size"] for entry in fetched if not _same_size(folder / entry["Path"], entry["Size"]))
    check_room(MODELSCOPE + name, missing, Path(config.cache_dir), "point MODELSCOPE_CACHE at a larger disk")
    try:
        # config.json first: it says whether the weights are worth fetching.
        for part in ([files["config.json"]], fetched):
            api.download_repo(name, "model", revision=branch, local_dir=folder, file_list=part)
            check_unquantised(MODELSCOPE + name, read_json(folder / "config.json"))
    except CheckpointError:
        raise
    except Exception as error:
        raise _refusal(name, revision, error) from error
    # Only finished downloads are found without network, under the name asked for and by commit.
    finished.parent.mkdir(exist_ok=True)
    for ref in (finished, finished.parent / commit):
        ref.write_text(commit)
    return _open(name, home, commit, f"revision {branch} is commit {commit}, which the manifest records.")


def _open(name: str, home: Path, commit: str, notice: str) -> FolderCheckpoint:
    source = {"kind": "hub", "id": MODELSCOPE + name, "revision": commit, "seed": None}
    checkpoint = FolderCheckpoint(home / "snapshots" / commit, source)
    checkpoint.notices.insert(0, f"{MODELSCOPE}{name}: {notice}")
    return checkpoint


def _commit(name: str, files: list[dict[str, Any]], fetched: list[dict[str, Any]]) -> str:
    """The newest commit of a listing, whose fetched files must carry what they are checked against."""
    remedy = f"download with `modelscope download --model {name} --local_dir FOLDER` and give --checkpoint FOLDER"
    for entry in fetched:
        if entry.get("Size") is None or (entry["Path"].endswith(".safetensors") and not entry.get("Sha256")):
            raise CheckpointError(
                f"{MODELSCOPE}{name}: ModelScope lists {entry['Path']} without size or sha256, so that it cannot be "
                f"checked; {remedy}"
            )
    newest = max(files, key=lambda entry: entry.get("CommittedDate") or 0)
    commit: str = newest.get("Revision") or ""
    if _COMMIT.fullmatch(commit) is None:
        raise CheckpointError(
            f"{MODELSCOPE}{name}: ModelScope gives {newest['Path']} the commit {commit!r}, which is none; {remedy}"
        )
    return commit


def _same_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _refusal(name: str, revision: str | None, error: Exception) -> CheckpointError:
    """The client's error in the words of this project."""
    from modelscope_hub.errors import (
        AuthenticationError,
        FileDownloadError,
        FileIntegrityError,
        NotExistError,
        PermissionDeniedError,
    )

    # A download of several files keeps the cause of each.
    causes = list(error.failed_files.values()) if isinstance(error, FileDownloadError) else []
    causes.append(error)
    first, again = causes[0], "a second try keeps the files that are complete"
    if any(isinstance(cause, OSError) and cause.errno == errno.ENOSPC for cause in causes):
        return CheckpointError(
            f"cannot download {MODELSCOPE}{name}: no space left in ModelScope's cache; free some, or point "
            f"MODELSCOPE_CACHE at a larger disk ({again})"
        )
    if isinstance(first, FileIntegrityError):
        return CheckpointError(
            f"cannot download {MODELSCOPE}{name}: a file is not the listed one ({first}); try again, the repository "
            "may have changed meanwhile"
        )
    if isinstance(first, AuthenticationError | PermissionDeniedError):
        return CheckpointError(f"{MODELSCOPE}{name} is closed to you; log in with `modelscope login`, or give a folder")
    if isinstance(first, NotExistError):
        which = "" if revision is None else f" with the revision {revision!r} (branches and tags are served)"
        return CheckpointError(f"ModelScope has no repository {name}{which}; check the name on its page")
    return CheckpointError(
        f"cannot download {MODELSCOPE}{name}: ModelScope cannot be reached ({type(first).__name__}) and the "
        f"cache holds no finished download; {again}, or give a local folder with --checkpoint PATH"
    )

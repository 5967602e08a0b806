"""Checkpoints from a hub, pinned to a commit: downloads by huggingface_hub, then a folder like any other."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from export.checkpoint.base import CheckpointError, read_json
from export.checkpoint.download import IGNORED, PATTERNS, check_files, check_room, check_unquantised, wanted
from export.checkpoint.folder import FolderCheckpoint
from export.checkpoint.modelscope import MODELSCOPE, open_modelscope

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

REMEDY = "give a local folder with --checkpoint PATH, or --checkpoint random for random weights"


def open_hub(name: str, revision: str | None) -> FolderCheckpoint:
    """Download (or find in the cache) a repository at one commit and open it.

    A branch, a tag or the default branch is resolved to its commit first; `source["revision"]` is that
    commit. Where the hub cannot be asked, a finished download in the cache is used and a notice says so.
    The library honours HF_ENDPOINT and HF_HOME.

    Raises:
        CheckpointError: no network, no such repository or revision, a gated one, one without weights that
            can be read, too small or a full disk.
    """
    if name.startswith(MODELSCOPE):
        return open_modelscope(name.removeprefix(MODELSCOPE), revision)
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import HFValidationError, RevisionNotFoundError

    api = HfApi()
    try:
        # Records branch and commit in the cache, so that the same name works without network afterwards.
        commit = api.resolve_revision(name, revision=revision).resolved
        info = api.model_info(name, revision=commit, files_metadata=True)
    except (RevisionNotFoundError, HFValidationError) as error:
        raise _refusal(name, revision, error) from error
    except Exception as error:  # the library raises many kinds for one cause: the hub cannot be asked
        return _cached(name, revision, error)
    files = info.siblings or []
    check_files(name, (file.rfilename for file in files))
    if info.library_name == "mlx":  # shapes and the offset of norms differ from the published ones
        raise CheckpointError(f"{name} holds weights for MLX; take the checkpoint that it was converted from")
    notices = [] if revision == commit else [_pinned(name, revision, commit)]
    try:
        notices += _check_room(name, commit, files)
        check_unquantised(name, read_json(Path(hf_hub_download(name, "config.json", revision=commit))))
        folder = snapshot_download(name, revision=commit, allow_patterns=PATTERNS, ignore_patterns=IGNORED)
    except CheckpointError:
        raise
    except Exception as error:
        raise _refusal(name, revision, error) from error
    return _open(name, folder, notices)


def _open(name: str, folder: str, notices: list[str]) -> FolderCheckpoint:
    # Snapshots are named after their commit.
    source = {"kind": "hub", "id": name, "revision": Path(folder).name, "seed": None}
    checkpoint = FolderCheckpoint(folder, source)
    checkpoint.notices[:0] = notices
    return checkpoint


def _pinned(name: str, revision: str | None, commit: str) -> str:
    what = "no --revision was given: the default branch" if revision is None else f"--revision {revision}"
    return f"{name}: {what} is commit {commit}, which the manifest records."


def _cached(name: str, revision: str | None, cause: Exception) -> FolderCheckpoint:
    """A finished download, when the hub cannot be asked because of `cause`."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            name, revision=revision, allow_patterns=PATTERNS, ignore_patterns=IGNORED, local_files_only=True
        )
    except LocalEntryNotFoundError:  # absent or incomplete: what went wrong first is what the user must know
        raise _refusal(name, revision, cause) from cause
    why = f"{name}: the hub does not serve it now ({type(cause).__name__})"
    return _open(name, folder, [f"{why}; the finished download of commit {Path(folder).name} in the cache is used."])


def _check_room(name: str, commit: str, files: Sequence[RepoSibling]) -> list[str]:
    """Refuse a download that the disk of the cache cannot hold; a notice if the hub tells no sizes."""
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.file_download import repo_folder_name

    cache = Path(constants.HF_HUB_CACHE)
    blobs = cache / repo_folder_name(repo_id=name, repo_type="model") / "blobs"
    fetched = set(wanted(file.rfilename for file in files))
    missing, unknown = 0, 0
    for file in files:
        path = file.rfilename
        if path not in fetched or isinstance(try_to_load_from_cache(name, path, revision=commit), str):
            continue
        # A blob is named after its content: another commit may have brought it.
        blob = file.lfs.sha256 if file.lfs is not None else file.blob_id
        if blob is not None and (blobs / blob).is_file():
            continue
        missing += file.size or 0
        unknown += file.size is None
    check_room(name, missing, cache, "point HF_HOME at a larger disk")
    return [f"{name}: the hub tells no size of {unknown} files; room for them was not checked."] if unknown else []


def _refusal(name: str, revision: str | None, error: Exception) -> CheckpointError:
    """The library's error in the words of this project."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):  # a kind of RepositoryNotFoundError
        return CheckpointError(f"{name} is gated; log in with `hf auth login`, or {REMEDY}")
    if isinstance(error, RevisionNotFoundError):
        return CheckpointError(f"{name} has no revision {revision!r}; choose another --revision")
    if isinstance(error, RepositoryNotFoundError):
        return CheckpointError(f"the hub has no repository {name}; {REMEDY}")
    if isinstance(error, HFValidationError):
        return CheckpointError(f"{name!r} is no hub id; write it as org/name, or {REMEDY}")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return CheckpointError(
            f"cannot download {name}: no space left in the hub cache; free some, or point HF_HOME at a larger disk "
            "(a second try keeps the files that are complete)"
        )
    return CheckpointError(
        f"cannot download {name}: no connection to the hub ({type(error).__name__}) and it is not in the "
        f"cache; {REMEDY}"
    )

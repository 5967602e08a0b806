"""Checkpoints from a hub: resumable downloads by huggingface_hub, then a folder like any other."""

from __future__ import annotations

import errno

from export.checkpoint.base import CheckpointError
from export.checkpoint.folder import FolderCheckpoint

PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.txt", "README.md", "LICENSE*"]
"""Never pickles, never code."""


def open_hub(name: str, revision: str | None) -> FolderCheckpoint:
    """Download (or find in the cache) a repository and open it. The library honours HF_ENDPOINT and HF_HOME.

    Raises:
        CheckpointError: no network, no such repository or revision, a gated one, or a full disk.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    remedy = "give a local folder with --checkpoint PATH, or --checkpoint random for random weights"
    try:
        folder = snapshot_download(name, revision=revision, allow_patterns=PATTERNS)
    except GatedRepoError as error:
        raise CheckpointError(f"{name} is gated; log in with `hf auth login`, or {remedy}") from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{name} has no revision {revision!r}; choose another --revision") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(f"the hub has no repository {name}; {remedy}") from error
    except HFValidationError as error:
        raise CheckpointError(f"{name!r} is no hub id; write it as org/name, or {remedy}") from error
    except Exception as error:  # the library raises many kinds for one cause: the hub cannot be reached
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise CheckpointError(
                f"cannot download {name}: no space left in the hub cache; free some, or point HF_HOME at a "
                "larger disk (a second try continues where this one stopped)"
            ) from error
        raise CheckpointError(
            f"cannot download {name}: no connection to the hub ({type(error).__name__}) and it is not in the "
            f"cache; {remedy}"
        ) from error
    commit = folder.rstrip("/").rsplit("/", 1)[-1]
    return FolderCheckpoint(folder, {"kind": "hub", "id": name, "revision": commit, "seed": None})

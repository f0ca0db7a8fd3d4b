"""From `model.path` to a local folder and its exact revision: built-in, local, Hugging Face or ModelScope."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..common.errors import UserError, nearest
from ..config.guard.remote_code import trusts_remote_code
from .fingerprint import CODE, local_revision, patterns

HUBS = ("huggingface", "modelscope")
CONFIG = ["config.json"]  # what decides whether a model can be used


@dataclass(frozen=True)
class Located:
    """Where a model's files are (`folder`) and what identifies them (`path`, `hub`, `revision`, stored in env.json)."""

    path: str
    folder: Path
    hub: str
    revision: str


def locate(path: str, hub: str, revision: str | None, check: Callable[[Path], None] = lambda folder: None) -> Located:
    """Find or download a model. `mmft:NAME` is a model shipped with mmft. Raises UserError.

    check: called with a folder that holds config.json, before anything else is downloaded; raises UserError to refuse the model.
    """
    if path.startswith("mmft:"):
        folder = Path(__file__).resolve().parent.parent / "assets" / path.removeprefix("mmft:")
        if not folder.is_dir():
            raise UserError(f"model.path={path}: mmft ships no such model.{nearest(folder.name, [f.name for f in folder.parent.iterdir()])}")
        return Located(path, folder, "mmft", local_revision(folder))
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"model.path={path}: this folder has no config.json, so it is not a saved model")
        check(folder)
        return Located(path, folder.resolve(), "local", local_revision(folder))
    looks_local = path.startswith((".", "/", "~")) or "\\" in path or path.count("/") != 1
    if looks_local:
        siblings = [f.name for f in folder.parent.iterdir() if f.is_dir()] if folder.parent.is_dir() else []
        raise UserError(f"model.path={path}: no such folder, and not a hub id of the form organisation/name.{nearest(folder.name, siblings)}")
    if hub not in HUBS:
        raise UserError(f"model.hub={hub}: no such hub.{nearest(hub, HUBS)} There are: {', '.join(HUBS)}.")
    return _huggingface(path, revision, check) if hub == "huggingface" else _modelscope(path, revision, check)


def _huggingface(path: str, revision: str | None, check: Callable[[Path], None]) -> Located:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        try:
            HfApi().model_info(path, revision=revision)
        except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError):
            raise
        except Exception:  # no connection (the client raises many types): the model may be in the local cache
            pass
        # Download by branch, so that the cache can resolve the branch without a network. The folder is named after the commit
        # that the branch was resolved to, and only its files are loaded.
        check(Path(snapshot_download(path, revision=revision, allow_patterns=CONFIG + (CODE if trusts_remote_code() else []))))
        folder = Path(snapshot_download(path, revision=revision, allow_patterns=patterns()))
    except UserError:
        raise
    except GatedRepoError:
        raise UserError(f"model.path={path}: this model asks for an agreement on its page, then for a login (hf auth login)") from None
    except RevisionNotFoundError:
        raise UserError(f"model.revision={revision}: {path} has no such branch, tag or commit") from None
    except RepositoryNotFoundError:
        raise UserError(
            f"model.path={path}: the Hugging Face hub has no such model, or hides it from you (hf auth login);"
            " model.hub=modelscope looks at ModelScope instead"
        ) from None
    except Exception as error:  # of requests, httpx, the hub client or the system
        raise UserError(f"model.path={path}: could not be downloaded: {_first_line(error)} (a mirror: HF_ENDPOINT; {_hint(path)})") from None
    return Located(path, folder, "huggingface", folder.name)


def cached_snapshot(path: str, commit: str) -> Path | None:
    """The folder of a commit of a Hugging Face model in the local cache; None if it is not there. Nothing is downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, revision=commit, allow_patterns=patterns(), local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None


def _modelscope(path: str, revision: str | None, check: Callable[[Path], None]) -> Located:
    try:
        from modelscope import snapshot_download

        check(Path(snapshot_download(path, revision=revision, allow_patterns=CONFIG + (CODE if trusts_remote_code() else []))))
        folder = Path(snapshot_download(path, revision=revision, allow_patterns=patterns()))
    except UserError:
        raise
    except Exception as error:  # of requests, modelscope or Python
        raise UserError(f"model.path={path}: could not be downloaded from ModelScope: {_first_line(error)} ({_hint(path)})") from None
    # ModelScope's API gives no commit for a branch, so the contents identify the model.
    return Located(path, folder, "modelscope", local_revision(folder))


def _hint(path: str) -> str:
    return f"or download it by hand and give the folder: model.path=./{path.split('/')[-1]}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]

"""HubDataset: a data set of the Hugging Face hub or ModelScope by its id; the revision used is recorded."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...common.errors import UserError
from ..sample import BadRow, Row
from .base import Stamp
from .columns import ColumnKeys, PositionKey
from .saved import dataset_rows, is_remote, named_splits

HUBS = ("huggingface", "modelscope")


@dataclass(kw_only=True)
class HubDataset(ColumnKeys, PositionKey):
    """dataset: `owner/name`. hub: huggingface or modelscope. subset: its configuration. split: use only this split, or those of a list,
    each under its own split name; null: all of them. revision: branch, tag or commit (null: the default branch).

    HF_ENDPOINT and MODELSCOPE_ENDPOINT choose mirrors. With `limit`, rows of the Hugging Face hub are streamed and the
    rest is not downloaded.
    """

    dataset: str
    hub: str = "huggingface"
    subset: str | None = None
    split: str | Sequence[str] | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_hub(self.hub)

    def stamp(self) -> Stamp:
        self._sha = resolve_revision(self.dataset, self.revision, self.hub)
        return {"hub": self.hub, "dataset": self.dataset, "revision": self._sha}

    def data_root(self) -> None:
        return None

    def read(self) -> Iterator[Row | BadRow]:
        sha = getattr(self, "_sha", None) or self.stamp()["revision"]
        streaming = self.hub == "huggingface" and self.limit is not None
        loaded = load(self.dataset, self.hub, self.subset, self.split if isinstance(self.split, str) else None, sha, streaming)
        for name, dataset in named_splits(loaded, self.split, self.dataset):
            yield from dataset_rows(dataset, name, self, self.image_position, f"{self.dataset}/{name or _only(self.split)}", fetch, self.limit if streaming else None)


def _only(split: str | Sequence[str] | None) -> str:
    return split if isinstance(split, str) else next(iter(split or ()), "train")


def check_hub(hub: str) -> None:
    if hub not in HUBS:
        raise UserError(f"data.hub={hub}: must be {' or '.join(HUBS)}")


def resolve_revision(dataset: str, revision: str | None, hub: str) -> str:
    """The commit that `revision` points to. Raises UserError naming the data set."""
    try:
        return _huggingface_sha(dataset, revision) if hub == "huggingface" else _modelscope_sha(dataset, revision)
    except UserError:
        raise
    except Exception as error:
        raise hub_error(error, dataset, revision, hub) from None


def _huggingface_sha(dataset: str, revision: str | None) -> str:
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return HfApi().dataset_info(dataset, revision=revision).sha
    except (HfHubHTTPError, HFValidationError):
        raise
    except Exception:  # no network: use the commit of the last download
        cached = Path(constants.HF_HUB_CACHE, f"datasets--{dataset.replace('/', '--')}", "refs", revision or "main")
        if not cached.is_file():
            raise
        return cached.read_text(encoding="utf-8").strip()


def _modelscope_sha(dataset: str, revision: str | None) -> str:
    """`branch@hash of its file list`: ModelScope reports no commit, and loads by branch or tag only."""
    from modelscope.hub.api import HubApi

    revision = revision or "master"
    listed, page = [], 1
    while files := HubApi().get_dataset_files(repo_id=dataset, revision=revision, recursive=True, page_number=page, page_size=500):
        listed += [f"{f.get('Path')} {f.get('Sha256')} {f.get('Size')}" for f in files if f.get("Type") != "tree"]
        page += 1
        if len(files) < 500:
            break
    return f"{revision}@{hashlib.sha256(repr(sorted(listed)).encode()).hexdigest()[:16]}"


def load(dataset: str, hub: str, subset: str | None, split: str | None, sha: str, streaming: bool = False) -> Any:
    """The result of datasets.load_dataset (or ModelScope's MsDataset.load): one data set or a mapping of splits. Raises UserError."""
    try:
        if hub == "huggingface":
            from datasets import load_dataset

            # without `split=`, so that the message for an unknown split can list the existing ones
            return load_dataset(dataset, name=subset, revision=sha, streaming=streaming)
        from modelscope.msdatasets import MsDataset

        loaded = MsDataset.load(dataset, subset_name=subset, split=split, version=sha.split("@")[0], use_streaming=streaming)
        if isinstance(loaded, Mapping):
            return {name: _plain(d) for name, d in loaded.items()}
        return {split: _plain(loaded)} if split else _plain(loaded)
    except Exception as error:
        raise hub_error(error, dataset, sha, hub) from None


def _plain(dataset: Any) -> Any:
    return dataset.to_hf_dataset() if hasattr(dataset, "to_hf_dataset") else dataset


def hub_error(error: Exception, dataset: str, revision: str | None, hub: str) -> UserError:
    """A hub client's exception as a one-line UserError."""
    kind, text = type(error).__name__, " ".join(str(error).split())
    place = "the Hugging Face hub" if hub == "huggingface" else "ModelScope"
    variable = "HF_ENDPOINT" if hub == "huggingface" else "MODELSCOPE_ENDPOINT"
    if "Gated" in kind:
        return UserError(f"data.dataset={dataset}: is gated; accept its terms on {place} and log in")
    if kind == "RevisionNotFoundError":
        return UserError(f"data.revision={revision}: {dataset} has no such branch, tag or commit on {place}")
    if kind in ("RepositoryNotFoundError", "DatasetNotFoundError", "NotExistError", "HFValidationError") or " 404" in text:
        return UserError(f"data.dataset={dataset}: not found on {place}{f' at revision {revision}' if revision else ''}; check the id (owner/name)"
                         " and, if it is private, log in")
    if "Connect" in kind or "Offline" in kind or "Timeout" in kind or "Max retries" in text:
        return UserError(f"data.dataset={dataset}: {place} cannot be reached; check the network, choose a mirror with {variable}, or name local files")
    if "scripts are no longer supported" in text:
        return UserError(f"data.dataset={dataset}: is a loading script, which is not run; use a copy of the data in parquet form")
    return UserError(f"data.dataset={dataset}: cannot be loaded from {place}: {kind}: {text[:300]}")


def fetch(path: str) -> bytes | str:
    """The bytes of an image that a hub data set names by path, from the hub itself or its cache; any other path unchanged."""
    import datasets
    from huggingface_hub import constants

    if is_remote(path):
        # chains such as zip://a.jpg::hf://... end in an address of the hub
        if not path.split("::")[-1].startswith("hf://"):
            return path
        from datasets.download.streaming_download_manager import xopen

        with xopen(path, "rb") as file:
            return file.read()
    real = Path(os.path.realpath(path))
    caches = [constants.HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH]
    if any(real.is_relative_to(os.path.realpath(c)) for c in caches) and real.is_file():
        return real.read_bytes()
    return path

"""Upload a folder as a new model repository of the Hugging Face hub or of ModelScope, private unless asked otherwise."""

from __future__ import annotations

import re
from pathlib import Path

from ..common.errors import UserError, nearest
from ..models.hub import HUBS


def check(repo: str, hub: str) -> None:
    """Checks that need no upload: the name, the hub, the login. Raises UserError."""
    if hub not in HUBS:
        raise UserError(f"hub={hub}: no such hub.{nearest(hub, HUBS)} There are: {', '.join(HUBS)}.")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", repo):
        raise UserError(f"push={repo}: must be of the form organisation/name")
    if hub == "huggingface":
        from huggingface_hub import constants, get_token

        if constants.HF_HUB_OFFLINE:
            raise UserError("push: HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it")
        if not get_token():
            raise UserError("push: nobody is logged in to the Hugging Face hub (hf auth login, or HF_TOKEN)")
    elif not _modelscope_token():
        raise UserError("push: nobody is logged in to ModelScope (modelscope login, or MODELSCOPE_API_TOKEN)")


def push(folder: Path, repo: str, hub: str, private: bool) -> str:
    """Create the repository, upload `folder`, and return the repository's address. Raises UserError, also if it exists already."""
    try:
        return (_huggingface if hub == "huggingface" else _modelscope)(folder, repo, private)
    except UserError:
        raise
    except Exception as error:  # of the hub's client, its HTTP library or Python
        by_hand = f"hf upload {repo} {folder}" if hub == "huggingface" else f"modelscope upload {repo} {folder}"
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"push={repo}: {first} (the merged model is complete in {folder}; later: {by_hand})") from None


def _huggingface(folder: Path, repo: str, private: bool) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        address = api.create_repo(repo, private=private, exist_ok=False)
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code == 409:
            raise _taken(repo, folder, "hf upload") from None
        raise
    api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Merged by mmft")
    return str(address)


def _modelscope(folder: Path, repo: str, private: bool) -> str:
    from modelscope_hub.api import HubApi
    from modelscope_hub.config import get_default_config
    from modelscope_hub.errors import AlreadyExistsError

    api = HubApi(token=_modelscope_token())
    try:
        # without a licence the client would state Apache-2.0
        api.create_repo(repo, "model", visibility="private" if private else "public", license="other")
    except AlreadyExistsError:
        raise _taken(repo, folder, "modelscope upload") from None
    api.upload_folder(repo, "model", folder, commit_message="Merged by mmft", use_cache=False, disable_tqdm=True)
    return f"{get_default_config().endpoint}/models/{repo}"


def _taken(repo: str, folder: Path, command: str) -> UserError:
    return UserError(
        f"push={repo}: exists already, and its visibility would stay what it is; choose a new name, or add a commit to it by hand:"
        f" {command} {repo} {folder}"
    )


def _modelscope_token() -> str | None:
    try:
        from modelscope_hub.config import get_default_config
    except ImportError:
        raise UserError("push: hub=modelscope needs a newer client: pip install -U modelscope") from None
    return get_default_config().token

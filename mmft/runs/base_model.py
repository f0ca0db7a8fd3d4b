"""Find the base model that a run was trained on, also after its folder was moved, and check that its files are the same."""

from __future__ import annotations

from pathlib import Path

from ..common.errors import UserError
from ..common.records import ModelIdentity
from ..models.families.base import Family
from ..models.fingerprint import local_revision
from ..models.hub import Located, cached_snapshot
from ..models.load import locate_model

MOVED = "model.path"  # the one key of a run's model that a command may give: where the same files are now
CONTENT = "sha256:"  # prefix of a revision that is a hash of the files; others are commits of a hub


def locate_base(family: Family, trained_on: ModelIdentity, run: str | Path) -> Located:
    """The base model in `family.path`, which must have the files that the run was trained on.

    trained_on: from the run's env.json. Raises UserError if the model is not there or has other files.
    """
    recorded = trained_on.get("revision") or ""
    if not recorded.startswith(CONTENT) and family.path == trained_on.get("path"):
        family.revision = recorded  # the commit that the run was trained on; its branch may have moved
    try:
        located = locate_model(family)
    except UserError as error:
        if trained_on.get("hub") == "local":
            raise UserError(f"{error} If the base model of run={run} was moved, add {MOVED}=FOLDER.") from None
        raise
    check_base(located, trained_on, run)
    return located


def check_base(located: Located, trained_on: ModelIdentity, run: str | Path) -> None:
    """Raises UserError unless a model has the files that the run was trained on."""
    if has_files_of(located, trained_on, run):
        return
    recorded = trained_on.get("revision") or ""
    raise UserError(
        f"run={run}: its base model {located.path} is not what it was trained on (then {recorded[:19]}, now {located.revision[:19]}); give it back"
        f" its files, or name a folder that has them: {MOVED}=FOLDER"
    )


def has_files_of(located: Located, trained_on: ModelIdentity, run: str | Path) -> bool:
    """Whether a model has the files that the run was trained on. Raises UserError if these cannot be compared."""
    return located.revision == (trained_on.get("revision") or "") or _content(located) == _recorded_content(trained_on, run)


def _content(located: Located) -> str:
    return located.revision if located.revision.startswith(CONTENT) else local_revision(located.folder)


def _recorded_content(trained_on: ModelIdentity, run: str | Path) -> str:
    """The hash of the files that a run was trained on; of a hub's model by the local cache. Raises UserError if it is not there."""
    recorded = trained_on.get("revision") or ""
    if recorded.startswith(CONTENT):
        return recorded
    folder = cached_snapshot(str(trained_on.get("path")), recorded)
    if folder is None:
        raise UserError(
            f"run={run}: was trained on {trained_on.get('path')} at commit {recorded[:12]}, which is not in the local cache, so that the files of"
            f" another place cannot be compared with it; drop {MOVED}=... to use the hub's, or download that commit once"
        )
    return local_revision(folder)

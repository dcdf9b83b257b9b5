"""Uploads of folders to the hub: what can be checked before, and the upload, tried again where the net fails."""

import shlex
import time
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_session, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from lowmem_grpo.errors import InputError, NotUploadedError, in_a_line, shown
from lowmem_grpo.output.places import content_for_others

# s to connect, and without a byte read or written: the hub's own client waits for ever.
CONNECT_S, SILENCE_S = 10.0, 120.0
PAUSES_S = (2.0, 8.0)  # before the second try and the third
PASSING = (408, 425, 429, *range(500, 600))  # HTTP statuses that another try may not meet


def check_upload(repo_id: str) -> None:
    """Refuse an upload that cannot succeed, without asking the hub.

    Raises:
        InputError: no token is there, the hub is switched off, or the repository's name is none.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(
            f"{shown(repo_id)} names no repository of the hub; write it as user/name, in letters, digits, -, _ and ."
        ) from error
    if constants.HF_HUB_OFFLINE:
        raise InputError("HF_HUB_OFFLINE is set, and an upload needs the hub; unset it, or upload later by `hf upload`")
    if not get_token():
        raise InputError(
            "an upload to the hub needs a token, and none is there; run `hf auth login`, or set the environment "
            "variable HF_TOKEN"
        )


def upload(
    folder: Path, repo_id: str, *, private: bool | None = None, revision: str | None = None,
    beside: Mapping[str, str] | None = None,
) -> str:  # fmt: skip
    """Upload a folder's files to a model repository, in one commit; returns the repository's address.

    Args:
        folder: its files, and those in its folders, keep their names; configurations lose paths of this machine.
        repo_id: user/name, or a name among those of the token's user. A repository is made where there is none.
        private: of one that is made; None leaves it to the hub.
        revision: a branch, which is made where there is none; main by default.
        beside: texts by the names of further files.

    Raises:
        NotUploadedError: the hub cannot be reached or has refused, in a sentence with the command that does it later.
    """
    there = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files: dict[str, Path | bytes] = {path.relative_to(folder).as_posix(): content_for_others(path) for path in there}
    files |= {name: text.encode() for name, text in (beside or {}).items()}
    client = get_session()
    timeout = client.timeout
    client.timeout = (CONNECT_S, SILENCE_S, SILENCE_S, CONNECT_S)
    try:
        for pause in (*PAUSES_S, None):
            try:
                return _upload_once(files, repo_id, private, revision)
            except Exception as error:  # of the hub's client, which raises its own, those of httpx and Python's
                if pause is None or not _may_pass(error):
                    raise NotUploadedError(
                        f"{folder} was not uploaded to {repo_id} ({_reason(error)}); later, "
                        f"`{command(folder, repo_id)}` does it"
                    ) from error
                time.sleep(pause)
    finally:
        client.timeout = timeout
    raise AssertionError


def repository(hub_model_id: str | None, output_dir: Path) -> str:
    """The repository for a run's adapter: the one that is named, or one of the name of its folder."""
    return hub_model_id or output_dir.resolve().name


def command(folder: Path, repo_id: str) -> str:
    """The command that uploads a folder."""
    return f"hf upload {shlex.quote(repo_id)} {shlex.quote(str(folder))}"


def _upload_once(files: Mapping[str, Path | bytes], repo_id: str, private: bool | None, revision: str | None) -> str:
    hub = HfApi()
    address = hub.create_repo(repo_id, private=private, exist_ok=True)
    full = address.repo_id
    if revision is not None:
        hub.create_branch(full, branch=revision, exist_ok=True)
    added = [CommitOperationAdd(name, path) for name, path in files.items()]
    hub.create_commit(full, added, commit_message="Upload by lowmem_grpo", revision=revision)
    return str(address)


def _reason(error: Exception) -> str:
    return f"{'the token may not write there: ' if _status(error) in (401, 403) else ''}{in_a_line(error)}"


def _may_pass(error: Exception) -> bool:
    """Tell whether another try may meet no error: no reply came, or one that says so."""
    if _status(error) is not None:
        return _status(error) in PASSING
    return not isinstance(error, (HFValidationError, ValueError, FileNotFoundError))


def _status(error: Exception) -> int | None:
    """The status of the reply that an error is about, None where none came."""
    return getattr(getattr(error, "response", None), "status_code", None)

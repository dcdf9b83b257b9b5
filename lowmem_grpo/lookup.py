"""Names of models and datasets, looked up here and on the hub, before anything is imported that computes.

The hub's client tries for 23 s to read a file of a name that it does not have in its cache, whatever keeps it from
that. So such a name is asked for once before, and what no further try can mend is said at once.
"""

import contextlib
import difflib
import functools
import json
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowmem_grpo.errors import InputError, in_a_line, shown
from lowmem_grpo.output.folder import refuse_pointer
from lowmem_grpo.paths import expanded

TEXT_FILES = (".jsonl", ".json", ".csv")  # of data, by the ends of their names
DATA_FILES = (*TEXT_FILES, ".parquet")
NO_MODEL = "is neither a model folder nor a model the hub gives"
NO_DATASET = "is neither a JSONL, JSON, CSV or Parquet file nor a dataset the hub gives"
NOT_CONNECTED = {"ConnectError", "ConnectionError", "ProxyError"}  # names of errors: of httpx, or of requests
PAUSE_S = 1.0  # before a hub that no connection was made to is asked a second time
NEAR, NEAREST_OF = 0.8, 1000  # ratio of two names, of which the ends may be one; entries of a folder


def is_adapter(model: Any) -> bool:
    """Tell whether a model is named by a folder that holds an adapter in PEFT's format."""
    return isinstance(model, str) and os.path.isfile(os.path.join(model, "adapter_config.json"))


def has_score_head(folder: str | Path) -> bool:
    """Tell whether a folder holds an adapter for sequence classification, as a reward adapter is one."""
    try:
        return json.loads((Path(folder) / "adapter_config.json").read_bytes()).get("task_type") == "SEQ_CLS"
    except (OSError, ValueError, AttributeError):  # no such file, or no JSON in it, or no object
        return False


def look_up_model(model: str, loading: Mapping[str, Any] | None = None, *, what: str = "model") -> None:
    """Raise InputError where neither a folder nor a model of the hub has a name.

    `loading` is what from_pretrained is given.
    """
    given = loading or {}
    try:
        os.stat(model)
    except (FileNotFoundError, NotADirectoryError):  # a hub id, or no folder
        pass
    except (OSError, ValueError) as error:  # no name that a folder may have
        why = error.strerror if isinstance(error, OSError) else in_a_line(error)
        raise InputError(f"{what} {shown(model)} cannot be looked for: {why}; name a folder or a hub id") from error
    if not model.strip():
        raise InputError(f"{what} {model!r} is no name; name a folder or a hub id")
    folder = Path(model)
    if os.path.isfile(model):
        raise InputError(f"{what} {model!r} is a file; name the folder that it is in")
    if not os.path.isdir(model):  # of any text, unlike Path's
        if model.startswith((".", "/")) or model.count("/") > 1:
            raise InputError(f"{what} {model!r} is not a folder on this machine{_or(_near(model))}")
        names = {name: given[name] for name in ("revision", "token", "cache_dir") if name in given}
        if not given.get("local_files_only"):
            look_up_on_hub(model, f"{what} {model!r} {NO_MODEL}", **names)
        return
    for path in sorted(folder.iterdir()):
        refuse_pointer(path)
    if not (folder / "config.json").is_file() and not is_adapter(model):
        inside = sorted(path.parent for path in folder.glob("*/adapter_config.json"))
        if (folder / "adapter").is_dir():
            raise InputError(f"{what} {model!r} is the output of a run; its adapter is {folder / 'adapter'}")
        if inside:
            raise InputError(f"{what} {model!r} holds adapters in folders; name one, such as {inside[0]}")


def look_up_dataset(dataset: str, name: str) -> None:
    """Raise InputError where neither a file or folder nor a dataset of the hub has a name."""
    if not dataset.strip():
        raise InputError(f"{name} is {dataset!r}, which names nothing; give a hub id, a file or a task")
    path = Path(expanded(dataset))
    if path.suffix.lower() in DATA_FILES:
        if os.path.isdir(path):
            raise InputError(f"{name} {dataset!r} is a folder; name a file in it, or rename the folder")
        if not os.path.isfile(path):  # which, unlike Path's, takes any text
            raise InputError(f"{name} {dataset!r} is not a file on this machine{_or(_near(dataset))}")
        if path.stat().st_size == 0:
            raise InputError(f"{name} {dataset!r} is empty; it needs at least one row")
        refuse_pointer(path)
    elif os.path.isfile(path):
        raise InputError(
            f"{name} {dataset!r} is a file of another format than {', '.join(DATA_FILES)}; unpack or convert it"
        )
    elif not os.path.isdir(path) and not dataset.startswith("hf://"):  # which `datasets` reads by itself
        if dataset.startswith((".", "/", "~")) or dataset.count("/") > 1:
            raise InputError(f"{name} {dataset!r} is no file or folder on this machine{_or(_near(dataset))}")
        if not _is_prepared(dataset):
            look_up_on_hub(dataset, f"{name} {dataset!r} {NO_DATASET}", repo_type="dataset")


def _is_prepared(dataset: str) -> bool:
    """Tell whether `datasets` has a dataset in its own cache, from which it reads without the hub."""
    from huggingface_hub import constants

    cache = os.path.expanduser(os.environ.get("HF_DATASETS_CACHE", os.path.join(constants.HF_HOME, "datasets")))
    names = os.listdir(cache) if os.path.isdir(cache) else []  # HuggingFaceH4___math-500 of HuggingFaceH4/MATH-500
    return dataset.replace("/", "").replace("_", "").lower() in [name.replace("_", "").lower() for name in names]


def look_up_on_hub(
    repo_id: str, words: str, *, repo_type: str = "model", revision: str | None = None,
    token: str | bool | None = None, cache_dir: str | None = None,
) -> None:  # fmt: skip
    """Raise InputError, which begins with `words`, where the hub cannot give the files of a name.

    One that is in the cache is not asked for: which of its files are needed, the hub's client knows. A hub that is
    slow, or that has an error of its own, is left to that client, too, which tries again.
    """
    from huggingface_hub import constants, errors, get_token
    from huggingface_hub.utils import validate_repo_id

    near = _near(repo_id)
    try:
        validate_repo_id(repo_id)
    except errors.HFValidationError as error:
        raise InputError(f"{words}: {near or in_a_line(error)}") from error
    if _is_in_cache(repo_id, repo_type, revision, cache_dir or constants.HF_HUB_CACHE):
        return
    if constants.HF_HUB_OFFLINE:
        remedy = near or "name a folder or a file, or unset HF_HUB_OFFLINE to download it"
        raise InputError(f"{words}: HF_HUB_OFFLINE is set, and the hub's cache has none of this name; {remedy}")
    hub = constants.ENDPOINT
    page = f"{hub}/{'datasets/' if repo_type == 'dataset' else ''}{repo_id}"
    login = "log in by `hf auth login`" if not (token or get_token()) else "take another token, by `hf auth login`"
    try:
        _ask(repo_id, repo_type, revision, token)
    except errors.GatedRepoError as error:
        raise InputError(f"{words}: it is gated; accept its conditions at {page}, and {login}") from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"{words}: it has no revision {shown(revision)}; look for its revisions at {page}") from error
    except errors.RepositoryNotFoundError as error:
        remedy = near or f"check the name, or {login}"
        raise InputError(f"{words}: {hub} has none of this name, or a private one; {remedy}") from error
    except errors.HfHubHTTPError as error:
        if error.response.status_code == 401:
            raise InputError(
                f"{words}: {hub} does not take the token; take another one, by `hf auth login` or HF_TOKEN"
            ) from error
    except Exception as error:  # of its client, httpx or requests, by the version
        kinds = {kind.__name__ for kind in type(error).__mro__}
        remedy = near or "check the name and the network, or name a folder or a file"
        if "ConnectTimeout" in kinds:
            remedy += f"; if the network is slow, set HF_HUB_ETAG_TIMEOUT to more than {constants.HF_HUB_ETAG_TIMEOUT}"
        elif not kinds & NOT_CONNECTED:
            return
        raise InputError(
            f"{words}: {hub} cannot be reached ({in_a_line(error)}), and the hub's cache has none of this name; "
            f"{remedy}"
        ) from error


def _is_in_cache(repo_id: str, repo_type: str, revision: str | None, cache_dir: str) -> bool:
    """Tell whether the hub's cache has a revision's folder, of whichever files."""
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(os.path.expanduser(cache_dir), repo_folder_name(repo_id=repo_id, repo_type=repo_type))
    commit = revision or "main"
    with contextlib.suppress(OSError):  # where it is a commit itself
        commit = (folder / "refs" / commit).read_text(encoding="utf-8")
    return (folder / "snapshots" / commit).is_dir()


@functools.cache
def _ask(repo_id: str, repo_type: str, revision: str | None, token: str | bool | None) -> None:
    """Ask the hub for a file's head, twice where no connection is made. A file that is not there is no error."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    file = "README.md" if repo_type == "dataset" else "config.json"
    url = hf_hub_url(repo_id, file, repo_type=repo_type, revision=revision)
    for pause in (PAUSE_S, None):
        try:
            get_hf_file_metadata(url, token=token)
            return
        except EntryNotFoundError:
            return
        except Exception as error:
            if pause is None or not {kind.__name__ for kind in type(error).__mro__} & NOT_CONNECTED:
                raise
            time.sleep(pause)


def _near(name: str) -> str:
    """Ask whether another name was meant, or say nothing.

    It is the hub id in a page's address, or the entry of a folder whose name is near to one that is not there.
    """
    address = re.match(r"https?://[^/]+/(?:datasets/)?([^/]+/[^/?#]+)", name)
    if address:
        return f"did you mean {address[1]!r}?"
    path = Path(expanded(name))
    try:
        there = [entry.name for entry in os.scandir(path.parent)][:NEAREST_OF]
    except (OSError, ValueError):
        return ""
    found = difflib.get_close_matches(path.name, there, n=1, cutoff=NEAR)
    return f"did you mean {str(Path(name).parent / found[0])!r}?" if found else ""


def _or(near: str) -> str:
    return f"; {near}" if near else ""

"""A name -> local files: a local folder as it is, or a Hugging Face hub repository through its download cache.

Models, tokenizers, templates and datasets are all found here. Downloads go through huggingface_hub, so its cache,
`HF_HUB_OFFLINE`, `HF_ENDPOINT`, `HF_TOKEN` and its progress bar work as usual.
"""

import socket
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass


def resolve_file(name_or_folder: str | Path, filename: str, revision: str | None = None) -> Path | None:
    """The local path of `filename` in a folder or hub repository, or None if that has no such file.

    Raises `FileNotFoundError` if there is no such folder, and no such repository on the hub or in its cache.
    """
    if Path(name_or_folder).is_dir():
        path = Path(name_or_folder) / filename
        return path if path.is_file() else None
    name = str(name_or_folder)
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{name}: no such folder (and not a hub id of the form OWNER/NAME)")
    return fetch(name, filename, revision)


def fetch(repo_id: str, filename: str, revision: str | None = None, repo_type: str = "model") -> Path | None:
    """The path of one file of a hub repository, downloaded unless cached; None if the repository has no such file."""
    from huggingface_hub import errors, hf_hub_download, try_to_load_from_cache

    offline = not hub_is_reachable()
    try:
        return Path(
            hf_hub_download(repo_id, filename, revision=revision, repo_type=repo_type, local_files_only=offline)
        )
    except errors.LocalEntryNotFoundError as error:  # offline and not cached; a subclass of EntryNotFoundError
        if offline and try_to_load_from_cache(repo_id, "config.json", revision=revision, repo_type=repo_type):
            return None  # the model itself is cached, so this file is an optional one that was not downloaded
        raise FileNotFoundError(
            f"{repo_id}: no such folder here, and the hub cannot be reached for {filename} "
            "(give a local folder, or download once with a network)"
        ) from error
    except errors.EntryNotFoundError:
        return None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        at_revision = f" at revision {revision}" if revision else ""
        raise FileNotFoundError(
            f"{repo_id}: no such folder here, and no such {repo_type} on the hub{at_revision} "
            "(a private one needs HF_TOKEN)"
        ) from error


@cache
def hub_is_reachable() -> bool:
    """Whether the hub accepts a connection, checked once per process: huggingface_hub would retry for half a minute
    on every file."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    url = urlsplit(constants.ENDPOINT)
    host = url.hostname or ""
    if {url.scheme, "all"} & getproxies().keys() and not proxy_bypass(host):
        return True  # behind a proxy a direct connection may fail although the hub can be reached
    try:
        socket.create_connection((host, url.port or (80 if url.scheme == "http" else 443)), timeout=5).close()
    except OSError:
        return False
    return True

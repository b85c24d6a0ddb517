"""Where files are found, how JSON is read, and how files are written whole.

A model, a tokenizer, a template and a dataset all come either from a local folder or from the Hugging Face
hub. The hub side is huggingface_hub's: its cache, `HF_HUB_OFFLINE`, `HF_ENDPOINT`, `HF_TOKEN`, its progress bar.
"""

import errno
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass
from uuid import uuid4

# A full disk, a missing right, a file where a folder belongs; a file system without locks.
UNWRITABLE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST),
    *(errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOENT),  # the last: a folder in /proc
}


def resolve_file(name_or_folder: str | Path, filename: str, revision: str | None = None) -> Path | None:
    """The local path of `filename` in a folder or in a hub repository, or None where that has no such file.

    Raises `FileNotFoundError` where neither the folder nor the hub repository can be reached.
    """
    if Path(name_or_folder).is_dir():
        path = Path(name_or_folder) / filename
        return path if path.is_file() else None
    name = str(name_or_folder)
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{name}: no such folder (and not a hub id, which reads OWNER/NAME)")
    return fetch(name, filename, revision)


def fetch(repo_id: str, filename: str, revision: str | None = None, repo_type: str = "model") -> Path | None:
    """Downloads one file of a hub repository into huggingface_hub's cache, or finds it there."""
    from huggingface_hub import errors, hf_hub_download, try_to_load_from_cache

    offline = not hub_is_reachable()
    try:
        return Path(
            hf_hub_download(repo_id, filename, revision=revision, repo_type=repo_type, local_files_only=offline)
        )
    except errors.LocalEntryNotFoundError as error:  # offline, and not in the cache: a subclass of the next
        if offline and try_to_load_from_cache(repo_id, "config.json", revision=revision, repo_type=repo_type):
            return None  # the rest of the model is: what is not there was not wanted, or never was
        raise FileNotFoundError(
            f"{repo_id}: no such folder here, and the hub cannot be reached for {filename} "
            "(give a local folder, or download once with a network)"
        ) from error
    except errors.EntryNotFoundError:
        return None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        where = f" at revision {revision}" if revision else ""
        raise FileNotFoundError(
            f"{repo_id}: no such folder here, and no such {repo_type} on the hub{where} (a private one needs HF_TOKEN)"
        ) from error


@cache
def hub_is_reachable() -> bool:
    """One look a process: huggingface_hub itself would try for half a minute, for every file."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    url = urlsplit(constants.ENDPOINT)
    host = url.hostname or ""
    if {url.scheme, "all"} & getproxies().keys() and not proxy_bypass(host):
        return True  # whoever asks through a proxy may not reach the hub directly
    try:
        socket.create_connection((host, url.port or (80 if url.scheme == "http" else 443)), timeout=5).close()
    except OSError:
        return False
    return True


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds. A `ValueError` names the file, and the line, where it holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start}), so not JSON") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg} (correct it, or fetch it again)") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return content


def lock_folder(folder: Path, lock: IO[str], otherwise: str) -> None:
    """Makes a folder this process's until the lock file, opened with "a+", is closed, or the process gone.

    Raises `FileExistsError` where another process has it; `otherwise` is what else the user may do than to wait.
    """
    import fcntl  # here, because Windows has none, and chat.py, which claims no folder, runs there

    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        raise FileExistsError(
            f"{folder}: another run, {lock.read()}, is writing into this folder; wait for it, end it, or {otherwise}"
        ) from None
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}")
    lock.flush()


@contextmanager
def writing_to(folder: Path, flag: str) -> Iterator[None]:
    """A full disk or a missing right names the folder, and the flag that chooses another."""
    try:
        yield
    except OSError as error:
        ours = (
            error.filename is None
            or Path(error.filename).is_relative_to(folder)
            or folder.is_relative_to(error.filename)
        )
        if error.errno not in UNWRITABLE or not ours:
            raise
        raise OSError(f"{folder}: cannot be written to ({error.strerror}); {flag} chooses another place") from error


def wait_until_visible(path: Path, seconds: float = 90) -> bool:
    """Whether a file that another machine wrote is seen here by then: network file systems remember absence."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True


def remove(path: Path) -> None:
    """Removes a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def to_disk(path: Path) -> None:
    """Waits until a file, or a folder's list of names, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`, and moves it into place when the block ends well.

    A reader sees the old file or the new one, never half of one, and a memory map of the old one stays valid.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)

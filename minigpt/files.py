"""Local files: reading JSON, atomic writes, folder locks, fsync, and errors that name the flag to change."""

import errno
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

# Errors that another folder would avoid: disk full, no permission, a file in place of a folder, no lock support.
UNWRITABLE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST),
    *(errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOENT),  # ENOENT: creating a folder in /proc
}


def read_json(path: Path) -> dict[str, Any]:
    """Reads a file that contains one JSON object. If it does not, `ValueError` names the file and line."""
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
    """Locks a folder through its lock file, opened with "a+"; closing that file or ending the process unlocks it.

    Raises `FileExistsError` if another process holds the lock; `otherwise` ends its message: what the user can do
    besides waiting for or ending that process.
    """
    import fcntl  # not at the top: Windows has no fcntl, and chat.py, which locks no folder, runs there

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
    """Adds to a write error, such as a full disk, the folder and the flag that chooses another one."""
    try:
        yield
    except OSError as error:
        in_folder = (
            error.filename is None
            or Path(error.filename).is_relative_to(folder)
            or folder.is_relative_to(error.filename)
        )
        if error.errno not in UNWRITABLE or not in_folder:
            raise
        raise OSError(f"{folder}: cannot be written to ({error.strerror}); {flag} chooses another place") from error


def wait_until_visible(path: Path, seconds: float = 90) -> bool:
    """Waits for a file that another machine wrote; False if it does not appear within `seconds`.

    Network file systems cache that a file does not exist.
    """
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True


def remove(path: Path) -> None:
    """Removes a file or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def to_disk(path: Path) -> None:
    """Calls fsync, so that a file's content, or a folder's list of names, survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Atomic write: yields a temporary path in the same folder, and renames it to `path` unless the block raises.

    A reader sees the old file or the new one, never a partial one, and a memory map of the old one stays valid.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)

"""Files of a run folder: read as untrusted input, replaced in one piece."""

import contextlib
import errno
import os
import secrets
import stat
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

# Part of the name that a temporary file shares with the file it will become; long names would not leave room for more.
SHARED_NAME = 40


class RunError(ValueError):
    """A run folder that cannot be used as asked."""


def write_atomically(path: Path, content: bytes, check: Callable[[Path], None] | None = None) -> None:
    """Replace `path` by `content`, synced to disk. Raises RunError, leaving the old file, when that fails.

    check  is given the file under its temporary name; what it raises is raised, and the old file left as it is
    Any number of processes may write the same file at the same time: it is then what one of them wrote last.
    """
    # A name of its own per write: of two writers that share one, the second renames what the first still fills.
    temporary = path.with_name(f".{path.name[:SHARED_NAME]}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if check:
            _checked(temporary, check)
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "Free some space" if full else "Make the folder writable, or choose another with --out"
        raise RunError(
            f"cannot save {path}: {error.strerror}; what was saved before is intact. "
            f"{remedy}, then run the same command again"
        ) from error


def _checked(temporary: Path, check: Callable[[Path], None]) -> None:
    try:
        check(temporary)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_temporary(folder: Path, name: str) -> None:
    """Remove what writers of `name` (a file's name, or a pattern) that were killed left half-written in `folder`.

    Only for files that nobody writes at the moment.
    """
    for left in folder.glob(f".{name}*.tmp"):
        with contextlib.suppress(OSError):
            left.unlink()


def require_writable(folder: Path) -> None:
    """Raise RunError unless files can be made in `folder`, which is made if it is not there."""
    probe = folder / f".writable.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RunError(
            f"cannot write to {folder}: {error.strerror}; choose another folder with --out, or make it writable"
        ) from error


def read_bounded(path: Path, most_bytes: int) -> bytes | None:
    """The content of a regular file; None if there is none. Raises RunError for anything else, and for a larger file.

    Nothing is read of what is too large or no file, such as a device or a pipe, which would never end.
    """
    try:
        with _open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            content = file.read(most_bytes + 1) if size <= most_bytes else b""
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise RunError(f"{path} cannot be read: {reason}; make it a readable file") from error
    if max(size, len(content)) > most_bytes:
        raise RunError(
            f"{path} is damaged: {size:,} bytes are more than the {most_bytes:,} that such a file can have; "
            "put back a copy of it"
        )
    return content


def read_regular(path: Path) -> bytes:
    """The content of a regular file. Raises OSError for anything else: a device or a pipe would never end."""
    with _open_regular(path) as file:
        return file.read()


def _open_regular(path: Path) -> BinaryIO:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # or opening a pipe waits for its writer
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file")
    return os.fdopen(descriptor, "rb")


def require_inside(folder: Path, name: str) -> None:
    """Raise ValueError unless the relative path `name` stays within `folder`, also through symbolic links."""
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts:
        raise ValueError("must be a path within the run folder")
    root = folder.resolve()
    try:
        resolved = (folder / name).resolve()
    except RuntimeError as error:  # links that point at each other, before Python 3.13
        raise ValueError("is a symbolic link that leads nowhere") from error
    if not resolved.is_relative_to(root):
        raise ValueError("leads out of the run folder through a symbolic link")


def move_aside(folder: Path, patterns: Sequence[str]) -> Path | None:
    """Move the files of `folder` that fit `patterns`, in their order, to a new folder in it, and return that.

    None if there is nothing to move. Raises RunError if moving fails; what was moved until then is in the new folder.
    """
    found = [file for pattern in patterns for file in sorted(folder.glob(pattern))]
    if not found:
        return None
    name = f"replaced-{time.strftime('%Y-%m-%dT%H-%M-%S')}"
    taken = len(list(folder.glob(f"{name}*")))
    target = folder / (f"{name}-{taken + 1}" if taken else name)
    try:
        target.mkdir()
        for file in found:
            file.rename(target / file.name)
    except OSError as error:
        raise RunError(
            f"cannot move {folder}'s files to {target}: {error.strerror}; choose another --out"
        ) from error
    return target

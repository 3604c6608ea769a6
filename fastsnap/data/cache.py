"""Arrays that took long to make, kept outside the data folder under a key that changes with what they were made of.

An entry is a folder: arrays as .npy, which are mapped into memory, and meta.json, which says what they are. It is
made under a temporary name and renamed, so it is whole or not there.
"""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastsnap.data.archives import DataError

VERSION = 1  # of what lies in an entry; part of every key
META = "meta.json"
PROBED = 64  # rows of an array that are hashed when it is opened: all of them would take as long as decoding
MOST_META = 2**28


@dataclass
class Entry:
    """Arrays [N, ...] and facts (JSON) that are written together."""

    arrays: dict[str, NDArray[Any]]
    facts: dict[str, Any] = field(default_factory=dict)


def cache_folder(given: str | None) -> Path:
    """`given`, or fastsnap in XDG_CACHE_HOME, or in ~/.cache."""
    if given is not None:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "fastsnap"


def key_of(*parts: Any) -> str:
    """A key, in hexadecimal, of arrays, lists of names and numbers."""
    digest = hashlib.sha256(f"fastsnap {VERSION}".encode())
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype.str}{part.shape}".encode())
            digest.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
        elif isinstance(part, list):
            digest.update(f"{len(part)}".encode())
            for name in part:
                digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()[:32]


def open_or_make(
    folder: Path,
    name: str,
    needs: Collection[str],
    make: Callable[["Maker"], dict[str, Any]],
    say: Callable[[str], None],
) -> Entry:
    """The entry `name` of the cache in `folder`; if it is not there, or is damaged, it is made.

    needs  names of the arrays that it must hold
    make   is given a Maker to get arrays from, fills them and returns the facts
    say    is told what the user should know: of a damaged entry, of another process that is waited for
    Of several processes one makes it, the others wait. Raises DataError, with what to do, for a folder that cannot be
    written to and for a full disk; what was half made is removed.
    """
    entry = _opened(folder / name, needs, say)
    if entry is not None:
        return entry
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f"{name}.lock", say):
            entry = _opened(
                folder / name, needs, lambda text: None
            )  # another process may have made it meanwhile
            return entry if entry is not None else _made(folder, name, needs, make)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "free some space" if full else "make it writable"
        raise DataError(
            f"cannot keep decoded images in {folder}: {error.strerror or error}. {remedy.capitalize()}, choose another "
            "folder with --cache, or decode while training with --memory 0"
        ) from error


class Maker:
    """Gives out arrays on disk, of which all bytes are taken beforehand: a full disk is an error, not a crash."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.arrays: dict[str, np.memmap[Any, Any]] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """A new array of zeros, in the file `name`.npy."""
        path = self.folder / f"{name}.npy"
        kind = np.dtype(dtype)
        with path.open("wb") as file:
            header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            start, size = file.tell(), int(np.prod(shape)) * kind.itemsize
            file.flush()
            if size:
                _take(file.fileno(), start + size)
        if not size:
            return np.zeros(shape, kind)
        self.arrays[name] = np.memmap(path, kind, "r+", start, shape)
        return self.arrays[name]

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Everything to disk, and meta.json beside it."""
        for array in self.arrays.values():
            array.flush()
        files = {
            path.stem: _probe(np.load(path, mmap_mode="r")) for path in sorted(self.folder.glob("*.npy"))
        }
        (self.folder / META).write_text(
            json.dumps({"version": VERSION, "files": files, "facts": dict(facts)})
        )
        for path in self.folder.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _take(descriptor: int, size: int) -> None:
    """Give the file `size` bytes of disk. Raises OSError if there are not as many."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        block = bytes(2**20)
        for start in range(0, size, len(block)):
            os.pwrite(descriptor, block[: size - start], start)


def _made(folder: Path, name: str, needs: Collection[str], make: Callable[[Maker], dict[str, Any]]) -> Entry:
    for left in folder.glob(
        f".{name}.*.tmp"
    ):  # of a process that was killed: who makes this one holds the lock
        shutil.rmtree(left, ignore_errors=True)
    temporary = folder / f".{name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    temporary.mkdir()
    try:
        maker = Maker(temporary)
        maker.finish(make(maker))
        shutil.rmtree(folder / name, ignore_errors=True)  # a damaged one
        try:
            temporary.rename(folder / name)
        except OSError:
            if not (folder / name / META).exists():  # without locks, another process may have been faster
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    entry = _opened(folder / name, needs, lambda text: None)
    if entry is None:
        raise DataError(
            f"{folder / name} was damaged as soon as it was written: choose another folder with --cache"
        )
    return entry


def _opened(path: Path, needs: Collection[str], say: Callable[[str], None]) -> Entry | None:
    """The entry in `path`, mapped into memory; None if there is none, or one that is not what was written."""
    if not path.is_dir():
        return None
    try:
        if (path / META).stat().st_size > MOST_META:
            raise ValueError("meta.json is too large")
        meta = json.loads((path / META).read_bytes())
        if meta["version"] != VERSION:
            raise ValueError(f"it is of version {meta['version']}")
        if not set(needs) <= meta["files"].keys():
            raise ValueError(f"it lacks {', '.join(sorted(set(needs) - meta['files'].keys()))}")
        # "c": what is written stays in this process. A read-only map would make PyTorch warn.
        arrays = {name: np.load(path / f"{name}.npy", mmap_mode="c") for name in meta["files"]}
        for name, array in arrays.items():
            if _probe(array) != meta["files"][name]:
                raise ValueError(f"{name}.npy is not what was written")
        return Entry(arrays, meta["facts"])
    except (OSError, ValueError, TypeError, LookupError, EOFError) as error:
        say(f"the cache {path} is damaged ({error}): making it anew")
        return None


def _probe(array: NDArray[Any]) -> str:
    """SHA-256 of type, shape and some rows, spread evenly."""
    digest = hashlib.sha256(f"{array.dtype.str}{array.shape}".encode())
    for index in np.linspace(0, len(array) - 1, min(PROBED, len(array))).astype(np.int64):
        digest.update(np.ascontiguousarray(array[index]).tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _locked(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold a lock of the file system, where it has such; elsewhere the rename decides between several makers."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process is making {path.with_suffix('')}: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass
        yield

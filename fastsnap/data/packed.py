"""Unpacking an archive of a data set as untrusted input: only what belongs to it, and no more than there can be."""

import gzip
import shutil
import tarfile
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import IO, cast

from fastsnap.data.archives import DataError

LARGEST = 2**29  # bytes in all, unpacked; CIFAR's have 187 million
MOST_MEMBERS = 100


class Bounded:
    """A stream that ends in an error after LARGEST bytes: a few kilobytes of gzip can hold terabytes."""

    def __init__(self, stream: gzip.GzipFile, path: Path) -> None:
        self._stream, self._path, self._left = stream, path, LARGEST

    def read(self, count: int) -> bytes:
        """At most `count` bytes."""
        data = self._stream.read(min(count, self._left + 1))
        self._left -= len(data)
        if self._left < 0:
            raise DataError(f"{self._path} unpacks to more than {LARGEST} bytes: get it again")
        return data


def unpack(archive: Path, subfolder: str, names: Collection[str], target: Path) -> None:
    """Write the files `names`, which lie in `subfolder` of the .tar.gz `archive`, into the folder `target`.

    Nothing else in the archive is written, whatever its name or kind. Raises DataError, naming the archive, where it is
    damaged, too large, or lacks a file.
    """
    missing = {f"{subfolder}/{name}": name for name in names}
    try:
        with (
            gzip.open(archive) as stream,
            tarfile.open(fileobj=cast(IO[bytes], Bounded(stream, archive)), mode="r|") as tar,
        ):
            for number, member in enumerate(tar):
                if number >= MOST_MEMBERS:
                    raise DataError(f"{archive} has more than {MOST_MEMBERS} members: get it again")
                if not missing or member.name not in missing:
                    continue
                content = tar.extractfile(member) if member.isreg() else None
                if content is None:
                    raise DataError(f"{member.name} in {archive} is no plain file: get the archive again")
                with (target / missing.pop(member.name)).open("xb") as file:
                    shutil.copyfileobj(content, file)
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{archive} is damaged or truncated ({error}): get it again") from error
    if missing:
        raise DataError(f"{archive} lacks {', '.join(sorted(missing))}: get it again")

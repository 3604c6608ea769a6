"""The pictures that a command line names: files, folders, and names on standard input, one after the other."""

import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from fastsnap.data.listing import is_hidden, is_image

STANDARD_INPUT = "-"


@dataclass(frozen=True)
class NoPicture:
    """Something that was named and gives no picture, and why."""

    reason: str


def pictures_of(names: Iterable[str], standard_input: BinaryIO | None = None) -> Iterator[str | NoPicture]:
    """The files that `names` mean, in this order; of folders, at any depth, those that are images by their endings, in
    the order of their names. "-" means the names on standard input, one a line. In memory are the names of one folder,
    and of those above it, at a time.

    standard_input  default: this process's
    """
    for name in names:
        if name == STANDARD_INPUT:
            lines = standard_input or sys.stdin.buffer
            yield from pictures_of(filter(None, (os.fsdecode(line.rstrip(b"\r\n")) for line in lines)))
        elif os.path.isdir(name):
            yield from _folder(Path(name))
        else:
            yield name


def _folder(top: Path) -> Iterator[str | NoPicture]:
    empty = True
    for name in _below(top, frozenset()):
        empty = False
        yield name
    if empty:
        yield NoPicture(f"{top}: it holds no image")


def _below(folder: Path, above: frozenset[tuple[int, int]]) -> Iterator[str | NoPicture]:
    try:
        status = os.stat(folder)
        inner = sorted(name for name in os.listdir(folder) if not is_hidden(name))
    except OSError as error:
        yield NoPicture(f"{folder}: it cannot be read: {error.strerror}")
        return
    identity = status.st_dev, status.st_ino
    if identity in above:  # a link that leads back
        return
    for name in inner:
        path = folder / name
        if path.is_dir():
            yield from _below(path, above | {identity})
        elif is_image(name):
            yield str(path)

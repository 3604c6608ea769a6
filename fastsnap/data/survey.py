"""What the headers of many files say, before any is decoded: sizes, colours, and which are no pictures at all."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fastsnap.data.archives import DataError
from fastsnap.data.headers import DamagedImage, Header, inspect
from fastsnap.kernels.cpu import use_one_thread

MOST_SIZE = 224  # pixels of the side that images are brought to unless asked for: ImageNet's
CHUNK = 16  # files that a thread is handed at once: small ones take less than handing them over does
CHUNKS_PER_THREAD = 16  # at a time, so that a million files make no million of tasks
OnProgress = Callable[[int], None]  # told how many more are done
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Survey:
    """Of N files, in their order.

    sizes        int32 [N, 2]: height and width as seen; 0 where the header is damaged
    coloured     bool [N]
    transparent  bool [N]
    direct       int8 [N]: see sources.FileSet
    damaged      index -> reason, which begins with the path
    """

    sizes: NDArray[np.int32]
    coloured: NDArray[np.bool_]
    transparent: NDArray[np.bool_]
    direct: NDArray[np.int8]
    damaged: dict[int, str]


def stamps(root: Path, names: Sequence[str]) -> NDArray[np.int64]:
    """Bytes and modification time (ns) of each file: int64 [N, 2]; -1 where it is gone."""
    found = np.full((len(names), 2), -1, np.int64)
    for index, name in enumerate(names):
        found[index] = _stamp(root / name)
    return found


def require_unchanged(path: Path, stamp: NDArray[np.int64]) -> None:
    """Raise DataError, naming the file and the remedy, unless it has the size and the time that it had."""
    now = _stamp(path)
    if now != (int(stamp[0]), int(stamp[1])):
        what = (
            "is gone" if now[0] < 0 else f"changed: {now[0]:,} bytes, {int(stamp[0]):,} when it was checked"
        )
        raise DataError(f"{path} {what}. Put it back as it was and run the same command again, which goes on")


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def survey(
    root: Path, names: Sequence[str], threads: int, on_progress: OnProgress = lambda done: None
) -> Survey:
    """Read the headers of `names` below `root`."""
    count = len(names)
    result = Survey(
        np.zeros((count, 2), np.int32),
        np.zeros(count, bool),
        np.zeros(count, bool),
        np.zeros(count, np.int8),
        {},
    )

    def look(index: int) -> Header | str:
        try:
            return inspect(root / names[index])
        except DamagedImage as error:
            return str(error)

    for index, found in enumerate(in_threads(look, range(count), threads)):
        if isinstance(found, str):
            result.damaged[index] = found
        else:
            result.sizes[index] = found.height, found.width
            result.coloured[index], result.transparent[index] = found.coloured, found.transparent
            result.direct[index] = found.orientation if found.plain else 0
        on_progress(1)
    return result


def decoding_pool(threads: int) -> ThreadPoolExecutor:
    """Threads that decode, each on one core: PyTorch's own threads within each would wait for each other's cores."""
    return ThreadPoolExecutor(threads, "fastsnap-files", use_one_thread)


def in_threads(work: Callable[[Item], Result], items: Sequence[Item], threads: int) -> Iterator[Result]:
    """`work` of every item, in their order; a few chunks are in the threads at a time."""

    def chunk(start: int) -> list[Result]:
        return [work(item) for item in items[start : start + CHUNK]]

    starts = iter(range(0, len(items), CHUNK))
    with decoding_pool(threads) as pool:
        while part := list(islice(starts, CHUNKS_PER_THREAD * threads)):
            for results in pool.map(chunk, part):
                yield from results


def usual_size(sizes: NDArray[np.int32]) -> int:
    """The median shorter side of the images, at most 224 pixels."""
    return min(MOST_SIZE, int(np.median(sizes.min(axis=1))))


def describe_sizes(sizes: NDArray[np.int32]) -> str:
    """For the log: the range of widths and heights, and the median shorter side."""
    areas = sizes.astype(np.int64).prod(axis=1)
    small, large = sizes[areas.argmin()], sizes[areas.argmax()]
    if (small == large).all():
        return f"all of {small[1]:,}x{small[0]:,} pixels"
    median = int(np.median(sizes.min(axis=1)))
    return f"{small[1]:,}x{small[0]:,} to {large[1]:,}x{large[0]:,} pixels, median shorter side {median:,}"

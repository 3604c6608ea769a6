"""Pictures for an ensemble, batch by batch: decoded in threads while it computes, two batches in memory at a time."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fastsnap.data.survey import CHUNK, decoding_pool
from fastsnap.ensemble.preprocessing import Picture, Preprocessing

BATCH_SIZE = 64  # as fast as larger ones on a CPU, whose caches it fits
Read = tuple[Picture, NDArray[np.uint8] | ValueError]
Batch = list[Read]


def listed(images: Any) -> Iterable[Picture]:
    """The pictures of what may be one."""
    if isinstance(images, str | Path | Image.Image) or (
        isinstance(images, np.ndarray | Tensor) and images.ndim < 4
    ):
        return [images]
    if not isinstance(images, Iterable):
        raise ValueError(f"images must be paths, PIL images or arrays, got a {type(images).__name__}")
    return images


def read_batches(
    preprocessing: Preprocessing, pictures: Iterable[Picture], batch_size: int, threads: int
) -> Iterator[Batch]:
    """Each picture with its pixels, uint8 [H, W, C] as the networks see it, or with why it cannot be used.

    The next batch is decoded while the caller computes with this one.
    """
    numbered = enumerate(pictures)
    ahead: list[Future[Batch]] = []
    with decoding_pool(threads) as pool:
        try:
            ahead = _submitted(pool, preprocessing, list(islice(numbered, batch_size)))
            while ahead:
                current = ahead
                ahead = _submitted(pool, preprocessing, list(islice(numbered, batch_size)))
                yield [read for future in current for read in future.result()]
        finally:
            for future in ahead:
                future.cancel()


def _submitted(
    pool: ThreadPoolExecutor, preprocessing: Preprocessing, part: Sequence[tuple[int, Picture]]
) -> list[Future[Batch]]:
    """At work in the threads, small chunks each, so that large pictures are spread over them."""

    def read(chunk: Sequence[tuple[int, Picture]]) -> Batch:
        return [(picture, _pixels(preprocessing, picture, index)) for index, picture in chunk]

    size = max(1, min(CHUNK, len(part) // (4 * pool._max_workers)))
    return [pool.submit(read, part[start : start + size]) for start in range(0, len(part), size)]


def _pixels(preprocessing: Preprocessing, picture: Picture, index: int) -> NDArray[np.uint8] | ValueError:
    try:
        return preprocessing.of(picture, f"image {index}")
    except ValueError as error:
        return error

"""What both loaders of files share: reading ahead in threads, and which part of an image a batch wants."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from fastsnap.data.archives import DataError
from fastsnap.data.decoding import decode_bytes, decode_direct
from fastsnap.data.headers import DamagedImage, read_picture
from fastsnap.data.plan import Batch, Plan
from fastsnap.data.sources import FileSet
from fastsnap.data.survey import decoding_pool, require_unchanged

AHEAD = 2  # batches that are read while the step runs
Position = tuple[int, int]  # epoch and step
Work = TypeVar("Work")


def read_unchanged(source: FileSet, index: int) -> bytes:
    """The content of file `index`. Raises DataError, naming it, if it is not what was checked before training."""
    path = source.root / source.names[index]
    require_unchanged(path, source.stamps[index])
    try:
        content = read_picture(path)
    except DamagedImage:
        require_unchanged(path, source.stamps[index])  # gone since: the better reason
        raise
    if len(content) != source.stamps[index, 0]:
        raise DataError(
            f"{path} changed while it was read. Put it back and run the same command again, which goes on"
        )
    return content


def decoded(source: FileSet, index: int, content: bytes) -> NDArray[np.uint8]:
    """The picture of file `index`, uint8 [H, W, C]. Raises DamagedImage, naming it."""
    name, orientation = str(source.root / source.names[index]), int(source.direct[index])
    if orientation:
        return decode_direct(content, name, source.channels, orientation)
    return decode_bytes(content, name, source.channels, source.background)


class ReadAhead(Generic[Work]):
    """Work of the coming batches in threads, an item per image; at most AHEAD batches beyond the one that is asked for.

    prepare  called with a batch; its result goes to the work on each of the batch's images
    work     called with that, the batch and the place of an image in it
    A jump - an epoch left early, a resume - drops what was read ahead.
    """

    def __init__(
        self,
        plan: Plan,
        threads: int,
        work: Callable[[Any, Batch, int], Work],
        prepare: Callable[[Batch], Any] = lambda batch: None,
    ) -> None:
        self._plan, self._work, self._prepare = plan, work, prepare
        self._pool = decoding_pool(threads)
        self._in_flight: dict[Position, list[Future[Work]]] = {}

    def take(self, position: Position) -> list[Work]:
        """The results for the batch at `position`, in its order. Raises what the work raised."""
        wanted = [position, *self._following(position)]
        for other in [key for key in self._in_flight if key not in wanted]:
            for future in self._in_flight.pop(other):
                future.cancel()
        for coming in wanted:
            if coming not in self._in_flight:
                batch = self._plan.batch(*coming)
                places = range(len(batch.indices))
                prepared = self._prepare(batch)
                self._in_flight[coming] = [
                    self._pool.submit(self._work, prepared, batch, place) for place in places
                ]
        futures = self._in_flight.pop(position)
        try:
            return [future.result() for future in futures]
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Drop what was read ahead."""
        for futures in self._in_flight.values():
            for future in futures:
                future.cancel()
        self._in_flight.clear()

    def _following(self, position: Position) -> Iterator[Position]:
        epoch, step = position
        for _ in range(AHEAD):
            step += 1
            if step == self._plan.steps_per_epoch:
                epoch, step = (epoch + 1 if self._plan.training else 0), 0
            yield epoch, step

    def __del__(self) -> None:
        self.stop()
        self._pool.shutdown(wait=False, cancel_futures=True)

"""Memory for batches that come and go: what the caller has dropped is filled again, instead of fresh from the system.

A batch of photographs is larger than what the allocator keeps, so each would be new pages, which the system fills with
zeros first: that took longer than the batch itself.
"""

import weakref

import numpy as np
import torch
from torch import Tensor

MOST_BLOCKS = 4  # that wait to be filled again


class Blocks:
    """Gives out float32 tensors on the CPU that belong to the caller, however long it keeps them, or views of them."""

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []

    def take(self, *shape: int) -> Tensor:
        """An uninitialised tensor of this shape, C-contiguous."""
        size = int(np.prod(shape, dtype=np.int64))
        block = next((block for block in self._free if len(block) >= size), None)
        if block is None:
            block = np.empty(size, np.float32)
        else:
            self._free = [other for other in self._free if other is not block]
        # The tensor's storage holds this view, which nobody else does: it goes when the last of its tensors does.
        view = block[:size].reshape(shape)
        weakref.finalize(view, _give_back, weakref.ref(self), block).atexit = False
        return torch.from_numpy(view)


def _give_back(owner: "weakref.ref[Blocks]", block: np.ndarray) -> None:
    blocks = owner()
    if blocks is not None and len(blocks._free) < MOST_BLOCKS:
        blocks._free.append(block)

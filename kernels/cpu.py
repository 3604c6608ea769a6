"""The CPU kernels: a shared library that setup.py builds from the .cpp files of this folder."""

import ctypes
import functools
import importlib.util

from torch import Tensor  # first torch, then the library: both then share one pool of OpenMP threads


@functools.cache
def library() -> ctypes.CDLL:
    """The library. Raises ImportError where it has not been built."""
    found = importlib.util.find_spec(f"{__package__}._cpu")
    if found is None or found.origin is None:
        raise ImportError(
            "fastsnap's CPU kernels are not built: run `pip install -e .` in the repository, it needs a C++ compiler"
        )
    return ctypes.CDLL(found.origin)


def address(tensor: Tensor | None) -> int:
    """Address of the first element, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()

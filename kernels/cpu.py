"""The CPU kernels: a shared library that setup.py builds from the .cpp files of this folder, if it finds a compiler."""

import contextlib
import ctypes
import functools
import importlib.machinery
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor  # first torch, then the library: both then share one pool of OpenMP threads

INSTRUCTION_SETS = ("plain", "avx2", "avx512")  # as in instructions.h; plain: what every processor has
REMEDY = "install a C++ compiler (Debian: apt install g++), then fastsnap once more (pip install --force-reinstall)"


@functools.cache
def _library_file() -> str | None:
    # Beside this file only: the library of another fastsnap on the path may not fit.
    found = importlib.machinery.PathFinder.find_spec(f"{__package__}._cpu", [str(Path(__file__).parent)])
    return None if found is None else found.origin


def is_built() -> bool:
    """Whether there is a library."""
    return _library_file() is not None


@functools.cache
def library() -> ctypes.CDLL:
    """The library. Raises ImportError where it has not been built: ask `has_library` before."""
    file = _library_file()
    if file is None:
        raise ImportError(f"fastsnap's CPU kernels are not built: {REMEDY}")
    return ctypes.CDLL(file)


def has_library() -> bool:
    """Whether there is a library; if not, a UserWarning says once what is lost. For who else takes a reference."""
    return is_built() or _warn_of_references()


@functools.cache
def _warn_of_references() -> bool:
    warnings.warn(
        "fastsnap was installed without a C++ compiler, so on the CPU plain PyTorch does the work of its kernels: the "
        "same results up to rounding, but an update takes about 5 times as long, batch normalisation 2 times, an "
        f"ensemble's average 80 times. To get them, {REMEDY}",
        stacklevel=3,
    )
    return False


def use_one_thread() -> None:
    """What the calling thread computes from now on, it computes alone; all others keep their number of threads.

    torch.set_num_threads would be for all.
    """
    torch.get_num_threads()  # a thread's first call sets it to the number of all
    with contextlib.suppress(AttributeError):  # built without OpenMP
        ctypes.CDLL(None).omp_set_num_threads(1)


def address(tensor: Tensor | None) -> int:
    """Address of the first element, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def instruction_sets() -> tuple[str, ...]:
    """Those that the kernels are compiled for and this processor has, from the plain to the best, the default."""
    return INSTRUCTION_SETS[: library().fastsnap_best_instructions() + 1]


@contextlib.contextmanager
def using_instructions(name: str) -> Iterator[None]:
    """Within, the kernels of this process use this instruction set: for tests and measurements.

    Not the bf16 convolution's, which is for one instruction set only. Raises ValueError for one that is not there.
    """
    available = instruction_sets()
    if name not in available:
        raise ValueError(f"name must be one of {', '.join(available)} on this processor, got {name!r}")
    before = library().fastsnap_use_instructions(INSTRUCTION_SETS.index(name))
    try:
        yield
    finally:
        library().fastsnap_use_instructions(before)

"""Reading data-set files as untrusted input: the CIFAR pickles and the idx files of Fashion-MNIST.

A pickle is a program. Here it runs in an unpickler that makes no call that the pickle asks for: the few names that
NumPy arrays need stand for a record of the call (`Call`), every other name is an error, and arrays are then built from
the records by code that checks them.
"""

import gzip
import pickle
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ARRAY_NAMES = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy.core.numeric", "_frombuffer"),
    ("numpy._core.numeric", "_frombuffer"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}
INTEGER_CODES = ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8")
IDX_UINT8 = 8


class DataError(ValueError):
    """A data set is missing, damaged or not what it claims to be."""


class Name:
    """A name that a pickle may mention; calling it records the call."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *arguments: Any) -> "Call":
        return Call(self.name, arguments)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError(f"a state for {self.name}")


class Call:
    """A call that a pickle asks for, recorded instead of made, with the state that it sets on the result."""

    def __init__(self, name: str, arguments: tuple[Any, ...]) -> None:
        self.name, self.arguments, self.state = name, arguments, None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class RecordingUnpickler(pickle.Unpickler):
    """Admits plain containers and the names in ARRAY_NAMES, and executes nothing."""

    def __init__(self, file: Any, path: Path) -> None:
        super().__init__(file, encoding="bytes")  # the archives are Python 2 pickles
        self._path = path

    def find_class(self, module: str, name: str) -> Name:
        if (module, name) not in ARRAY_NAMES:
            raise DataError(
                f"{self._path} asks for {module}.{name}, which no image archive needs: it was not executed. "
                "Do not use this file; get the archive from its publisher"
            )
        return Name(name)


def read_pickle(path: Path, largest: int) -> dict[str, Any]:
    """The dict in a pickle of at most `largest` bytes, keys as str; NumPy arrays come as `Call` (see `as_array`).

    Raises DataError, naming the file, for anything else.
    """
    _check_size(path, largest)
    try:
        with path.open("rb") as file:
            content = RecordingUnpickler(file, path).load()
    except DataError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise DataError(
            f"{path} is damaged or truncated ({error or type(error).__name__}): get it again"
        ) from error
    if not isinstance(content, dict):
        raise DataError(f"{path} should hold a dict, got {type(content).__name__}")
    return {as_text(key): value for key, value in content.items()}


def as_text(value: Any) -> str:
    """`value` as str: Python 2 pickles hold bytes where Python 3 pickles hold str."""
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


def as_array(value: Any) -> NDArray[Any]:
    """The integer array that `value` stands for: a recorded array or scalar, or a list of these or of numbers.

    Raises ValueError for other types, other dtypes than integers, and sizes that do not fit.
    """
    if isinstance(value, list):
        return _list_array(value)
    if not isinstance(value, Call):
        raise ValueError(f"an array was expected, got {type(value).__name__}")
    if value.name == "scalar":
        dtype, raw = value.arguments
        return np.frombuffer(_as_bytes(raw), _dtype(dtype))[0]
    if value.name == "_frombuffer":
        raw, dtype, shape, order = value.arguments
        return np.frombuffer(_as_bytes(raw), _dtype(dtype)).reshape(shape, order=as_text(order))
    if value.name == "_reconstruct" and value.state is not None:
        _version, shape, dtype, column_major, raw = value.state
        order = "F" if column_major else "C"
        return np.frombuffer(_as_bytes(raw), _dtype(dtype)).reshape(shape, order=order)
    raise ValueError(f"an array was expected, got numpy's {value.name}")


def _list_array(values: list[Any]) -> NDArray[Any]:
    if values and all(type(value) is int for value in values):
        return np.array(values, np.int64)
    if values and all(isinstance(value, Call) for value in values):
        return np.stack([as_array(value) for value in values])
    raise ValueError("a list of whole numbers or of arrays was expected")


def _as_bytes(raw: Any) -> bytes:
    if isinstance(raw, Call) and raw.name == "encode" and raw.arguments[1:] == ("latin1",):
        raw = raw.arguments[0].encode("latin1")  # how Python 3 writes bytes for protocols 0 to 2
    if not isinstance(raw, bytes | bytearray):
        raise ValueError(f"an array's data should be bytes, got {type(raw).__name__}")
    return bytes(raw)


def _dtype(value: Any) -> np.dtype[Any]:
    code = as_text(value.arguments[0]) if isinstance(value, Call) and value.name == "dtype" else repr(value)
    if code not in INTEGER_CODES:
        raise ValueError(f"dtype should be an integer type, got {code}")
    order = as_text(value.state[1]) if value.state else "|"
    return np.dtype(code).newbyteorder(order)


def read_idx(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """The uint8 array of exactly `shape` in an idx file (gzip if it is called .gz), writable.

    Raises DataError, naming the file, for anything else.
    """
    count = int(np.prod(shape))
    header = bytes([0, 0, IDX_UINT8, len(shape)]) + np.array(shape, ">i4").tobytes()
    _check_size(path, 2 * (len(header) + count))
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read(
                len(header) + count + 1
            )  # one more, so as to notice bytes that should not be there
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged or truncated ({error}): get it again") from error
    if not data.startswith(header):
        raise DataError(
            f"{path} should be an idx file of uint8 {shape}, but its header says otherwise: get it again"
        )
    if len(data) != len(header) + count:
        raise DataError(f"{path} should hold {count} bytes after its header, but it does not: get it again")
    return np.frombuffer(data, np.uint8, count, len(header)).reshape(shape).copy()


def _check_size(path: Path, largest: int) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): get it again") from error
    if size > largest:
        raise DataError(f"{path} has {size} bytes, more than the {largest} that it can need: get it again")

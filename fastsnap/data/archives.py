"""Reading data-set files as untrusted input: the CIFAR pickles and the idx files of Fashion-MNIST.

A pickle is a program. Here it runs in an unpickler that makes none of the calls that the pickle asks for:
the few names that NumPy arrays need stand for a record of the call (`Call`), every other name is an error,
and arrays are then built from the records by code that checks them.
"""

import gzip
import pickle
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

ADMITTED_NAMES = {  # NumPy 2 moved numpy.core to numpy._core
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy.core.numeric", "_frombuffer"),
    ("numpy._core.numeric", "_frombuffer"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),  # how Python 3 writes bytes for protocols 0 to 2, and
    ("__builtin__", "bytes"),  # how it writes empty ones
    ("builtins", "bytes"),
}
INTEGER_CODES = ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8")
IDX_UINT8 = 8


class DataError(ValueError):
    """A data set is missing, damaged or not what it claims to be.

    details  further lines, one for each of many faults
    """

    def __init__(self, message: str, details: Sequence[str] = ()) -> None:
        super().__init__("\n  ".join([message, *details]))
        self.lines = (message, *(f"  {detail}" for detail in details))


class Name:
    """A name that a pickle may mention; calling it records the call."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *arguments: Any) -> "Call":
        return Call(self.name, arguments)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError(f"{self.name} has no state to set")


class Call:
    """A call that a pickle asks for, recorded instead of made, with the state that it sets on the result."""

    def __init__(self, name: str, arguments: tuple[Any, ...]) -> None:
        self.name, self.arguments = name, arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


# The unpickler written in Python: the one in C copies every string twice, which is hundreds of megabytes here, and
# four bytes of a pickle can make it allocate a memo of gigabytes.
class RecordingUnpickler(pickle._Unpickler):
    """Admits plain containers and ADMITTED_NAMES, and makes no call."""

    # A bytearray would be filled with zeros to whatever size is claimed, before the file is found to be shorter.
    dispatch: ClassVar[dict[int, Any]] = {
        **pickle._Unpickler.dispatch,
        pickle.BYTEARRAY8[0]: pickle._Unpickler.dispatch[pickle.BINBYTES8[0]],
    }

    def __init__(self, file: IO[bytes], path: Path) -> None:
        super().__init__(file, encoding="bytes")  # the published archives are Python 2 pickles
        self._path = path

    def find_class(self, module: str, name: str) -> Name:
        """The stand-in for `module.name`. Raises DataError where no array needs that name."""
        if (module, name) not in ADMITTED_NAMES:
            raise DataError(
                f"{self._path} asks for {module}.{name}, which no image archive needs; nothing was executed. "
                "Do not use this file: get the archive from its publisher"
            )
        return Name(name)


def read_pickle(path: Path, largest: int) -> dict[str, Any]:
    """The dict with text keys in a pickle of at most `largest` bytes; its arrays are for `as_array`.

    Raises DataError, naming the file, for anything else.
    """
    _check_size(path, largest)
    try:
        with path.open("rb") as file:
            content = RecordingUnpickler(file, path).load()
            return {as_text(key): value for key, value in content.items()}
    except DataError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise DataError(f"{path} is damaged or truncated ({_describe(error)}): get it again") from error


def as_text(value: Any) -> str:
    """A text: str, or bytes, however they were pickled. Raises ValueError for anything else."""
    if isinstance(value, str):
        return value
    if not isinstance(value, bytes | Call):
        raise ValueError(f"a text was expected, got {type(value).__name__}")
    return _as_bytes(value).decode("latin1")


def as_texts(value: Any, path: Path, key: str, count: int) -> tuple[str, ...]:
    """The list of `count` texts that `value` is. Raises DataError, naming file and key, for anything else."""
    try:
        if isinstance(value, list) and len(value) == count:
            return tuple(as_text(text) for text in value)
    except ValueError:  # one of them is no text
        pass
    raise DataError(f"{path} should hold a list of {count} texts in {key!r}: get it again")


def as_array(value: Any, path: Path, key: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """The integer array of `shape` that `value` describes: an array, or a list of arrays or of numbers.

    Raises DataError, naming file and key, for anything else; object arrays are never built.
    """
    try:
        array = _list_array(value) if isinstance(value, list) else _recorded_array(value)
    except Exception as error:  # the arguments in a damaged file can be anything
        raise DataError(
            f"{path}: {key!r} is no array of integers ({_describe(error)}): get it again"
        ) from error
    if array.shape != shape:
        raise DataError(f"{path}: {key!r} should have shape {shape}, got {array.shape}: get it again")
    return array


def _list_array(values: list[Any]) -> NDArray[Any]:
    if all(type(value) is int for value in values):
        return np.array(values, np.int64)
    return np.stack([_recorded_array(value) for value in values])


def _recorded_array(value: Any) -> NDArray[Any]:
    """The array that NumPy would have made of the recorded call."""
    if not isinstance(value, Call):
        raise ValueError(f"an array was expected, got {type(value).__name__}")
    if value.name == "scalar":
        dtype, data = value.arguments
        return np.frombuffer(_as_bytes(data), _as_dtype(dtype), 1).reshape(())
    if value.name == "_frombuffer":
        data, dtype, shape, order = value.arguments
    else:
        _version, shape, dtype, column_major, data = value.state
        order = "F" if column_major else "C"
    return np.frombuffer(_as_bytes(data), _as_dtype(dtype)).reshape(shape, order=order)


def _as_bytes(data: Any) -> bytes:
    """Bytes, as such or as one of the calls that Python 3 writes for them. Raises ValueError for anything else."""
    if isinstance(data, Call) and (data.name, data.arguments) == ("bytes", ()):
        return b""
    if isinstance(data, Call) and data.name == "encode":
        text, encoding = data.arguments
        if isinstance(text, str) and encoding == "latin1":
            return text.encode("latin1")
    if not isinstance(data, bytes):
        raise ValueError(
            f"bytes were expected, got {data.name if isinstance(data, Call) else type(data).__name__}"
        )
    return data


def _as_dtype(value: Any) -> np.dtype[Any]:
    code = as_text(value.arguments[0])
    if value.name != "dtype" or code not in INTEGER_CODES:
        raise ValueError(f"dtype {code[:10]}")
    big_endian = value.state is not None and as_text(value.state[1]) == ">"
    return np.dtype(code).newbyteorder(">" if big_endian else "<")


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
        raise DataError(f"{path} is damaged or truncated ({_describe(error)}): get it again") from error
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
        raise DataError(f"{path} cannot be read ({_describe(error)}): get it again") from error
    if size > largest:
        raise DataError(f"{path} has {size} bytes where at most {largest} can be right: get it again")


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:200]


def check_labels(labels: NDArray[Any], classes: int, path: Path) -> None:
    """Raise DataError unless all labels, of at least one image, lie in 0..classes - 1."""
    if labels.min() < 0 or labels.max() >= classes:
        raise DataError(
            f"{path} has labels from {labels.min()} to {labels.max()}, beyond 0 to {classes - 1}: "
            "get it again"
        )

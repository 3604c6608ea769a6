"""Weights to begin with, from a run, a snapshot, a safetensors file or a PyTorch file, as untrusted input."""

import hashlib
import io
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from fastsnap.run_files import read_regular
from fastsnap.run_folder import RunFolder
from fastsnap.snapshot import COMPILED_PREFIX

PREFIX = "module."  # of DataParallel and DistributedDataParallel, before all names
ZIP, PICKLE = (
    b"PK\x03\x04",
    b"\x80",
)  # how PyTorch files begin: those of today, and those from before version 1.6
NESTED = ("state_dict", "model")  # where a PyTorch file keeps its weights among other things
MOST_BYTES = 2**36


class InitialWeightsError(ValueError):
    """Weights that cannot be begun with."""


@dataclass(frozen=True)
class InitialWeights:
    """A state_dict as it was found.

    place   the file, for messages
    sha256  of its content
    notes   what was done to read it
    """

    place: str
    state: dict[str, Tensor]
    sha256: str
    notes: tuple[str, ...] = ()


def read_initial(path: str | Path) -> InitialWeights:
    """What `path` holds: a run folder (its last snapshot), a safetensors file, or a PyTorch file with a state_dict.

    Raises InitialWeightsError, and RunError for a damaged run, naming the path and what to do.
    """
    path = Path(path)
    if path.is_dir():
        folder = RunFolder(path)
        folder.config()
        entries = folder.snapshots()
        if not entries:
            raise InitialWeightsError(f"initial: the run {path} has no snapshot yet; name one that has")
        return InitialWeights(
            str(path / entries[-1].file), folder.load_snapshot(entries[-1]), entries[-1].sha256
        )
    try:
        if path.stat().st_size > MOST_BYTES:
            raise InitialWeightsError(
                f"initial: {path} is larger than {MOST_BYTES:,} bytes: name a file of weights"
            )
        content = read_regular(path)
    except OSError as error:
        raise InitialWeightsError(
            f"initial: {path} cannot be read: {error.strerror}; name a run folder, a safetensors file or a PyTorch file"
        ) from error
    # By content, where that says it: PyTorch's files have all kinds of names.
    pytorch = content.startswith((ZIP, PICKLE)) or (path.suffix != ".safetensors" and content[8:9] != b"{")
    state = _pytorch(path, content) if pytorch else _safetensors(path, content)
    state, notes = _without_prefixes(state)
    return InitialWeights(str(path), state, hashlib.sha256(content).hexdigest(), notes)


def _safetensors(path: Path, content: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(content)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise InitialWeightsError(
            f"initial: {path} is no safetensors file ({error}): get it again"
        ) from error


def _pytorch(path: Path, content: bytes) -> dict[str, Tensor]:
    """Read with weights_only, which builds tensors and containers and nothing else."""
    try:
        _require_unpacked(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that are no PyTorch file, which are an error anyway
            loaded: Any = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # of a damaged file, its parser raises anything
        raise InitialWeightsError(
            f"initial: {path} cannot be read as a PyTorch file of weights alone ({_reason(error)}): save the network's "
            "state_dict with torch.save, or with safetensors"
        ) from error
    return _state_dict(path, loaded)


def _require_unpacked(content: bytes) -> None:
    """Raise ValueError for a packed archive, or one whose members overlap, which could unpack to any size."""
    if content.startswith(ZIP):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = archive.infolist()
        packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
        if packed or sum(member.file_size for member in members) > len(content):
            raise ValueError("it is a compressed archive, as PyTorch writes none")


def _reason(error: Exception) -> str:
    """Without PyTorch's advice to read it in a way that can run code."""
    kind = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
    if kind:
        return f"besides tensors it holds a {kind[1]}, which could run code"
    text = str(error) if type(error) is ValueError else ""
    return text or f"{type(error).__name__}: it is damaged, cut short or something else"


def _state_dict(path: Path, content: Any) -> dict[str, Tensor]:
    for name in NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if (
        not isinstance(content, Mapping)
        or not content
        or not all(isinstance(v, Tensor) for v in content.values())
    ):
        raise InitialWeightsError(
            f"initial: {path} holds no state_dict, which is names and tensors: save network.state_dict()"
        )
    return {str(name): value for name, value in content.items()}


def _without_prefixes(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Names as in the plain network: torch.compile puts its prefix before any part of one, DataParallel before all."""
    notes: tuple[str, ...] = ()
    plain = {name.replace(COMPILED_PREFIX, ""): value for name, value in state.items()}
    if plain.keys() != state.keys() and len(plain) == len(state):
        state, notes = plain, (f"without the prefix {COMPILED_PREFIX}",)
    if all(name.startswith(PREFIX) for name in state):
        state = {name.removeprefix(PREFIX): value for name, value in state.items()}
        notes += (f"without the prefix {PREFIX}",)
    return state, notes

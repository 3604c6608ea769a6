"""A checkpoint as a file: tensors and a small state in safetensors, with a hash of both."""

import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from fastsnap import run_schema
from fastsnap.run_files import RunError


def checkpoint_content(tensors: dict[str, Tensor], state: dict[str, Any]) -> bytes:
    """The content of the file. `state` is JSON-serialisable: see run_schema.CheckpointState.

    Tensors may have any memory layout and share memory. Raises ValueError for a type that safetensors does not know.
    """
    tensors, text = _plain(tensors), json.dumps(state)
    try:
        return safetensors.torch.save(tensors, metadata={"state": text, "sha256": _hash(tensors, text)})
    except KeyError as error:
        named = [
            f"{name} is {tensor.dtype}" for name, tensor in tensors.items() if tensor.dtype in error.args
        ]
        raise ValueError(
            f"the network cannot be saved: {', '.join(named)}, which safetensors does not know: convert it"
        ) from error


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, each in one piece of memory that is its own, as safetensors wants it; copies only where need be."""
    plain: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
        if not tensor.is_contiguous() or tensor.untyped_storage().data_ptr() in taken:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        taken.add(tensor.untyped_storage().data_ptr())
        plain[name] = tensor
    return plain


def read_checkpoint(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, on the CPU, and the state. Raises RunError unless they are, to the bit, what was saved."""
    try:
        if not file.is_file():
            raise ValueError("it is not a regular file")
        with safetensors.safe_open(file, framework="pt") as opened:
            text, sha256 = (opened.metadata()[name] for name in ("state", "sha256"))
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        if _hash(tensors, text) != sha256:
            raise ValueError("its SHA-256 is not the one that was saved with it")
        state = run_schema.parse(text, "its state")
        run_schema.check(state, run_schema.CheckpointState, "its state")
    except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"{file} is damaged ({error}); put a copy of it back, or add --restart to train again from the start, "
            "moving what is there aside"
        ) from error
    return tensors, state


def _hash(tensors: dict[str, Tensor], state: str) -> str:
    return hashlib.sha256(safetensors.torch.save(tensors) + state.encode()).hexdigest()

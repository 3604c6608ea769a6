"""A network as a snapshot: its plain state_dict in fp32, as a safetensors file."""

import os
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from fastsnap.run_files import write_atomically

COMPILED_PREFIX = "_orig_mod."  # what torch.compile puts before the names of a module's parameters


def save_snapshot(network: nn.Module | Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Save `network`, or a state_dict, at `path`, to be loaded by `load_state_dict(safetensors.torch.load_file(path))`.

    Names are those of the plain network, also from within torch.compile and DistributedDataParallel. Floating-point
    tensors of any type are saved as fp32, others as they are; any memory layout will do. Tensors that share memory, as
    tied weights, are saved under each of their names. The file is replaced in one piece.

    Raises ValueError for tensors that cannot be saved so, and RunError, which is one, if writing fails.
    """
    write_atomically(Path(path), snapshot_content(network))


def snapshot_content(network: nn.Module | Mapping[str, Tensor]) -> bytes:
    """The content of `save_snapshot`'s file. Raises ValueError for tensors that cannot be saved so."""
    network = plain_network(network) if isinstance(network, nn.Module) else network
    state = network.state_dict() if isinstance(network, nn.Module) else network
    plain = {name.replace(COMPILED_PREFIX, ""): _plain(name, tensor) for name, tensor in state.items()}
    try:
        return safetensors.torch.save(plain)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"the network cannot be saved as safetensors: {error}") from error


def plain_network(network: nn.Module) -> nn.Module:
    """The network itself, from within DistributedDataParallel and torch.compile."""
    if isinstance(network, nn.parallel.DistributedDataParallel | nn.DataParallel):
        return plain_network(network.module)
    inner = getattr(network, COMPILED_PREFIX.rstrip("."), None)
    return plain_network(inner) if isinstance(inner, nn.Module) else network


def load_plain(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a snapshot's state_dict into `network`, compiled or not. Raises RuntimeError where it does not fit."""
    names = {name.replace(COMPILED_PREFIX, ""): name for name in network.state_dict()}
    network.load_state_dict({names.get(name, name): tensor for name, tensor in state.items()})


def _plain(name: str, tensor: Tensor) -> Tensor:
    """A copy on the CPU that shares its memory with nothing, which safetensors insists on."""
    if not isinstance(tensor, Tensor):
        raise ValueError(
            f"{name} of the state_dict is a {type(tensor).__name__}, but a snapshot holds tensors only: leave it out"
        )
    if tensor.layout is not torch.strided or tensor.is_meta:
        kind = "meta" if tensor.is_meta else str(tensor.layout).removeprefix("torch.")
        raise ValueError(f"{name} is a {kind} tensor, which cannot be saved: make it a dense one")
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    copy = tensor.detach().to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)
    if tensor.dtype is torch.float64 and not torch.equal(copy.isinf(), tensor.detach().cpu().isinf()):
        raise ValueError(f"{name} has float64 values beyond fp32's largest, 3.4e38: scale them")
    return copy

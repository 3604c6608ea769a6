"""What a checkpoint holds of a loop that is not ours: network, optimizer, scaler and PyTorch's random generators."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastsnap.run_files import RunError
from fastsnap.snapshot import COMPILED_PREFIX
from fastsnap.training import state_tree

NETWORK, CPU_GENERATOR, CUDA_GENERATOR = "network.", "generator.cpu", "generator.cuda"


def network_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, also those that no state_dict has."""
    named = [*network.named_parameters(), *network.named_buffers()]
    return {NETWORK + name.replace(COMPILED_PREFIX, ""): tensor.detach() for name, tensor in named}


def all_finite(network: nn.Module) -> bool:
    """Of the parameters; a buffer may well hold infinity, as masks do. Waits for the device."""
    return all(bool(parameter.isfinite().all()) for parameter in network.parameters())


def loop_state(
    network: nn.Module, optimizer: Optimizer, scaler: torch.amp.GradScaler | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and state for Records.save_checkpoint. Raises ValueError for an optimizer whose state is more."""
    tensors, tree = state_tree.pack(optimizer.state_dict())
    generators = {CPU_GENERATOR: torch.get_rng_state()}
    device = _cuda(network)
    if device:
        generators[CUDA_GENERATOR] = torch.cuda.get_rng_state(device)
    state = {"scaler": scaler.state_dict() if scaler else {}, "optimizer": tree}
    return network_tensors(network) | generators | tensors, state


def restore_loop(
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    network: nn.Module,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler | None,
    run: str,
) -> None:
    """All but the network's tensors, which Records.restore copies. Raises RunError for another optimizer's state."""
    try:
        optimizer.load_state_dict(state_tree.unpack(state.get("optimizer"), tensors))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise RunError(
            f"the checkpoint in {run} is not of this optimizer: {error}; choose another folder"
        ) from error
    if scaler:
        scaler.load_state_dict(state["scaler"])
    if CPU_GENERATOR in tensors:
        torch.set_rng_state(tensors[CPU_GENERATOR])
    device = _cuda(network)
    if device and CUDA_GENERATOR in tensors:
        torch.cuda.set_rng_state(tensors[CUDA_GENERATOR], device)


def _cuda(network: nn.Module) -> torch.device | None:
    """The GPU that the network is on."""
    first = next(network.parameters(), None)
    return first.device if first is not None and first.device.type == "cuda" else None

"""Evaluating an ensemble of M networks in other ways; each returns the error of all M together, in percent.

The networks are in memory and the images normalised, which is not counted; the project's time includes reading both.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils.data import DataLoader, TensorDataset

from opponents.ensemble_pytorch import make_ensemble

BATCH_SIZE = 250
Forward = Callable[[nn.Module, Tensor], Tensor]


def ensemble_prediction(networks: Sequence[nn.Module], images: Tensor) -> Tensor:
    """What all networks together predict: int64 [N]."""
    members = [torch.cat([network(batch) for batch in _batches(images)]).softmax(1) for network in networks]
    return torch.stack(members).mean(0).argmax(1)


def authors_way(networks: Sequence[nn.Module], images: Tensor, labels: Tensor, forward: Forward) -> float:
    """As the authors' code does it: each network alone, then the growing ensemble with a second forward of each."""
    for network in networks:
        logits = torch.cat([forward(network, batch) for batch in _batches(images)])
        _error(logits.softmax(1), labels)
    total = torch.zeros(1, device=images.device)
    for network in networks:
        logits = torch.cat([forward(network, batch) for batch in _batches(images)])
        total = total + logits.softmax(1)
        error = _error(total, labels)
    return error


def vmapped(networks: Sequence[nn.Module], images: Tensor, labels: Tensor) -> float:
    """All networks at once, over a stacked state."""
    state = stack_module_state(list(networks))
    base = networks[0]

    def forward(parameters: dict[str, Tensor], buffers: dict[str, Tensor], batch: Tensor) -> Tensor:
        return functional_call(base, (parameters, buffers), (batch,))

    together = vmap(forward, in_dims=(0, 0, None))
    logits_MNC = torch.cat([together(*state, batch) for batch in _batches(images)], dim=1)
    probabilities_MNC = logits_MNC.softmax(2)
    for member in probabilities_MNC:
        _error(member, labels)
    for total in probabilities_MNC.cumsum(0):
        error = _error(total, labels)
    return error


def torchensemble_way(networks: Sequence[nn.Module], images: Tensor, labels: Tensor) -> float:
    """torchensemble's evaluate, which tells the accuracy of all M together and nothing else."""
    ensemble = make_ensemble(networks[0], len(networks), images.device.type)
    ensemble.estimators_.extend(networks)
    ensemble.set_criterion(nn.CrossEntropyLoss())  # it computes the loss in any case
    loader = DataLoader(TensorDataset(images, labels), batch_size=BATCH_SIZE)
    return 100 - ensemble.evaluate(loader)


def plain_forward(network: nn.Module, batch: Tensor) -> Tensor:
    """Plain PyTorch."""
    return network(batch)


def autocast_forward(dtype: torch.dtype, network: nn.Module, batch: Tensor) -> Tensor:
    """Autocast to `dtype`; logits in float32."""
    with torch.autocast(batch.device.type, dtype):
        return network(batch).float()


def _batches(images: Tensor) -> Iterator[Tensor]:
    return iter(images.split(BATCH_SIZE))


def _error(scores: Tensor, labels: Tensor) -> float:
    return 100 * (scores.argmax(1) != labels).double().mean().item()

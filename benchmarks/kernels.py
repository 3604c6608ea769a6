"""The update against torch.optim.SGD with its scheduler, and the averaging against the loop one would write by hand.

The update finds the gradients where autograd left them. It is timed alone, once right after the backward pass, when
the caches hold something else, and as one of many updates in a row. Shares of the copy bandwidth are of the least
possible bytes: 20 per parameter, 4 per logit; what fits into a cache can exceed it.
"""

import copy
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastsnap.kernels.averaging import average_members
from fastsnap.kernels.schedule import Schedule
from fastsnap.nets.build import build_network
from fastsnap.training.apex import ApexSGD
from fastsnap.training.flat import FlatParameters
from fastsnap.training.optim import SnapshotSGD
from harness.measure import PROJECT, Result, Settings, alternate, compare, spread

NAME = "kernels"
NETS, QUICK_NETS = ("resnet20", "resnet110"), ("resnet20",)
ROUNDS, QUICK_ROUNDS = 25, 5
IN_A_ROW = 10  # updates timed together
MEMBERS, SAMPLES, CLASSES = 5, 10_000, 100
BYTES_PER_PARAMETER, BYTES_PER_LOGIT = 20, 4
OPTIONS: dict[str, Any] = {"momentum": 0.9, "weight_decay": 1e-4, "nesterov": True}
SCHEDULE = Schedule("snapshot", 100_000, 5, 0.2)


def run(settings: Settings) -> Iterator[Result]:
    """Milliseconds of an update and of an averaging, and megabytes that the averaging needs at its peak."""
    bandwidth = copy_bandwidth(settings.device)
    for net in QUICK_NETS if settings.quick else NETS:
        yield from _update(settings, net, bandwidth)
    yield from _averaging(settings, bandwidth)
    if settings.device == "cpu" and sys.platform == "linux":
        yield from _averaging_memory()


def copy_bandwidth(device: str) -> float:
    """GB/s read and written by copying a tensor larger than the caches."""
    source = torch.ones(64 * 2**20, device=device)
    target = torch.empty_like(source)
    seconds = [_timed(partial(target.copy_, source), device, 1) for _ in range(7)]
    return 2 * source.nbytes / spread(seconds[1:]).median / 1e9


def _timed(call: Callable[[], object], device: str, times: int) -> float:
    """Seconds per call."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / times


# -- the update


def _update(settings: Settings, net: str, bandwidth: float) -> Iterator[Result]:
    device = settings.device
    base = build_network(net, classes=100).to(device).to(memory_format=torch.channels_last)
    makers: dict[str, Callable[[nn.Module], Callable[[], object]]] = {
        PROJECT: _project,
        "foreach + scheduler": partial(_torch_sgd, foreach=True),
        "fused + scheduler": partial(_torch_sgd, fused=True),
    }
    if device == "cuda":
        makers |= {"compiled foreach": _compiled_sgd, "apex": _apex}
    steps, missing = {}, {}
    for name, make in makers.items():
        network = copy.deepcopy(base)
        try:
            steps[name] = partial(_milliseconds, network, make(network), device)
        except ValueError as error:  # apex that is not there, or PyPI's package of that name
            missing[name] = str(error)
    numel = sum(parameter.numel() for parameter in base.parameters())
    tensors = len(list(base.parameters()))
    for when, updates in (("in a row", IN_A_ROW), ("after backward", 1)):
        calls = {name: partial(step, updates) for name, step in steps.items()}
        alternate(calls, 2)  # warm up
        values = alternate(calls, QUICK_ROUNDS if settings.quick else ROUNDS)
        details = {PROJECT: _floor(BYTES_PER_PARAMETER * numel, values[PROJECT], bandwidth)}
        case = f"update {when}, {net}, {tensors} tensors, {numel:,} parameters"
        yield from compare(NAME, case, "ms", values, "lower", details)
        for name, reason in missing.items():
            yield Result(NAME, case, name, "ms", "lower", missing=reason)


def _floor(least_bytes: int, milliseconds: list[float], bandwidth: float) -> dict[str, float]:
    gigabytes_per_second = least_bytes / spread(milliseconds).median / 1e6
    share = gigabytes_per_second / bandwidth
    return {"GB/s": round(gigabytes_per_second, 1), "share of copy bandwidth": round(share, 2)}


def _milliseconds(network: nn.Module, step: Callable[[], object], device: str, updates: int) -> float:
    """Of one update: right after the backward pass, or the mean of several after a first one."""
    network.zero_grad(set_to_none=True)
    images = torch.randn(2, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    network(images).square().sum().backward()
    if updates > 1:
        step()
    return 1000 * _timed(step, device, updates)


def _project(network: nn.Module) -> Callable[[], object]:
    return SnapshotSGD(network.named_parameters(), SCHEDULE, **OPTIONS).step


def _torch_sgd(network: nn.Module, **implementation: bool) -> Callable[[], object]:
    optimizer = torch.optim.SGD(network.parameters(), 1.0, **OPTIONS, **implementation)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, SCHEDULE.rate_after)

    def step() -> None:
        optimizer.step()
        scheduler.step()

    return step


def _compiled_sgd(network: nn.Module) -> Callable[[], object]:
    rate = torch.tensor(1.0, device=next(network.parameters()).device)  # a tensor, or every rate recompiles
    optimizer = torch.optim.SGD(network.parameters(), rate, foreach=True, **OPTIONS)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, SCHEDULE.rate_after)
    compiled = torch.compile(optimizer.step, fullgraph=False)

    def step() -> None:
        compiled()
        scheduler.step()

    return step


def _apex(network: nn.Module) -> Callable[[], object]:
    flat = FlatParameters(network)
    return ApexSGD(flat.parameters, SCHEDULE, flat=flat, **OPTIONS).step


# -- the averaging


def random_logits(device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(MEMBERS, SAMPLES, CLASSES, generator=generator)
    return logits.to(device), torch.randint(CLASSES, (SAMPLES,), generator=generator).to(device)


def by_hand(logits_MNC: Tensor, labels_N: Tensor) -> list[tuple[Tensor, ...]]:
    """Error, error of the first five, NLL and Brier score of the last m members, for every m."""
    members = list(logits_MNC)
    results: list[tuple[Tensor, ...]] = []
    for m in range(1, len(members) + 1):
        mean_NC = torch.stack(members[-m:]).softmax(-1).mean(0)
        of_label_N = mean_NC.gather(1, labels_N[:, None])[:, 0]
        best_five = mean_NC.topk(5).indices
        results.append(
            (
                (mean_NC.argmax(1) != labels_N).float().mean(),
                (best_five != labels_N[:, None]).all(1).float().mean(),
                functional.nll_loss(mean_NC.log(), labels_N),
                (mean_NC.square().sum(1) - 2 * of_label_N + 1).mean(),
            )
        )
    return results


def error_and_nll_by_hand(logits_MNC: Tensor, labels_N: Tensor) -> list[tuple[Tensor, ...]]:
    """Only error and NLL: less than the project computes."""
    results: list[tuple[Tensor, ...]] = []
    for m in range(1, len(logits_MNC) + 1):
        mean_NC = torch.stack(list(logits_MNC[-m:])).softmax(-1).mean(0)
        errors = (mean_NC.argmax(1) != labels_N).float().mean()
        results.append((errors, functional.nll_loss(mean_NC.log(), labels_N)))
    return results


WAYS: dict[str, Callable[[Tensor, Tensor], object]] = {
    PROJECT: average_members,
    "loop over m, all metrics": by_hand,
    "loop over m, error and NLL only": error_and_nll_by_hand,
}
AVERAGING_CASE = f"averaging, [{MEMBERS}, {SAMPLES}, {CLASSES}]"


def _averaging(settings: Settings, bandwidth: float) -> Iterator[Result]:
    logits, labels = random_logits(settings.device)
    calls = {
        name: partial(_call_milliseconds, way, logits, labels, settings.device) for name, way in WAYS.items()
    }
    alternate(calls, 2)
    values = alternate(calls, QUICK_ROUNDS if settings.quick else ROUNDS)
    details = {PROJECT: _floor(BYTES_PER_LOGIT * logits.numel(), values[PROJECT], bandwidth)}
    yield from compare(NAME, AVERAGING_CASE, "ms", values, "lower", details)


def _call_milliseconds(
    way: Callable[[Tensor, Tensor], object], logits: Tensor, labels: Tensor, device: str
) -> float:
    return 1000 * _timed(partial(way, logits, labels), device, 1)


def _averaging_memory() -> Iterator[Result]:
    """Each way in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        values = {name: [pool.apply(peak_megabytes, (name,))] for name in WAYS}
    yield from compare(NAME, f"{AVERAGING_CASE}, peak memory", "MB", values, "lower")


def peak_megabytes(way: str) -> float:
    """Megabytes that the process grows by at its peak, with the logits in memory and the code loaded."""
    logits, labels = random_logits("cpu")
    WAYS[way](logits[:, :10], labels[:10])
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = _megabytes("VmRSS")
    WAYS[way](logits, labels)
    return _megabytes("VmHWM") - before


def _megabytes(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024

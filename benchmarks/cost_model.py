"""What a step of N ranks costs on paper, on GPUs that nobody has measured here: the tables of docs/scaling.md.

    python benchmarks/cost_model.py

A step is the arithmetic of a rank's part of the batch, the packing of the gradients, their sum in a ring, and the
update, one after the other; the input is made meanwhile, and counts where it takes longer. Every constant is a data
sheet's or an assumption that says so.
"""

import math
from dataclasses import dataclass

RANKS = (1, 2, 4, 8, 16, 32, 64)
BATCHES = (64, 512)
MEMORY = 3.35e12  # bytes/s of an H100's memory
KERNEL = 4e-6  # seconds: a launch, or the least that a kernel takes; assumed
KERNELS_PER_LAYER = (
    6  # forward, and backward with respect to input and weights, each with its normalisation; assumed
)
UPDATE, PACKING = 20, 8  # bytes moved per parameter
GRADIENT = 4  # bytes sent per parameter
PHOTOGRAPHS = 16 * 800  # per second and GPU: 16 cores, assumed, of 800 each, measured (docs/folders.md)
WORTH = 0.5  # efficiency below which more ranks are called not worth it


@dataclass(frozen=True)
class Net:
    """images_per_second: the ceiling of one GPU, from arithmetic or memory, whichever is lower.

    decoded_per_second: pictures of the input; small ones are in the GPU's memory already
    """

    name: str
    parameters: float
    images_per_second: float
    layers: int
    decoded_per_second: float = math.inf


@dataclass(frozen=True)
class Link:
    """Between neighbours in the ring: bytes/s in each direction, and seconds until the first byte."""

    name: str
    bandwidth: float
    latency: float


NETS = (
    Net("ResNet-20", 0.28e6, 627_000, 20),  # ResNet-110's memory traffic, by layers
    Net("ResNet-110", 1.74e6, 114_000, 110),
    Net("WRN-28-10", 36.5e6, 31_000, 28),
    Net("ResNet-50 at 224", 25.6e6, 10_800, 53, PHOTOGRAPHS),
)
NVLINK = Link("NVLink, one host", 300e9, 3e-6)
INFINIBAND = Link("400 Gbit/s InfiniBand between hosts", 45e9, 6e-6)
ETHERNET = Link("10 Gbit/s Ethernet between hosts", 1.1e9, 30e-6)
LINKS = (NVLINK, INFINIBAND, ETHERNET)


def seconds_of_a_step(net: Net, batch: int, ranks: int, link: Link) -> dict[str, float]:
    """By what they are for. `batch` images over all ranks."""
    compute = max(batch / ranks / net.images_per_second, net.layers * KERNELS_PER_LAYER * KERNEL)
    more = PACKING if ranks > 1 else 0
    return {
        "compute": compute,
        "sum": ring_seconds(GRADIENT * net.parameters, ranks, link),
        "update": max(KERNEL, (UPDATE + more) * net.parameters / MEMORY),
    }


def step(net: Net, batch: int, ranks: int, link: Link) -> float:
    """Seconds of the whole step."""
    own = sum(seconds_of_a_step(net, batch, ranks, link).values())
    return max(own, batch / ranks / net.decoded_per_second)


def ring_seconds(size: float, ranks: int, link: Link) -> float:
    """Of summing `size` bytes over a ring: every rank sends 2 (N - 1) / N of them, in 2 (N - 1) messages."""
    if ranks == 1:
        return 0.0
    return 2 * (ranks - 1) * (size / ranks / link.bandwidth + link.latency)


def efficiency(net: Net, batch: int, ranks: int, link: Link) -> float:
    """How many times faster than one rank, per rank."""
    return step(net, batch, 1, link) / step(net, batch, ranks, link) / ranks


def worth(net: Net, batch: int, link: Link) -> int:
    """The most ranks, of RANKS, that are worth it."""
    return max(ranks for ranks in RANKS if efficiency(net, batch, ranks, link) >= WORTH)


def fastest(net: Net, batch: int, link: Link) -> int:
    """The ranks, of RANKS, whose step takes least; the fewest where several do."""
    return min(RANKS, key=lambda ranks: step(net, batch, ranks, link))


def table() -> list[str]:
    """In Markdown."""
    lines = [
        "| net | batch | link | step of 1 rank, ms | of 8: compute + sum + update, ms | efficiency of 8 "
        "| worth it up to | fastest |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for net in NETS:
        for batch in BATCHES:
            for link in LINKS:
                alone = 1000 * step(net, batch, 1, link)
                parts = [1000 * value for value in seconds_of_a_step(net, batch, 8, link).values()]
                lines.append(
                    f"| {net.name} | {batch} | {link.name} | {alone:.2f} | {' + '.join(f'{p:.2f}' for p in parts)} | "
                    f"{efficiency(net, batch, 8, link):.2f} | {worth(net, batch, link)} | {fastest(net, batch, link)} |"
                )
    return lines


if __name__ == "__main__":
    print("\n".join(table()))

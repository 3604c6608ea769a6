"""Several ranks make the update that one process makes."""

import hashlib

import numpy as np
import pytest
import torch
from in_ranks import error_of, in_ranks
from torch import nn

from fastsnap.data.pipeline import make_pipeline
from fastsnap.data.sources import Augmentation, ImageSet
from fastsnap.kernels.schedule import Schedule
from fastsnap.training.exchange import Exchange
from fastsnap.training.ranks import Ranks
from fastsnap.training.step import TrainStep
from fastsnap.training.updates import build_optimizer

STEPS = 50
CPU = torch.device("cpu")
# Images and batch size: the last batch has 13, 5, 4, 3, 16 and 1 images; 3 and 4 ranks divide few of them, and of
# batches of 2 and 1 some ranks have nothing.
CASES = [(37, 8), (12, 7), (10, 4), (5, 2), (50, 17), (3, 1)]


def images_of(count: int) -> ImageSet:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (count, 8, 8, 3), np.uint8)
    return ImageSet(pixels, generator.integers(0, 5, count))


def network(norm: bool) -> nn.Module:
    torch.manual_seed(1)
    between: list[nn.Module] = [nn.BatchNorm2d(8)] if norm else []
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), *between, nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 5)
    ).to(memory_format=torch.channels_last)


class Unused(nn.Module):
    """A network with a parameter that has no gradient in any step."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.unused, self.inner = nn.Parameter(torch.ones(3)), inner

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.inner(images)


def train(
    ranks: Ranks,
    count: int,
    batch_size: int,
    precision: str = "fp32",
    norm: bool = False,
    unused: bool = False,
) -> dict[str, torch.Tensor | list[str] | list[float]]:
    """STEPS steps; the network, the totals, and a hash of the parameters after every step."""
    pipeline = make_pipeline(
        images_of(count),
        batch_size=batch_size,
        mean=(128.0,) * 3,
        std=(64.0,) * 3,
        device=CPU,
        augmentation=Augmentation("crop", padding=2, flip=True),
        loader="torch",
        rank=ranks.rank,
        ranks=ranks.count,
    )
    net = Unused(network(norm)) if unused else network(norm)
    schedule = Schedule("snapshot", STEPS, 2, 0.02)
    optimizer = build_optimizer("fused", net, schedule, momentum=0.9, weight_decay=1e-2)
    exchange = Exchange(net, optimizer.flat, ranks) if ranks.count > 1 else None
    step = TrainStep(
        net, optimizer, CPU, precision=precision, compiled=False, graphed=False, exchange=exchange
    )
    hashes = []
    done = 0
    while done < STEPS:
        for images, labels in pipeline.epoch(*divmod(done, pipeline.steps_per_epoch)):
            own, whole = pipeline.plan.share(done % pipeline.steps_per_epoch)
            step(images[:own], labels[:own], whole)
            done += 1
            state = torch.cat([tensor.flatten().float() for tensor in net.state_dict().values()])
            hashes.append(hashlib.sha256(state.numpy().tobytes()).hexdigest())
            if done == STEPS:
                break
    totals = step.totals.clone()
    ranks.sum(totals)
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    return {"hashes": hashes, "totals": totals.tolist(), **{n: t.numpy() for n, t in state.items()}}


def train_all(ranks: Ranks) -> list[dict]:
    cases = [train(ranks, count, batch_size) for count, batch_size in CASES]
    return [*cases, train(ranks, 37, 8, unused=True)]


@pytest.mark.parametrize("count", [2, 3, 4])
def test_ranks_make_the_update_of_one_process(count: int) -> None:
    alone = train_all(Ranks())
    for rank in (of_ranks := in_ranks(train_all, count)):
        for single, several, first in zip(alone, rank, of_ranks[0], strict=True):
            assert several["hashes"] == first["hashes"]  # the same bits after every step
            assert several["totals"] == pytest.approx(single["totals"], rel=1e-5)
            assert several["totals"][1] == single["totals"][1]
            for name in single.keys() - {"hashes", "totals"}:
                assert np.abs(several[name] - single[name]).max() <= 1e-6, name


def train_with_norm(ranks: Ranks) -> dict:
    return train(ranks, 37, 9, norm=True)


def test_running_statistics_are_the_average_of_what_the_ranks_saw() -> None:
    alone = train(Ranks(), 37, 9, norm=True)
    ranks = in_ranks(train_with_norm, 2)
    same = [name for name in ranks[0] if name != "1.num_batches_tracked"]
    for name in same:
        np.testing.assert_array_equal(ranks[0][name], ranks[1][name])
    # Of one step from the same weights the means are those of one process, and the variances less by that between the
    # ranks' means; after 50 the networks differ, but see the same data.
    np.testing.assert_allclose(ranks[0]["1.running_mean"], alone["1.running_mean"], atol=0.2)
    np.testing.assert_allclose(ranks[0]["1.running_var"], alone["1.running_var"], rtol=0.5)
    assert not np.array_equal(ranks[0]["1.running_mean"], alone["1.running_mean"])


def average_of_one_step(ranks: Ranks) -> np.ndarray:
    """BatchNorm alone: rank r sees 1 + r images of the value 10 * r."""
    net = nn.Sequential(nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2))
    optimizer = build_optimizer("fused", net, Schedule("snapshot", 2, 1, 0.1), momentum=0, weight_decay=0)
    exchange = Exchange(net, optimizer.flat, ranks)
    step = TrainStep(net, optimizer, CPU, precision="fp32", compiled=False, graphed=False, exchange=exchange)
    own = 1 + ranks.rank
    step(torch.full((own, 2, 2, 2), 10.0 * ranks.rank), torch.zeros(own, dtype=torch.int64), 3)
    return net[0].running_mean.numpy()


def test_an_average_weights_each_rank_by_its_images() -> None:
    for running_mean in in_ranks(average_of_one_step, 2):
        np.testing.assert_allclose(running_mean, 0.1 * (1 / 3 * 0 + 2 / 3 * 10), rtol=1e-6)


class Fickle(nn.Module):
    """Uses one of its layers in the first forward pass only."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.first = nn.Linear(4, 2), nn.Linear(4, 2)
        self.calls = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        flat = images.flatten(1)
        return self.always(flat) + (self.first(flat) if self.calls == 1 else 0)


def train_fickle(ranks: Ranks) -> str:
    net = Fickle()
    optimizer = build_optimizer("fused", net, Schedule("snapshot", 2, 1, 0.1), momentum=0, weight_decay=0)
    exchange = Exchange(net, optimizer.flat, ranks)
    step = TrainStep(net, optimizer, CPU, precision="fp32", compiled=False, graphed=False, exchange=exchange)
    batch = torch.ones(1, 1, 2, 2), torch.zeros(1, dtype=torch.int64), 2
    step(*batch)
    return error_of(lambda: step(*batch))


def test_a_gradient_that_comes_and_goes_is_an_error_that_names_it() -> None:
    for said in in_ranks(train_fickle, 2):
        assert "that of first.weight comes and goes: train this net on one process" in said

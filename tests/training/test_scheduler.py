"""The scheduler that shows and does nothing, in the hands of loops that insist on one."""

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from fastsnap.kernels.schedule import Schedule
from fastsnap.training.optim import SnapshotSGD

SCHEDULE = Schedule("snapshot", 6, 2, 0.1)


def made() -> SnapshotSGD:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    return SnapshotSGD(
        [{"params": net[0].parameters()}, {"params": net[1].parameters(), "lr_scale": 0.5}], SCHEDULE
    )


def test_shows_what_a_scheduler_of_torch_would_and_changes_nothing():
    optimizer = made()
    scheduler = optimizer.scheduler()
    assert isinstance(scheduler, lr_scheduler.LRScheduler)
    assert scheduler.optimizer is optimizer
    for updates in range(7):
        expected = SCHEDULE.rate_after(updates)
        assert scheduler.get_last_lr() == [expected, 0.5 * expected]
        assert scheduler.last_epoch == updates
        if updates < 6:
            optimizer.step()
            scheduler.step()
            scheduler.step()
    assert scheduler.get_last_lr() == [0.0, 0.0]


def test_its_state_goes_through_a_file_and_is_the_optimizers(tmp_path):
    optimizer = made()
    optimizer.step()
    scheduler = optimizer.scheduler()
    torch.save(scheduler.state_dict(), tmp_path / "scheduler.pt")
    other = made()
    other.load_state_dict(optimizer.state_dict())
    resumed = other.scheduler()
    resumed.load_state_dict(torch.load(tmp_path / "scheduler.pt"))
    assert resumed.state_dict() == scheduler.state_dict()
    assert resumed.state_dict()["last_epoch"] == 1


@pytest.mark.parametrize(
    "attach",
    [
        lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1.0),
        lambda optimizer: lr_scheduler.ConstantLR(optimizer, factor=1.0),
        lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=6, cycle_momentum=False),
        lambda optimizer: torch.optim.swa_utils.SWALR(optimizer, 0.05),
        lambda optimizer: optimizer.param_groups[1].update(lr=0.3),
    ],
)
def test_a_scheduler_that_would_set_rates_is_refused_with_the_way_out(attach):
    optimizer = made()
    attach(optimizer)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"remove the lr_scheduler.*optimizer\.scheduler\(\)"):
            optimizer.step()
    assert optimizer.updates() == 0

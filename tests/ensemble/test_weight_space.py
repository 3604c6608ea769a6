"""Networks between snapshots: averaged weights, BatchNorm's statistics gathered anew, lines."""

import copy

import pytest
import torch
from small_run import NET, small_dataset, small_run, snapshot_weights
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn

from fastsnap.data.pipeline import make_pipeline
from fastsnap.ensemble.evaluate import evaluate_run
from fastsnap.ensemble.forwards import Forwards, Passes
from fastsnap.ensemble.weight_space import (
    WeightSpace,
    choose_soup,
    gather_statistics,
    mean_nll,
    mean_of,
    measure_line,
    mixed_state,
)
from fastsnap.nets.build import build_network
from fastsnap.run_folder import RunError
from fastsnap.training.ranks import Ranks

CPU = torch.device("cpu")


def training_batches(batch_size=100):
    dataset = small_dataset()
    return make_pipeline(
        dataset.train,
        batch_size=batch_size,
        mean=dataset.mean,
        std=dataset.std,
        device=CPU,
        augmentation=dataset.augmentation,
    )


def space_of(folder, split="test"):
    passes = Passes.of(folder.config(), [], split=split, batch_size=100, precision="fp32")
    forwards = Forwards(passes, folder, small_dataset(), None, CPU, Ranks(), check_memory=False)
    return WeightSpace(forwards, folder, training_batches(250), "fp32")


def test_averaged_weights_are_those_of_torchs_averaged_model(tmp_path):
    folder = small_run(tmp_path / "run", snapshots=3)
    network = build_network(NET, classes=10, in_channels=1)
    averaged = AveragedModel(network)
    for number in (1, 2, 3):
        network.load_state_dict(snapshot_weights(number))
        averaged.update_parameters(network)
    found = mixed_state(folder, mean_of(folder.snapshots()))
    for name, parameter in averaged.module.named_parameters():
        torch.testing.assert_close(found[name], parameter.data)


def test_gathered_statistics_are_those_of_torchs_update_bn():
    network = build_network(NET, classes=10, in_channels=1, seed=3)
    other = copy.deepcopy(network)
    weights = {name: parameter.clone() for name, parameter in network.named_parameters()}
    batches = list(training_batches(batch_size=100).epoch(0))
    whole = [pair for pair in batches if len(pair[0]) == 100][:5]
    update_bn(whole, other)
    assert gather_statistics(network, training_batches(), 500, "fp32")
    for (name, mine), (_, theirs) in zip(network.named_buffers(), other.named_buffers(), strict=True):
        if "running" in name:
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4, msg=name)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in network.named_parameters())
    assert not network.training
    assert {module.momentum for module in network.modules() if isinstance(module, nn.BatchNorm2d)} == {0.1}


def test_a_network_without_batch_norm_has_nothing_to_gather():
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    assert not gather_statistics(network, training_batches(), 100, "fp32")


def test_the_ends_of_a_line_are_the_snapshots(tmp_path):
    folder = small_run(tmp_path / "run", snapshots=3)
    first, _, last = folder.snapshots()
    line = measure_line(space_of(folder), first, last)
    report = evaluate_run(folder, dataset=small_dataset(), device=CPU, precision="fp32")
    ends = line.points[0], line.points[-1]
    for point, metrics in zip(ends, (report.metrics.alone[0], report.metrics.alone[2]), strict=True):
        assert point.error == pytest.approx(metrics.error)
        assert point.nll == pytest.approx(metrics.nll, rel=1e-4)
    assert [point.part for point in line.points] == pytest.approx([1 - 0.1 * index for index in range(11)])
    assert line.barrier >= 0
    middle = line.points[5]
    assert middle.nll != pytest.approx(middle.gathered_nll)


def test_a_soup_takes_who_helps(tmp_path):
    folder = small_run(tmp_path / "run", snapshots=3)
    space = space_of(folder, "validation")
    entries = folder.snapshots()
    labels = space.forwards.labels
    nlls = [mean_nll(logits, labels) for logits in space.forwards.logits(entries)]
    taken = choose_soup(space, entries, nlls)
    order = sorted(range(3), key=lambda index: nlls[index])
    best, expected = nlls[order[0]], [order[0]]
    for index in order[1:]:
        trial = sorted([*expected, index])
        nll = mean_nll(space.logits(mean_of([entries[member] for member in trial])), labels)
        if nll <= best:
            best, expected = nll, trial
    assert [entry.number - 1 for entry in taken] == expected


def test_averages_are_rows_of_the_report(tmp_path):
    folder = small_run(tmp_path / "run", snapshots=2)
    folder.save_snapshot(
        snapshot_weights(3),
        step=80,
        cycle=3,
        epoch=4,
        learning_rate=1e-4,
        train_loss=0.3,
        average=snapshot_weights(9),
    )
    report = evaluate_run(folder, dataset=small_dataset(), device=CPU, precision="fp32", averages=True)
    rows = [row for row in report.worth.rows if row.name in ("mean weights", "running mean")]
    assert [row.members for row in rows] == [(1, 2), (0, 1, 2), (2,)]
    assert {row.cost.forwards for row in rows} == {1}
    assert {row.cost.parameters for row in rows} == {report.worth.row("newest alone").cost.parameters}
    running = space_of(folder).logits([(folder.average(), 1.0)])
    error = 100 * (running.argmax(1) != torch.from_numpy(small_dataset().test.labels)).double().mean().item()
    assert rows[-1].metrics.error == pytest.approx(error)
    plain = evaluate_run(folder, dataset=small_dataset(), device=CPU, precision="fp32")
    assert "mean weights" not in [row.name for row in plain.worth.rows]


def test_lines_need_two_snapshots_that_are_there(tmp_path):
    folder = small_run(tmp_path / "run", snapshots=2)
    options = {"dataset": small_dataset(), "device": CPU}
    for numbers, message in (
        ([1], "needs two snapshots, got 1: .* holds 1, 2"),
        ([1, 1], "needs two snapshots, got 1, 1"),
        ([1, 7], "snapshots must be among the 1, 2"),
    ):
        with pytest.raises(RunError, match=message):
            evaluate_run(folder, interpolate=numbers, **options)
    assert evaluate_run(folder, interpolate=[], **options).line.second == 2
    alone = small_run(tmp_path / "other", snapshots=1)
    with pytest.raises(RunError, match="needs two snapshots, got 1"):
        evaluate_run(alone, interpolate=[], **options)

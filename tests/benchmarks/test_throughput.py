"""Throughput: each opponent at its best, in turns with the project."""

from dataclasses import replace

import pytest
import torch
from pausing_loop import pausing_loop

import throughput
from fastsnap.device import choose_precision
from harness.measure import PROJECT, Settings
from harness.paced import ContenderFailed, PacedProcess
from harness.precisions import text_of, tried_by_hand
from harness.task import Task
from throughput import CAREFUL, PLAIN, Setting

SMALL = Task("resnet8", "cpu", batch_size=4)


def test_throughput_is_measured_in_turns_and_says_in_which_precision_and_with_how_many_workers() -> None:
    tried = {PLAIN: [Setting(0, "fp32")], CAREFUL: [Setting(0, "bf16"), Setting(0, "fp32")]}
    results, best = throughput.measure_net(SMALL, tried, quick=True)
    project, plain, careful = results
    assert [result.opponent for result in results] == [PROJECT, PLAIN, CAREFUL]
    assert project.case == plain.case == careful.case == f"resnet8, {text_of('auto', 'cpu')}, batch 4"
    assert best[PLAIN] == Setting(0, "fp32")
    assert best[CAREFUL] in tried[CAREFUL]
    assert careful.details == {"precision": best[CAREFUL].precision, "DataLoader workers": 0}
    assert project.details["precision"] in project.case
    assert project.details["threads"] >= 1
    ratios = [own / other for own, other in zip(project.values, plain.values, strict=True)]
    assert plain.ratio is not None
    assert min(ratios) <= plain.ratio.median <= max(ratios)


def test_an_opponent_keeps_the_setting_that_is_fastest_and_the_others_end() -> None:
    pauses = {Setting(0, "bf16"): 0.3, Setting(0, "fp32"): 0.0, Setting(2, "fp32"): 0.2}
    processes = {
        setting: PacedProcess(f"{setting}", pausing_loop, seconds) for setting, seconds in pauses.items()
    }
    best = throughput.keep_fastest(processes, steps=2, warm_up=1)
    assert best == Setting(0, "fp32")
    processes.pop(best).close()
    for process in processes.values():
        with pytest.raises(ContenderFailed):
            process.run(1)


def test_loops_that_offer_a_precision_try_both_and_the_others_are_left_at_theirs() -> None:
    both = tried_by_hand("auto", "cpu")
    tried = throughput.to_try(CAREFUL, SMALL, None, quick=False)
    assert {setting.precision for setting in tried} == set(both)
    assert {setting.workers for setting in tried} == set(throughput.WORKERS)
    assert len(tried) == len(both) * len(throughput.WORKERS)
    plain = throughput.to_try(PLAIN, SMALL, None, quick=True)
    assert plain == [Setting(workers, "fp32") for workers in throughput.QUICK_WORKERS]


def test_another_net_keeps_the_workers_and_tries_both_precisions_unless_one_is_asked_for() -> None:
    best, asked = Setting(2, "bf16"), replace(SMALL, precision="fp32")
    both = [Setting(2, precision) for precision in tried_by_hand("auto", "cpu")]
    assert throughput.to_try(CAREFUL, SMALL, best, quick=False) == both
    assert throughput.to_try(CAREFUL, asked, best, quick=False) == [Setting(2, "fp32")]
    assert throughput.to_try(PLAIN, replace(SMALL, precision="bf16"), Setting(2, "fp32"), quick=False) == [
        Setting(2, "fp32")
    ]
    assert {setting.precision for setting in throughput.to_try(CAREFUL, asked, None, quick=False)} == {"fp32"}


def test_resnet20_is_measured_in_fp32_too_and_every_net_in_what_is_asked_for() -> None:
    default = choose_precision("auto", torch.device("cpu")).name
    found = [(task.net, task.precision) for task in throughput.tasks(Settings(device="cpu"))]
    fp32_too = [] if default == "fp32" else [("resnet20", "fp32")]
    rest = [(net, "auto") for net in throughput.NETS[1:]]
    assert found == [("resnet20", "auto"), *fp32_too, *rest]
    asked = throughput.tasks(Settings(device="cpu", precision="fp32"))
    assert [(task.net, task.precision) for task in asked] == [(net, "fp32") for net in throughput.NETS]

"""Layers against PyTorch's."""

from pathlib import Path

import torch

import layers
import report
from fastsnap.device import choose_precision
from harness import results
from harness.measure import PROJECT, Settings


def test_layers_are_measured_against_pytorch_s() -> None:
    measured = [result for result in layers.run(Settings(device="cpu", quick=True)) if not result.missing]
    default = choose_precision("auto", torch.device("cpu")).name
    for precision in {default, "fp32"}:
        kernels = 1 + sum(layers.has_kernel(part, precision) for part in layers.PARTS)
        own = [result for result in measured if f", {precision}, " in result.case]
        assert len(own) == kernels * len(layers.WAYS) * len(layers.STAGES)
    assert {result.opponent for result in measured} == {PROJECT, "PyTorch"}
    assert all(len(result.values) == layers.QUICK_ROUNDS for result in measured)


def test_layers_say_what_their_kernels_are_not_for(tmp_path: Path) -> None:
    (result,) = layers.run(Settings(device="cuda", quick=True))
    assert result.missing == "for CPUs: a GPU takes torch.compile's kernels"
    results.append(result, Settings(device="cpu", out=tmp_path))
    report.write(tmp_path, docs=False)
    assert "not measured: for CPUs: a GPU takes" in (tmp_path / "report.md").read_text()

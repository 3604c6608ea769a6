"""Weights to begin with that are damaged, hostile, or of another network in a way that is easily overlooked."""

import argparse
import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from small_run import small_run, snapshot_weights
from torch import nn

from fastsnap.nets.build import build_network
from fastsnap.nets.initial import (
    InitialWeights,
    InitialWeightsError,
    begin_with,
    read_initial,
    require_outside,
    require_same_initial,
)
from fastsnap.run_folder import RunError

STATE = {"weight": torch.zeros(100)}
CLASSIFIER = {"linear.weight", "linear.bias"}


def saved(value, **options) -> bytes:
    content = io.BytesIO()
    torch.save(value, content, **options)
    return content.getvalue()


def zipped(compression: int) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(STATE))) as old, zipfile.ZipFile(packed, "w", compression) as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member.filename))
    return packed.getvalue()


def begun(state: dict[str, torch.Tensor], classes: int = 10) -> nn.Module:
    network = build_network("resnet8", classes=classes, in_channels=1, seed=9)
    begin_with(network, InitialWeights("file", state, "0" * 64), CLASSIFIER)
    return network


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"<!DOCTYPE html><html></html>", "damaged, cut short or something else"),
        (safetensors.torch.save(STATE)[:-1], "is no safetensors file"),
        (b"\xff" * 7 + b"\x7f{}", "is no safetensors file"),
        (saved(STATE)[:-100], "damaged, cut short"),
        (saved(STATE, _use_new_zipfile_serialization=False)[:-1], "damaged, cut short"),
        (b"\x80\x04K\x01.", "holds no state_dict|damaged, cut short"),
        (zipped(zipfile.ZIP_DEFLATED), "a compressed archive"),
        (
            saved({"best": np.float64(1), "state_dict": STATE}),
            r"holds a numpy\S*scalar, which could run code\)",
        ),
        (saved({"args": argparse.Namespace(a=1)}), r"holds a argparse.Namespace, which could run code\)"),
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".bin"])
def test_files_are_refused_in_one_plain_line(tmp_path: Path, content: bytes, named: str, suffix: str) -> None:
    (tmp_path / f"a{suffix}").write_bytes(content)
    with pytest.raises(InitialWeightsError, match=named) as raised:
        read_initial(tmp_path / f"a{suffix}")
    assert "\x1b" not in str(raised.value)
    assert "weights_only" not in str(raised.value)


@pytest.mark.parametrize("content", [safetensors.torch.save(STATE), saved(STATE), zipped(zipfile.ZIP_STORED)])
@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "weights"])
def test_what_a_file_is_its_content_says(tmp_path: Path, content: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert read_initial(tmp_path / name).state.keys() == STATE.keys()


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(InitialWeightsError, match="not a regular file"):
        read_initial(tmp_path / "pipe.pt")


def test_wrappers_leave_the_names_in_any_order(tmp_path: Path) -> None:
    plain = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    for wrapped in (
        nn.DataParallel(torch.compile(plain)),
        torch.compile(nn.DataParallel(plain)),
        nn.Sequential(torch.compile(plain[0]), plain[1]),
    ):
        torch.save(wrapped.state_dict(), tmp_path / "a.pt")
        assert read_initial(tmp_path / "a.pt").state.keys() == plain.state_dict().keys()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"bn1.bias": torch.full((16,), 1e300, dtype=torch.float64)}, "bn1.bias has NaN or infinite values"),
        ({"bn1.bias": torch.zeros(16).to(torch.float8_e4m3fn)}, "bn1.bias is torch.float8_e4m3fn instead of"),
        ({"bn1.bias": torch.zeros(16, dtype=torch.complex64)}, "bn1.bias is torch.complex64 instead of"),
        ({"bn1.bias": torch.zeros(16, dtype=torch.int64)}, "bn1.bias is torch.int64 instead of"),
        ({"bn1.bias": torch.zeros(16).to_sparse()}, "bn1.bias is no dense tensor"),
        (
            {"bn1.num_batches_tracked": torch.tensor(1.0)},
            "bn1.num_batches_tracked is torch.float32 instead of",
        ),
    ],
)
def test_tensors_of_another_kind_are_refused(change: dict[str, torch.Tensor], named: str) -> None:
    with pytest.raises(InitialWeightsError, match=named):
        begun(snapshot_weights(1) | change)


def test_a_classifier_that_differs_otherwise_or_lacks_a_part_is_refused() -> None:
    state = snapshot_weights(1)
    with pytest.raises(InitialWeightsError, match=r"linear.weight is \[20, 128\] instead of \[2, 64\]"):
        begun(state | {"linear.weight": torch.zeros(20, 128), "linear.bias": torch.zeros(20)}, 2)
    del state["linear.bias"]
    for classes in (2, 10):
        with pytest.raises(InitialWeightsError, match=r"linear\.bias is missing"):
            begun(state, classes)


def test_a_counter_that_lacks_among_others_is_missing() -> None:
    state = snapshot_weights(1)
    del state["bn1.num_batches_tracked"]
    with pytest.raises(InitialWeightsError, match=r"bn1\.num_batches_tracked is missing"):
        begun(state)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight


def test_of_tied_weights_one_name_is_enough() -> None:
    state = dict(Tied().state_dict())
    del state["second.weight"]
    network = Tied()
    begin_with(network, InitialWeights("file", state, "0" * 64), set())
    assert torch.equal(network.second.weight, state["first.weight"])


def test_weights_in_the_run_folder_itself_are_refused(tmp_path: Path) -> None:
    for inside in ("run", "run/snapshots/a.safetensors", "run/../run"):
        with pytest.raises(InitialWeightsError, match="lies in the run folder"):
            require_outside(str(tmp_path / inside), str(tmp_path / "run"))
    require_outside(str(tmp_path / "runs"), str(tmp_path / "run"))
    require_outside(None, str(tmp_path))


def test_a_file_that_is_not_there_is_the_same_only_by_its_own_name(tmp_path: Path) -> None:
    began = {"initial": str(tmp_path / "gone.pt"), "initial_sha256": "0" * 64}
    require_same_initial(str(tmp_path / "gone.pt"), began, "run")
    with pytest.raises(ValueError, match="cannot be read"):
        require_same_initial(str(tmp_path / "other.pt"), began, "run")
    with pytest.raises(RunError, match="other weights"):
        require_same_initial(str(small_run(tmp_path / "run", snapshots=1).path), began, "run")

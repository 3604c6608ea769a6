"""What a run is told: numbers that the kernels cannot hold, and what would have no effect, are errors that say so."""

import os
from pathlib import Path

import pytest

from fastsnap.assembly import settle
from fastsnap.config import make_config


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"learning_rate": 1e39}, r"learning_rate \(--lr\) must be finite and above 0 in fp32, got 1e\+39"),
        ({"learning_rate": 1e-50}, "learning_rate .* above 0 in fp32, got 1e-50"),
        ({"learning_rate": float("inf")}, "learning_rate .* got inf"),
        ({"weight_decay": 1e39}, r"weight_decay must be finite in fp32 and at least 0, got 1e\+39"),
        ({"weight_decay": float("nan")}, "weight_decay .* got nan"),
        ({"weight_decay": -1e-9}, "weight_decay .* got -1e-09"),
        ({"momentum": 1 - 1e-9}, "momentum must be at least 0 and below 1 in fp32, got 0.999999999"),
        ({"timeout": 0.0}, "timeout must be finite and above 0, got 0.0"),
        ({"timeout": float("inf")}, "timeout must be finite and above 0, got inf"),
        ({"epochs": 10**30}, "epochs must be from 1 to 2147483647, got 10{30}"),
        ({"batch_size": 10**12}, "batch_size must be from 1 to 2147483647, got 10{12}"),
        ({"cycles": 2**31}, "cycles must be from 1 to 2147483647"),
        ({"train_images": 2**63}, "train_images must be from 1 to 2147483647"),
        ({"validation": 2**63}, "validation must be from 0 to 2147483647"),
        ({"seed": 2**63}, "seed must be from 0 to"),
        ({"threads": 10**30}, "threads must be from 1 to 1024"),
    ],
)
def test_numbers_beyond_what_computes_with_them_are_errors(given, message):
    with pytest.raises(ValueError, match=message):
        make_config(**given)


@pytest.mark.parametrize("given", [{"learning_rate": 3e38}, {"weight_decay": 1e-60}, {"momentum": 0.0}])
def test_numbers_within_are_none(given):
    config = make_config(**given)
    assert {name: getattr(config, name) for name in given} == given


def test_data_for_digits_is_an_error_with_the_remedy():
    with pytest.raises(
        ValueError,
        match=r"data \(--data, make: DATA\) has no effect .* my_images: leave it out, or .* cifar100",
    ):
        make_config(data="my_images")
    assert make_config("cifar100", data="my_images").data == "my_images"


def test_the_folder_of_the_data_is_kept_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert settle(make_config("cifar100", data="../sets")).data == str(tmp_path.parent / "sets")
    assert Path(settle(make_config("cifar100")).data) == Path(os.getcwd(), "data")

"""In which precisions a case is compared, on whatever processor the tests run."""

import torch

from fastsnap.device import choose_precision
from harness.precisions import compared, text_of, tried_by_hand

DEFAULT = choose_precision("auto", torch.device("cpu")).name


def test_fp32_is_compared_on_every_processor_and_nothing_twice() -> None:
    names = [choose_precision(asked, torch.device("cpu")).name for asked in compared(None, "cpu")]
    assert names[0] == DEFAULT
    assert "fp32" in names
    assert len(names) == len(set(names))


def test_what_is_asked_for_is_compared_alone_and_tried_alone() -> None:
    assert compared("bf16", "cpu") == tried_by_hand("bf16", "cpu") == ("bf16",)
    assert compared("auto", "cpu") == ("auto",)


def test_by_hand_one_tries_fp32_and_all_that_the_project_would_take() -> None:
    assert {"fp32", DEFAULT} <= set(tried_by_hand("auto", "cpu")) <= {"fp32", "bf16"}


def test_cases_tell_a_default_from_what_is_asked_of_all() -> None:
    assert text_of("auto", "cpu") == f"{DEFAULT} by default"
    assert text_of("fp32", "cpu") == "fp32 asked of all"

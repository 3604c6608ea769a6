"""The Triton averaging kernel in Triton's interpreter, against fp64."""

import pytest
import torch
from averaging_cases import cases, check_against_float64
from hypothesis import given, settings

from fastsnap.kernels.averaging_triton import tiles, triton_averaging


@settings(max_examples=60)
@given(cases(most_classes=300))
def test_agrees_with_float64(case):
    check_against_float64(case, *triton_averaging(**case))


def test_classes_beyond_one_block_agree_with_float64():
    torch.manual_seed(0)
    logits = torch.randn(3, 2, 21_841) * 4
    logits[1, 0, 20_000] = logits[2, 1, 5] = 60.0
    case = {
        "logits": logits,
        "labels": torch.tensor([20_000, 17]),
        "joining": [2, 1, 0],
        "weights_M": [1.0, 2.0, 0.5],
        "temperature": 1.5,
        "probabilities": True,
    }
    check_against_float64(case, *triton_averaging(**case))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
def test_logits_that_are_not_finite_are_counted():
    logits = torch.randn(3, 5, 10)
    logits[0, 1, 2] = float("nan")
    logits[2, 1, 2] = logits[2, 1, 3] = logits[2, 4, 9] = float("inf")
    _, invalid_M = triton_averaging(logits, None, [2, 1, 0], [1.0] * 3, 1.0, False)
    assert invalid_M.tolist() == [2, 0, 1]


def test_more_than_the_registers_hold_is_refused():
    with pytest.raises(ValueError, match="32768 classes, got 5 and 40000"):
        tiles(5, 40_000)
    with pytest.raises(ValueError, match="64 members"):
        tiles(65, 10)

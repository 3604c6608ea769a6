"""Every version of the CPU kernels that this processor can run, on the same inputs: by dispatch, not by luck."""

from collections.abc import Callable, Iterable

import pytest
import torch
from averaging_cases import cases as averaging_cases
from averaging_cases import check_against_float64 as check_averaging
from averaging_cases import large_cases
from batch_norm_cases import batch_norm_cases
from batch_norm_cases import check_against_float64 as check_batch_norm
from hypothesis import given, settings
from torch import Tensor
from update_cases import cases as update_cases
from update_cases import check_against_reference

from fastsnap.kernels.averaging import average_members
from fastsnap.kernels.averaging_cpu import cpu_averaging
from fastsnap.kernels.cpu import INSTRUCTION_SETS, instruction_sets, using_instructions
from fastsnap.kernels.update_cpu import CpuUpdate

pytestmark = pytest.mark.needs_library


def on_every_set(work: Callable[[], Iterable[Tensor | None]]) -> list[list[Tensor]]:
    """What `work` returns, on each of the instruction sets."""
    results = []
    for name in instruction_sets():
        with using_instructions(name):
            results.append([tensor for tensor in work() if tensor is not None])
    return results


def assert_same_bits(results: list[list[Tensor]]) -> None:
    for other in results[1:]:
        for found, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@settings(max_examples=20)
@given(update_cases(largest=10_000, masters=True))
def test_an_update_has_the_same_bits_on_every_instruction_set_and_agrees_with_the_reference(case):
    def work() -> Iterable[Tensor | None]:
        state = check_against_reference(case, CpuUpdate)
        return state.weights, state.momentum, state.copy, state.average, state.rate

    assert_same_bits(on_every_set(work))


@settings(max_examples=20)
@given(batch_norm_cases())
def test_a_batch_normalisation_has_the_same_bits_on_every_instruction_set_and_agrees_with_float64(case):
    assert_same_bits(on_every_set(lambda: check_batch_norm(case)))


@settings(max_examples=20)
@given(averaging_cases(most_classes=2000))
def test_an_averaging_agrees_with_float64_on_every_instruction_set(case):
    for name in instruction_sets():
        with using_instructions(name):
            check_averaging(case, *cpu_averaging(**case))


@pytest.mark.parametrize("case", large_cases())
def test_many_classes_or_members_agree_with_float64_on_every_instruction_set(case):
    for name in instruction_sets()[:-1]:  # the best: test_averaging.py
        with using_instructions(name):
            check_averaging(case, *cpu_averaging(**case))


def test_each_instruction_set_has_a_version_of_its_own():
    # Sums over classes are split among as many parts as a vector has elements, so their roundings tell versions apart.
    logits = torch.randn(2, 200, 1000, generator=torch.Generator().manual_seed(0))
    results = on_every_set(lambda: [average_members(logits).entropy])
    assert len({tuple(entropy.flatten().tolist()) for (entropy,) in results}) == len(instruction_sets())


def test_instructions_are_the_old_ones_again_after_the_block_also_after_an_error_in_it():
    logits = torch.randn(2, 200, 1000, generator=torch.Generator().manual_seed(0))
    best = average_members(logits).entropy
    with using_instructions("plain"):
        plain = average_members(logits).entropy
        with using_instructions(instruction_sets()[-1]):
            assert torch.equal(average_members(logits).entropy, best)
        with pytest.raises(KeyError), using_instructions(instruction_sets()[-1]):
            raise KeyError
        assert torch.equal(average_members(logits).entropy, plain)
    assert torch.equal(average_members(logits).entropy, best)


def test_an_instruction_set_that_is_not_there_is_refused_with_those_that_are():
    assert instruction_sets() == INSTRUCTION_SETS[: len(instruction_sets())]
    with pytest.raises(ValueError, match=r"one of plain.* on this processor, got 'sse9'"):
        using_instructions("sse9").__enter__()

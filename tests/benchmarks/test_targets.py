"""The targets name what is measured, in every precision that makes sense on a processor."""

import pytest

import throughput
from harness.precisions import compared, text_of
from targets import targets_for

PROCESSORS = {"bf16": {"bf16", "fp32"}, "fp32": {"fp32"}}


def bounds(default: str, precision: str) -> dict[str, float]:
    """Of training ResNet-20, by opponent."""
    case = throughput.case_of("resnet20", f"{precision} asked of all")
    return {target.opponent: target.bound for target in targets_for(default) if case in target.cases}


@pytest.mark.parametrize("default", PROCESSORS)
def test_training_is_never_slower_than_by_hand_in_every_precision_of_the_processor(default: str) -> None:
    for precision in PROCESSORS[default]:
        assert bounds(default, precision) == {
            throughput.PLAIN: 1.7,
            throughput.CAREFUL: 1.15,
            throughput.TORCHENSEMBLE: 2.1,
        }
    assert len({target.text for target in targets_for(default)}) == len(targets_for(default))


def test_a_processor_without_bf16_has_no_target_in_it() -> None:
    assert bounds("fp32", "bf16") == {}
    assert not [target for target in targets_for("fp32") if "bf16" in target.text]


@pytest.mark.parametrize("asked", [None, "fp32"])
def test_a_default_run_and_one_in_fp32_both_measure_the_targets_of_fp32(asked: str | None) -> None:
    measured = {throughput.case_of("resnet20", text_of(name, "cpu")) for name in compared(asked, "cpu")}
    targets = [target for target in targets_for("fp32") if target.benchmark == throughput.NAME]
    in_fp32 = [target for target in targets if "ResNet-20" in target.text]
    assert len(in_fp32) == 3
    assert all(measured & set(target.cases) for target in in_fp32)

"""The command line of the benchmarks."""

import json
from pathlib import Path

import pytest

import run
from harness import results

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_a_benchmark_runs_from_the_command_line_to_the_report_in_the_precision_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--quick", "--only", "evaluation", "--device", "cpu", "--precision", "fp32"]
    assert run.main([*arguments, "--out", str(tmp_path)]) == 0
    assert "5 x resnet20, fp32 asked of all: 10 forwards, plain PyTorch" in capsys.readouterr().out
    assert "With results of quick runs" in (tmp_path / "report.md").read_text()
    lines = [json.loads(line) for line in (tmp_path / results.FILE).read_text().splitlines()]
    assert {line["case"] for line in lines} == {"5 x resnet20, fp32 asked of all"}
    assert all(line["n"] or line["missing"] for line in lines)
    assert {line["details"]["precision"] for line in lines if line["n"]} == {"fp32"}


WRONG = [
    (["--only", "speed"], "error: unknown benchmark speed: choose from throughput, "),
    (["--seeds", "0"], "error: --seeds must be at least 1, got 0"),
    (["--quick", "--update-docs"], "error: --update-docs needs figures that mean something"),
    (
        ["--only", "accuracy", "--precision", "fp32"],
        "error: --precision is for throughput and evaluation, got",
    ),
    (["--device", "cpu", "--precision", "fp16"], "error: --precision fp16 is for a GPU"),
    (["--full"], "error: --full needs CIFAR-100"),
    (["--data", "nowhere"], "nowhere"),
    (["--out", "/dev/null/reports"], "error: cannot write to --out /dev/null/reports"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_errors_are_one_clear_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(arguments) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1


def test_the_list_names_every_benchmark_and_each_has_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--list"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == list(run.BENCHMARKS)
    assert all((BENCHMARKS / f"{name}.py").exists() for name in names)

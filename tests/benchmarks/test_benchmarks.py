"""The benchmark suite: how it measures, what it concludes, and that each of its parts runs."""

import itertools
import json
import re
import sys
from collections.abc import Callable
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))  # its files are scripts, not a package

from counting_loop import counting_loop  # noqa: E402

import accuracy  # noqa: E402
import layers  # noqa: E402
import report  # noqa: E402
import run  # noqa: E402
import scaling  # noqa: E402
import targets  # noqa: E402
import throughput  # noqa: E402
from fastsnap.data.datasets import ImageSet  # noqa: E402
from fastsnap.ensemble.evaluate import evaluate_run  # noqa: E402
from fastsnap.kernels.convolution_cpu import has_instructions  # noqa: E402
from fastsnap.run_folder import RunFolder  # noqa: E402
from harness import results  # noqa: E402
from harness.measure import PROJECT, Result, Settings, alternate, compare  # noqa: E402
from harness.paced import Chunk, ContenderFailed, PacedProcess, run_loop  # noqa: E402
from harness.project import batches_loop, train_loop  # noqa: E402
from harness.task import Task, synthetic_images  # noqa: E402
from opponents.ensemble_pytorch import fit_loop  # noqa: E402
from opponents.loaders import TransformedImages  # noqa: E402
from opponents.loops import careful_loop, plain_loop, timm_loop  # noqa: E402
from pipelines import dataloader_loop, step_loop  # noqa: E402

SMALL = Task("resnet8", "cpu", batch_size=4)


# -- measuring


def test_contenders_take_turns() -> None:
    calls: list[str] = []

    def contender(name: str) -> Callable[[], float]:
        return lambda: calls.append(name) or float(len(calls))  # type: ignore[func-returns-value]

    values = alternate({"a": contender("a"), "b": contender("b")}, rounds=3)
    assert calls == ["a", "b"] * 3
    assert values == {"a": [1, 3, 5], "b": [2, 4, 6]}


def test_ratios_are_taken_within_a_round_and_above_1_the_project_wins() -> None:
    # The machine slows down tenfold after the first round; the project stays twice as fast.
    project, other = compare("b", "c", "s", {PROJECT: [1, 10, 10], "other": [2, 20, 20]}, "lower")
    assert project.ratio is None
    assert other.ratio is not None
    assert (other.ratio.median, other.ratio.low, other.ratio.high) == (2, 2, 2)
    _, other = compare("b", "c", "images/s", {PROJECT: [8, 4], "other": [2, 2]}, "higher")
    assert other.ratio is not None
    assert (other.ratio.median, other.ratio.low, other.ratio.high) == (3, 2.5, 3.5)


def test_a_result_says_where_it_comes_from() -> None:
    line = Result("b", "c", PROJECT, "s", "lower", (1.0, 2.0, 3.0, 4.0)).as_json(Settings(device="cpu"))
    assert (line["n"], line["median"], line["low"], line["high"]) == (4, 2.5, 1.75, 3.25)
    assert line["machine"]["cpu"]
    assert line["machine"]["threads"] == torch.get_num_threads()
    assert line["versions"]["torch"] == torch.__version__.split("+")[0]
    assert re.fullmatch(r"[0-9a-f]{7,}(-dirty)?", line["commit"])
    assert line["command"].startswith("python ")
    assert str(ROOT) not in json.dumps(line)


def test_a_process_runs_in_its_turn_only_and_its_failure_is_told(tmp_path: Path) -> None:
    file = tmp_path / "count"
    with PacedProcess("the counter", counting_loop, file) as process:
        chunk = process.run(2)
        assert file.read_text() == "1"  # the second step, and no third
        assert chunk.seconds > 0
        assert chunk.peak_memory_mb > 10
        with pytest.raises(ContenderFailed, match="the counter failed: RuntimeError: nothing left to do"):
            process.run(5)
        assert file.read_text() == "2"


LOOPS: dict[str, tuple[Callable[..., None], tuple[Any, ...]]] = {
    "fastsnap": (train_loop, (SMALL,)),
    "fastsnap, standard schedule": (train_loop, (SMALL, "step")),
    "plain": (plain_loop, (SMALL,)),
    "careful": (careful_loop, (SMALL,)),
    "torchensemble": (fit_loop, (SMALL,)),
    "timm": (timm_loop, (SMALL,)),
    "batches": (batches_loop, (SMALL, "torch")),
    "DataLoader": (dataloader_loop, (SMALL,)),
    "step": (step_loop, (SMALL,)),
}


@pytest.mark.parametrize("name", LOOPS)
def test_every_contender_runs_the_steps_it_is_told(name: str) -> None:
    if name in ("torchensemble", "timm"):
        pytest.importorskip(name)
    loop, arguments = LOOPS[name]
    here, there = Pipe()
    for steps in (2, 1, 0):
        here.send(steps)
    run_loop(there, loop, arguments)
    for _ in range(2):
        answer = here.recv()
        assert isinstance(answer, Chunk), answer
    assert not here.poll()


def test_throughput_is_measured_in_turns_and_says_with_how_many_workers() -> None:
    (project, plain), best = throughput.measure_net(SMALL, {throughput.PLAIN: (0,)}, quick=True)
    assert (project.opponent, plain.opponent) == (PROJECT, throughput.PLAIN)
    assert project.case == plain.case == "resnet8, batch 4"
    assert best == {throughput.PLAIN: (0,)}
    assert plain.details["DataLoader workers"] == 0
    ratios = [own / other for own, other in zip(project.values, plain.values, strict=True)]
    assert plain.ratio is not None
    assert min(ratios) <= plain.ratio.median <= max(ratios)


def test_the_opponents_images_are_normalised_and_padded_with_the_mean_colour() -> None:
    dataset = synthetic_images(train=8, test=1)
    colour = np.round(dataset.mean).astype(np.uint8)
    flat = np.broadcast_to(colour, (8, 32, 32, 3)).copy()
    images = TransformedImages(type(dataset)(**vars(dataset) | {"train": ImageSet(flat, np.arange(8))}))
    for index in range(8):
        image, label = images[index]
        assert (image.shape, image.dtype, label) == ((3, 32, 32), torch.float32, index)
        assert image.abs().max() < 0.01
    noise, _ = TransformedImages(dataset)[0]
    assert 0.8 < noise.std() < 1.3  # uniform noise of 0 to 255 has a deviation of 74, the data set's is 68


# -- what follows from the measurements


def test_an_exponent_is_found_with_its_standard_error() -> None:
    sizes = [1, 2, 4, 8]
    exponent, error = scaling.fit_exponent(sizes, [3 * size**1.5 for size in sizes])
    assert exponent == pytest.approx(1.5)
    assert error == pytest.approx(0, abs=1e-6)
    _, error = scaling.fit_exponent(sizes, [1, 2.2, 3.9, 8.1])
    assert error is not None
    assert 0.01 < error < 0.1
    assert scaling.fit_exponent([1, 10], [5, 5]) == (0, None)
    with pytest.raises(ValueError, match="two or more sizes"):
        scaling.fit_exponent([1, 2], [0, 1])


def test_intervals_are_students() -> None:
    # t of 97.5 % with 2 degrees of freedom is 4.303, the standard error of the mean of 1, 2, 3 is 1 / sqrt(3).
    found = accuracy.interval([1, 2, 3])
    assert found["mean"] == 2
    assert found["low"] == pytest.approx(2 - 4.303 / 3**0.5, abs=1e-3)
    assert found["high"] == pytest.approx(2 + 4.303 / 3**0.5, abs=1e-3)
    assert accuracy.interval([5]) == {"mean": 5, "low": None, "high": None}


@pytest.fixture(scope="module")
def accuracy_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, list[Result]]:
    """One seed of the quick regime."""
    settings = Settings(out=tmp_path_factory.mktemp("accuracy"), device="cpu", quick=True, seeds=1)
    return settings, list(accuracy.run(settings))


def quick_run(settings: Settings, name: str) -> RunFolder:
    return RunFolder(settings.out / "accuracy" / accuracy.QUICK.name / name)


def test_the_methods_are_compared_at_equal_epochs(accuracy_run: tuple[Settings, list[Result]]) -> None:
    settings, found = accuracy_run
    assert [result.opponent for result in found] == list(accuracy.METHODS)
    updates = {}
    for kind in ("snapshot", "step", "single-cycle"):
        folder = quick_run(settings, f"{kind}-s0")
        updates[kind] = folder.snapshots()[-1].step
        assert len(folder.snapshots()) == accuracy.QUICK.cycles
    assert len(set(updates.values())) == 1
    rates = [record["lr"] for record in quick_run(settings, "step-s0").metrics()]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.001])


def test_single_cycle_members_start_anew_and_their_run_is_an_ordinary_one(
    accuracy_run: tuple[Settings, list[Result]],
) -> None:
    settings, found = accuracy_run
    folder = quick_run(settings, "single-cycle-s0")
    seeds = [RunFolder(path).config()["seed"] for path in sorted(folder.path.glob("member-*"))]
    assert len(set(seeds)) == accuracy.QUICK.cycles
    (result,) = (result for result in found if result.opponent.startswith("SingleCycle"))
    assert evaluate_run(folder).metrics.last_m[-1].error == pytest.approx(result.values[0])


def test_an_evaluation_of_some_snapshots_does_not_pass_for_one_of_all(
    accuracy_run: tuple[Settings, list[Result]],
) -> None:
    settings, before = accuracy_run
    folder = quick_run(settings, "snapshot-s0")
    folder.write_json("ensemble.json", evaluate_run(folder, snapshots=[1]).as_json())
    assert accuracy.finished_seeds(accuracy.QUICK, settings.out) == []
    again = list(accuracy.run(settings))
    assert [result.values for result in again] == [result.values for result in before]


def test_a_seed_is_added_without_repeating_the_others(
    accuracy_run: tuple[Settings, list[Result]], tmp_path: Path
) -> None:
    settings, before = accuracy_run
    checkpoint = quick_run(settings, "snapshot-s0").path / "checkpoint.safetensors"
    written = checkpoint.stat().st_mtime_ns
    more = list(accuracy.run(Settings(out=settings.out, device="cpu", quick=True, seeds=2)))[-len(before) :]
    assert checkpoint.stat().st_mtime_ns == written
    for old, new in zip(before, more, strict=True):
        assert new.values[:1] == old.values
        assert len(new.values) == 2
    ensemble, standard = (
        next(r for r in more if r.opponent == name) for name in (PROJECT, accuracy.STANDARD)
    )
    differences = [a - b for a, b in zip(ensemble.values, standard.values, strict=True)]
    assert ensemble.details["against_standard"]["mean"] == pytest.approx(sum(differences) / 2)


def test_a_run_of_other_settings_is_not_taken_for_this_one(
    accuracy_run: tuple[Settings, list[Result]], tmp_path: Path
) -> None:
    folder = quick_run(accuracy_run[0], "snapshot-s0")
    config = folder.config()
    try:
        folder.write_json("config.json", config | {"epochs": 99})
        with pytest.raises(ValueError, match="another epochs"):
            list(accuracy.run(accuracy_run[0]))
    finally:
        folder.write_json("config.json", config)


# -- results and report


def record(**changes: Any) -> results.Record:
    result = Result("throughput", "resnet20, batch 64", PROJECT, "images/s", "higher", (3.0, 4.0))
    return result.as_json(Settings(device="cpu")) | changes


def test_the_newest_run_of_every_case_counts_and_a_cut_line_is_left_out(tmp_path: Path) -> None:
    records = [
        record(run="1", median=1.0),
        record(run="1", opponent="gone since"),
        record(run="1", case="another"),
        record(run="2", median=2.0),
        record(run="2", opponent="x"),
        record(run="2", median=3.0),  # again, after one more seed
        record(run="3", median=4.0, quick=True),
    ]
    lines = [json.dumps(line) for line in records]
    file = tmp_path / results.FILE
    file.write_text("\n".join([*lines, '{"benchmark": "thr']))
    found = [(line["case"], line["opponent"], line["median"]) for line in results.latest(tmp_path)]
    case = records[0]["case"]
    assert found == [(case, PROJECT, 3.0), (case, "x", 3.5), ("another", PROJECT, 3.5)]
    file.write_text("\n".join(["{", *lines]))
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        results.latest(tmp_path)
    with pytest.raises(ValueError, match="holds no result"):
        results.latest(tmp_path / "elsewhere")


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    """Results of made-up measurements: a throughput, an opponent that is missing, a series."""
    settings = Settings(out=tmp_path, device="cpu")
    series = scaling.Series("time of a step", "depth", "ms", "lower", {8: [1, 2, 3], 14: [4, 4, 4]})
    made_up = itertools.chain(
        compare(
            "throughput",
            "resnet20, batch 64",
            "images/s",
            {PROJECT: [310, 320, 330], "plain PyTorch loop": [100, 100, 100]},
            "higher",
        ),
        [
            Result(
                "throughput",
                "resnet20, batch 64",
                "torchensemble",
                "images/s",
                "higher",
                missing="not installed: make bench-peers",
            )
        ],
        scaling.results_of(series),
    )
    for result in made_up:
        results.append(result, settings)
    return tmp_path


def test_the_report_shows_values_ratios_and_what_is_missing(measured: Path) -> None:
    report.write(measured, readme=False)
    text = (measured / "report.md").read_text()
    assert "| resnet20, batch 64 | fastsnap | 320 (315 to 325) images/s |" in text
    assert "|  | plain PyTorch loop | 100 images/s | 3.20 (3.15 to 3.25) | 3 |" in text
    assert "not measured: not installed: make bench-peers" in text
    assert "| exponent ± standard error | 1.24 |" in text  # log(4 / 2) / log(14 / 8)
    assert {file.name for file in measured.glob("*.png")} == {"throughput.png", "scaling.png"}


def test_the_html_page_needs_no_other_file(measured: Path) -> None:
    report.write(measured, readme=False)
    page = (measured / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 2
    assert not re.search(r"https?://|<link|<script|url\(|@import", page)
    assert re.findall(r'src="(?!data:)', page) == []


def verdict_of(target: targets.Target, **changes: Any) -> targets.Verdict:
    place = {"benchmark": target.benchmark, "case": target.case, "opponent": target.opponent}
    ratio = {"median": 3.1, "low": 2.9, "high": 3.3}
    return next(
        verdict
        for verdict in targets.verdicts([record(**place | {"ratio": ratio} | changes)])
        if verdict.target == target
    )


def test_targets_are_reached_missed_or_not_known() -> None:
    at_least, share, at_most, difference = (
        next(target for target in targets.TARGETS if target.figure == figure)
        for figure in ("ratio", "share", "median", "difference")
    )
    assert (verdict_of(at_least).met, verdict_of(at_least).found) == (True, "3.10 (2.90 to 3.30)")
    assert verdict_of(at_least, ratio={"median": 2.9, "low": 2.8, "high": 3.3}).met is False
    assert verdict_of(at_least, quick=True).met is None
    assert (verdict_of(share).met, verdict_of(share).found) == (True, "0.32 (0.30 to 0.34)")
    assert verdict_of(at_most).met is False  # 3.5 % of a step
    intervals = {"mean": -1.0, "low": -1.5, "high": -0.5}
    assert verdict_of(difference, details={"against_standard": intervals}).met is True
    assert verdict_of(difference, details={"against_standard": intervals | {"high": 0.5}}).met is False
    one_seed = {"mean": -1.0, "low": None, "high": None}
    assert verdict_of(difference, details={"against_standard": one_seed}).met is None
    assert all(verdict.met is None for verdict in targets.verdicts([]))


def test_the_readme_gets_its_results_between_the_markers(measured: Path) -> None:
    section = report.readme_section(results.latest(measured))
    assert "times a plain PyTorch loop's images/s | at least 3 | 3.20 (3.15 to 3.25) | reached |" in section
    assert re.search(r"Machine: .*torch", section)
    before = f"# x\n{report.START}\nold\n{report.END}\nrest\n"
    after = report.with_results(before, section)
    assert after == f"# x\n{report.START}\n{section}\n{report.END}\nrest\n"
    assert report.with_results(after, section) == after
    with pytest.raises(ValueError, match="has no <!-- results -->"):
        report.with_results("# x\n", section)
    with pytest.raises(ValueError, match="quick runs"):
        report.readme_section([record(quick=True)])


def test_layers_are_measured_against_pytorch_s() -> None:
    measured = [result for result in layers.run(Settings(device="cpu", quick=True)) if not result.missing]
    kernels = 1 + has_instructions()
    assert len(measured) == kernels * 2 * len(layers.STAGES)
    assert {result.opponent for result in measured} == {PROJECT, "PyTorch"}
    assert all(len(result.values) == layers.QUICK_ROUNDS for result in measured)


def test_layers_say_where_their_kernels_are_not_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (result,) = layers.run(Settings(device="cuda", quick=True))
    assert result.missing == "for CPUs: a GPU takes torch.compile's kernels"
    monkeypatch.setattr(layers, "has_instructions", lambda: False)
    settings = Settings(device="cpu", quick=True, out=tmp_path)
    for result in layers.run(settings):
        results.append(result, settings)
    report.write(tmp_path, readme=False)
    assert "needs a CPU with AVX512-BF16" in (tmp_path / "report.md").read_text()


# -- the command line


def test_a_benchmark_runs_from_the_command_line_to_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(["--quick", "--only", "evaluation", "--device", "cpu", "--out", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "5 x resnet20, fp32: 10 forwards, plain PyTorch" in output
    assert "With results of quick runs" in (tmp_path / "report.md").read_text()
    lines = [json.loads(line) for line in (tmp_path / results.FILE).read_text().splitlines()]
    assert {line["case"] for line in lines} == {"5 x resnet20, fp32", "5 x resnet20, bf16"}
    assert all(line["n"] or line["missing"] for line in lines)


WRONG = [
    (["--only", "speed"], "error: unknown benchmark speed: choose from throughput, "),
    (["--seeds", "0"], "error: --seeds must be at least 1, got 0"),
    (["--quick", "--update-readme"], "error: --update-readme needs figures that mean something"),
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
    assert all((ROOT / "benchmarks" / f"{name}.py").exists() for name in names)

"""The command line of the evaluation: what it prints where, what it writes, and how it fails."""

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from small_run import small_dataset, small_run

from fastsnap.data.fingerprint import fingerprints
from fastsnap.ensemble.evaluate import evaluate_run
from fastsnap.ensemble.metrics import Difference
from fastsnap.ensemble.report import file_suffix, report_run
from fastsnap.ensemble.results import Report
from fastsnap.ensemble.sentences import summary
from fastsnap.ensemble.tables import print_report
from fastsnap.ensemble_eval import main

CPU = torch.device("cpu")
WRITTEN = {
    *("ensemble.json", "error-against-m.png", "training.png"),
    *("members.png", "reliability.png", "cascade.png", "report.html"),
}


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Report:
    folder = small_run(tmp_path_factory.mktemp("runs") / "digits-run", snapshots=3)
    return evaluate_run(folder, dataset=small_dataset(), device=CPU, precision="fp32")


@pytest.fixture(autouse=True)
def threads_as_before():
    """The command line sets the process's threads; here, other tests follow in it."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def printed(report: Report, width: int = 80) -> str:
    file = io.StringIO()
    print_report(report, Console(file=file, width=width))
    return file.getvalue()


def test_prints_the_tables_and_writes_the_files(tmp_path, capsys):
    folder = small_run(tmp_path / "digits-run", snapshots=3)
    assert main([str(folder.path), "--device", "cpu", "--precision", "fp32"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "digits-run: resnet8 on digits test, 360 images (cpu, fp32" in out
    assert "saved ensemble.json" in out
    assert {path.name for path in folder.path.iterdir()} >= WRITTEN
    content = json.loads((folder.path / "ensemble.json").read_text())
    for row in content["members"] + content["last_m"]:
        cells = [f"{row['error']:.2f}", f"{row['top5_error']:.2f}", f"{row['nll']:.4f}", f"{row['ece']:.4f}"]
        assert "  ".join(cells).split() in [line.split()[-5:-1] for line in out.splitlines()]


def test_another_precision_than_that_of_training_is_said(tmp_path, capsys):
    folder = small_run(tmp_path / "run", snapshots=1, precision="bf16")
    arguments = [str(folder.path), "--device", "cpu", "--precision"]
    assert main([*arguments, "fp32", "--threads", "1"]) == 0
    assert "Evaluated in fp32 (as asked for), trained in bf16." in capsys.readouterr().out
    assert main([*arguments, "bf16", "--threads", "2"]) == 0
    assert "trained in" not in capsys.readouterr().out
    assert main([*arguments, "bf16", "--threads", "0"]) == 2
    assert "threads must be from 1" in capsys.readouterr().err


def test_without_a_run_it_takes_the_newest_and_says_so_if_there_is_none(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["--device", "cpu"]) == 2
    assert "python -m fastsnap.train" in capsys.readouterr().err
    for age, name in enumerate(("newer", "older")):
        folder = small_run(tmp_path / "runs" / name, snapshots=1)
        for file in ("config.json", "manifest.json"):
            os.utime(folder.path / file, (1e9 - age, 1e9 - age))
    assert main(["--device", "cpu"]) == 0
    assert "newer: resnet8" in capsys.readouterr().out


def test_json_to_standard_output_is_alone_there(tmp_path, capsys):
    folder = small_run(tmp_path / "run", snapshots=2)
    assert (
        main(
            [str(folder.path), "--json", "-", "--snapshots", "2", "--split", "validation", "--device", "cpu"]
        )
        == 0
    )
    out, err = capsys.readouterr()
    content = json.loads(out)
    assert content == json.loads((folder.path / "ensemble-validation-snapshots-2.json").read_text())
    assert [member["snapshot"] for member in content["members"]] == [2]
    assert (content["split"], content["images"]) == ("validation", 100)
    assert "Each snapshot alone" in err


def test_json_to_a_file(tmp_path, capsys):
    folder = small_run(tmp_path / "run", snapshots=1)
    path = tmp_path / "result.json"
    assert main([str(folder.path), "--json", str(path), "--batch-size", "64", "--device", "cpu"]) == 0
    assert json.loads(path.read_text()) == json.loads((folder.path / "ensemble.json").read_text())
    capsys.readouterr()
    assert main([str(folder.path), "--json", str(tmp_path), "--device", "cpu"]) == 2
    assert capsys.readouterr().err.startswith(f"error: cannot write --json {tmp_path}")
    assert main([str(folder.path), "--json", str(tmp_path / "nowhere" / "a.json"), "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert "there is no folder" in err
    assert out == ""  # said before the evaluation


def test_what_cannot_be_saved_after_all_is_printed_and_is_an_error(tmp_path, capsys):
    folder = small_run(tmp_path / "run", snapshots=1)
    (folder.path / "ensemble.json").mkdir()
    assert main([str(folder.path), "--json", "-", "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert json.loads(out)["run"] == "run"
    assert "Each snapshot alone" in err
    assert "error: cannot save" in err


def run_process(*arguments, **environment):
    command = [sys.executable, "-m", "fastsnap.ensemble_eval", *arguments, "--device", "cpu"]
    if os.geteuid() == 0:  # who may write everywhere would not notice a folder that is read-only
        command = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override", *command]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | environment
    )


def test_a_read_only_run_is_evaluated_into_another_folder_and_refused_before_without(tmp_path):
    folder = small_run(tmp_path / "run", snapshots=2)
    folder.path.chmod(0o555)
    process = run_process(str(folder.path), "--json", "-")
    out, err = process.communicate()
    assert (process.returncode, out) == (2, b"")
    assert (
        f"error: cannot write to {folder.path}: Permission denied; choose another folder with --out"
        in err.decode()
    )
    process = run_process(str(folder.path), "--out", str(tmp_path / "elsewhere" / "results"))
    out, err = process.communicate()
    assert (process.returncode, err) == (0, b"")
    assert {file.name for file in (tmp_path / "elsewhere" / "results").iterdir()} == WRITTEN
    assert not WRITTEN & {file.name for file in folder.path.iterdir()}
    folder.path.chmod(0o755)


def test_three_evaluations_of_one_run_at_once(tmp_path):
    folder = small_run(tmp_path / "run", snapshots=2)
    processes = [run_process(str(folder.path)) for _ in range(3)]
    results = [(*process.communicate(), process.returncode) for process in processes]
    assert [(err, status) for _, err, status in results] == [(b"", 0)] * 3
    assert json.loads((folder.path / "ensemble.json").read_text())["last_m"]
    assert not list(folder.path.glob(".*.tmp"))


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_stream_that_is_not_utf_8_loses_no_result_and_a_file_gets_no_codes(tmp_path, encoding):
    folder = small_run(tmp_path / "run \x1b[31m[red]$x_{$ ü\u4e00", snapshots=2)
    process = run_process(str(folder.path), PYTHONIOENCODING=encoding, FORCE_COLOR="1")
    out, err = process.communicate()
    text = out.decode(encoding)
    assert (process.returncode, err) == (0, b"")
    assert r"run \x1b[31m[red]$x_{$ " in text
    assert "\x1b" not in text
    assert "points" in text or "the same as the last one" in text
    assert {file.name for file in folder.path.iterdir()} >= WRITTEN


def test_what_is_not_the_whole_evaluation_replaces_nothing(tmp_path, capsys):
    folder = small_run(tmp_path / "run", snapshots=3)
    common = [str(folder.path), "--device", "cpu"]
    assert main(common) == 0
    whole = {name: (folder.path / name).read_bytes() for name in WRITTEN}
    for arguments, suffix in (
        (["--snapshots", "2"], "-snapshots-2"),
        (["--snapshots", "1,3", "--split", "validation"], "-validation-snapshots-1,3"),
        (["--split", "validation"], "-validation"),
        (["--precision", "bf16"], "-bf16"),
    ):
        capsys.readouterr()
        assert main([*common, *arguments]) == 0
        names = [f"ensemble{suffix}.json", f"report{suffix}.html", f"error-against-m{suffix}.png"]
        said = capsys.readouterr().out
        assert f"saved {names[0]}, {names[1]}, {names[2]}" in said
        assert f" in {folder.path}" in said
        assert all((folder.path / name).exists() for name in names)
        assert {name: (folder.path / name).read_bytes() for name in WRITTEN} == whole
    assert main([*common, "--snapshots", "3,2,1", "--precision", "fp32"]) == 0  # all, in training's precision
    assert (folder.path / "ensemble.json").read_bytes() != whole["ensemble.json"]  # its seconds


def test_many_snapshots_make_no_name_that_is_too_long(report):
    entries = tuple(dataclasses.replace(report.snapshots[0], number=2 * n) for n in range(1, 200))
    suffixes = {
        file_suffix(dataclasses.replace(report, snapshots=chosen, saved=500), "auto")
        for chosen in (entries, entries[:-1])
    }
    assert len(suffixes) == 2
    assert max(len(suffix) for suffix in suffixes) <= 100


def test_a_file_is_no_run(tmp_path, capsys):
    file = tmp_path / "README.md"
    file.write_text("hello")
    assert main([str(file), "--device", "cpu"]) == 2
    assert f"error: {file} is not a run folder: it is a file" in capsys.readouterr().err


def test_other_images_than_the_run_s_are_refused(tmp_path, capsys):
    saved = fingerprints(small_dataset()) | {"test": "0" * 64}
    folder = small_run(tmp_path / "run", snapshots=1, fingerprints=saved)
    assert main([str(folder.path), "--device", "cpu"]) == 2
    assert "the test images or labels are not those that" in capsys.readouterr().err
    assert main([str(folder.path), "--device", "cpu", "--split", "validation"]) == 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--snapshots", "9"], "9"),
        (["--split", "validation"], "--validation N"),
        (["--batch-size", "0"], "batch size"),
        (["no-such-run"], "not a run folder"),
    ],
)
def test_errors_are_one_line_and_status_2(tmp_path, capsys, arguments, named):
    folder = small_run(tmp_path / "run", snapshots=1, validation=0)
    run = [] if arguments[0] == "no-such-run" else [str(folder.path)]
    assert main([*run, *arguments, "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert named in err
    assert not WRITTEN & {path.name for path in folder.path.iterdir()}


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_cuda_is_an_error(tmp_path, capsys):
    assert main([str(small_run(tmp_path / "run", snapshots=1).path), "--device", "cuda"]) == 2
    assert "--device cpu" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--snapshots", "1,x"], ["--split", "train"], ["--device", "tpu"]])
def test_wrong_flags_are_refused_by_the_parser(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert arguments[0] in capsys.readouterr().err


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    for flag in (
        "RUN",
        "--snapshots",
        "--split",
        "--json",
        "--out",
        "--batch-size",
        "--device",
        "--data",
        "--version",
    ):
        assert flag in text


def test_training_hands_over_its_data_set(tmp_path):
    folder = small_run(tmp_path / "run", snapshots=1, dataset="cifar100", data="nowhere")
    report = report_run(folder, console=Console(file=io.StringIO()), dataset=small_dataset(), device=CPU)
    assert report.images == 360


@pytest.mark.parametrize("width", [20, 80, 200])
def test_no_cell_is_cut_and_a_file_gets_no_control_codes(report, width):
    text = printed(report, width)
    assert "…" not in text
    assert "\x1b" not in text
    assert "  ".join(("snapshot", "epoch", "end lr", "train loss", "error %", "top-5 %")) in text
    assert all(len(line) <= 80 for line in text.splitlines() if "─" in line or line.startswith(" "))


def test_the_members_of_each_ensemble_are_named(report):
    rows = [line.split() for line in printed(report).splitlines()]
    for m, members in (("1", "3"), ("2", "2-3"), ("3", "1-3")):
        assert any(row[:2] == [m, members] for row in rows)
    chosen = dataclasses.replace(
        report,
        snapshots=tuple(dataclasses.replace(report.snapshots[i], number=n) for i, n in enumerate((1, 2, 5))),
    )
    assert "1-2, 5" in printed(chosen)


def test_an_unfinished_run_is_called_that(report):
    assert "not finished" not in printed(report)
    text = printed(dataclasses.replace(report, planned=6))
    assert "not finished: 3 of its 6 snapshots" in text


def with_result(report: Report, together: float, alone: float, standard_error: float) -> Report:
    metrics = report.metrics
    last_m = (*metrics.last_m[:-1], dataclasses.replace(metrics.last_m[-1], error=together))
    members = (*metrics.alone[:-1], dataclasses.replace(metrics.alone[-1], error=alone))
    difference = Difference(together - alone, standard_error)
    changed = dataclasses.replace(metrics, last_m=last_m, alone=members, all_against_last=difference)
    return dataclasses.replace(report, metrics=changed)


def test_the_summary_is_honest(report):
    better = summary(with_result(report, 24.2, 25.5, 0.3))
    assert better.startswith(
        "3 snapshots together: 24.20 % error, 1.30 ± 0.30 points below the last one alone (25.50 %)"
    )
    assert "noise" not in better
    worse = summary(with_result(report, 27.0, 25.5, 0.3))
    assert "1.50 ± 0.30 points above the last one alone (25.50 %)" in worse
    assert "within the noise" in summary(with_result(report, 25.1, 25.5, 0.3))
    assert "the same as the last one alone" in summary(with_result(report, 25.5, 25.5, 0.3))


def test_the_test_set_is_not_offered_for_choosing_m(report):
    assert "Lowest" not in printed(report)
    undecided = dataclasses.replace(report, choice=None, no_choice="the run held no images out")
    assert "Nothing was chosen, weights are equal: the run held no images out." in printed(undecided)
    nlls = [metrics.nll for metrics in report.metrics.last_m]
    text = printed(dataclasses.replace(report, split="validation"))
    assert f"Lowest NLL on the validation images: the last {nlls.index(min(nlls)) + 1}." in text


def test_one_snapshot_is_no_ensemble(tmp_path):
    folder = small_run(tmp_path / "run", snapshots=1, planned=1)
    text = printed(evaluate_run(folder, dataset=small_dataset(), device=CPU))
    assert "an ensemble needs at least 2" in text
    assert "Nothing was chosen" not in text
    assert "What each way" not in text


@pytest.mark.parametrize("sink", ["| true", "> /dev/full", ">&-"])
def test_json_that_nobody_reads_is_no_success_and_no_traceback(tmp_path, sink):
    folder = small_run(tmp_path / "run", snapshots=2)
    command = f"{sys.executable} -m fastsnap.ensemble_eval {folder.path} --device cpu --json - {sink}"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 128 + signal.SIGPIPE
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert "The last m averaged" in done.stderr
    assert (folder.path / "ensemble.json").exists()


def test_json_goes_where_a_link_leads_to_and_needs_a_name(tmp_path, capsys):
    folder = small_run(tmp_path / "run", snapshots=1)
    target, link = tmp_path / "target.json", tmp_path / "link.json"
    target.write_text("old")
    link.symlink_to(target)
    assert main([str(folder.path), "--json", str(link), "--device", "cpu"]) == 0
    assert link.is_symlink()
    assert json.loads(target.read_text())["run"] == "run"
    assert main([str(folder.path), "--json", "", "--device", "cpu"]) == 2
    assert "--json needs a file's name" in capsys.readouterr().err


def test_arguments_are_printed_as_they_are_in_the_parser_s_errors_too(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["run", "--no-such\x1b[31m"])
    assert "--no-such\\x1b[31m" in capsys.readouterr().err

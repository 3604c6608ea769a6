"""The files of a run folder are untrusted input: each error names file, field, value and remedy, and is a RunError."""

import contextlib
import copy
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_run import small_dataset, small_run

from fastsnap.ensemble.evaluate import evaluate_run
from fastsnap.ensemble.plots import figures_of, save_plots
from fastsnap.run_files import RunError
from fastsnap.run_folder import RunFolder
from fastsnap.run_schema import MOST_BYTES

JSON_FILES = ("config.json", "manifest.json", "metrics.jsonl")
STATE = {"step": 80, "steps": 80, "seconds": 1.5, "epoch_seconds": 0.5, "scaler": {}}


def whole_run(path: Path, **overrides: Any) -> RunFolder:
    """A run with everything that training writes."""
    written = {"momentum": 0.9, "threads": 2, "classes": 10, "versions": {"fastsnap": "0.1.0", "git": None}}
    folder = small_run(path, snapshots=3, **written | overrides)
    folder.save_checkpoint({"parameters": torch.zeros(3)}, STATE)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return whole_run(tmp_path / "run")


def change(folder: RunFolder, name: str, edit: Callable[[Any], None]) -> None:
    content = json.loads((folder.path / name).read_text())
    edit(content)
    (folder.path / name).write_text(json.dumps(content))


def first_entry(**values: Any) -> Callable[[Any], None]:
    return lambda manifest: manifest["snapshots"][0].update(values)


@pytest.mark.parametrize(
    ("name", "edit", "named"),
    [
        ("config.json", lambda c: c.update(cycles="5"), r"config\.json .*cycles: Expected int, got str, found '5'"),
        ("config.json", lambda c: c.update(epochs=0), r"epochs: Expected int >= 1, found 0"),
        ("config.json", lambda c: c.update(epochs=True), r"epochs: Expected int, got bool, found True"),
        ("config.json", lambda c: c.update(learning_rate=0), r"learning_rate: Expected float > 0"),
        ("config.json", lambda c: c.update(precision="fp8"), r"precision: .*'fp8'"),
        ("config.json", lambda c: c.update(schedule=["step"]), r"schedule: "),
        ("config.json", lambda c: c["images"].update(train=-1), r"images\.train: Expected int >= 1, found -1"),
        ("config.json", lambda c: c.update(cycles=1000), r"cycles: 1000 are more than the 80 steps"),
        ("config.json", lambda c: c.update(data="a\0b"), r"data: "),
        ("config.json", lambda c: c.update(momentun=c.pop("momentum")), r"'momentun' and lacks 'momentum'"),
        ("config.json", lambda c: c.update(epoch=c.pop("epochs")), r"'epoch' and lacks 'epochs'"),
        ("config.json", lambda c: c.update(epochs="\ud800"), r"it holds '\\ud800'"),
        ("config.json", lambda c: c.pop("net"), r"missing required field net"),
        ("manifest.json", first_entry(learning_rate="x"), r"snapshots\[0\]\.learning_rate: .*found 'x'"),
        ("manifest.json", first_entry(step=1.5), r"snapshots\[0\]\.step: Expected int, got float, found 1\.5"),
        ("manifest.json", first_entry(sha256="abc"), r"snapshots\[0\]\.sha256: .*found 'abc'"),
        ("manifest.json", first_entry(file="../../../etc/passwd"), r"snapshots\[0\]\.file: '\.\./.*within the run"),
        ("manifest.json", first_entry(file="/etc/passwd"), r"snapshots\[0\]\.file: '/etc/passwd' must be"),
        ("manifest.json", first_entry(file="snapshots/../../other/x"), r"must be a path within the run folder"),
        ("manifest.json", lambda m: m["snapshots"].append(m["snapshots"][-1]), r"number must ascend, found 3 after 3"),
        ("manifest.json", lambda m: m["snapshots"].reverse(), r"number must ascend, found 2 after 3"),
        ("manifest.json", first_entry(step=79), r"step must ascend"),
        ("manifest.json", first_entry(file="snapshots/snapshot-02.safetensors"), r"is another snapshot's"),
        ("manifest.json", first_entry(file="./snapshots//snapshot-02.safetensors"), r"is another snapshot's"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_with_file_field_and_remedy(
    folder: RunFolder, name: str, edit: Callable[[Any], None], named: str
) -> None:
    change(folder, name, edit)
    with pytest.raises(RunError, match=named) as caught:
        evaluate_run(folder, dataset=small_dataset())
    assert str(folder.path / name) in str(caught.value)
    assert "put back a copy" in str(caught.value) or "correct the name" in str(caught.value)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('{"a": 1}', "missing required field step"),
        ('{"step": 40, "train_loss": NaN}', "NaN is no number in JSON"),
        ('{"step": 90, "train_loss": 1e999}', r"train_loss: .*found inf"),
        ('{"step": 90, "train_loss": 1, "lr": "0.1"}', r"lr: .*found '0\.1'"),
        ("{", "is not JSON"),
        ('{"step": 3, "epoch": 1, "train_loss": 1}', "step must ascend, found 3 after"),
    ],
)
def test_a_wrong_line_of_the_metrics_is_named(folder: RunFolder, line: str, named: str) -> None:
    file = folder.path / "metrics.jsonl"
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(RunError, match=rf"metrics\.jsonl.*{named}"):
        folder.metrics()


def test_a_snapshot_outside_the_folder_is_not_read_through_a_link(folder: RunFolder, tmp_path: Path) -> None:
    snapshots = folder.path / "snapshots"
    shutil.move(snapshots, tmp_path / "elsewhere")
    snapshots.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunError, match="out of the run folder through a symbolic link"):
        folder.snapshots()


def test_a_run_that_was_linked_to_is_read(folder: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder.path)
    assert len(RunFolder(tmp_path / "link").snapshots()) == 3


@pytest.mark.parametrize("name", JSON_FILES)
def test_a_file_of_gigabytes_is_refused_before_it_is_read(folder: RunFolder, name: str) -> None:
    os.truncate(folder.path / name, 2**36)  # a hole: no disk has to hold it, but memory would
    with pytest.raises(
        RunError, match=rf"{name} is damaged: 68,719,476,736 bytes are more than the {MOST_BYTES[name]:,}"
    ):
        {"config.json": folder.config, "manifest.json": folder.snapshots, "metrics.jsonl": folder.metrics}[
            name
        ]()


@pytest.mark.parametrize("name", ["manifest.json", "snapshots/snapshot-02.safetensors"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(folder: RunFolder, name: str) -> None:
    (folder.path / name).unlink()
    os.mkfifo(folder.path / name)
    with pytest.raises(RunError, match="not a regular file"):
        evaluate_run(folder, dataset=small_dataset())


@pytest.mark.parametrize("name", JSON_FILES)
def test_deep_nesting_and_other_encodings_are_refused(folder: RunFolder, name: str) -> None:
    read = {"config.json": folder.config, "manifest.json": folder.snapshots, "metrics.jsonl": folder.metrics}[
        name
    ]
    for content in (b"[" * 10**5 + b"\n", b"\xff\xfe{}\n", b"9" * 5000 + b"\n"):
        (folder.path / name).write_bytes(content)
        with pytest.raises(RunError, match=rf"{name}.* is damaged: it is not JSON"):
            read()


def test_what_a_newer_version_adds_is_left_alone(folder: RunFolder) -> None:
    change(
        folder, "config.json", lambda config: config.update(label_smoothing=0.1, lr_scale=[1], epoch_offset=3)
    )
    change(folder, "manifest.json", first_entry(temperature=1.5))
    assert len(folder.snapshots()) == 3
    assert evaluate_run(folder, dataset=small_dataset()).images == 360


def test_a_path_that_is_not_utf_8_is_read_back(folder: RunFolder) -> None:
    change(folder, "config.json", lambda config: config.update(data=os.fsdecode(b"/data/\xff")))
    assert os.fsencode(folder.config()["data"]) == b"/data/\xff"


def test_a_configuration_of_version_0_1_0_is_read(folder: RunFolder) -> None:
    """As the first version's `describe` wrote it: no threads, no fingerprints."""
    for name in ("threads", "fingerprints", "momentum"):
        change(folder, "config.json", lambda config, name=name: config.pop(name, None))
    change(folder, "config.json", lambda config: config.update(loader="auto", out="runs/a"))
    assert folder.config()["loader"] == "auto"


@pytest.mark.parametrize("values", [{"epochs": 3}, {"cycles": 2}])
def test_files_of_different_runs_are_refused_before_anything_is_computed(
    folder: RunFolder, values: dict
) -> None:
    change(folder, "config.json", lambda config: config.update(values))
    forwarded: list[int] = []
    with pytest.raises(
        RunError, match=r"go to step 80, snapshot 3, but config\.json plans (60 steps|80 steps, 2 snap)"
    ):
        evaluate_run(folder, dataset=small_dataset(), on_member=lambda entry: forwarded.append(entry.number))
    assert forwarded == []


def test_a_file_is_no_run_folder(tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_text("# hello")
    with pytest.raises(RunError, match=r"README\.md is not a run folder: it is a file"):
        RunFolder(file).config()


# -- whatever is in the files

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.integers(-2, 100)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["..", "/", "a/../../b", "\ud800", "fp16", "resnet20", "digits"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """All containers with a key or index of theirs."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


def mutated(content: Any, data: st.DataObject) -> str:
    """`content` as JSON with a value replaced, removed or renamed."""
    content = copy.deepcopy(content)
    container, key = data.draw(st.sampled_from(places(content)))
    how = data.draw(st.sampled_from(["replace", "replace", "remove", "rename"]))
    if how == "replace":
        container[key] = data.draw(VALUES)
    elif how == "rename" and isinstance(container, dict):
        container[data.draw(st.text(max_size=6)) + key[1:]] = container.pop(key)
    else:
        del container[key]
    return json.dumps(content)


def damaged(content: bytes, data: st.DataObject) -> bytes:
    position = data.draw(st.integers(0, len(content)))
    return (
        content[:position]
        + data.draw(st.binary(max_size=4))
        + content[position + data.draw(st.integers(0, 9)) :]
    )


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return whole_run(tmp_path_factory.mktemp("template") / "run")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_the_files_hold_the_error_is_a_run_error(
    template: RunFolder, data: st.DataObject, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path / f"{time.monotonic_ns()}")
    shutil.copytree(template.path, folder.path)
    name = data.draw(st.sampled_from([*JSON_FILES, "checkpoint.safetensors"]))
    file = folder.path / name
    if name == "checkpoint.safetensors" or data.draw(st.integers(0, 4)) == 0:
        file.write_bytes(damaged(file.read_bytes(), data))
    elif name == "metrics.jsonl":
        lines = file.read_text().splitlines()
        index = data.draw(st.integers(0, len(lines) - 1))
        lines[index] = mutated(json.loads(lines[index]), data)
        file.write_text("\n".join(lines) + "\n")
    else:
        file.write_text(mutated(json.loads(file.read_text()), data))
    for read in (
        folder.config,
        folder.snapshots,
        folder.metrics,
        folder.load_checkpoint,
        lambda: evaluated(folder),
    ):
        with contextlib.suppress(RunError):
            read()
    shutil.rmtree(folder.path)


def evaluated(folder: RunFolder) -> None:
    report = evaluate_run(folder, dataset=small_dataset(), device=torch.device("cpu"), precision="fp32")
    save_plots(figures_of(folder, report), folder.path)

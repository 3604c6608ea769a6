"""The exported files: the same answers in a process that does not know the project, what they say, and refusals."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from small_run import small_dataset, small_run, snapshot_weights

import fastsnap
from fastsnap.ensemble import exporting
from fastsnap.ensemble.evaluate import evaluate_run
from fastsnap.ensemble.exporting import drawn_images
from fastsnap.export import main
from fastsnap.nets.build import build_network
from fastsnap.run_folder import RunFolder

FACTS: dict[str, Any] = {
    "class_names": [f"digit {number}" for number in range(10)],
    "mean": [77.87],
    "std": [95.87],
    "image_shape": [8, 8, 1],
}
STRANGER = """
import json, sys
import numpy as np
path, images, out = sys.argv[1:]
images = np.load(images)
if path.endswith(".onnx"):
    import onnxruntime
    session = onnxruntime.InferenceSession(path)
    outputs = session.run(["probabilities", "entropy", "mutual_information"], {"images": images})
    texts = session.get_modelmeta().custom_metadata_map  # names as they are, the rest JSON
    facts = {name: text if name in ("run", "net", "dataset", "precision") else json.loads(text)
             for name, text in texts.items()}
else:
    import torch
    extra = {"fastsnap.json": ""}
    module = torch.export.load(path, extra_files=extra).module()
    outputs = [output.numpy() for output in module(torch.from_numpy(images))]
    facts = json.loads(extra["fastsnap.json"])
assert not any(name.partition(".")[0] == "fastsnap" for name in sys.modules)
np.savez(out, *outputs)
print(json.dumps(facts))
"""
pytestmark = pytest.mark.filterwarnings("ignore")  # of the exporters, about themselves


@pytest.fixture(autouse=True)
def threads_as_before():
    """The command line sets the process's threads; here, other tests follow in it."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return small_run(tmp_path / "run", snapshots=3, **FACTS)


def ask_a_stranger(path: Path, images: np.ndarray, folder: Path) -> tuple[list[np.ndarray], dict[str, Any]]:
    """What another program gets from the file, and what the file says of itself."""
    np.save(folder / "images.npy", images)
    arguments = [str(path), str(folder / "images.npy"), str(folder / "out.npz")]
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, *arguments], capture_output=True, text=True, cwd=folder, check=False
    )
    assert done.returncode == 0, done.stderr
    with np.load(folder / "out.npz") as outputs:
        return [outputs[name] for name in outputs.files], json.loads(done.stdout)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_a_stranger_gets_the_evaluations_answers(
    run: RunFolder, tmp_path: Path, format: str, precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if format == "onnx":
        pytest.importorskip("onnxruntime")
    assert main([str(run.path), "--format", format, "--precision", precision]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    path = run.path / f"ensemble.{format}"
    assert out.startswith(f"{path}: 3 members, {precision}, ")
    assert "loaded again: largest differences over 40 images: probabilities " in out
    test = small_dataset().test
    (probabilities, entropy, information), facts = ask_a_stranger(path, test.images, tmp_path)
    expected = fastsnap.load_ensemble(run.path, device="cpu").combined(torch.from_numpy(test.images))
    tolerance = 1e-5 if precision == "fp32" else 2e-3
    assert np.abs(probabilities - expected.probabilities.numpy()).max() <= tolerance
    assert np.abs(entropy - expected.entropy.numpy()).max() <= 10 * tolerance
    assert np.abs(information - expected.mutual_information.numpy()).max() <= 10 * tolerance
    if precision == "fp32":
        report = evaluate_run(run, device=torch.device("cpu"), precision="fp32")
        error = 100 * (probabilities.argmax(1) != test.labels).mean()
        assert error == pytest.approx(report.metrics.last_m[-1].error, abs=1e-12)
    assert facts["classes"] == FACTS["class_names"]
    assert facts["image_shape"] == [8, 8, 1]
    assert facts["m"] == 3
    assert [entry["sha256"] for entry in facts["snapshots"]] == [entry.sha256 for entry in run.snapshots()]
    assert facts["precision"] == precision
    assert facts["versions"]["fastsnap"] == fastsnap.__version__
    content = path.read_bytes()
    assert str(Path(fastsnap.__file__).parent).encode() not in content  # nor where it was made


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_weights_and_temperature_are_in_the_file(run: RunFolder, tmp_path: Path, format: str) -> None:
    if format == "onnx":
        pytest.importorskip("onnxruntime")
    options: dict[str, Any] = {"device": "cpu", "weights": [3, 0, 1], "temperature": 0.5, "resident": "all"}
    ensemble = fastsnap.load_ensemble(run.path, **options)
    exported = fastsnap.export_ensemble(ensemble, tmp_path / f"e.{format}", format)
    assert exported.difference is not None
    assert max(exported.difference.values()) < 1e-5
    images = drawn_images((8, 8, 1))[:1]
    (probabilities, _, _), facts = ask_a_stranger(exported.path, images, tmp_path)
    assert np.abs(probabilities - ensemble(torch.from_numpy(images)).numpy()).max() < 1e-6
    assert (facts["m"], facts["weights"], facts["temperature"]) == (2, [0.75, 0.25], 0.5)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_safetensors_hold_the_members_stacked(run: RunFolder, precision: str) -> None:
    assert main([str(run.path), "--format", "safetensors", "--last", "2", "--precision", precision]) == 0
    path = run.path / "ensemble.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
        stacked = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    members = [snapshot_weights(2), snapshot_weights(3)]
    assert stacked.keys() == members[0].keys()
    for name, tensor in stacked.items():
        expected = torch.stack([member[name] for member in members])
        assert torch.equal(
            tensor, expected.half() if precision == "fp16" and expected.is_floating_point() else expected
        )
    assert json.loads(metadata["classes"]) == FACTS["class_names"]
    assert [entry["number"] for entry in json.loads(metadata["snapshots"])] == [2, 3]
    assert json.loads(metadata["mean"]) == [77.87]


NETS = ("preresnet8", "wrn-10-1", "densenet-10-4", "torchvision:resnet18", "torchvision:mobilenet_v3_small")


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_every_kind_of_network_is_exported(net: str, format: str, tmp_path: Path) -> None:
    if format == "onnx":
        pytest.importorskip("onnxruntime")
    shape = (16, 16, 3) if not net.startswith("torchvision") else (32, 32, 3)
    facts = FACTS | {"mean": [100.0, 120.0, 90.0], "std": [60.0, 50.0, 70.0], "image_shape": list(shape)}
    own = {"preresnet8": "A", "torchvision:resnet18": "A"}
    run = small_run(tmp_path / "run", snapshots=0, net=net, shortcut=own.get(net, "A"), **facts)
    for number in (1, 2):
        network = build_network(net, classes=10, image_size=shape[:2], seed=number)
        run.save_snapshot(
            network.state_dict(),
            step=26 * number,
            cycle=number,
            epoch=number,
            learning_rate=0.1,
            train_loss=1.0,
        )
    ensemble = fastsnap.load_ensemble(run.path, device="cpu", resident="all")
    exported = fastsnap.export_ensemble(ensemble, tmp_path / f"e.{format}", format)
    assert exported.difference is not None
    assert exported.difference["probabilities"] < 1e-5


def test_what_is_there_is_kept_unless_forced(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    path = run.path / "ensemble.safetensors"
    path.write_text("dear")
    assert main([str(run.path), "--format", "safetensors"]) == 2
    assert (
        "is there already and is kept: choose another --out, or replace it with --force"
        in capsys.readouterr().err
    )
    assert path.read_text() == "dear"
    assert main([str(run.path), "--format", "safetensors", "--force"]) == 0
    assert path.stat().st_size > 900_000


@pytest.mark.parametrize("format", ["pt2", "safetensors"])
def test_a_file_that_computes_something_else_is_refused_and_removed(
    run: RunFolder,
    tmp_path: Path,
    format: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = exporting._WRITERS[format]

    def broken(deployed: Any, facts: Any) -> Any:
        content, check = real(deployed, facts)
        with torch.no_grad():
            deployed.networks[1].linear.bias[0] += 3  # of safetensors, what was written is compared with this
        return real(deployed, facts)[0] if check else content, check

    monkeypatch.setitem(exporting._WRITERS, format, broken)
    target = tmp_path / "out" / "file"
    assert main([str(run.path), "--format", format, "--out", str(target)]) == 2
    err = capsys.readouterr().err
    assert (
        "the file is refused: its probabilities differ by up to" if format == "pt2" else "does not hold what"
    ) in err
    assert list(target.parent.iterdir()) == []


def test_a_full_disk_leaves_the_old_file(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run.path / "ensemble.safetensors"
    path.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("fastsnap.run_files.os.fsync", full)
    assert main([str(run.path), "--format", "safetensors", "--force"]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert path.read_text() == "old"
    assert not list(run.path.glob(".*.tmp"))


def test_without_onnx_the_extra_is_named(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert main([str(run.path)]) == 2
    assert "pip install 'fastsnap[onnx]'" in capsys.readouterr().err


def test_other_arguments_are_refused(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run.path), "--out", str(tmp_path), "--format", "pt2"]) == 2
    assert "it is a folder; name a file" in capsys.readouterr().err
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "is not a run folder" in capsys.readouterr().err
    assert main([str(run.path), "--format", "pt2", "--last", "4"]) == 2
    assert "last must be from 1 to the 3" in capsys.readouterr().err
    ensemble = fastsnap.load_ensemble(run.path, device="cpu", resident="one")
    with pytest.raises(ValueError, match='load it with resident="all"'):
        fastsnap.export_ensemble(ensemble, tmp_path / "e.pt2", "pt2")
    with pytest.raises(ValueError, match="format must be one of"):
        fastsnap.export_ensemble(ensemble, tmp_path / "e.pt2", "h5")
    with pytest.raises(ValueError, match="precision must be one of"):
        fastsnap.export_ensemble(ensemble, tmp_path / "e.pt2", "pt2", precision="bf16")


def test_fp16_that_overflows_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = small_run(tmp_path / "run", snapshots=0, **FACTS)
    weights = snapshot_weights(1)
    weights["conv1.weight"] *= 1e5
    run.save_snapshot(weights, step=26, cycle=1, epoch=2, learning_rate=0.1, train_loss=1.0)
    assert main([str(run.path), "--format", "pt2", "--precision", "fp16"]) == 2
    err = capsys.readouterr().err
    assert "the file is refused" in err
    assert "use fp32" in err
    assert not (run.path / "ensemble.pt2").exists()

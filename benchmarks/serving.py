"""Predicting with the ensemble: milliseconds per image, size of the exported files, cold starts.

From uint8 images in memory to averaged probabilities, in fp32, each contender in a process of its own. By hand: the
networks in plain PyTorch, normalisation before, a loop over them and the mean of their softmax, under inference_mode.
onnxruntime and torch.export run the project's exported files. A cold start is that of the command, from nothing to the
first prediction printed; importing is counted on top of Python's own start.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from fastsnap.device import choose_device
from fastsnap.ensemble.exporting import export_ensemble
from fastsnap.ensemble.loading import load_ensemble
from fastsnap.run_folder import RunFolder
from harness.measure import PROJECT, Result, Settings, alternate, compare, not_installed
from harness.paced import Pace, PacedProcess
from harness.project import random_networks, random_run
from harness.task import Task, load_images

NAME = "serving"
NETS = ("resnet20", "resnet110")
MEMBERS = (1, 5)
BATCHES = (1, 64)  # images at a time
TURN_SECONDS, QUICK_TURN_SECONDS = (
    0.4,
    0.05,
)  # that the project computes in a turn; all do as many predictions
FEWEST_PREDICTIONS = 2  # in a turn
PAUSE = 0.1  # seconds before a turn: threads of the contender before go on spinning for a while
ROUNDS, QUICK_ROUNDS = 11, 2
STARTS, QUICK_STARTS = 5, 1
LOOP = "a loop over the networks, plain PyTorch"
CHANNELS_LAST = "the same loop, channels-last"
ONNX = "onnxruntime, the exported file"
EXPORTED = "torch.export, the exported file"
COLD_CASE = f"first prediction of the command from a cold start, {MEMBERS[-1]} x {NETS[0]}"
IMPORT_CASE = "import fastsnap, on top of Python's start"
Predict = Callable[[], object]


def run(settings: Settings) -> Iterator[Result]:
    """Speed of every net, number of members and batch; then sizes, then starts."""
    for net in NETS[:1] if settings.quick else NETS:
        with tempfile.TemporaryDirectory() as temporary:
            folder = _run_folder(Path(temporary), net, settings)
            for members in MEMBERS:
                files = _exported(folder, members, ("fp32",))
                for batch in BATCHES:
                    yield from _speed(net, folder, members, batch, files, settings)
            if net == NETS[0]:
                yield from _sizes(net, folder)
                yield from _starts(folder, settings)


def case_of(net: str, members: int, batch: int) -> str:
    """For the report and the targets."""
    return f"{members} x {net}, {batch} at a time"


def _run_folder(place: Path, net: str, settings: Settings) -> Path:
    task = Task(net, settings.device, settings.data, cycles=max(MEMBERS))
    networks = random_networks(net, max(MEMBERS))
    return random_run(place / "run", task, load_images(settings.data), networks).path


def _exported(folder: Path, members: int, precisions: tuple[str, ...]) -> dict[str, Path]:
    """The files, by format and precision, as far as what writes them is installed."""
    ensemble = load_ensemble(folder, last=members, device="cpu", resident="all")
    formats = ["pt2"] if not_installed("onnxruntime") else ["onnx", "pt2"]
    files = {}
    for precision in precisions:
        for kind in formats:
            path = folder / f"{members}-{precision}.{kind}"
            if not path.exists():
                export_ensemble(ensemble, path, kind, precision=precision)
            files[f"{kind}, {precision}"] = path
    return files


def _speed(
    net: str, folder: Path, members: int, batch: int, files: dict[str, Path], settings: Settings
) -> Iterator[Result]:
    case = case_of(net, members, batch)
    loops: dict[str, tuple[Any, ...]] = {
        PROJECT: (project_loop, folder, members, batch, settings.device),
        LOOP: (by_hand_loop, folder, members, batch, settings.device, torch.contiguous_format),
        CHANNELS_LAST: (by_hand_loop, folder, members, batch, settings.device, torch.channels_last),
    }
    if settings.device == "cpu":
        loops |= {EXPORTED: (exported_loop, files["pt2, fp32"], batch)}
        loops |= {ONNX: (onnx_loop, files["onnx, fp32"], batch)} if "onnx, fp32" in files else {}
    with ExitStack() as processes:
        turns = {}
        for name, (loop, *arguments) in loops.items():
            process = processes.enter_context(PacedProcess(name, loop, *arguments))
            process.run(3)  # warms up
            if name == PROJECT:
                turn = QUICK_TURN_SECONDS if settings.quick else TURN_SECONDS
                predictions = max(FEWEST_PREDICTIONS, round(turn / process.seconds_per_step(5)))
            turns[name] = partial(_milliseconds, process, predictions, batch)
        values = alternate(turns, QUICK_ROUNDS if settings.quick else ROUNDS)
    yield from compare(NAME, case, "ms per image", values, "lower")
    if ONNX not in loops:
        reason = not_installed("onnxruntime") or "onnxruntime was measured on CPUs only"
        yield Result(NAME, case, ONNX, "ms per image", "lower", missing=reason)


def _milliseconds(process: PacedProcess, predictions: int, batch: int) -> float:
    time.sleep(PAUSE)
    process.run(1)  # awake, its code and weights in the caches
    return 1000 * process.seconds_per_step(predictions) / batch


def _images(folder: Path, batch: int) -> NDArray[np.uint8]:
    shape = load_ensemble(folder, last=1, device="cpu").preprocessing.image_shape
    return np.random.default_rng(0).integers(0, 256, (batch, *shape)).astype(np.uint8)


def _paced(pace: Pace, predict: Predict) -> None:
    for _ in pace.batches(repeat(None)):
        predict()


def project_loop(pace: Pace, folder: Path, members: int, batch: int, device: str) -> None:
    """The module, as load_ensemble gives it."""
    ensemble = load_ensemble(folder, last=members, device=device)
    images = torch.from_numpy(_images(folder, batch)).to(device)
    _paced(pace, lambda: _finished(ensemble(images)))


def by_hand_loop(
    pace: Pace, folder: Path, members: int, batch: int, device: str, order: torch.memory_format
) -> None:
    """What a user writes who has the networks."""
    where = choose_device(device)
    networks = [network.to(where).to(memory_format=order) for network in _networks(folder, members)]
    shown = load_ensemble(folder, last=1, device="cpu").preprocessing
    mean = torch.tensor(shown.mean, device=where)[:, None, None]
    std = torch.tensor(shown.std, device=where)[:, None, None]
    images = torch.from_numpy(_images(folder, batch)).to(where)

    @torch.inference_mode()
    def predict() -> Tensor:
        normalised = ((images.permute(0, 3, 1, 2) - mean) / std).contiguous(memory_format=order)
        return torch.stack([network(normalised).softmax(1) for network in networks]).mean(0)

    _paced(pace, lambda: _finished(predict()))


def _networks(folder: Path, members: int) -> list[nn.Module]:
    """In plain PyTorch; those of the run, which are random."""
    return random_networks(RunFolder(folder).config()["net"], max(MEMBERS))[-members:]


def exported_loop(pace: Pace, path: Path, batch: int) -> None:
    """The .pt2 file."""
    with path.open("rb") as file:
        module = torch.export.load(file).module()
    images = torch.from_numpy(_images(path.parent, batch))
    _paced(pace, lambda: module(images))


def onnx_loop(pace: Pace, path: Path, batch: int) -> None:
    """The ONNX file, with onnxruntime's own settings."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    images = _images(path.parent, batch)
    _paced(pace, lambda: session.run(["probabilities"], {"images": images}))


def _finished(probabilities: Tensor) -> Tensor:
    """On the host, so that a GPU has finished too."""
    return probabilities.cpu()


def _sizes(net: str, folder: Path) -> Iterator[Result]:
    members = max(MEMBERS)
    files = _exported(folder, members, ("fp32", "fp16"))
    together = sum(path.stat().st_size for path in (folder / "snapshots").iterdir())
    for name, path in files.items():
        values = {PROJECT: [path.stat().st_size / 1e6], "the snapshots' files together": [together / 1e6]}
        yield from compare(NAME, f"one file for {members} x {net}, {name}", "MB", values, "lower")


def _starts(folder: Path, settings: Settings) -> Iterator[Result]:
    rounds = QUICK_STARTS if settings.quick else STARTS
    picture = folder / "picture.png"
    Image.fromarray(_images(folder, 1)[0]).save(picture)
    commands: dict[str, list[str]] = {
        PROJECT: ["-m", "fastsnap.predict", str(folder), str(picture)],
        "import torch, torchvision alone": ["-c", "import torch, torchvision"],
    }
    turns = {name: partial(_seconds, command) for name, command in commands.items()}
    alternate(turns, 1)  # files come into the cache
    yield from compare(NAME, COLD_CASE, "s", alternate(turns, rounds), "lower")
    imports = {name: partial(_seconds, ["-c", name]) for name in ("import fastsnap", "pass")}
    seconds = alternate(imports, 3 * rounds)
    added = [mine - own for mine, own in zip(seconds["import fastsnap"], seconds["pass"], strict=True)]
    yield Result(NAME, IMPORT_CASE, PROJECT, "s", "lower", tuple(added))


def _seconds(arguments: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start

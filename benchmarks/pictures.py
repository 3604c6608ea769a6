"""Folders of pictures: batches of random resized crops per second, streamed and from the cache; decoding once; memory.

The opponent is what PyTorch's ImageNet example does, torchvision's ImageFolder in a DataLoader, with the number of
workers that suits it best; it has no colour jitter, which the project's batches have.
"""

import os
import shutil
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastsnap.data.datasets import load_dataset
from fastsnap.data.decoded import Split
from fastsnap.data.layouts import Names, find_layout
from fastsnap.data.pictures import Wishes
from fastsnap.data.pipeline import choose_loader, make_pipeline
from fastsnap.data.sources import Dataset
from fastsnap.limits import choose_threads
from fastsnap.training.allocator import keep_freed_memory
from fastsnap.waiting import spin_shortly
from harness.measure import PROJECT, Result, Settings, alternate, compare, not_installed
from harness.paced import Pace, PacedProcess
from opponents.image_folder import make_folder_loader

NAME = "pipelines"  # a part of it
UNIT = "images/s"
BATCH = 64
WORKERS = (0, 1, 2, 4)
FOLDER_LOADER = "torchvision's ImageFolder and DataLoader"
PILLOW = "Pillow in one process"
OTHER = "fastsnap, the other loader"
BATCHES, QUICK_BATCHES = 10, 3  # of a turn
PREPARED = 12  # batches that a loader may have ready when its turn comes: 2 for each of 4 workers, and some
CACHED_BATCHES = 200
ROUNDS, QUICK_ROUNDS = 5, 2
MADE_UP = (240, 120)  # training and test pictures where no folder is given
MANY = 1_000_000  # names of a made-up folder
FEW_OF = 10  # one of so many images, for the memory that streaming takes


def run(settings: Settings) -> Iterator[Result]:
    """All cases, for each folder of `settings.images`."""
    with tempfile.TemporaryDirectory() as temporary:
        folders = settings.images or (made_up_pictures(Path(temporary) / "made-up-500x375"),)
        for number, folder in enumerate(folders):
            yield from _folder(folder, Path(temporary) / f"cache-{number}", settings)
    yield _listing()


def streaming_case(name: str) -> str:
    """Of a folder."""
    return f"{name}, streaming, batch {BATCH}"


def cached_case(name: str) -> str:
    """Of a folder."""
    return f"{name}, from the cache, batch {BATCH}"


def decoding_case(name: str) -> str:
    """Of a folder."""
    return f"{name}, decoding all once"


def _folder(folder: Path, cache: Path, settings: Settings) -> Iterator[Result]:
    rounds = QUICK_ROUNDS if settings.quick else ROUNDS
    dataset = load(folder, cache, "files")
    size = dataset.train.shape[0]
    device = torch.device(settings.device)
    default = choose_loader("auto", device, files=True)
    other = "torch" if default == "dali" else "dali"
    loops: dict[str, tuple[Any, ...]] = {PROJECT: (files_loop, folder, cache, settings.device, default)}
    missing = not_installed("nvidia.dali") if other == "dali" else None
    if not missing:
        loops[OTHER] = (files_loop, folder, cache, settings.device, other)
    train = find_layout(folder).root / "train"
    with ExitStack() as stack:
        workers = _best_workers(train, size)
        loops[FOLDER_LOADER] = (folder_loop, train, size, workers)
        details: dict[str, dict[str, Any]] = {
            PROJECT: {"pipeline": default, "size": size, "images": len(dataset.train.labels)},
            FOLDER_LOADER: {"workers": workers},
        }
        processes = {name: stack.enter_context(_process(name, *loop)) for name, loop in loops.items()}
        batches = QUICK_BATCHES if settings.quick else BATCHES
        seconds = alternate(
            {name: partial(_steady, process, batches) for name, process in processes.items()}, rounds
        )
        rates = _rates(seconds, dataset)
        yield from compare(NAME, streaming_case(folder.name), UNIT, rates, "higher", details)
    yield from _cached(folder, cache, train, size, workers, settings, rounds)
    yield from _decoding(folder, cache, rounds)
    yield from _memory(folder, cache, settings)


def _process(name: str, *loop: Any) -> PacedProcess:
    """A process whose threads wait as the command line's do, if it is the project's."""
    before = os.environ.copy()
    if name in (PROJECT, OTHER):
        spin_shortly()
    try:
        return PacedProcess(name, *loop)
    finally:
        os.environ.clear()
        os.environ.update(before)


def _steady(process: PacedProcess, batches: int) -> float:
    """Seconds per batch, without those that were prepared while others had their turn."""
    process.run(PREPARED)
    return process.seconds_per_step(batches)


def _rates(seconds: dict[str, list[float]], dataset: Dataset) -> dict[str, list[float]]:
    """Images per second from seconds per batch; the last batch of an epoch is smaller for all."""
    count = len(dataset.train.labels)
    images = count / -(-count // BATCH)
    return {name: [images / value for value in own] for name, own in seconds.items()}


def _best_workers(train: Path, size: int) -> int:
    """The number of DataLoader workers that gives most images per second, each measured alone."""
    seconds = {}
    for workers in WORKERS:
        with _process(FOLDER_LOADER, folder_loop, train, size, workers) as process:
            seconds[workers] = _steady(process, BATCHES)
    return min(seconds, key=lambda workers: seconds[workers])


def _cached(
    folder: Path, cache: Path, train: Path, size: int, workers: int, settings: Settings, rounds: int
) -> Iterator[Result]:
    with ExitStack() as stack:
        own = stack.enter_context(_process(PROJECT, arrays_loop, folder, cache, settings.device))
        loader = stack.enter_context(_process(FOLDER_LOADER, folder_loop, train, size, workers))
        turns = {
            PROJECT: partial(_steady, own, CACHED_BATCHES),
            FOLDER_LOADER: partial(_steady, loader, QUICK_BATCHES if settings.quick else BATCHES),
        }
        seconds = alternate(turns, rounds)
    rates = _rates(seconds, load(folder, cache, "files"))
    yield from compare(
        NAME, cached_case(folder.name), UNIT, rates, "higher", {FOLDER_LOADER: {"workers": workers}}
    )


def _decoding(folder: Path, cache: Path, rounds: int) -> Iterator[Result]:
    layout = find_layout(folder)
    names = [*layout.train.names, *layout.test.names]
    fresh = cache.with_name(f"{cache.name}-fresh")

    def project() -> float:
        shutil.rmtree(fresh, ignore_errors=True)
        start = time.perf_counter()
        load(folder, fresh, "arrays")
        return len(names) / (time.perf_counter() - start)

    def pillow() -> float:
        start = time.perf_counter()
        for name in names:
            with Image.open(layout.root / name) as image:
                np.array(image.convert("RGB"))  # without the resize, which the project's time has in it
        return len(names) / (time.perf_counter() - start)

    rates = alternate({PROJECT: project, PILLOW: pillow}, rounds)
    yield from compare(NAME, decoding_case(folder.name), UNIT, rates, "higher")

    def again() -> float:
        start = time.perf_counter()
        load(folder, fresh, "arrays")
        return time.perf_counter() - start

    seconds = alternate({PROJECT: again}, rounds)
    yield from compare(NAME, f"{folder.name}, opening the cache again", "s", seconds, "lower")


def _memory(folder: Path, cache: Path, settings: Settings) -> Iterator[Result]:
    """Peak memory of a process that streams all images, and one of FEW_OF of them."""
    peaks = {}
    for part in (1, FEW_OF):
        with _process(PROJECT, files_loop, folder, cache, settings.device, "torch", part) as process:
            peaks[part] = process.run(PREPARED + 2 * BATCHES).peak_memory_mb
    for part, peak in peaks.items():
        which = "all images" if part == 1 else f"one of {part} images"
        yield from compare(
            NAME, f"{folder.name}, peak memory streaming {which}", "MB", {PROJECT: [peak]}, "lower"
        )


def _listing() -> Result:
    """Bytes per file of what is kept of a million made-up names."""
    tracemalloc.start()
    names = [f"train/n{number % 1000:08d}/n{number % 1000:08d}_{number}.JPEG" for number in range(MANY)]
    layout = Names(names, np.zeros(MANY, np.int64))
    split = Split(
        *(layout.names, layout.labels),
        sizes=np.zeros((MANY, 2), np.int32),
        stamps=np.zeros((MANY, 2), np.int64),
        transparent=np.zeros(MANY, bool),
        coloured=np.zeros(MANY, bool),
        direct=np.zeros(MANY, np.int8),
    )
    per_file = tracemalloc.get_traced_memory()[0] / len(split.names)
    tracemalloc.stop()
    return Result(NAME, f"listing {MANY:,} made-up names", PROJECT, "bytes per file", "lower", (per_file,))


def load(folder: Path, cache: Path, storage: str) -> Dataset:
    """The folder as the project's command line reads it."""
    threads = choose_threads(None).count
    wishes = Wishes(storage=storage, cache=str(cache), threads=threads)
    return load_dataset("folder", folder, augment="resized-crop", wishes=wishes)


def files_loop(pace: Pace, folder: Path, cache: Path, device: str, loader: str, part: int = 1) -> None:
    """Batches decoded as they are needed, of one of `part` images."""
    keep_freed_memory()  # as fastsnap.train's main does
    dataset = load(folder, cache, "files")
    images = dataset.train.subset(np.arange(len(dataset.train.labels)) % part == 0)
    _batches(pace, dataset, images, device, loader)


def arrays_loop(pace: Pace, folder: Path, cache: Path, device: str) -> None:
    """Batches from the cache."""
    keep_freed_memory()
    dataset = load(folder, cache, "arrays")
    _batches(pace, dataset, dataset.train, device, "auto")


def _batches(pace: Pace, dataset: Dataset, images: Any, device: str, loader: str) -> None:
    pipeline = make_pipeline(
        images,
        batch_size=min(BATCH, len(images.labels)),
        mean=dataset.mean,
        std=dataset.std,
        device=torch.device(device),
        augmentation=dataset.augmentation,
        loader=loader,
    )
    epoch = 0
    while True:
        for _ in pace.batches(pipeline.epoch(epoch)):
            pass
        epoch += 1


def folder_loop(pace: Pace, train: Path, size: int, workers: int) -> None:
    """The DataLoader's batches."""
    loader = make_folder_loader(train, size, BATCH, workers, jitter=0.0)
    while True:
        for _ in pace.batches(loader):
            pass


def made_up_pictures(folder: Path) -> Path:
    """JPEG files of 500x375 pixels, smooth and with some noise, as photographs are."""
    generator = np.random.default_rng(0)
    for split, count in zip(("train", "val"), MADE_UP, strict=True):
        for number in range(count):
            coarse = generator.integers(0, 256, (6, 8, 3), np.uint8)
            smooth = np.asarray(
                Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC), np.float32
            )
            pixels = (smooth + generator.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8)
            place = folder / split / f"class-{number % 2}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(place / f"{number:04d}.jpg", quality=90)
    return folder

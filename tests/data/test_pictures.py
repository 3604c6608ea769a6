"""Folders of pictures from end to end: the cache, arrays against files, streaming, damage and changes."""

import errno
import json
import multiprocessing
import os
import resource
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from made_pictures import folder_of_pictures, picture, save

from fastsnap.data.archives import DataError
from fastsnap.data.datasets import load_dataset
from fastsnap.data.decoding import centred, decode
from fastsnap.data.layouts import find_layout
from fastsnap.data.pictures import Wishes
from fastsnap.data.pipeline import choose_loader, make_pipeline
from fastsnap.data.sources import Augmentation, FileSet, ImageSet

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return folder_of_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(params=["torch", "dali"])
def loader(request):
    if request.param == "dali":
        pytest.importorskip("nvidia.dali")
    return request.param


def load(root, cache, augment="resized-crop", **wishes):
    usual = {"image_size": 24, "cache": str(cache), "threads": 2}
    return load_dataset("folder", root, augment=augment, wishes=Wishes(**usual | wishes))


def pipeline(source, dataset, loader="torch", augmentation=None, batch_size=7, **options):
    return make_pipeline(
        source,
        batch_size=batch_size,
        mean=dataset.mean,
        std=dataset.std,
        device=CPU,
        seed=3,
        augmentation=augmentation,
        loader=loader,
        **options,
    )


@pytest.mark.parametrize("augment", ["crop", "none", "resized-crop"])
def test_arrays_are_the_decoded_pictures_in_their_form(pictures, tmp_path, augment):
    dataset = load(pictures, tmp_path, augment)
    layout = find_layout(pictures)
    background = tuple(
        json.loads(next(tmp_path.glob("arrays-*/meta.json")).read_text())["facts"]["background"]
    )
    large = 27 if augment == "resized-crop" else 24  # 24 * 256 / 224
    for split, names, side in ((dataset.train, layout.train, large), (dataset.test, layout.test, 24)):
        assert isinstance(split, ImageSet)
        assert split.shape == (24, 24, 3)
        assert np.array_equal(split.labels, names.labels)
        for image, name in zip(split.images, names.names, strict=True):
            assert np.array_equal(image, centred(decode(pictures / name, 3, background), large, side))
    pixels = dataset.train.images.reshape(-1, 3).astype(np.float64)
    np.testing.assert_allclose(dataset.mean, pixels.mean(axis=0), atol=1e-3)
    np.testing.assert_allclose(dataset.std, pixels.std(axis=0), atol=1e-3)
    assert dataset.resize == large
    assert dataset.storage == "arrays"


def test_grey_pictures_have_one_channel_unless_one_of_training_is_coloured(tmp_path):
    for split, count in (("train", 4), ("val", 2)):
        for number in range(count):
            for kind in "ab":
                save(picture(30, 30, number, "L"), tmp_path / f"data/{split}/{kind}/{number}.png")
    save(picture(30, 30), tmp_path / "data/val/a/coloured.png")
    dataset = load(tmp_path / "data", tmp_path / "cache")
    assert dataset.train.shape == dataset.test.shape == (24, 24, 1)
    save(picture(30, 30), tmp_path / "data/train/a/coloured.png")
    assert load(tmp_path / "data", tmp_path / "cache").train.shape == (24, 24, 3)


def test_pictures_of_one_size_that_are_small_are_kept_for_random_crops(tmp_path):
    for split in ("train", "val"):
        for number in range(3):
            for kind in "ab":
                save(picture(26, 25, number), tmp_path / f"data/{split}/{kind}/{number}.png")
    dataset = load(tmp_path / "data", tmp_path / "cache")
    assert dataset.train.images.shape[1:] == (25, 26, 3)
    assert dataset.train.shape == (24, 24, 3)


def test_the_cache_is_used_again_and_made_anew_when_a_file_changes(pictures, tmp_path):
    root = shutil.copytree(pictures, tmp_path / "data")
    work = []

    def count(what, done, total):
        work.append(what)

    first = load(root, tmp_path / "cache", on_progress=count)
    assert set(work) == {"reading headers", "decoding"}
    assert work.count("decoding") == 32
    work.clear()
    again = load(root, tmp_path / "cache", on_progress=count)
    assert work == []
    assert np.array_equal(first.train.images, again.train.images)
    name = find_layout(root).train.names[0]
    save(picture(60, 50, seed=77), root / name)
    changed = load(root, tmp_path / "cache", on_progress=count)
    assert "decoding" in work
    assert not np.array_equal(changed.train.images[0], first.train.images[0])
    # Transparent ones show the mean colour, which is another now.
    same = np.array(
        [
            number > 0 and not path.endswith(".png")
            for number, path in enumerate(find_layout(root).train.names)
        ]
    )
    assert np.array_equal(changed.train.images[same], first.train.images[same])
    assert not list((tmp_path / "cache").glob(".*.tmp"))


def entries(cache, kind="arrays"):
    return [path for path in cache.glob(f"{kind}-*") if path.is_dir()]


def swap(path):
    np.save(path / "train.npy", np.zeros_like(np.load(path / "train.npy")))


def shorten(path):
    content = (path / "train.npy").read_bytes()
    (path / "train.npy").write_bytes(content[: len(content) // 2])


DAMAGES = {
    "shortened": shorten,
    "swapped": swap,
    "without an array": lambda path: (path / "test.npy").unlink(),
    "without facts": lambda path: (path / "meta.json").unlink(),
    "no JSON": lambda path: (path / "meta.json").write_text("{"),
    "of another kind": lambda path: (path / "meta.json").write_text(
        '{"version": 1, "files": {}, "facts": {}}'
    ),
    "of another version": lambda path: (path / "meta.json").write_text('{"version": 0}'),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_cache_is_made_anew_and_said_so(pictures, tmp_path, damage):
    first = np.array(load(pictures, tmp_path).train.images)
    (entry,) = entries(tmp_path)
    damage(entry)
    said = []
    again = load(pictures, tmp_path, say=said.append)
    assert np.array_equal(again.train.images, first)
    assert any("is damaged" in line and "making it anew" in line for line in said)


def load_in_a_process(root, cache, results):
    said = []
    dataset = load(root, cache, say=said.append)
    results.put((int(dataset.train.images.sum()), said))


def test_two_processes_that_need_the_same_cache_both_get_it(pictures, tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [
        context.Process(target=load_in_a_process, args=(pictures, tmp_path, results)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert found[0][0] == found[1][0] == int(load(pictures, tmp_path).train.images.sum())
    assert len(entries(tmp_path)) == 1
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_full_disk_is_an_error_and_leaves_nothing(pictures, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    load(pictures, tmp_path, storage="files")
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(
            DataError, match=rf"{os.strerror(errno.EFBIG)}. Free some space, .*--cache, .*--memory 0"
        ):
            load(pictures, tmp_path, storage="arrays")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert entries(tmp_path) == []
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_cache_where_a_file_lies_is_an_error(pictures, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot keep decoded images in .*--cache"):
        load(pictures, tmp_path / "file")


def test_what_does_not_fit_the_budget_streams(pictures, tmp_path):
    said = []
    dataset = load(pictures, tmp_path, memory=1000, say=said.append)
    assert isinstance(dataset.train, FileSet)
    assert dataset.storage == "files"
    assert any("decoded while training" in line for line in said)
    assert isinstance(load(pictures, tmp_path, memory=1000, storage="arrays").train, ImageSet)


def test_damaged_pictures_are_all_named_or_left_out(pictures, tmp_path):
    root = shutil.copytree(pictures, tmp_path / "data")
    whole = find_layout(root)
    cut, text = whole.train.names[0], whole.train.names[5]
    (root / cut).write_bytes((root / cut).read_bytes()[:300])
    (root / text).write_text("no picture")
    with pytest.raises(DataError, match=r"2 files cannot be decoded; .*--skip-damaged") as caught:
        load(root, tmp_path / "cache")
    assert len(caught.value.lines) == 3
    assert f"{root / cut}: it is cut short or damaged" in str(caught.value)
    assert f"{root / text}: it is no picture" in str(caught.value)
    for storage in ("arrays", "files"):
        said = []
        dataset = load(root, tmp_path / "cache", skip_damaged=True, storage=storage, say=said.append)
        assert len(dataset.train.labels) == len(whole.train.names) - 2
        assert "left out: 2 files that cannot be decoded (--skip-damaged)" in said


def test_a_class_that_is_all_damaged_is_an_error(pictures, tmp_path):
    root = shutil.copytree(pictures, tmp_path / "data")
    for path in (root / "train/class 0").rglob("*.*"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="no training image of the class 'class 0' can be decoded"):
        load(root, tmp_path / "cache", skip_damaged=True)


AUGMENTATIONS = [
    None,
    Augmentation("none"),
    Augmentation("crop", padding=2, flip=True),
    Augmentation("crop", padding=2, flip=True, jitter=0.4),
    Augmentation("resized-crop", flip=True, jitter=0.4, lighting=0.1),
]


@pytest.mark.parametrize("augmentation", AUGMENTATIONS, ids=str)
def test_both_loaders_of_files_give_the_same_bits(pictures, tmp_path, augmentation):
    pytest.importorskip("nvidia.dali")
    dataset = load(pictures, tmp_path, storage="files")
    for source in (dataset.train, replace(dataset.train, channels=1, direct=np.zeros(24, np.int8))):
        means = replace(dataset, mean=dataset.mean[: source.channels], std=dataset.std[: source.channels])
        loaders = [pipeline(source, means, loader, augmentation) for loader in ("torch", "dali")]
        for epoch in (0, 1):
            for (torchs, labels), (dalis, dali_labels) in zip(
                *(own.epoch(epoch) for own in loaders), strict=True
            ):
                assert torchs.is_contiguous(memory_format=torch.channels_last)
                assert torch.equal(torchs, dalis)
                assert torch.equal(labels, dali_labels)


@pytest.mark.parametrize("augmentation", [Augmentation("crop", 2, flip=True), None], ids=str)
def test_files_give_the_batches_of_arrays(pictures, tmp_path, loader, augmentation):
    files, arrays = (load(pictures, tmp_path, "crop", storage=storage) for storage in ("files", "arrays"))
    assert (files.mean, files.std) == (arrays.mean, arrays.std)
    streamed = pipeline(files.train, files, loader, augmentation)
    in_memory = pipeline(arrays.train, arrays, "torch", augmentation)
    for (one, labels), (other, others) in zip(streamed.epoch(2), in_memory.epoch(2), strict=True):
        assert torch.equal(one, other)
        assert torch.equal(labels, others)


def test_a_resized_crop_is_taken_from_the_whole_picture(pictures, tmp_path, loader):
    """Against the definition: the box in the decoded picture, resized by torchvision, mirrored and normalised."""
    from torchvision.transforms.v2 import functional

    from fastsnap.data.plan import Plan

    dataset = load(pictures, tmp_path, storage="files")
    source, augmentation = dataset.train, Augmentation("resized-crop", flip=True)
    images, _ = next(pipeline(source, dataset, loader, augmentation).epoch(1))
    batch = Plan(len(source.labels), 7, 3, augmentation, source.sizes).batch(1, 0)
    for image, index, box, flip in zip(images, batch.indices, batch.boxes, batch.flips, strict=True):
        pixels = torch.from_numpy(decode(source.root / source.names[index], 3, source.background)).permute(
            2, 0, 1
        )
        expected = functional.resized_crop(pixels.float(), *map(int, box), [24, 24], antialias=True)
        expected = expected.flip(2) if flip else expected
        mean, std = (torch.tensor(values)[:, None, None] for values in (dataset.mean, dataset.std))
        torch.testing.assert_close(image, (expected - mean) / std, rtol=0, atol=1e-4)


def test_a_streamed_epoch_can_be_left_and_resumed_to_the_bit(pictures, tmp_path, loader):
    dataset = load(pictures, tmp_path, storage="files")
    augmentation = Augmentation("resized-crop", flip=True, jitter=0.4, lighting=0.1)
    whole = list(pipeline(dataset.train, dataset, loader, augmentation).epoch(4))
    other = pipeline(dataset.train, dataset, loader, augmentation, threads=1)
    list(islice(other.epoch(0), 2))  # left early
    for first in (2, 1, 0, 2):
        for (images, labels), (right, right_labels) in zip(other.epoch(4, first), whole[first:], strict=True):
            assert torch.equal(images, right)
            assert torch.equal(labels, right_labels)


def changed(path):
    save(picture(33, 33), path.with_suffix(".jpg")).rename(path)


def shrunk(path):
    with path.open("r+b") as file:
        file.truncate(100)


@pytest.mark.parametrize(
    ("what", "message"), [(Path.unlink, "is gone"), (changed, "changed"), (shrunk, "changed: 100 bytes")]
)
def test_a_file_that_is_no_longer_what_was_checked_is_named(pictures, tmp_path, loader, what, message):
    root = shutil.copytree(pictures, tmp_path / "data")
    dataset = load(root, tmp_path / "cache", storage="files")
    own = pipeline(dataset.train, dataset, loader, Augmentation("resized-crop"), batch_size=24)
    path = root / dataset.train.names[3]
    what(path)
    with pytest.raises(DataError, match=message) as caught:
        list(own.epoch(0))
    assert str(path) in str(caught.value)
    assert "run the same command again" in str(caught.value)


def test_files_are_for_dali_where_it_is_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert choose_loader("auto", CPU, files=True) == "torch"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    assert choose_loader("auto", CPU, files=True) == "dali"
    assert choose_loader("auto", CPU) == "torch"


def test_no_thread_is_left_when_a_pipeline_is_dropped(pictures, tmp_path):
    import gc
    import threading

    dataset = load(pictures, tmp_path, storage="files")
    own = pipeline(dataset.train, dataset, "torch", Augmentation("resized-crop"))
    next(own.epoch(0))
    workers = [thread for thread in threading.enumerate() if thread.name.startswith("fastsnap-files")]
    assert workers
    del own
    gc.collect()
    for thread in workers:
        thread.join(timeout=30)
        assert not thread.is_alive()


@pytest.mark.gpu
@pytest.mark.parametrize("augmentation", AUGMENTATIONS, ids=str)
def test_files_on_the_gpu_give_about_the_batches_of_the_cpu(pictures, tmp_path, loader, augmentation):
    dataset = load(pictures, tmp_path, storage="files")
    options = {
        "batch_size": 7,
        "mean": dataset.mean,
        "std": dataset.std,
        "seed": 3,
        "augmentation": augmentation,
    }
    on_cpu, on_gpu = (
        make_pipeline(dataset.train, device=torch.device(device), loader=kind, **options)
        for device, kind in (("cpu", "torch"), ("cuda", loader))
    )
    # DALI's decoder on a GPU and its resize round otherwise; PyTorch's loader decodes on the CPU.
    most = 0.05 if loader == "dali" else 1e-5
    for (images, labels), (cuda_images, cuda_labels) in zip(on_cpu.epoch(1), on_gpu.epoch(1), strict=True):
        assert torch.equal(cuda_labels.cpu(), labels)
        assert (cuda_images.cpu() - images).abs().mean() < most


@pytest.mark.gpu
@pytest.mark.parametrize("augmentation", AUGMENTATIONS[1:], ids=str)
def test_arrays_on_the_gpu_give_the_batches_of_the_cpu(pictures, tmp_path, loader, augmentation):
    dataset = load(pictures, tmp_path, augmentation.kind, storage="arrays")
    options = {
        "batch_size": 7,
        "mean": dataset.mean,
        "std": dataset.std,
        "seed": 3,
        "augmentation": augmentation,
    }
    on_cpu, on_gpu = (
        make_pipeline(dataset.train, device=torch.device(device), loader=loader, **options)
        for device in ("cpu", "cuda")
    )
    for (images, labels), (cuda_images, cuda_labels) in zip(on_cpu.epoch(1), on_gpu.epoch(1), strict=True):
        torch.testing.assert_close(cuda_images.cpu(), images, rtol=0, atol=1e-3)
        assert torch.equal(cuda_labels.cpu(), labels)


def test_a_mapped_array_is_not_copied_into_memory(pictures, tmp_path):
    dataset = load(pictures, tmp_path, storage="arrays")
    images = dataset.train.images
    assert isinstance(images, np.memmap)
    own = pipeline(dataset.train, dataset, "torch", Augmentation("resized-crop"))
    next(own.epoch(0))
    addresses = {tensor.data_ptr() for tensor in vars(own).values() if isinstance(tensor, torch.Tensor)}
    assert images.ctypes.data in addresses

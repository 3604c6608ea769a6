"""Both pipelines against an image-by-image reference; what they share, and how they resume."""

import importlib.util
from itertools import islice

import numpy as np
import pytest
import torch

from fastsnap.data.draws import crops_and_flips, permutation
from fastsnap.data.pipeline import choose_loader, make_pipeline
from fastsnap.data.plan import training_steps
from fastsnap.data.sources import Augmentation, ImageSet

CPU = torch.device("cpu")
USUAL = Augmentation("crop", padding=4, flip=True)
MEAN, STD = (129.3, 124.1, 112.4), (68.2, 65.4, 70.4)


@pytest.fixture(params=["torch", "dali"])
def loader(request):
    if request.param == "dali":
        pytest.importorskip("nvidia.dali")
    return request.param


def random_images(count, height=8, width=8, channels=1):
    generator = np.random.default_rng(count)
    images = generator.integers(0, 256, (count, height, width, channels), dtype=np.uint8)
    return ImageSet(images, generator.integers(0, 10, count))


def numbered_images(count):
    """Image i, and its label, say i."""
    labels = np.arange(count)
    return ImageSet(np.broadcast_to(labels[:, None, None, None], (count, 8, 8, 1)).astype(np.uint8), labels)


def make(images, loader, device=CPU, **arguments):
    channels = images.images.shape[3]
    usual = {"mean": MEAN[:channels], "std": STD[:channels], "augmentation": USUAL}
    return make_pipeline(images, device=device, loader=loader, **usual | arguments)


def reference(images, seed, epoch, padding, flip):
    """The augmented images of an epoch [N, C, H, W], one after the other, by the definition."""
    count, height, width, channels = images.images.shape
    order = permutation(seed, epoch, count)
    offsets, flips = crops_and_flips(seed, epoch, count, padding, flip)
    mean, std = np.float32(MEAN[:channels]), np.float32(STD[:channels])
    result = []
    for i in order:
        image = (images.images[i].astype(np.float32) - mean) * (1 / std)
        image = image[:, ::-1] if flips[i] else image
        image = np.pad(image, [(padding, padding), (padding, padding), (0, 0)])
        row, column = offsets[i]
        result.append(image[row : row + height, column : column + width].transpose(2, 0, 1))
    return np.stack(result), images.labels[order]


def joined(batches):
    images, labels = zip(*batches, strict=True)
    return torch.cat(images).numpy(), torch.cat(labels).numpy()


@pytest.mark.parametrize("shape", [(8, 8, 1), (9, 13, 2), (32, 32, 3), (17, 8, 3)])
@pytest.mark.parametrize(("padding", "flip", "batch_size"), [(4, True, 16), (1, False, 7), (0, True, 100)])
def test_batches_follow_the_definition_exactly(loader, shape, padding, flip, batch_size):
    images = random_images(37, *shape)
    pipeline = make(
        images, loader, batch_size=batch_size, seed=5, augmentation=Augmentation("crop", padding, flip)
    )
    for epoch in (0, 3):
        batches = list(pipeline.epoch(epoch))
        assert len(batches) == pipeline.steps_per_epoch == training_steps(37, batch_size)
        for pixels, labels in batches:
            assert pixels.dtype == torch.float32
            assert labels.dtype == torch.int64
            assert pixels.is_contiguous(memory_format=torch.channels_last)
        pixels, labels = joined(batches)
        expected_pixels, expected_labels = reference(images, 5, epoch, padding, flip)
        assert np.array_equal(pixels, expected_pixels)
        assert np.array_equal(labels, expected_labels)


def test_padding_has_the_mean_colour(loader):
    """A black image is far from the mean, so its zeros are padding: (9 - |shift|) rows and columns remain."""
    images = ImageSet(np.zeros((50, 9, 9, 1), np.uint8), np.zeros(50, np.int64))
    pixels, _ = joined(
        make(images, loader, batch_size=50, augmentation=Augmentation("crop", 2, flip=True)).epoch(0)
    )
    shifts = np.abs(crops_and_flips(0, 0, 50, 2, True)[0] - 2)[permutation(0, 0, 50)]
    assert np.array_equal((pixels != 0).sum(axis=(1, 2, 3)), np.prod(9 - shifts, axis=1))


def test_every_image_comes_once_with_its_label(loader):
    pipeline = make(
        numbered_images(53), loader, batch_size=10, augmentation=Augmentation("crop", 0, flip=True)
    )
    sizes = []
    seen = []
    for pixels, labels in pipeline.epoch(2):
        numbers = (pixels[:, 0, 0, 0] * STD[0] + MEAN[0]).round()
        assert torch.equal(numbers.long(), labels)
        sizes.append(len(labels))
        seen += labels.tolist()
    assert sizes == [10, 10, 10, 10, 13]
    assert sorted(seen) == list(range(53))


@pytest.mark.parametrize("batch_size", [4, 10, 40, 10**12])
def test_the_batch_size_changes_no_image(loader, batch_size):
    """Also where the last batch of an epoch is larger than the others, and where there is but one."""
    images = random_images(41)
    pixels, labels = joined(make(images, loader, batch_size=batch_size).epoch(1))
    expected_pixels, expected_labels = reference(images, 0, 1, 4, True)
    assert np.array_equal(pixels, expected_pixels)
    assert np.array_equal(labels, expected_labels)


def test_evaluation_keeps_order_and_images(loader):
    images = random_images(21, channels=3)
    pipeline = make(images, loader, batch_size=8, augmentation=None)
    expected = (images.images.astype(np.float32) - np.float32(MEAN)) * (1 / np.float32(STD))
    for epoch in (0, 0, 5):
        pixels, labels = joined(pipeline.epoch(epoch))
        assert np.array_equal(pixels, expected.transpose(0, 3, 1, 2))
        assert np.array_equal(labels, images.labels)


def test_an_epoch_can_be_left_resumed_and_visited_again(loader):
    images = random_images(60)  # 8 batches, the last of 11 images
    pipeline = make(images, loader, batch_size=7)
    whole = {epoch: list(make(images, loader, batch_size=7).epoch(epoch)) for epoch in range(3)}

    def check(epoch, first_step, count):
        got = list(islice(pipeline.epoch(epoch, first_step), count))
        expected = whole[epoch][first_step : first_step + count]
        assert len(got) == len(expected)
        for (pixels, labels), (right_pixels, right_labels) in zip(got, expected, strict=True):
            assert torch.equal(pixels, right_pixels)
            assert torch.equal(labels, right_labels)

    check(0, 0, 2)  # left early
    check(0, 1, 3)  # one back, into what is prefetched
    check(0, 5, 99)  # a jump to the end, on into the next epoch
    check(1, 0, 99)
    check(1, 0, 99)  # the same again
    check(2, 7, 99)  # the last, larger batch alone
    check(0, 4, 1)
    check(2, 8, 99)  # nothing is left of it
    check(0, 5, 1)


def test_two_epochs_can_be_read_in_turns(loader):
    pipeline = make(random_images(30), loader, batch_size=7)
    expected = [joined(pipeline.epoch(epoch)) for epoch in (0, 1)]
    turns = list(zip(pipeline.epoch(0), pipeline.epoch(1), strict=True))
    for got, right in zip(zip(*turns, strict=True), expected, strict=True):
        pixels, labels = joined(got)
        assert np.array_equal(pixels, right[0])
        assert np.array_equal(labels, right[1])


def test_a_batch_is_never_overwritten(loader):
    """Whoever keeps batches, or writes into them, sees no later batch in them and spoils none."""
    pipeline = make(random_images(200), loader, batch_size=10)
    kept = list(pipeline.epoch(0))
    copies = [pixels.clone() for pixels, _ in kept]
    for pixels, labels in pipeline.epoch(1):
        pixels.fill_(-99)
        labels.fill_(-99)
    for (pixels, _), copy in zip(kept, copies, strict=True):
        assert torch.equal(pixels, copy)
    again = [pixels for pixels, _ in pipeline.epoch(0)]
    assert torch.equal(torch.cat(again), torch.cat(copies))


@pytest.mark.parametrize("first_step", [-1, 4])
def test_first_step_out_of_range_is_an_error(loader, first_step):
    pipeline = make(random_images(30), loader, batch_size=10)
    with pytest.raises(ValueError, match=f"between 0 and 3, got {first_step}"):
        next(pipeline.epoch(0, first_step))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch size must be at least 1, got 0"),
        ({"augmentation": Augmentation("crop", padding=-1)}, "padding must be at least 0 pixels, got -1"),
        ({"mean": (1.0, 2.0)}, "one value for each of the 1 channels"),
        ({"std": (0.0,)}, "std above 0"),
        ({"loader": "dalli"}, "one of auto, dali, torch, got 'dalli'"),
        ({"seed": -1}, "seed must be between"),
        ({"images": ImageSet(np.zeros((2, 8, 8, 1)), np.zeros(2, np.int64))}, "images should be uint8"),
        ({"images": ImageSet(np.zeros((0, 8, 8, 1), np.uint8), np.zeros(0, np.int64))}, "images should be"),
        ({"images": ImageSet(np.zeros((2, 8, 8, 1), np.uint8), np.zeros(3, np.int64))}, r"int64 \[2\], got"),
    ],
)
def test_arguments_that_do_not_fit_are_errors(arguments, message):
    usual = {"images": random_images(3), "batch_size": 2, "mean": (1.0,), "std": (1.0,), "device": CPU}
    usual["augmentation"] = USUAL
    images, *_ = (usual | arguments).values()
    rest = {name: value for name, value in (usual | arguments).items() if name != "images"}
    with pytest.raises(ValueError, match=message):
        next(make_pipeline(images, **rest).epoch(0))


def test_without_dali_the_error_names_the_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"nvidia-dali-cuda130.*--loader torch"):
        make(random_images(3), "dali", batch_size=2)


def test_auto_is_the_pytorch_pipeline_on_a_cpu():
    assert (
        make(random_images(3), "auto", batch_size=2).name
        == choose_loader("auto", torch.device("cpu"))
        == "torch"
    )


@pytest.mark.gpu
def test_pipelines_on_the_gpu_give_the_batches_of_the_cpu(loader):
    images = random_images(100, 32, 32, 3)
    cuda = torch.device("cuda")
    on_cpu, on_gpu = (make(images, loader, device, batch_size=16) for device in (CPU, cuda))
    for epoch, first_step in ((0, 0), (2, 3), (1, 0)):
        batches = zip(on_cpu.epoch(epoch, first_step), on_gpu.epoch(epoch, first_step), strict=True)
        for (pixels, labels), (cuda_pixels, cuda_labels) in batches:
            assert cuda_pixels.is_contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(cuda_pixels.cpu(), pixels, rtol=0, atol=1e-6)
            assert torch.equal(cuda_labels.cpu(), labels)


def test_other_defaults_of_torch_change_nothing():
    images = random_images(7, channels=3)
    options = {"loader": "torch", "batch_size": 3, "seed": 1}
    expected = list(make(images, **options).epoch(0))
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        found = list(make(images, **options).epoch(0))
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_an_evaluation_sees_the_centre_of_larger_images(loader: str) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 11, 11, 3), dtype=np.uint8)
    larger = ImageSet(images, np.arange(5), size=8)
    options = {
        "batch_size": 2,
        "mean": (1.0, 2.0, 3.0),
        "std": (2.0, 2.0, 2.0),
        "device": torch.device("cpu"),
    }
    found = torch.cat([batch for batch, _ in make_pipeline(larger, loader=loader, **options).epoch(0)])
    centres = ImageSet(np.ascontiguousarray(images[:, 2:10, 2:10]), np.arange(5))
    expected = torch.cat([batch for batch, _ in make_pipeline(centres, loader=loader, **options).epoch(0)])
    assert torch.equal(found, expected)

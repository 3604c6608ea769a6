"""Batches of images on the device: uint8 arrays in memory -> normalised, augmented float32, channels-last.

Two pipelines give the same batches, on the CPU bit for bit: PyTorch's (torch_pipeline.py) and DALI's
(dali_pipeline.py). Which images come when, and how each is cropped and flipped, is decided by `plan.Plan` alone.
"""

import importlib.util
from collections.abc import Sequence

import numpy as np
import torch

from fastsnap.data.plan import Pipeline, Plan
from fastsnap.data.sources import Augmentation, FileSet, ImageSet, Source
from fastsnap.data.torch_files import TorchFiles
from fastsnap.data.torch_pipeline import TorchPipeline

LOADERS = ("auto", "dali", "torch")


def choose_loader(loader: str, device: torch.device, *, files: bool = False) -> str:
    """Which pipeline `loader` means, "dali" or "torch"; "auto" is what is faster on `device`.

    For images in memory, on a CPU that is PyTorch: it takes a third of DALI's time from the cores that train, and
    starts sooner. On a GPU it is DALI, where it is installed; for images in files also on a CPU, where it decodes less.
    Raises ValueError for another loader, and for "dali" where it is not installed.
    """
    if loader not in LOADERS:
        raise ValueError(f"loader must be one of {', '.join(LOADERS)}, got {loader!r}")
    installed = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")
    if loader == "dali" and not installed:
        raise ValueError(
            "loader dali needs NVIDIA DALI: pip install nvidia-dali-cuda130 (or -cuda120, to match torch's CUDA; the "
            "package nvidia-dali only raises). --loader torch gives the same batches without it"
        )
    if loader == "auto":
        return "dali" if installed and (files or device.type == "cuda") else "torch"
    return loader


def make_pipeline(
    images: Source,
    *,
    batch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
    seed: int = 0,
    augmentation: Augmentation | None = None,
    loader: str = "auto",
    threads: int | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> Pipeline:
    """The pipeline over `images` that `loader` asks for.

    mean, std     per channel, in the images' units (0 to 255)
    augmentation  of training; None gives the images in their order, only normalised (evaluation)
    loader        see choose_loader
    threads       that decode files; default: PyTorch's number
    rank, ranks   of `ranks` that share each batch, the one that this pipeline is for: see plan.Plan

    Raises ValueError for arguments that do not fit the images, and for "dali" without DALI.
    """
    require_batch_size(batch_size)
    if isinstance(images, FileSet):
        plan = Plan(len(images.labels), batch_size, seed, augmentation, images.sizes, rank=rank, ranks=ranks)
        return _files_pipeline(images, plan, mean, std, device, loader, threads)
    _check(images, mean, std, augmentation.padding if augmentation else 0)
    if augmentation is None:
        images = _centres(images)
    sizes = np.broadcast_to(np.array(images.images.shape[1:3], np.int32), (len(images.labels), 2))
    plan = Plan(len(images.labels), batch_size, seed, augmentation, sizes, rank=rank, ranks=ranks)
    if choose_loader(loader, device) == "torch":
        return TorchPipeline(images, plan, mean, std, device)
    from fastsnap.data.dali_pipeline import DaliPipeline  # here, since DALI need not be installed

    return DaliPipeline(images, plan, mean, std, device)


def _files_pipeline(
    files: FileSet,
    plan: Plan,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
    loader: str,
    threads: int | None,
) -> Pipeline:
    threads = threads or torch.get_num_threads()
    if choose_loader(loader, device, files=True) == "torch":
        return TorchFiles(files, plan, mean, std, device, threads)
    from fastsnap.data.dali_files import DaliFiles  # here, since DALI need not be installed

    return DaliFiles(files, plan, mean, std, device, threads)


def require_batch_size(batch_size: int) -> None:
    """Raise ValueError for less than one image."""
    if batch_size < 1:
        raise ValueError(f"batch size must be at least 1, got {batch_size}")


def _centres(images: ImageSet) -> ImageSet:
    """The centre of each image that is larger than a network sees, as of held-out images of resized crops."""
    height, width, _ = images.shape
    own_height, own_width = images.images.shape[1:3]
    top, left = max(0, round((own_height - height) / 2)), max(0, round((own_width - width) / 2))
    if not top and not left:
        return images
    centres = images.images[:, top : top + height, left : left + width]
    return ImageSet(np.ascontiguousarray(centres), images.labels)


def _check(images: ImageSet, mean: Sequence[float], std: Sequence[float], padding: int) -> None:
    shape = images.images.shape
    if images.images.dtype != np.uint8 or len(shape) != 4 or 0 in shape:
        raise ValueError(f"images should be uint8 [N, H, W, C], got {images.images.dtype} {list(shape)}")
    if images.labels.dtype != np.int64 or images.labels.shape != shape[:1]:
        raise ValueError(
            f"labels should be int64 [{shape[0]}], got {images.labels.dtype} {list(images.labels.shape)}"
        )
    if padding < 0:
        raise ValueError(f"padding must be at least 0 pixels, got {padding}")
    if not len(mean) == len(std) == shape[3] or min(std) <= 0:
        raise ValueError(
            f"mean and std need one value for each of the {shape[3]} channels, and std above 0, "
            f"got {list(mean)} and {list(std)}"
        )

"""Folders of pictures as PyTorch's ImageNet example reads them: torchvision's ImageFolder in a DataLoader."""

import warnings
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def make_folder_loader(folder: Path, size: int, batch_size: int, workers: int, jitter: float) -> DataLoader:
    """A shuffling DataLoader over the classes in `folder`: random resized crops of `size` pixels, mirrored, normalised.

    jitter  of colour; 0: none, and so less work than the project does
    """
    warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores are tried too
    colour = [v2.ColorJitter(jitter, jitter, jitter)] if jitter else []
    crop = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]
    tensor = [
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
    ]
    return DataLoader(
        ImageFolder(str(folder), v2.Compose([*crop, *colour, *tensor])),
        batch_size=batch_size,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        multiprocessing_context="fork" if workers else None,
    )

"""The input that PyTorch's tutorials teach: torchvision's transforms, image by image, in a DataLoader."""

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from fastsnap.data import datasets
from fastsnap.data.sources import ImageSet
from harness.task import Task, load_images


class TransformedImages(Dataset):
    """Training images, augmented as the project augments them; the padding has the mean colour to the nearest integer.

    PIL images, as torchvision's own data sets give them; tensors and transforms.v2 measured no faster.
    """

    def __init__(self, dataset: datasets.Dataset) -> None:
        assert isinstance(dataset.train, ImageSet)
        self.images, self.labels = dataset.train.images, dataset.train.labels.tolist()
        self.classes = dataset.classes  # torchensemble would otherwise count them in a pass over the data
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(
                    self.images.shape[1],
                    padding=dataset.augmentation.padding,
                    fill=tuple(round(value) for value in dataset.mean),
                ),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(
                    [value / 255 for value in dataset.mean], [value / 255 for value in dataset.std]
                ),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def make_loader(task: Task) -> DataLoader:
    """A shuffling DataLoader over the training images, with as many workers as the task says."""
    return DataLoader(
        TransformedImages(load_images(task.data)),
        batch_size=task.batch_size,
        shuffle=True,
        num_workers=task.workers,
        persistent_workers=task.workers > 0,
        pin_memory=task.device == "cuda",
        multiprocessing_context="fork" if task.workers else None,
        generator=torch.Generator().manual_seed(0),
    )

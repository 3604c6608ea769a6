"""Data sets that are folders of pictures: the user's own, Tiny ImageNet, ImageNet."""

from pathlib import Path

from fastsnap.data.archives import DataError
from fastsnap.data.layouts import Layout, describe, find_layout
from fastsnap.data.pictures import Wishes, load_pictures
from fastsnap.data.sources import JITTER, LIGHTING, PADDING, Augmentation, Dataset, augmentation_of

FOLDERS = ("tiny-imagenet", "imagenet", "folder")
USUAL = {  # REFERENCE: the authors' code; their Tiny ImageNet has crops, mirror images and colour jitter
    "tiny-imagenet": Augmentation("crop", padding=PADDING, flip=True, jitter=JITTER),
    "imagenet": Augmentation("resized-crop", flip=True, jitter=JITTER, lighting=LIGHTING),
    "folder": Augmentation("resized-crop", flip=True, jitter=JITTER, lighting=LIGHTING),
}
PUBLISHED_CLASSES = {"tiny-imagenet": 200, "imagenet": 1000}
BY_HAND = {
    "tiny-imagenet": "unpack http://cs231n.stanford.edu/tiny-imagenet-200.zip in {folder}",
    "imagenet": "get its archives from https://image-net.org, put them in {folder}, and unpack them with "
    "torchvision.datasets.ImageNet({folder!r}, split) for the splits 'train' and 'val'",
}


def load_folder(name: str, folder: Path, augment: str | None, wishes: Wishes) -> Dataset:
    """The data set `name` from the pictures in `folder`. Raises DataError for what cannot be trained on."""
    layout = _layout(name, folder)
    for line in describe(layout):
        wishes.say(line)
    published = PUBLISHED_CLASSES.get(name)
    if published and len(layout.classes) != published:
        wishes.say(f"{len(layout.classes):,} of the {published:,} classes of {name}")
    augmentation = augmentation_of(augment, USUAL[name])
    found = load_pictures(layout, augmentation.kind, wishes)
    return Dataset(
        name=name,
        train=found.train,
        validation=None,
        test=found.test,
        classes=layout.classes,
        mean=found.mean,
        std=found.std,
        augmentation=augmentation,
        source=f"{layout.root}: {layout.kind}",
        resize=found.resize,
        storage=found.storage,
        background=found.background,
    )


def _layout(name: str, folder: Path) -> Layout:
    if name == "folder":
        return find_layout(folder)
    kind = {"tiny-imagenet": "Tiny ImageNet", "imagenet": "ImageNet"}[name]
    packed = [file.name for file in sorted(folder.glob("*.tar"))] if name == "imagenet" else []
    try:
        layout = find_layout(folder)
        reason = f"{folder} has {layout.kind}"
    except DataError as error:
        layout, reason = None, str(error)
    # ImageNet without meta.bin is train/ and val/ folders of identifiers.
    if layout is None or (
        layout.kind != kind and not (name == "imagenet" and layout.kind.startswith("train/"))
    ):
        packed_text = f", only the archives {', '.join(packed)}" if packed else ""
        how = BY_HAND[name].format(folder=str(folder))
        raise DataError(f"{kind} was not found ({reason}{packed_text}). It is not downloaded: {how}")
    return layout

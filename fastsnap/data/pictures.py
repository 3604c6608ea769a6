"""A folder of pictures -> what training takes: arrays in memory where they fit, else files that are decoded as needed.

Every picture is decoded once before the first step, whatever comes of it, so that a damaged one is named now and not
after hours; the channels' mean and deviation come from the same pass. What it finds is kept in the cache.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastsnap.data import cache
from fastsnap.data.archives import DataError
from fastsnap.data.decoded import Decoding, Form, Split
from fastsnap.data.layouts import Layout
from fastsnap.data.sources import FileSet, ImageSet, Source
from fastsnap.data.survey import describe_sizes, stamps, survey, usual_size
from fastsnap.limits import choose_threads, format_bytes, usual_budget

ARRAYS, FILES = "arrays", "files"  # the kinds of storage
TEST_SCALE = 256 / 224  # shorter side to size, before the centre crop of a test image of resized-crop
GREY = 128  # behind transparent pixels where no training image is opaque
SURVEYED = ("sizes", "coloured", "transparent", "direct")  # what is kept of a survey
SMALL_FILE = 2**14  # bytes; 64x64 pixels have 2,000
SHOWN = 20  # damaged images that an error names
Say = Callable[[str], None]
OnProgress = Callable[[str, int, int], None]  # what is done, how much of it, of how much


@dataclass(frozen=True)
class Wishes:
    """How the pictures of a folder are to be read.

    image_size    pixels of the side of the square that a network sees; None: the median shorter side, at most 224
    storage       "arrays", "files" or None: arrays where they take at most `memory` bytes
    cache         folder of the cache; None: the user's
    skip_damaged  leave damaged pictures out instead of an error
    threads       that decode
    say           told what the user should know, line by line
    on_progress   told what is done, how many, of how many
    """

    image_size: int | None = None
    storage: str | None = None
    memory: int = field(default_factory=usual_budget)
    cache: str | None = None
    skip_damaged: bool = False
    threads: int = field(default_factory=lambda: choose_threads(None).count)
    say: Say = lambda text: None
    on_progress: OnProgress = lambda what, done, total: None


@dataclass(frozen=True)
class Pictures:
    """Both splits of a folder, and what was found in the training images."""

    train: Source
    test: Source
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: int
    storage: str
    background: tuple[int, ...]


def load_pictures(layout: Layout, augment: str, wishes: Wishes) -> Pictures:
    """Both splits for training with the augmentation of this kind.

    Raises DataError for damaged pictures, all of them in one list, unless they are to be skipped."""
    train, test, coloured = _surveyed(layout, wishes)
    readable = train.sizes[train.sizes[:, 0] > 0]
    if not len(readable):
        raise DataError(
            f"{layout.root} has no training image that can be read, only files that are called so"
        )
    channels = 3 if coloured else 1
    wishes.say(f"images are {describe_sizes(readable)}, {'coloured' if coloured else 'grey'}")
    size = wishes.image_size or usual_size(readable)
    resize = round(size * TEST_SCALE) if augment == "resized-crop" else size
    forms = (_training_form(readable, size, resize, channels, augment), Form(resize, size, channels))
    needed = sum(
        len(split.names) * int(np.prod(form.shape(split)))
        for split, form in zip((train, test), forms, strict=True)
    )
    storage = wishes.storage or (ARRAYS if needed <= wishes.memory else FILES)
    entry = _decoded(layout, (train, test), forms, storage, wishes)
    _say_what(entry, size, storage, needed, wishes)
    _require_whole(entry.facts["damaged"], wishes)
    sources = [
        _source(layout, split, entry, part, storage, size, resize, channels)
        for part, split in (("train", train), ("test", test))
    ]
    _require_classes(layout, *sources)
    facts = entry.facts
    return Pictures(
        sources[0],
        sources[1],
        mean=tuple(facts["mean"]),
        std=tuple(facts["std"]),
        resize=resize,
        storage=storage,
        background=tuple(facts["background"]),
    )


def _surveyed(layout: Layout, wishes: Wishes) -> tuple[Split, Split, bool]:
    """Both splits, and whether any training image has colours."""
    parts = {"train": layout.train, "test": layout.test}
    own_stamps = {name: stamps(layout.root, part.names) for name, part in parts.items()}
    key = cache.key_of(
        str(layout.root.resolve()), layout.train.names, layout.test.names, *own_stamps.values()
    )

    def make(maker: cache.Maker) -> dict[str, Any]:
        count = _Counter(
            "reading headers", sum(len(part.names) for part in parts.values()), wishes.on_progress
        )
        for name, part in parts.items():
            found = survey(layout.root, part.names, _threads(own_stamps[name], wishes), count)
            for kind in SURVEYED:
                values = getattr(found, kind)
                maker.array(f"{kind}-{name}", values.shape, values.dtype)[:] = values
        return {}

    needs = [f"{kind}-{name}" for kind in SURVEYED for name in parts]
    arrays = cache.open_or_make(
        cache.cache_folder(wishes.cache), f"headers-{key}", needs, make, wishes.say
    ).arrays
    splits = [
        Split(
            part.names,
            part.labels,
            stamps=own_stamps[name],
            **{kind: np.array(arrays[f"{kind}-{name}"]) for kind in SURVEYED},
        )
        for name, part in parts.items()
    ]
    return splits[0], splits[1], bool(splits[0].coloured.any())


def _threads(file_stamps: NDArray[np.int64], wishes: Wishes) -> int:
    """Small files are decoded in less time than threads take to hand Python over to each other."""
    return 1 if len(file_stamps) and file_stamps[:, 0].mean() < SMALL_FILE else wishes.threads


class _Counter:
    """Adds up what is done of a total, for a progress bar."""

    def __init__(self, what: str, total: int, on_progress: OnProgress) -> None:
        self._what, self._total, self._on_progress, self._done = what, total, on_progress, 0

    def __call__(self, more: int) -> None:
        self._done += more
        self._on_progress(self._what, self._done, self._total)


def _training_form(sizes: NDArray[np.int32], size: int, resize: int, channels: int, augment: str) -> Form:
    """Of arrays. Random crops of a part of the image want more pixels than a network sees; where there are not so many,
    and all images have one size, they are kept as they are.
    """
    if augment != "resized-crop":
        return Form(size, size, channels)
    one_size = bool((sizes == sizes[0]).all())
    return Form(resize, None if one_size and sizes[0].max() <= resize else resize, channels)


def _decoded(
    layout: Layout, splits: tuple[Split, Split], forms: tuple[Form, Form], storage: str, wishes: Wishes
) -> cache.Entry:
    """Every picture decoded once: masks kept-train and kept-test, facts and, for arrays, the pictures themselves."""
    key = cache.key_of(
        str(layout.root.resolve()),
        *(split.names for split in splits),
        *(split.stamps for split in splits),
        forms,
        storage,
    )

    def make(maker: cache.Maker) -> dict[str, Any]:
        count = _Counter("decoding", sum(len(split.names) for split in splits), wishes.on_progress)
        work = [
            Decoding(
                layout.root,
                split,
                form,
                maker,
                part,
                storage == ARRAYS,
                _threads(split.stamps, wishes),
                count,
            )
            for split, form, part in zip(splits, forms, ("train", "test"), strict=True)
        ]
        for decoding in work:
            decoding.run(~decoding.split.transparent, (GREY,) * forms[0].channels)
        background = work[0].mean(GREY)
        for decoding in work:
            decoding.run(decoding.split.transparent, background)
        mean, std = work[0].statistics()
        damaged = [reason for decoding in work for _, reason in sorted(decoding.damaged.items())]
        return {"mean": mean, "std": std, "background": background, "damaged": damaged}

    needs = ["kept-train", "kept-test", *(("train", "test") if storage == ARRAYS else ())]
    return cache.open_or_make(cache.cache_folder(wishes.cache), f"{storage}-{key}", needs, make, wishes.say)


def _say_what(entry: cache.Entry, size: int, storage: str, needed: int, wishes: Wishes) -> None:
    why = (
        "as asked for"
        if wishes.image_size
        else "the median shorter side, at most 224; --image-size asks for another"
    )
    wishes.say(f"image size {size} pixels ({why})")
    folder = cache.cache_folder(wishes.cache)
    if storage == ARRAYS:
        wishes.say(f"decoded once: {format_bytes(needed)} in {folder}")
    else:
        wishes.say(
            f"decoded while training: {format_bytes(needed)} are more than --memory {format_bytes(wishes.memory)}"
            if needed > wishes.memory
            else "decoded while training, as this run began"
        )


def _require_whole(damaged: Sequence[str], wishes: Wishes) -> None:
    """Raise DataError naming what cannot be decoded, or say it where it is to be skipped."""
    if not damaged:
        return
    shown = list(damaged[:SHOWN]) + ([f"and {len(damaged) - SHOWN:,} more"] if len(damaged) > SHOWN else [])
    if not wishes.skip_damaged:
        raise DataError(
            f"{len(damaged):,} files cannot be decoded; mend or remove them, or leave them out with --skip-damaged:",
            shown,
        )
    wishes.say(f"left out: {len(damaged):,} files that cannot be decoded (--skip-damaged)")
    for line in shown:
        wishes.say(f"  {line}")


def _source(
    layout: Layout,
    split: Split,
    entry: cache.Entry,
    part: str,
    storage: str,
    size: int,
    resize: int,
    channels: int,
) -> Source:
    kept = np.array(entry.arrays[f"kept-{part}"])
    if storage == ARRAYS:
        images = entry.arrays[part]
        own = None if images.shape[1:3] == (size, size) else size
        source: Source = ImageSet(images, split.labels, own)
    else:
        source = FileSet(
            layout.root,
            split.names,
            split.labels,
            split.sizes,
            split.stamps,
            np.where(split.coloured & (channels == 1), 0, split.direct).astype(np.int8),
            size,
            resize,
            channels,
            tuple(entry.facts["background"]),
        )
    return source if kept.all() else source.subset(kept)  # of arrays, a copy in memory


def _require_classes(layout: Layout, train: Source, test: Source) -> None:
    counts = np.bincount(train.labels, minlength=len(layout.classes))
    if counts.min() == 0:
        name = layout.classes[int(counts.argmin())]
        raise DataError(
            f"no training image of the class {name!r} can be decoded: mend some, or remove the folder"
        )
    if not len(test.labels):
        raise DataError("no test image can be decoded: mend some")

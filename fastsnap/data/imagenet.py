"""What is particular about ImageNet's and Tiny ImageNet's folders: identifiers for classes, and lists of names."""

import pickle
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from fastsnap.data.archives import DataError
from fastsnap.data.listing import list_folder, list_images

PUBLISHED_FOLDER = "tiny-imagenet-200"
ANNOTATIONS = "val/val_annotations.txt"
LARGEST_TEXT = 2**25  # bytes; the published words.txt has 2.6 million
LARGEST_META = 2**25
UNLABELLED = "images without a label (test/)"
UNANNOTATED = "validation images without an annotation"


@dataclass(frozen=True)
class TinyImageNet:
    """Tiny ImageNet's files: names relative to `root`, and labels into `classes`."""

    root: Path
    classes: tuple[str, ...]
    train: tuple[list[str], list[int]]
    test: tuple[list[str], list[int]]
    left_out: dict[str, int]


def find_tiny_imagenet(root: Path) -> TinyImageNet | None:
    """What `root`, or tiny-imagenet-200 in it, holds, if that is laid out as Tiny ImageNet is published.

    Raises DataError, naming file and line, for annotations that do not fit the folders.
    """
    for place in (root, root / PUBLISHED_FOLDER):
        if (place / ANNOTATIONS).is_file() and (place / "train").is_dir():
            return _read_tiny_imagenet(place)
    return None


def class_names_of_imagenet(root: Path, identifiers: tuple[str, ...]) -> tuple[str, ...] | None:
    """The classes' names, from torchvision's meta.bin; None without one. Raises DataError for a damaged one."""
    path = root / "meta.bin"
    if not path.is_file():
        return None
    import torch

    try:
        if path.stat().st_size > LARGEST_META:
            raise ValueError(f"{path.stat().st_size:,} bytes are too many")
        words = torch.load(path, weights_only=True)[0]
        names = {name: ", ".join(map(str, words[name])) for name in identifiers}
    except (
        OSError,
        ValueError,
        TypeError,
        LookupError,
        RuntimeError,
        EOFError,
        pickle.UnpicklingError,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{path} does not name the classes of {root}/train ({reason}): make it anew with "
            "torchvision.datasets.ImageNet, or remove it; the classes then have their folders' names"
        ) from error
    return _distinct([names[identifier] for identifier in identifiers], identifiers)


def _read_tiny_imagenet(root: Path) -> TinyImageNet:
    found = list_folder(root / "train", "train/")
    left_out = found.left_out
    identifiers = found.classes
    numbers = {name: number for number, name in enumerate(identifiers)}
    pictures = list_images(root / "val" / "images", "val/images/", left_out)
    labels = _annotated(root / ANNOTATIONS, numbers, set(pictures))
    left_out[UNANNOTATED] += len(pictures) - len(labels)
    if (root / "test").is_dir():
        left_out[UNLABELLED] += len(list_images(root / "test", "test/", Counter()))
    kept = [name for name in pictures if name in labels]
    return TinyImageNet(
        root,
        _titles(root / "words.txt", identifiers),
        (found.names, found.labels.tolist()),
        (kept, [labels[name] for name in kept]),
        {reason: count for reason, count in left_out.items() if count},
    )


def _annotated(path: Path, numbers: dict[str, int], pictures: set[str]) -> dict[str, int]:
    """Name -> label, of the lines "file<tab>class<tab>...": every line must have its picture and its class."""
    labels: dict[str, int] = {}
    for line, text in enumerate(_lines(path), start=1):
        if not text.strip():
            continue
        file, _, rest = text.partition("\t")
        identifier, name = rest.split("\t")[0].strip(), f"val/images/{file}"
        if not identifier:
            raise DataError(
                f"{path}, line {line}: should be a file's name, a tab and a class, got {text[:80]!r}"
            )
        if identifier not in numbers:
            raise DataError(
                f"{path}, line {line}: {identifier!r} has no folder in train/: remove the line, or add the folder"
            )
        if name not in pictures:
            raise DataError(
                f"{path}, line {line}: there is no picture {name}: get the folder again, or remove the line"
            )
        if labels.setdefault(name, numbers[identifier]) != numbers[identifier]:
            raise DataError(
                f"{path}, line {line}: {file} has another class in an earlier line: remove one of them"
            )
    return labels


def _titles(path: Path, identifiers: tuple[str, ...]) -> tuple[str, ...]:
    """Names from words.txt, "n01443537<tab>goldfish, Carassius auratus"; the identifier where there is none."""
    if not path.is_file():
        return identifiers
    wanted = set(identifiers)
    words = dict(
        (identifier, name.strip())
        for identifier, tab, name in (line.partition("\t") for line in _lines(path))
        if tab and identifier in wanted
    )
    return _distinct([words.get(identifier) or identifier for identifier in identifiers], identifiers)


def _distinct(names: list[str], identifiers: tuple[str, ...]) -> tuple[str, ...]:
    """Names that come twice (ImageNet has two cranes) get their identifier behind them."""
    often = Counter(names)
    pairs = zip(names, identifiers, strict=True)
    return tuple(f"{name} ({identifier})" if often[name] > 1 else name for name, identifier in pairs)


def _lines(path: Path) -> list[str]:
    try:
        if path.stat().st_size > LARGEST_TEXT:
            raise DataError(f"{path} is too large to be a list of names: get it again")
        return path.read_text("utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; make it readable") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8: get it again") from error

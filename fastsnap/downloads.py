"""Where the files of a published data set are looked for, and how they are fetched and verified."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from .archives import DataError

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist


@dataclass(frozen=True)
class Publication:
    """A data set as published. `md5` are torchvision's checksums of the files after unpacking, by file name."""

    title: str
    subfolder: str  # torchvision's, below the folder of data sets
    md5: dict[str, str]
    elsewhere: tuple[Path, ...]  # further folders to look in
    by_hand: str  # how to get the files without this program
    download: Callable[
        [Path], None
    ]  # into a folder of data sets; through torchvision, which verifies before unpacking


def _download_cifar10(folder: Path) -> None:
    from torchvision.datasets import CIFAR10 as published  # here: importing torchvision takes seconds
    from torchvision.datasets.utils import download_and_extract_archive

    download_and_extract_archive(
        published.url, str(folder), filename=published.filename, md5=published.tgz_md5
    )


def _download_cifar100(folder: Path) -> None:
    from torchvision.datasets import CIFAR100 as published
    from torchvision.datasets.utils import download_and_extract_archive

    download_and_extract_archive(
        published.url, str(folder), filename=published.filename, md5=published.tgz_md5
    )


def _download_fashion_mnist(folder: Path) -> None:
    from torchvision.datasets import FashionMNIST as published
    from torchvision.datasets.utils import download_url

    for filename, md5 in published.resources:  # stay packed: the reader unpacks them
        download_url(published.mirrors[0] + filename, str(folder / "FashionMNIST" / "raw"), filename, md5)


PUBLICATIONS = {
    "cifar10": Publication(
        title="CIFAR-10",
        subfolder="cifar-10-batches-py",
        md5={
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            "test_batch": "40351d587109b95175f43aff81a1287e",
            "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
        },
        elsewhere=(),
        by_hand="unpack https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz there",
        download=_download_cifar10,
    ),
    "cifar100": Publication(
        title="CIFAR-100",
        subfolder="cifar-100-python",
        md5={
            "train": "16019d7e3df5f24257cddd939b257f8d",
            "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
            "meta": "7973b15100ade9c7d40fb424638fde48",
        },
        elsewhere=(),
        by_hand="unpack https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz there",
        download=_download_cifar100,
    ),
    "fashion-mnist": Publication(
        title="Fashion-MNIST",
        subfolder="FashionMNIST/raw",
        md5={
            "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
            "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
            "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
        },
        elsewhere=(DEBIAN_FOLDER,),
        by_hand="put the four *-ubyte.gz files of https://github.com/zalandoresearch/fashion-mnist there, "
        "or on Debian and Ubuntu: apt-get install dataset-fashion-mnist",
        download=_download_fashion_mnist,
    ),
}


def locate(name: str, folder: Path, download: bool) -> tuple[dict[str, Path], str]:
    """The files of data set `name` by published name, and a line that says where they came from.

    Looks in torchvision's layout below `folder`, in `folder` itself and in the system's folders; then downloads if it
    may. A file may lack its .gz. Raises DataError if nothing is found and nothing can be downloaded.
    """
    publication = PUBLICATIONS[name]
    places = [folder / publication.subfolder, folder, *publication.elsewhere]
    for place in places:
        files = _files_in(place, publication.md5)
        if files:
            return files, f"{place}: {_verdict(files, publication.md5)}"
    reason = _fetch(publication, folder) if download else "downloading was not allowed"
    files = _files_in(places[0], publication.md5)
    if reason or not files:
        looked = ", ".join(str(place) for place in places)
        raise DataError(
            f"{publication.title} was not found in {looked}, and could not be downloaded: {reason}. By hand: "
            f"{publication.by_hand} ({places[0]}). The data set digits needs no files: --dataset digits"
        )
    return files, f"{places[0]}: downloaded, {_verdict(files, publication.md5)}"


def _files_in(place: Path, names: Iterable[str]) -> dict[str, Path] | None:
    """The path of each file, or None unless all of them are in `place`."""
    found = {}
    for name in names:
        candidates = [path for path in (place / name, place / name.removesuffix(".gz")) if path.is_file()]
        if not candidates:
            return None
        found[name] = candidates[0]
    return found


def _verdict(files: dict[str, Path], md5: dict[str, str]) -> str:
    """Whether the files are the published ones, byte for byte."""
    if all(path.name == name and _md5(path) == md5[name] for name, path in files.items()):
        return "the published checksums hold"
    return "a local copy, not the published files byte for byte (shapes, counts and labels are checked)"


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _fetch(publication: Publication, folder: Path) -> str:
    """Download into `folder`, whole or not at all; returns why it failed, "" if it did not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix="download-") as temporary:
            publication.download(Path(temporary))
            target = folder / publication.subfolder
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(Path(temporary) / publication.subfolder, target)
    except (
        OSError,
        RuntimeError,
    ) as error:  # torchvision raises RuntimeError when the checksum does not hold
        return str(error)
    return ""

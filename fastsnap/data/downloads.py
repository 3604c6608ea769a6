"""Where the files of a published data set are looked for, and how they are fetched and verified."""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from fastsnap.data.archives import DataError
from fastsnap.data.packed import unpack

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist


@dataclass(frozen=True)
class Publication:
    """A data set as its authors published it, in torchvision's layout."""

    title: str
    subfolder: str  # below the folder of data sets
    md5: dict[str, str]  # torchvision's checksums by file name, the smallest file first
    elsewhere: tuple[Path, ...]  # further folders to look in
    archive: str | None  # the file that holds them all, in the folder of data sets
    by_hand: str  # how to get the files without this program; {folder}, and {inside} = folder / subfolder
    download: Callable[[Path], None]  # into a folder of data sets, verified; the archive stays packed


# torchvision is imported when it is needed, since that takes seconds. It downloads and verifies; it does not
# read, since it would unpickle the files.
def _download_cifar10(folder: Path) -> None:
    from torchvision.datasets import CIFAR10, utils

    utils.download_url(CIFAR10.url, str(folder), CIFAR10.filename, CIFAR10.tgz_md5)


def _download_cifar100(folder: Path) -> None:
    from torchvision.datasets import CIFAR100, utils

    utils.download_url(CIFAR100.url, str(folder), CIFAR100.filename, CIFAR100.tgz_md5)


def _download_fashion_mnist(folder: Path) -> None:
    from torchvision.datasets import FashionMNIST, utils

    for filename, md5 in FashionMNIST.resources:  # they stay packed: the reader unpacks them
        utils.download_url(
            FashionMNIST.mirrors[0] + filename, str(folder / "FashionMNIST" / "raw"), filename, md5
        )


def _download_svhn(folder: Path) -> None:
    from torchvision.datasets import SVHN, utils

    for part in ("train", "test"):
        url, filename, md5 = SVHN.split_list[part]
        utils.download_url(url, str(folder / "svhn"), filename, md5)


PUBLICATIONS = {
    "cifar10": Publication(
        title="CIFAR-10",
        subfolder="cifar-10-batches-py",
        md5={
            "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            "test_batch": "40351d587109b95175f43aff81a1287e",
        },
        elsewhere=(),
        archive="cifar-10-python.tar.gz",
        by_hand="put https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz in {folder}",
        download=_download_cifar10,
    ),
    "cifar100": Publication(
        title="CIFAR-100",
        subfolder="cifar-100-python",
        md5={
            "meta": "7973b15100ade9c7d40fb424638fde48",
            "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
            "train": "16019d7e3df5f24257cddd939b257f8d",
        },
        elsewhere=(),
        archive="cifar-100-python.tar.gz",
        by_hand="put https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz in {folder}",
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
        archive=None,
        by_hand="put the four files *-ubyte.gz of https://github.com/zalandoresearch/fashion-mnist in "
        "{inside}, or on Debian and Ubuntu install the package dataset-fashion-mnist",
        download=_download_fashion_mnist,
    ),
    "svhn": Publication(
        title="SVHN",
        subfolder="svhn",
        md5={
            "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3",
            "train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373",
        },
        elsewhere=(),
        archive=None,
        by_hand="put train_32x32.mat and test_32x32.mat of http://ufldl.stanford.edu/housenumbers in {inside}",
        download=_download_svhn,
    ),
}


def locate(name: str, folder: Path, download: bool) -> tuple[dict[str, Path], str]:
    """The files of data set `name` by published name, and a line that says where they came from.

    Looks in torchvision's layout below `folder`, in `folder` itself and in the system's folders, then for the archive
    in `folder`, which it unpacks there; then downloads if it may. A file may lack its .gz. Raises DataError if the
    files are incomplete or damaged, or neither there nor downloaded.
    """
    publication = PUBLICATIONS[name]
    inside = folder / publication.subfolder
    places = [inside, folder, *publication.elsewhere]
    for place in places:
        files = _files_in(place, publication)
        if len(files) == len(publication.md5):
            return files, f"{place}: {_verdict(files, publication)}"
    archive = folder / publication.archive if publication.archive else None
    packed = archive is not None and archive.is_file()
    if inside.exists():
        missing = sorted(publication.md5.keys() - _files_in(inside, publication).keys())
        reason = f"{inside} is incomplete: it lacks {', '.join(missing)}"
        reason += f"; remove it, and {archive} is unpacked in its place" if packed else ""
    elif packed:
        reason = _place(publication, folder, lambda _: None)
    elif download:
        reason = _place(publication, folder, publication.download)
    else:
        reason = "downloading is switched off"
    if reason:
        raise DataError(
            f"{publication.title} was not found in {', '.join(map(str, places))}, and was not "
            f"{'unpacked' if packed else 'downloaded'} ({reason}). To get it by hand, "
            f"{publication.by_hand.format(folder=folder, inside=inside)}. --dataset digits needs no files"
        )
    files = _files_in(inside, publication)
    how = f"unpacked from {publication.archive}" if packed else "downloaded"
    return files, f"{inside}: {how}, {_verdict(files, publication)}"


def _files_in(place: Path, publication: Publication) -> dict[str, Path]:
    """Those of the files that are in `place`, by published name."""
    found: dict[str, Path] = {}
    for name in publication.md5:
        for path in (place / name, place / name.removesuffix(".gz")):
            if path.is_file():
                found.setdefault(name, path)
    return found


def _verdict(files: dict[str, Path], publication: Publication) -> str:
    """Whether the files are the published ones, byte for byte."""
    if all(path.name == name and _md5(path) == publication.md5[name] for name, path in files.items()):
        return "the published checksums hold"
    return "not the published files byte for byte; shapes, counts and labels are checked"


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _place(publication: Publication, folder: Path, download: Callable[[Path], None]) -> str:
    """Download and unpack into `folder`, whole or not at all. Returns why it failed, "" if it did not."""
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix="download-") as temporary:
            download(Path(temporary))
            found = Path(temporary) / publication.subfolder
            if publication.archive:
                fetched = Path(temporary) / publication.archive
                found.mkdir()
                archive = fetched if fetched.exists() else folder / publication.archive
                unpack(archive, publication.subfolder, publication.md5, found)
            target = folder / publication.subfolder
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.replace(found, target)
            except OSError:
                if not _files_in(target, publication):  # another run was faster
                    raise
    except (
        OSError,
        HTTPException,
        RuntimeError,
        DataError,
    ) as error:  # RuntimeError: the checksum does not hold
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        return str(error)
    return ""

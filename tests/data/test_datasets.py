"""Data sets: found, checked, split; damaged and hostile files are refused, and nothing in them is executed."""

import dataclasses
import gzip
import hashlib
import os
import pickle
import resource
import shutil
import socket
import struct
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsnap.data import datasets
from fastsnap.data.archives import DataError, as_array, as_texts, read_idx, read_pickle
from fastsnap.data.datasets import DATASETS, load_dataset
from fastsnap.data.downloads import PUBLICATIONS, locate
from fastsnap.data.sources import Augmentation
from fastsnap.limits import Room

LARGEST = 10**6


def python2_pickle(entries):
    """A dict in the dialect of the published archives: protocol 2, byte strings, NumPy 1 names."""

    def text(value):
        return b"T" + struct.pack("<i", len(value)) + value

    def item(value):
        if isinstance(value, np.ndarray):
            shape = b"".join(b"J" + struct.pack("<i", size) for size in value.shape)
            return (
                b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01("
                + shape
                + b"tcnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
                + text(value.tobytes())
                + b"tb"
            )
        if isinstance(value, list):
            return b"](" + b"".join(item(element) for element in value) + b"e"
        return text(value) if isinstance(value, bytes) else b"J" + struct.pack("<i", value)

    pairs = b"".join(text(key.encode()) + item(value) for key, value in entries.items())
    return b"\x80\x02}(" + pairs + b"u."


def write_cifar(folder, name):
    """A CIFAR archive of the published size; image i of each file is i % 251 in red, 1 in green, 2 in blue."""
    ten = name == "cifar10"
    inside = folder / PUBLICATIONS[name].subfolder
    inside.mkdir()
    classes = 10 if ten else 100
    names = [b"class %d" % i for i in range(classes)]
    meta = {"label_names": names} if ten else {"coarse_label_names": [b"x"], "fine_label_names": names}
    (inside / ("batches.meta" if ten else "meta")).write_bytes(python2_pickle(meta))
    sizes = {f"data_batch_{i}": 10_000 for i in range(1, 6)} if ten else {"train": 50_000}
    for file, count in (sizes | {"test_batch" if ten else "test": 10_000}).items():
        data = np.empty((count, 3, 1024), np.uint8)
        data[:] = np.array([0, 1, 2])[:, None]
        data[:, 0] = (np.arange(count) % 251)[:, None]
        data[:, 0, 1] = 255  # the second pixel of the first row
        labels = {"labels" if ten else "fine_labels": [i % classes for i in range(count)]}
        (inside / file).write_bytes(python2_pickle({"data": data.reshape(count, 3072), **labels}))
    return inside


@pytest.fixture(scope="module", params=["cifar10", "cifar100"])
def cifar(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    yield request.param, write_cifar(folder, request.param)
    shutil.rmtree(folder)  # 180 MB


@pytest.mark.parametrize("itself", [False, True], ids=["folder", "inner folder"])
def test_cifar_is_read_from_torchvisions_layout(cifar, itself):
    name, inside = cifar
    data = load_dataset(name, inside if itself else inside.parent, download=False)
    assert data.train.images.shape == (50_000, 32, 32, 3)
    assert data.test.images.shape == (10_000, 32, 32, 3)
    for images in (data.train, data.test):
        assert images.images.dtype == np.uint8
        assert images.labels.dtype == np.int64
        assert images.images.flags.c_contiguous
        assert images.images.flags.writeable
    assert data.train.images[20_007, 5, 9].tolist() == [
        20_007 % (10_000 if name == "cifar10" else 50_000) % 251,
        1,
        2,
    ]
    assert data.train.images[0, 0, 1].tolist() == [255, 1, 2]
    assert data.train.images[0, 1, 0].tolist() == [0, 1, 2]
    assert data.test.labels[123] == 123 % len(data.classes)
    assert data.classes[3] == "class 3"
    assert (data.augmentation, data.validation) == (Augmentation("crop", padding=4, flip=True), None)
    assert "not the published files" in data.source


def broken_cifar(folder, batch, meta=None):
    """A cifar-10-batches-py whose class names and first batch are as given, and whose other files are empty."""
    inside = folder / "cifar-10-batches-py"
    inside.mkdir()
    for file in PUBLICATIONS["cifar10"].md5:
        (inside / file).touch()
    names = python2_pickle({"label_names": [b"name"] * 10})
    (inside / "batches.meta").write_bytes(names if meta is None else meta)
    (inside / "data_batch_1").write_bytes(batch)


GOOD_LABELS = [0] * 10_000
GOOD_DATA = np.zeros((10_000, 3072), np.uint8)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (b"", "data_batch_1 is damaged or truncated"),
        (python2_pickle({"data": GOOD_DATA[:5], "labels": [0] * 5})[:-100], "data_batch_1 is damaged"),
        (python2_pickle({"labels": GOOD_LABELS}), "data_batch_1 has no 'data', only labels"),
        (python2_pickle({"data": GOOD_DATA}), "has no 'labels', only data"),
        (
            python2_pickle({"data": GOOD_DATA[:9]}),
            r"'data' should have shape \(10000, 3072\), got \(9, 3072\)",
        ),
        (python2_pickle({"data": [1, 2, b"x"]}), "'data' is no array of integers"),
        (python2_pickle({"data": GOOD_DATA, "labels": [0] * 9}), r"'labels' should have shape \(10000,\)"),
        (
            python2_pickle({"data": GOOD_DATA, "labels": [*GOOD_LABELS[1:], 10]}),
            "labels from 0 to 10, beyond 0 to 9",
        ),
        (python2_pickle({"data": GOOD_DATA, "labels": [*GOOD_LABELS[1:], -1]}), "labels from -1 to 0"),
        (pickle.dumps({"data": np.zeros((10_000, 3072), np.int8)}), "should hold uint8 images, got int8"),
        (pickle.dumps({"data": np.full((2, 2), None)}), "'data' is no array of integers"),
        (pickle.dumps({"data": np.zeros((2, 2), "f4")}), "'data' is no array of integers .*dtype f4"),
        (pickle.dumps([1, 2]), "is damaged or truncated"),
        (pickle.dumps({3: 4}), "a text was expected, got int"),
    ],
    ids=range(14),
)
def test_a_damaged_batch_is_an_error_that_names_the_file(tmp_path, batch, message):
    broken_cifar(tmp_path, batch)
    with pytest.raises(DataError, match=message):
        load_dataset("cifar10", tmp_path, download=False)


@pytest.mark.parametrize("names", [[b"name"] * 9, [1] * 10, b"name"])
def test_damaged_class_names_are_an_error(tmp_path, names):
    broken_cifar(tmp_path, b"", meta=python2_pickle({"label_names": names}))
    with pytest.raises(DataError, match=r"batches\.meta should hold a list of 10 texts in 'label_names'"):
        load_dataset("cifar10", tmp_path, download=False)


class Hostile:
    """Unpickled by pickle.load, this would run a command; `reduce` is what it would run."""

    def __init__(self, *reduce):
        self.reduce = reduce

    def __reduce__(self):
        return self.reduce


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("file", ["batches.meta", "data_batch_1"])
def test_a_pickle_that_would_execute_code_does_not(tmp_path, protocol, file):
    proof = tmp_path / "proof"
    hostile = pickle.dumps({"data": Hostile(os.system, (f"touch {proof}",))}, protocol)
    broken_cifar(tmp_path, *((b"", hostile) if file == "batches.meta" else (hostile,)))
    with pytest.raises(DataError, match=rf"{file} asks for (posix|nt)\.system, which no image archive needs"):
        load_dataset("cifar10", tmp_path, download=False)
    assert not proof.exists()
    pickle.loads(hostile)
    assert proof.exists()  # so it was a real one


@pytest.mark.parametrize(
    "program",
    [
        b"cbuiltins\neval\n(S'PROOF'\ntR.",
        b"(ibuiltins\neval\n.",  # INST
        b"(cbuiltins\neval\nS'PROOF'\no.",  # OBJ
        b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.",  # STACK_GLOBAL
        b"cnumpy\nload\n(S'PROOF'\ntR.",
        b"cnumpy\nndarray.__class__\n.",
        b"\x82\x01.",  # an extension code
        b"Psomething\n.",  # a persistent identifier
        b"cnumpy\ndtype\n(N}S'__call__'\ncnumpy\nndarray\nstb.",  # attributes of an admitted name
        b"cnumpy\ndtype\n)\x81.",  # a new object of an admitted name
        b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x.",  # 4 EiB of bytes
        b"\x80\x05\x96" + struct.pack("<Q", 2**32) + b"x.",  # a bytearray of 4 GiB
        b"\x80\x02}r\xff\xff\xff\x1f",  # memo entry 2**29
    ],
    ids=range(13),
)
def test_other_hostile_programs_are_refused(tmp_path, program):
    path = tmp_path / "program"
    path.write_bytes(program)
    before = peak_memory()
    with pytest.raises(DataError, match="program"):
        read_pickle(path, LARGEST)
    assert peak_memory() - before < 2**28


def peak_memory():
    """Of this process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_admitted_calls_are_recorded_and_not_made(tmp_path):
    """Even ndarray with absurd arguments: a terabyte is never allocated."""
    path = tmp_path / "calls"
    path.write_bytes(b"}(S'data'\ncnumpy\nndarray\n((I1000000000000\ntS'u1'\ntRu.")
    content = read_pickle(path, LARGEST)
    with pytest.raises(DataError, match="'data' is no array"):
        as_array(content["data"], path, "data", (10**12,))


def test_a_file_of_absurd_size_is_refused_unread(tmp_path):
    broken_cifar(tmp_path, b"")
    os.truncate(tmp_path / "cifar-10-batches-py" / "data_batch_1", 2**40)  # sparse
    with pytest.raises(DataError, match=r"data_batch_1 has 1099511627776 bytes where at most"):
        load_dataset("cifar10", tmp_path, download=False)


RANDOM_ARRAY = np.random.default_rng(0).integers(0, 256, (6, 5), dtype=np.uint8)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "value",
    [
        RANDOM_ARRAY,
        np.asfortranarray(RANDOM_ARRAY),
        list(RANDOM_ARRAY),
        RANDOM_ARRAY.astype(">i8"),
        RANDOM_ARRAY.astype("<i4"),
        RANDOM_ARRAY.astype(np.uint16)[::2],
        list(RANDOM_ARRAY[0].astype(np.int64)),
        RANDOM_ARRAY[0].tolist(),
    ],
    ids=range(8),
)
def test_arrays_come_back_as_they_were_pickled(tmp_path, value, protocol):
    path = tmp_path / "array"
    path.write_bytes(pickle.dumps({"data": value}, protocol))
    array = as_array(read_pickle(path, LARGEST)["data"], path, "data", np.shape(value))
    assert np.array_equal(array, value)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("fix_imports", [True, False])
def test_a_file_that_python_3_wrote_again_reads_as_before(tmp_path, protocol, fix_imports):
    """Up to protocol 2 it writes bytes as calls of _codecs.encode: keys, class names and the data of arrays."""
    content = {
        b"data": RANDOM_ARRAY,
        b"label_names": [b"apple", b"caf\xe9", b""],
        b"labels": [1, 2],
        b"": b"",
    }
    path = tmp_path / "again"
    path.write_bytes(pickle.dumps(content, protocol, fix_imports=fix_imports))
    read = read_pickle(path, LARGEST)
    assert read.keys() == {"data", "label_names", "labels", ""}
    assert np.array_equal(as_array(read["data"], path, "data", (6, 5)), RANDOM_ARRAY)
    assert as_texts(read["label_names"], path, "label_names", 3) == ("apple", "caf\xe9", "")


@pytest.mark.parametrize(
    "key",
    [
        b"c_codecs\nencode\n(Vdata\nVrot13\ntR",  # another encoding
        b"c_codecs\nencode\n(I1\nVlatin1\ntR",  # no text
        b"c_codecs\nencode\n(tR",  # no arguments
        b"cbuiltins\nbytes\n(I1000000000000\ntR",  # a terabyte of zeros
        b"cnumpy\ndtype\n(Vu1\ntR",
    ],
    ids=range(5),
)
def test_other_calls_are_no_texts(tmp_path, key):
    path = tmp_path / "keys"
    path.write_bytes(b"}(" + key + b"I1\nu.")
    with pytest.raises(DataError, match="keys is damaged"):
        read_pickle(path, LARGEST)
    path.write_bytes(b"}(S'label_names'\n(" + key + b"lu.")
    with pytest.raises(DataError, match="list of 1 texts in 'label_names'"):
        as_texts(read_pickle(path, LARGEST)["label_names"], path, "label_names", 1)


VALID = [
    python2_pickle({"data": RANDOM_ARRAY, "labels": [1, 2, 3], "batch_label": b"training"}),
    *(pickle.dumps({"data": RANDOM_ARRAY, "labels": [1, 2, 3]}, protocol) for protocol in (0, 2, 5)),
    pickle.dumps({b"data": RANDOM_ARRAY, b"labels": [1, 2, 3]}, 2),
]


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(VALID),
    st.lists(st.tuples(st.integers(0, 10**4), st.integers(0, 255)), max_size=4),
    st.data(),
)
def test_a_damaged_pickle_is_a_data_error_or_harmless(tmp_path_factory, valid, changes, data):
    damaged = bytearray(valid)
    for place, byte in changes:
        damaged[place % len(damaged)] = byte
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(damaged[: data.draw(st.integers(0, len(damaged)))] if not changes else damaged)
    message = str(path)
    try:
        for key, value in read_pickle(path, LARGEST).items():
            assert as_array(value, path, key, (6, 5)).shape == (6, 5)
    except DataError as error:
        message = str(error)
    assert str(path) in message


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    return header + array.tobytes()


@pytest.fixture(scope="module")
def fashion_mnist(tmp_path_factory):
    """A folder in torchvision's layout and one in Debian's, of published size; label i is i % 10."""
    folder = tmp_path_factory.mktemp("fashion")
    raw, debian = folder / "FashionMNIST" / "raw", folder / "debian"
    raw.mkdir(parents=True)
    debian.mkdir()
    for part, count in (("train", 60_000), ("t10k", 10_000)):
        images = np.zeros((count, 28, 28), np.uint8)
        images[7, 2, 3] = 99
        labels = (np.arange(count) % 10).astype(np.uint8)
        for file, array in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
            (raw / file).write_bytes(idx(array))
            (debian / f"{file}.gz").write_bytes(gzip.compress(idx(array), 1))
    yield folder, debian
    shutil.rmtree(folder)


@pytest.mark.parametrize("layout", [0, 1], ids=["torchvision", "Debian"])
def test_fashion_mnist_is_read_from_both_layouts(fashion_mnist, layout):
    data = load_dataset("fashion-mnist", fashion_mnist[layout], download=False)
    assert data.train.images.shape == (60_000, 28, 28, 1)
    assert data.test.images.shape == (10_000, 28, 28, 1)
    assert data.test.images[7, 2, 3, 0] == 99
    assert data.train.labels[59_999] == 9
    assert data.train.images.flags.writeable
    assert len(data.classes) == 10
    assert str(fashion_mnist[layout]) in data.source


IDX = idx(RANDOM_ARRAY)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("short", IDX[:-1], "should hold 30 bytes"),
        ("long", IDX + b"x", "should hold 30 bytes"),
        ("empty", b"", "header"),
        ("dtype", IDX.replace(b"\x08", b"\x0d", 1), "header"),
        ("shape", idx(RANDOM_ARRAY.T.copy()), "header"),
        ("huge", IDX + b"x" * 200, "bytes where at most"),
        ("cut.gz", gzip.compress(IDX)[:-9], "damaged or truncated"),
        ("changed.gz", gzip.compress(IDX)[:-7] + b"xxxxxxx", "damaged or truncated"),
        ("plain.gz", IDX, "damaged or truncated"),
        ("bomb.gz", gzip.compress(IDX + bytes(10**6))[:80], "should hold 30 bytes|damaged"),
    ],
)
def test_a_damaged_idx_file_is_an_error_that_names_it(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}.*({message})"):
        read_idx(tmp_path / name, (6, 5))


def test_idx_files_are_read_plain_and_packed(tmp_path):
    for name, content in (("plain", IDX), ("packed.gz", gzip.compress(IDX))):
        (tmp_path / name).write_bytes(content)
        assert np.array_equal(read_idx(tmp_path / name, (6, 5)), RANDOM_ARRAY)
    with pytest.raises(DataError, match="missing cannot be read"):
        read_idx(tmp_path / "missing", (6, 5))


def test_digits_need_no_files_and_their_split_is_fixed():
    data, other_seed = load_dataset("digits"), load_dataset("digits", seed=9)
    assert data.train.images.shape == (1437, 8, 8, 1)
    assert data.test.images.shape == (360, 8, 8, 1)
    assert data.train.images.max() == 255
    assert np.array_equal(data.test.images, other_seed.test.images)
    assert np.array_equal(data.train.labels, other_seed.train.labels)
    assert set(np.bincount(data.test.labels)) <= {35, 36, 37}
    assert data.train.images.mean() == pytest.approx(data.mean[0], rel=0.005)
    assert data.train.images.std() == pytest.approx(data.std[0], rel=0.005)
    assert data.augmentation == Augmentation("crop", padding=1)


def as_rows(*sets):
    """The images with their labels, in one sorted list."""
    rows = [
        [*image.ravel(), label]
        for part in sets
        for image, label in zip(part.images, part.labels, strict=True)
    ]
    return sorted(map(tuple, rows))


def test_validation_is_held_out_in_proportion_by_the_seed():
    whole = load_dataset("digits")
    data = load_dataset("digits", validation=143, seed=3)
    again = load_dataset("digits", validation=143, seed=3)
    other = load_dataset("digits", validation=143, seed=4)
    assert len(data.validation.labels) == 143
    assert as_rows(data.validation, data.train) == as_rows(whole.train)
    share = np.bincount(whole.train.labels) * 143 / 1437
    assert np.abs(np.bincount(data.validation.labels) - share).max() < 1
    assert np.array_equal(data.validation.images, again.validation.images)
    assert not np.array_equal(data.validation.images, other.validation.images)
    assert np.array_equal(data.test.images, whole.test.images)


def test_fewer_training_images_are_taken_from_what_is_not_held_out():
    data = load_dataset("digits", validation=400, train_images=100)
    rest = load_dataset("digits", validation=400)
    assert set(np.bincount(data.train.labels)) <= {9, 10, 11}
    assert len(data.train.labels) == 100
    assert set(as_rows(data.train)) <= set(as_rows(rest.train))
    assert len(load_dataset("digits", train_images=1437).train.labels) == 1437


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"validation": -1}, "validation must be between 10 .* and 1427, got -1"),
        ({"validation": 9}, "validation must be between 10 .*got 9: .* leave"),
        ({"validation": 1428}, "validation must be between 10 .* and 1427, got 1428"),
        ({"train_images": 0}, "train_images must be between 10 .* and 1437, got 0"),
        ({"train_images": -5}, "train_images .* got -5"),
        ({"train_images": 1438}, "train_images .* got 1438"),
        ({"validation": 437, "train_images": 1001}, "train_images must be between 10 .* and 1000, got 1001"),
        ({"validation": 10, "seed": -1}, "seed must be between 0"),
    ],
)
def test_numbers_that_do_not_fit_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_dataset("digits", **arguments)


def test_every_class_keeps_an_image_on_both_sides():
    data = load_dataset("digits", validation=1427)
    assert np.bincount(data.train.labels).tolist() == [1] * 10


@pytest.mark.parametrize(
    ("name", "near"), [("cifar", "cifar10"), ("fashion_mnist", "fashion-mnist"), ("Digits", "digits")]
)
def test_an_unknown_data_set_is_an_error_with_the_nearest_names(name, near):
    with pytest.raises(
        ValueError, match=rf"unknown data set '{name}': did you mean .*{near}.*{', '.join(DATASETS)}"
    ):
        load_dataset(name)


def test_missing_files_are_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(DataError) as error:
        load_dataset("cifar100", tmp_path / "nowhere", download=False)
    message = str(error.value)
    for part in (
        str(tmp_path / "nowhere" / "cifar-100-python"),
        "cifar-100-python.tar.gz",
        "--dataset digits",
    ):
        assert part in message
    assert not (tmp_path / "nowhere").exists()


def test_an_incomplete_folder_is_an_error_and_not_overwritten(tmp_path):
    broken_cifar(tmp_path, b"")
    (tmp_path / "cifar-10-batches-py" / "test_batch").unlink()
    with pytest.raises(DataError, match=r"cifar-10-batches-py is incomplete: it lacks test_batch"):
        load_dataset("cifar10", tmp_path)
    assert (tmp_path / "cifar-10-batches-py" / "data_batch_1").exists()


@pytest.fixture
def published(tmp_path, monkeypatch):
    """An archive of CIFAR-10's file names, "published" by a server in this process; returns its path."""
    from torchvision.datasets import CIFAR10

    (tmp_path / "source").mkdir()
    broken_cifar(tmp_path / "source", b"")
    archive = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "source" / "cifar-10-batches-py", "cifar-10-batches-py")
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=tmp_path)) as server:
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/{archive.name}")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield archive
        server.shutdown()
        thread.join()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_arguments):
        pass


def test_a_download_is_verified_and_unpacked(tmp_path, published):
    files, source = locate("cifar10", tmp_path / "data", download=True)
    assert all(path.is_file() for path in files.values())
    assert files.keys() == PUBLICATIONS["cifar10"].md5.keys()
    assert "downloaded" in source
    assert os.listdir(tmp_path / "data") == [
        "cifar-10-batches-py"
    ]  # neither the archive nor a temporary folder


@pytest.mark.parametrize("damage", ["changed", "truncated", "gone"])
def test_a_bad_download_is_an_error_and_leaves_nothing(tmp_path, published, damage):
    content = published.read_bytes()
    published.write_bytes(content + b"x" if damage == "changed" else content[:50])
    if damage == "gone":
        published.unlink()
    with pytest.raises(DataError, match=r"was not downloaded \(.+\)\. To get it by hand, put .* digits"):
        locate("cifar10", tmp_path / "data", download=True)
    assert not (tmp_path / "data").exists()


def test_an_archive_that_lies_there_packed_is_unpacked(tmp_path, published):
    files, source = locate("cifar10", tmp_path, download=False)
    inside = tmp_path / "cifar-10-batches-py"
    assert files == {name: inside / name for name in PUBLICATIONS["cifar10"].md5}
    for name, path in files.items():
        assert path.read_bytes() == (tmp_path / "source" / "cifar-10-batches-py" / name).read_bytes()
    assert "unpacked from cifar-10-python.tar.gz, not the published files" in source
    assert sorted(os.listdir(tmp_path)) == ["cifar-10-batches-py", published.name, "source"]
    assert "unpacked" not in locate("cifar10", tmp_path, download=False)[1]


def test_an_incomplete_folder_beside_an_archive_stays_and_is_told(tmp_path, published):
    inside = tmp_path / "cifar-10-batches-py"
    inside.mkdir()
    with pytest.raises(
        DataError, match=r"is incomplete.*; remove it, and .*cifar-10-python.tar.gz is unpacked"
    ):
        locate("cifar10", tmp_path, download=False)
    assert os.listdir(inside) == []


def packed(folder, change):
    """An archive of CIFAR-10's file names, each holding its name; `change(tar, name)` may add another instead."""
    archive = folder / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name in PUBLICATIONS["cifar10"].md5:
            if not change(tar, f"cifar-10-batches-py/{name}"):
                add(tar, f"cifar-10-batches-py/{name}", name.encode())
    return archive


def add(tar, name, content=b"", **fields):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in fields.items():
        setattr(member, field, value)
    tar.addfile(member, BytesIO(content))
    return True


def test_other_members_of_an_archive_are_never_written(tmp_path):
    """A path that leads out, a link out of the folder, a device: none of them is asked for."""

    def hostile(tar, name):
        if name.endswith("test_batch"):
            add(tar, "../escaped", b"x")
            add(tar, str(tmp_path / "absolute"), b"x")
            add(tar, "cifar-10-batches-py", type=tarfile.SYMTYPE, linkname="/tmp")
            add(tar, "cifar-10-batches-py/device", type=tarfile.CHRTYPE)
            add(tar, "cifar-10-batches-py/readme.html", b"hello")

    data = tmp_path / "data"
    data.mkdir()
    packed(data, hostile)
    files, _ = locate("cifar10", data, download=False)
    assert sorted(os.listdir(data / "cifar-10-batches-py")) == sorted(PUBLICATIONS["cifar10"].md5)
    assert files["test_batch"].read_bytes() == b"test_batch"
    assert sorted(os.listdir(tmp_path)) == ["data"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tar, name: name.endswith("_3"), "lacks cifar-10-batches-py/data_batch_3: get it again"),
        (
            lambda tar, name: (
                name.endswith("_3") and add(tar, name, type=tarfile.SYMTYPE, linkname="/etc/passwd")
            ),
            "data_batch_3 in .* is no plain file",
        ),
        (
            lambda tar, name: (
                name.endswith("_3") and add(tar, name, type=tarfile.LNKTYPE, linkname="test_batch")
            ),
            "data_batch_3 in .* is no plain file",
        ),
        (lambda tar, name: [add(tar, str(i)) for i in range(101)] and False, "more than 100 members"),
    ],
    ids=range(4),
)
def test_an_archive_of_something_else_is_an_error_and_leaves_nothing(tmp_path, change, message):
    archive = packed(tmp_path, change)
    with pytest.raises(DataError, match=rf"was not unpacked \(.*{message}"):
        locate("cifar10", tmp_path, download=True)
    assert os.listdir(tmp_path) == [archive.name]


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "plain"])
def test_a_damaged_archive_is_a_clear_error(tmp_path, damage):
    archive = packed(tmp_path, lambda tar, name: False)
    content = archive.read_bytes()
    middle = len(content) // 2
    archive.write_bytes(
        {
            "cut": content[:middle],
            "changed": content[:middle] + b"x" * 9 + content[middle + 9 :],
            "empty": b"",
            "plain": b"<html>not found</html>" * 99,
        }[damage]
    )
    with pytest.raises(
        DataError, match=r"cifar-10-python\.tar\.gz (is damaged or truncated|lacks) .*get it again"
    ):
        locate("cifar10", tmp_path, download=False)
    assert os.listdir(tmp_path) == [archive.name]


def test_a_small_archive_of_terabytes_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr("fastsnap.data.packed.LARGEST", 10**6)
    archive = packed(tmp_path, lambda tar, name: add(tar, name, bytes(10**6)))
    assert archive.stat().st_size < 10**5
    with pytest.raises(DataError, match="unpacks to more than 1000000 bytes"):
        locate("cifar10", tmp_path, download=False)
    assert os.listdir(tmp_path) == [archive.name]


def test_a_refused_connection_is_an_error(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR100

    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(CIFAR100, "url", f"http://127.0.0.1:{port}/cifar-100-python.tar.gz")
    with pytest.raises(
        DataError, match=r"CIFAR-100 was not found in .*refused.*--dataset digits needs no files"
    ):
        load_dataset("cifar100", tmp_path)


def test_published_checksums_are_recognised(tmp_path, monkeypatch):
    broken_cifar(tmp_path, b"")
    inside = tmp_path / "cifar-10-batches-py"
    md5 = {
        file: hashlib.md5((inside / file).read_bytes()).hexdigest() for file in PUBLICATIONS["cifar10"].md5
    }
    monkeypatch.setitem(PUBLICATIONS, "cifar10", dataclasses.replace(PUBLICATIONS["cifar10"], md5=md5))
    assert "the published checksums hold" in locate("cifar10", tmp_path, download=False)[1]
    (inside / "test_batch").write_bytes(b"changed")
    assert "not the published files" in locate("cifar10", tmp_path, download=False)[1]


def test_checksums_are_torchvisions():
    from torchvision.datasets import CIFAR10, CIFAR100, FashionMNIST

    for name, published in (("cifar10", CIFAR10), ("cifar100", CIFAR100)):
        files = dict([*published.train_list, *published.test_list])
        files[published.meta["filename"]] = published.meta["md5"]
        assert PUBLICATIONS[name].md5 == files
    assert PUBLICATIONS["fashion-mnist"].md5 == dict(FashionMNIST.resources)


def test_images_that_memory_cannot_hold_are_refused_before_they_are_read(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets, "free_memory", lambda: Room(10**8, "free in this container"))
    load_dataset("digits")
    with pytest.raises(
        ValueError, match=r"reading cifar100 takes about 36\d MB.*100 MB are free in this container"
    ):
        load_dataset("cifar100", tmp_path)

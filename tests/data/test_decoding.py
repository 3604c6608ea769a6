"""Decoding against Pillow and arithmetic, pixel by pixel; and what is no picture."""

import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_pictures import picture, save
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional

from fastsnap.data.decoding import centred, decode, decode_bytes, decode_direct, seen
from fastsnap.data.headers import DamagedImage, inspect

FORMATS = [
    ("RGB", "a.jpg", {}),
    ("RGB", "progressive.jpg", {"progressive": True}),
    ("L", "grey.jpg", {}),
    ("CMYK", "cmyk.jpg", {}),
    ("RGB", "a.png", {}),
    ("P", "palette.png", {}),
    ("1", "bit.png", {}),
    ("L", "grey.png", {}),
    ("RGB", "a.webp", {"quality": 80}),
    ("RGB", "a.bmp", {}),
    ("RGB", "a.tiff", {}),
    ("L", "grey.tiff", {}),
    ("CMYK", "cmyk.tiff", {}),
    ("P", "a.gif", {}),
    ("RGB", "a.ppm", {}),
    ("RGB", "a.avif", {}),
]


@pytest.mark.parametrize(("mode", "name", "options"), FORMATS)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_format_has_the_pixels_that_pillow_shows(mode, name, options, channels, tmp_path):
    try:
        path = save(picture(37, 23, mode=mode), tmp_path / name, **options)
    except (OSError, KeyError):
        pytest.skip("this Pillow does not write it")
    with Image.open(path) as image:
        expected = image.convert("RGB") if mode not in ("L", "1") else image.convert("L").convert("RGB")
    if channels == 1:
        expected = expected.convert("L")
    found = decode(path, channels)
    assert found.shape == (23, 37, channels)
    assert found.flags["C_CONTIGUOUS"]
    assert found.flags["WRITEABLE"]
    assert np.array_equal(found, np.asarray(expected).reshape(23, 37, channels))
    header = inspect(path)
    assert (header.height, header.width) == (23, 37)
    assert header.coloured == (mode not in ("L", "1"))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_orientation_is_applied(orientation, ending, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(picture(31, 17), tmp_path / f"a.{ending}", exif=exif)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
        assert np.array_equal(seen(image, 3), expected)
    header = inspect(path)
    assert (header.height, header.width) == expected.shape[:2]
    assert np.array_equal(decode(path, 3), expected)
    assert header.plain
    assert np.array_equal(decode_direct(path.read_bytes(), "a", 3, header.orientation), expected)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("background", [(0, 0, 0), (200, 10, 77)])
def test_half_transparent_pixels_show_the_background(mode, background, tmp_path):
    image = picture(20, 30, mode="RGB" if mode == "RGBA" else "L")
    alpha = picture(20, 30, seed=5, mode="L")
    image.putalpha(alpha)
    path = save(image, tmp_path / "a.png")
    colours = np.asarray(image.convert("RGBA")).astype(np.float64)
    share = colours[..., 3:] / 255
    exact = colours[..., :3] * share + np.array(background) * (1 - share)
    found = decode(path, 3, background)
    assert np.abs(found - exact).max() <= 0.5 + 1e-9
    assert inspect(path).transparent


def test_a_transparent_palette_shows_the_background(tmp_path):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.putpixel((3, 2), 0)
    path = save(image, tmp_path / "a.png", transparency=0)
    found = decode(path, 3, (1, 2, 3))
    assert found[2, 3].tolist() == [1, 2, 3]
    assert found[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("ending", ["png", "tiff"])
def test_sixteen_bits_become_eight(ending, tmp_path):
    values = np.array([[0, 1, 128, 129, 256, 257, 32768, 65406, 65407, 65535]], np.uint16)
    path = save(Image.fromarray(values), tmp_path / f"a.{ending}")
    assert decode(path, 1)[0, :, 0].tolist() == np.round(values[0] / 257).astype(int).tolist()
    assert not inspect(path).plain


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG file with these bytes as its rows."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def test_sixteen_bit_colours_and_alpha():
    pixel = struct.pack(">HHHH", 65535, 257, 0, 65535 // 2)
    found = decode_bytes(png(1, 1, 16, 6, b"\0" + pixel), "a.png", 3, (100, 100, 100))
    alpha = round(32767 / 257)
    expected = [round((colour * alpha + 100 * (255 - alpha)) / 255) for colour in (255, 1, 0)]
    assert found[0, 0].tolist() == expected


def test_a_huge_picture_in_a_small_file_is_refused_by_its_header(tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(png(50_000, 50_000, 8, 2, b"\0" * 1000))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for look in (inspect, lambda path: decode(path, 3)):
            with pytest.raises(DamagedImage, match=r"bomb.png: it has 50,000x50,000 pixels, more than"):
                look(path)


def test_a_large_photograph_is_no_bomb(tmp_path):
    path = tmp_path / "large.png"
    path.write_bytes(png(10_000, 10_000, 8, 0, b"\0" * 10))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow's of a decompression bomb
        assert inspect(path).width == 10_000


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"just some text, for a while", "it is no picture of a known format"),
        (b"\xff\xd8\xff\xe0", "its header is damaged|cut short"),
    ],
)
def test_what_is_no_picture_is_named_with_a_reason(content, reason, tmp_path):
    path = tmp_path / "odd.jpg"
    path.write_bytes(content)
    for look in (inspect, lambda path: decode(path, 3)):
        with pytest.raises(DamagedImage, match=f"odd.jpg: ({reason})"):
            look(path)


def test_pipes_and_folders_are_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    for name in ("pipe.jpg", "folder.jpg", "nothing.jpg"):
        with pytest.raises(DamagedImage, match=f"{name}: "):
            decode(tmp_path / name, 3)


def encoded(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


WHOLE = {kind: encoded(picture(40, 30), kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")}


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(sorted(WHOLE)), st.floats(0, 1))
def test_a_file_that_is_cut_short_is_damaged_or_whole(kind, share):
    content = WHOLE[kind]
    whole = decode_bytes(content, "whole", 3)
    part = content[: int(share * len(content))]
    try:
        found = decode_bytes(part, "part", 3)
    except DamagedImage:
        return
    assert np.array_equal(found, whole)


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(sorted(WHOLE)), st.binary(min_size=1, max_size=8), st.floats(0, 1))
def test_a_file_with_wrong_bytes_never_does_anything_else(kind, bytes_, place):
    content = WHOLE[kind]
    start = int(place * len(content))
    changed = content[:start] + bytes_ + content[start + len(bytes_) :]
    try:
        found = decode_bytes(changed, "changed", 3)
    except DamagedImage:
        return
    assert found.dtype == np.uint8
    assert found.ndim == 3


@pytest.mark.parametrize(("width", "height"), [(50, 31), (31, 50), (8, 8), (300, 5), (1, 1)])
@pytest.mark.parametrize(("resize", "size"), [(16, 16), (18, 16), (40, 33)])
def test_the_centre_is_torchvisions(width, height, resize, size):
    image = np.asarray(picture(width, height))
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)
    expected = functional.center_crop(functional.resize(pixels, [resize], antialias=True), [size, size])
    assert np.array_equal(centred(image, resize, size), expected.permute(1, 2, 0).numpy())


@pytest.mark.parametrize("turned", [False, True])
def test_a_very_long_image_gives_the_same_middle_without_its_ends(turned: bool) -> None:
    """Up to rounding, and where 1,001 columns cannot be cut in equal halves."""
    # Steep: a shift by a pixel of the result would be 8.
    columns = ((np.arange(1001) - 495) * 25).clip(0, 255)
    image = np.broadcast_to(columns.astype(np.uint8)[None, :, None], (10, 1001, 3)).copy()
    whole = torch.from_numpy(image).permute(2, 0, 1)
    resized = functional.resize(whole, [30], antialias=True)
    expected = functional.center_crop(resized, [20, 20]).permute(1, 2, 0).numpy()
    if turned:
        image, expected = image.transpose(1, 0, 2), expected.transpose(1, 0, 2)
    found = centred(image, 30, 20)
    assert found.shape == (20, 20, 3)
    assert np.abs(found.astype(int) - expected).max() <= 1

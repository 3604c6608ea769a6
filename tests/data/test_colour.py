"""Random resized crops and colours: their distribution, and the affine map against the jitters step by step."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastsnap.data import colour
from fastsnap.data.draws import boxes, colour_words

MEAN, STD = (100.0, 110.0, 120.0), (50.0, 60.0, 70.0)


@given(
    st.integers(0, 2**40),
    st.integers(0, 100),
    st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), max_size=8),
)
def test_boxes_lie_within_their_images_and_depend_on_them_alone(seed, epoch, sizes):
    sizes = np.array(sizes, np.int32).reshape(-1, 2)
    found = boxes(seed, epoch, sizes)
    top, left, height, width = found.T
    assert (found >= 0).all()
    assert (
        (height >= 1) & (width >= 1) & (top + height <= sizes[:, 0]) & (left + width <= sizes[:, 1])
    ).all()
    many = np.concatenate([sizes, np.full((500, 2), 64, np.int32)])
    assert np.array_equal(boxes(seed, epoch, many)[: len(sizes)], found)


def test_areas_and_ratios_are_those_of_the_recipe():
    found = boxes(0, 0, np.full((100_000, 2), (1200, 1000), np.int32)).astype(np.float64)
    areas = found[:, 2] * found[:, 3] / 1.2e6
    ratios = found[:, 3] / found[:, 2]
    assert 0.079 < areas.min() < 0.082
    assert 0.95 < areas.max() <= 1
    assert ratios.min() > 3 / 4 - 0.01
    assert ratios.max() < 4 / 3 + 0.01
    # Uniform, but for large areas, which fit at few ratios only.
    shares = np.histogram(areas, bins=[0.08, 0.2, 0.32, 0.44, 0.56])[0]
    assert shares.max() / shares.min() < 1.05
    assert abs(np.log(ratios[areas < 0.5]).mean()) < 0.01
    fractions = found[:, 0] / np.maximum(1, 1200 - found[:, 2])
    assert fractions.mean() == pytest.approx(0.5, abs=0.01)


def test_where_no_box_fits_it_is_the_centre():
    found = boxes(0, 0, np.tile(np.array([[10, 1000], [1000, 10]], np.int32), (200, 1)))
    assert [0, 493, 10, 13] in found[::2].tolist()
    assert [493, 0, 13, 10] in found[1::2].tolist()


def test_many_images_are_drawn_as_few_are():
    sizes = np.full((2**16 + 100, 2), 50, np.int32)
    assert np.array_equal(boxes(3, 1, sizes)[-50:], boxes(3, 1, sizes[: 2**16 + 100])[-50:])
    assert len(np.unique(boxes(3, 1, sizes)[[0, 2**16]], axis=0)) == 2


def by_steps(image, words, jitter, lighting):
    """One jitter after the other, then the lighting; image float64 [H, W, 3]."""
    grey = np.array([0.299, 0.587, 0.114])
    fields = [int(words[0]) >> 33, (int(words[0]) >> 2) & (2**31 - 1), int(words[1]) >> 33]
    factors = [1 + jitter * (2 * field / 2**31 - 1) for field in fields]
    for which in colour.ORDERS[((int(words[1]) >> 2) & (2**31 - 1)) * 6 >> 31]:
        factor = factors[which]
        other = (0, (image @ grey).mean(), (image @ grey)[..., None])[which]
        image = factor * image + (1 - factor) * other
    uniform = [value for word in words[2:] for value in (int(word) >> 32, int(word) & (2**32 - 1))]
    first, second, third, fourth = (value / 2**32 for value in uniform)
    normal = [
        np.sqrt(-2 * np.log(1 - first)) * np.cos(2 * np.pi * second),
        np.sqrt(-2 * np.log(1 - third)) * np.cos(2 * np.pi * fourth),
        np.sqrt(-2 * np.log(1 - first)) * np.sin(2 * np.pi * second),
    ]
    for value, eigenvalue, eigenvector in zip(normal, colour.EIGENVALUES, colour.EIGENVECTORS.T, strict=True):
        image = image + 255 * lighting * value * eigenvalue * eigenvector
    return image


def applied(image, transform):
    """A x + K mean(x) + d."""
    channels = image.shape[2]
    matrix, of_mean, offset = (
        transform[:channels],
        transform[channels : 2 * channels],
        transform[2 * channels],
    )
    return image @ matrix.T + of_mean @ image.mean(axis=(0, 1)) + offset


@pytest.mark.parametrize(("jitter", "lighting"), [(0.4, 0.1), (0.4, 0.0), (0.0, 0.1), (0.0, 0.0)])
def test_one_map_does_what_the_steps_do(jitter, lighting):
    generator = np.random.default_rng(0)
    words = colour_words(5, 2, 24)
    found = colour.transforms(words, jitter, lighting, MEAN, STD).astype(np.float64)
    for own, transform in zip(words, found, strict=True):
        image = generator.integers(0, 256, (6, 5, 3)).astype(np.float64)
        expected = (by_steps(image, own, jitter, lighting) - MEAN) / STD
        np.testing.assert_allclose(applied(image, transform), expected, rtol=0, atol=1e-4)


def test_a_grey_image_has_brightness_and_contrast_alone():
    words = colour_words(5, 2, 24)
    found = colour.transforms(words, 0.4, 0.1, MEAN[:1], STD[:1])
    image = np.arange(20.0).reshape(4, 5, 1)
    for own, transform in zip(words, found, strict=True):
        coloured = np.repeat(image, 3, axis=2)
        expected = (by_steps(coloured, own, 0.4, 0.0)[..., :1] - MEAN[0]) / STD[0]
        np.testing.assert_allclose(applied(image, transform.astype(np.float64)), expected, rtol=0, atol=1e-4)


def test_all_orders_and_all_factors_come():
    words = colour_words(0, 0, 20_000)
    found = colour.transforms(words, 0.4, 0.0, (0.0,), (1.0,))[:, :2, 0].sum(1)  # of a constant grey image
    assert 0.6 <= found.min() < 0.62
    assert 1.38 < found.max() <= 1.4
    assert found.mean() == pytest.approx(1, abs=0.01)
    orders = ((words[:, 1] >> np.uint64(2)) & np.uint64(2**31 - 1)) * np.uint64(6) >> np.uint64(31)
    assert np.bincount(orders.astype(int)).min() > 3000


def test_lighting_has_the_deviation_that_is_asked_for():
    found = colour.transforms(colour_words(1, 0, 20_000), 0.0, 0.1, (0.0,) * 3, (1.0,) * 3)[:, 6]
    expected = 255 * 0.1 * np.sqrt((colour.EIGENVECTORS**2) @ (colour.EIGENVALUES**2))
    np.testing.assert_allclose(found.std(axis=0), expected, rtol=0.03)
    np.testing.assert_allclose(found.mean(axis=0), 0, atol=0.1)

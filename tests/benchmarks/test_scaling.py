"""Exponents from measurements."""

import pytest

import scaling


def test_an_exponent_is_found_with_its_standard_error() -> None:
    sizes = [1, 2, 4, 8]
    exponent, error = scaling.fit_exponent(sizes, [3 * size**1.5 for size in sizes])
    assert exponent == pytest.approx(1.5)
    assert error == pytest.approx(0, abs=1e-6)
    _, error = scaling.fit_exponent(sizes, [1, 2.2, 3.9, 8.1])
    assert error is not None
    assert 0.01 < error < 0.1
    assert scaling.fit_exponent([1, 10], [5, 5]) == (0, None)
    with pytest.raises(ValueError, match="two or more sizes"):
        scaling.fit_exponent([1, 2], [0, 1])

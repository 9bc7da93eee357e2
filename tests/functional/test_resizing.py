"""Resizing by matrix products is torch's linear interpolation, gradient and all."""

import pytest
import torch
import torch.nn.functional as F

from labeleff.functional.resizing import SHORT, by_products, resized

SIZES = [((8, 6), (12, 9)), ((16, 9), (11, 9)), ((1, 5), (4, 1)), ((4, 6, 5), (7, 3, 10)), ((5, 1, 8), (5, 3, 4))]


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize(("given", "made"), SIZES)
def test_equal_to_interpolation(given, made, align_corners):
    torch.manual_seed(0)
    maps = torch.randn(2, 3, *given, dtype=torch.float64, requires_grad=True)
    mode = "bilinear" if len(given) == 2 else "trilinear"
    expected = F.interpolate(maps, made, mode=mode, align_corners=align_corners)
    found = by_products(maps, made, align_corners=align_corners)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(expected)
    one, other = (torch.autograd.grad((result * weight).sum(), maps)[0] for result in (expected, found))
    torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(resized(maps, made, align_corners=align_corners), expected, rtol=1e-10, atol=1e-10)


def test_long_axes_are_left_to_torch():
    maps = torch.randn(1, 1, 4, 4, 4)
    size = (2, 2, SHORT + 1)
    expected = F.interpolate(maps, size, mode="trilinear", align_corners=True)
    assert torch.equal(resized(maps, size, align_corners=True), expected)


def test_images_are_enlarged_by_products_and_shrunk_by_torch():
    maps = torch.randn(1, 2, 9, 11)
    for size in ((9, 16), (14, 11)):
        assert torch.equal(resized(maps, size, align_corners=True), by_products(maps, size, align_corners=True))
    expected = F.interpolate(maps, (8, 16), mode="bilinear", align_corners=True)
    assert torch.equal(resized(maps, (8, 16), align_corners=True), expected)


def test_in_low_precision_the_type_stays_and_digits_are_kept():
    maps = torch.randn(1, 2, 6, 6, 6).bfloat16()
    found = by_products(maps, (9, 9, 9), align_corners=True)
    assert found.dtype == torch.bfloat16
    expected = F.interpolate(maps.float(), (9, 9, 9), mode="trilinear", align_corners=True)
    torch.testing.assert_close(found.float(), expected, rtol=2**-8, atol=1e-6)

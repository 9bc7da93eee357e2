"""Pooling by matrix products is torch's adaptive pooling, gradient and all."""

import pytest
import torch
import torch.nn.functional as F

from labeleff.functional.resizing import pooled


@pytest.mark.parametrize(("shape", "grid"), [((4, 4), 8), ((7, 9), 4), ((16, 24), 8), ((5, 6, 7), 3), ((2, 8, 3), 4)])
def test_equal_to_adaptive_pooling(shape, grid):
    torch.manual_seed(0)
    maps = torch.randn(2, 3, *shape, dtype=torch.float64, requires_grad=True)
    plain = F.adaptive_avg_pool2d if len(shape) == 2 else F.adaptive_avg_pool3d
    expected, found = plain(maps, grid), pooled(maps, grid)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(expected)
    one, other = (torch.autograd.grad((result * weight).sum(), maps)[0] for result in (expected, found))
    torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-12)


def test_in_low_precision_the_type_stays():
    maps = torch.randn(1, 2, 6, 6, dtype=torch.bfloat16)
    assert pooled(maps, 4).dtype == torch.bfloat16


def test_mixed_precision_takes_no_digits():
    torch.manual_seed(0)
    maps = torch.randn(1, 2, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = pooled(maps, 4)
    torch.testing.assert_close(found, F.adaptive_avg_pool2d(maps, 4), rtol=1e-6, atol=1e-6)

"""Curves are drawn where they were counted."""

import io

import numpy as np
from PIL import Image

from labeleff.report.curves import draw_curves, fitted, has_curves


def test_a_fit_stands_where_its_points_stand():
    n, time = 20, np.linspace(0, 20, 20)
    curve = 0.8 * (1 - np.exp(-(time**0.9) / 3))
    windows, values = fitted(curve, 5)
    assert (windows[0], windows[-1]) == (6, 25)
    at_points = np.interp(np.arange(6, 26), windows, values)
    np.testing.assert_allclose(at_points, curve, atol=0.02)
    assert len(curve) == n


def test_a_picture_is_drawn_for_any_curve():
    curves = {1: [0.1, 0.4, 0.6, 0.7], 2: [None, None, None, None], 3: [0.0, 0.0, 0.2, None]}
    described = {f"iou/{c}": curve for c, curve in curves.items()}
    described |= {f"skipped/{c}": float(c - 1) for c in curves} | {
        f"due_since/{c}": 3.0 if c == 1 else -1.0 for c in curves
    }
    described |= {f"window/{c}": 4.0 for c in curves}
    assert has_curves(described)
    assert not has_curves({"flagged_share": 0.1})
    with Image.open(io.BytesIO(draw_curves(described, ("background", "a", "b", "c")))) as picture:
        assert picture.size[0] > 2 * picture.size[1]

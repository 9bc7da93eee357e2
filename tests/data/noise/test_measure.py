"""What noise did, against counts made by hand."""

import json

import numpy as np
import pytest

from labeleff.batch import IGNORE
from labeleff.data.noise.measure import Achieved


def test_counts_of_two_small_cases():
    clean = np.zeros((10, 10), np.uint8)
    clean[2:6, 2:6] = 1  # 16
    clean[8, 8] = 2
    noisy = np.zeros((10, 10), np.uint8)
    noisy[2:6, 2:4] = 1  # half of it
    noisy[0, 9] = 1  # an object that is not there
    clean[9, 0] = noisy[9, 0] = IGNORE
    found = Achieved(("background", "one", "two"))
    found.add("a", clean, noisy, spacing=(1.0, 1.0), strength={1: 2.0})
    found.add("b", clean, clean, spacing=(1.0, 1.0), strength={})
    summary = found.summary()
    one, two = summary["classes"]["one"], summary["classes"]["two"]
    assert one["dice"] == pytest.approx((2 * 8 / (16 + 9) + 1) / 2)
    assert one["dice_pooled"] == pytest.approx(2 * 24 / (32 + 25))
    assert one["iou_pooled"] == pytest.approx(24 / (32 + 25 - 24))
    assert one["volume_error"] == pytest.approx((9 / 16 - 1) / 2)
    assert (one["objects"], one["objects_missed"], one["objects_spurious"]) == (2, 0, 1)
    assert (two["objects"], two["objects_missed"], two["objects_spurious"]) == (2, 1, 0)
    # foreground: common 24 + 1, clean 34, noisy 26, union of each class 33 + 2
    assert summary["noise_level"] == pytest.approx(1 - 25 / 35)
    assert summary["voxel_error"] == pytest.approx((8 + 1 + 1) / 198)
    assert summary["noisy_given_clean"][1] == pytest.approx([8 / 32, 24 / 32, 0.0])
    assert summary["clean_given_noisy"][1] == pytest.approx([1 / 25, 24 / 25, 0.0])
    assert (summary["cases"], summary["cases_touched"]) == (2, 1)
    assert "NaN" not in json.dumps(summary)


def test_the_band_is_in_millimetres():
    clean = np.zeros((60, 60), np.uint8)
    clean[:, 30:] = 1
    noisy = clean.copy()
    noisy[:, 2] = 1  # far from the boundary
    noisy[:, 28] = 1  # near
    found = Achieved(("background", "one"))
    found.add("a", clean, noisy, spacing=(1.0, 1.0), strength={})
    assert found.summary()["voxel_error_near_boundaries"] == pytest.approx(1 / 12)  # columns 24 … 35
    finer = Achieved(("background", "one"))
    finer.add("a", clean, noisy, spacing=(1.0, 0.25), strength={})
    assert finer.summary()["voxel_error_near_boundaries"] == pytest.approx(1 / 42)

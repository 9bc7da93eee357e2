"""What RIPU's scores and selections cost: ``python benchmarks/region_score.py``.

One thread, CPU time, medians of interleaved repetitions in one process, on smooth random logits:

* the region-based score over log-softmax and entropy of the same logits, at a small and at a large radius, and these two
  over one another;
* its dense form, a convolution per class as wide as the window, over the score: in the memory layout of the authors' code
  (class by class; one repetition, since it takes half a minute), and in the one that oneDNN is quick in (classes last);
* a loop of one argmax over the map per pick, and the authors' of two maxima per pick, over the selection of as many.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import provenance, write
from torch import Tensor

from labeleff.functional.ripu import region_score, select_regions
from labeleff.process import set_up_process

ROUNDS, FEW, COARSE = 15, 3, 16
MAPS = {
    "2-D": {"shape": (1, 19, 512, 1024), "small": (1, 1), "large": (16, 16)},
    "3-D": {"shape": (1, 4, 64, 160, 160), "small": (1, 1, 1), "large": (2, 8, 8)},
    # a dense window of 33 x 33 x 33 is feasible in a small volume only
    "3-D, radius 16 on all axes": {"shape": (1, 2, 48, 64, 64), "small": (1, 1, 1), "large": (16, 16, 16)},
}
SELECTIONS = {
    "2-D 257": {"shape": (1, 19, 512, 1024), "radius": (1, 1), "count": 257},
    "2-D 1026": {"shape": (1, 19, 1024, 2048), "radius": (1, 1), "count": 1026},
    "2-D wide 26": {"shape": (1, 19, 1024, 2048), "radius": (9, 9), "count": 26},
    "3-D 257": {"shape": (1, 4, 64, 160, 160), "radius": (1, 1, 1), "count": 257},
    "3-D wide 30": {"shape": (1, 4, 64, 160, 160), "radius": (2, 8, 8), "count": 30},
}


def medians(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Return the median CPU seconds of each call; every other round goes backwards, the first is not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name in list(calls)[:: 1 if number % 2 else -1]:
            start = time.process_time()
            calls[name]()
            times[name].append(time.process_time() - start)
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}


def smooth_logits(shape: tuple[int, ...]) -> Tensor:
    """Return random logits that change over 16 voxels or so."""
    coarse = torch.randn(*shape[:2], *(n // COARSE for n in shape[2:]), generator=torch.Generator().manual_seed(0)) * 3
    return F.interpolate(coarse, shape[2:], mode="bilinear" if len(shape) == 4 else "trilinear")


def log_softmax_entropy(logits: Tensor) -> Tensor:
    """Return the plain entropy [B, *S]: what a score cannot do without."""
    log_p = F.log_softmax(logits, 1)
    return -(log_p.exp() * log_p).sum(1)


def dense_score(logits: Tensor, radius: tuple[int, ...], *, classes_last: bool) -> Tensor:
    """Return the region-based score by convolutions as wide as the window, as the authors compute it."""
    convolve = F.conv2d if len(radius) == 2 else F.conv3d
    classes = logits.shape[1]
    ones = torch.ones(classes, 1, *(2 * r + 1 for r in radius))
    p = logits.softmax(1)
    entropy = -(p * (p + 1e-6).log()).sum(1, keepdim=True)
    count = convolve(torch.ones_like(entropy), ones[:1], padding=radius)
    hot = F.one_hot(p.argmax(1), classes).float().movedim(-1, 1)  # classes last
    share = convolve(hot if classes_last else hot.contiguous(), ones, padding=radius, groups=classes) / count
    impurity = -(share * (share + 1e-6).log()).sum(1)
    return impurity * (convolve(entropy, ones[:1], padding=radius) / count)[:, 0] / math.log(classes) ** 2


def loop(score: Tensor, radius: tuple[int, ...], count: int, best: Callable[[Tensor], tuple[int, ...]]) -> list[Any]:
    """Return the picks of a search through the whole map per pick."""
    score, picks = score.clone(), []
    for _ in range(count):
        picks.append(best(score))
        score[
            tuple(slice(max(a - 2 * r, 0), a + 2 * r + 1) for a, r in zip(picks[-1], radius, strict=True))
        ] = -torch.inf
    return picks


def by_argmax(score: Tensor) -> tuple[int, ...]:
    """Return the first largest place of the flat map."""
    return tuple(int(a) for a in torch.unravel_index(score.argmax(), score.shape))


def by_axes(score: Tensor) -> tuple[int, ...]:
    """Return the largest place as the authors find it: the maxima along one axis after the other."""
    along = []
    while score.ndim:
        score, index = score.max(0)
        along.append(index)
    place: tuple[int, ...] = ()
    for index in reversed(along):
        place = (int(index[place]), *place)
    return place


def scores(shape: tuple[int, ...], small: tuple[int, ...], large: tuple[int, ...]) -> dict[str, float]:
    """Return seconds and ratios of scores of one map."""
    logits = smooth_logits(shape)
    calls = {
        "entropy": lambda: log_softmax_entropy(logits),
        "small": lambda: region_score(logits, small),
        "large": lambda: region_score(logits, large),
    }
    took = medians(calls, ROUNDS)
    fewer = {
        "dense_small": lambda: dense_score(logits, small, classes_last=False),
        "dense_small_classes_last": lambda: dense_score(logits, small, classes_last=True),
        "dense_large_classes_last": lambda: dense_score(logits, large, classes_last=True),
    }
    took |= medians(fewer, FEW)
    took |= medians({"dense_large": lambda: dense_score(logits, large, classes_last=False)}, 1)
    error = (region_score(logits, large) - dense_score(logits, large, classes_last=True)).abs().max()
    return {
        **{f"{name}_seconds": value for name, value in took.items()},
        "small_over_entropy": took["small"] / took["entropy"],
        "large_over_entropy": took["large"] / took["entropy"],
        "large_over_small": took["large"] / took["small"],
        **{f"{name}_over_score": took[name] / took[name.split("_")[1]] for name in [*fewer, "dense_large"]},
        "largest_difference_from_dense": float(error),
    }


def selection(shape: tuple[int, ...], radius: tuple[int, ...], count: int) -> dict[str, Any]:
    """Return seconds and ratios of one selection."""
    score = region_score(smooth_logits(shape), radius)[0]
    calls = {
        "selection": lambda: select_regions(score, radius, count),
        "argmax": lambda: loop(score, radius, count, by_argmax),
        "authors": lambda: loop(score, radius, count, by_axes),
    }
    same = calls["selection"]().tolist() == [list(place) for place in calls["authors"]()]
    took = medians(calls, FEW)
    took["selection"] = medians({"selection": calls["selection"]}, ROUNDS)["selection"]
    return {
        **{f"{name}_seconds": value for name, value in took.items()},
        "argmax_over_selection": took["argmax"] / took["selection"],
        "authors_over_selection": took["authors"] / took["selection"],
        "same_picks_as_authors": same,
    }


def main() -> None:
    """Measure and write ``results/region_score.json``."""
    set_up_process(1)
    result: dict[str, Any] = {**provenance(), "scores": {}, "selections": {}}
    for part, function, cases in (("scores", scores, MAPS), ("selections", selection, SELECTIONS)):
        for name, options in cases.items():
            result[part][name] = {**options, **function(**options)}
            print(name, {k: round(v, 4) for k, v in result[part][name].items() if isinstance(v, float)}, flush=True)
    write("region_score", result)


if __name__ == "__main__":
    main()

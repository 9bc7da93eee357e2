"""Contrast between images and between regions, against loops of Python floats that go pair by pair."""

import itertools
import math

import numpy as np
import pytest
import torch

from labeleff.errors import ShapeError
from labeleff.functional.glcl import global_loss, local_loss, region_table, windows


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cosine(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(a @ b) / (math.sqrt(max(float(a @ a), 1e-12)) * math.sqrt(max(float(b @ b), 1e-12)))


def term(anchor, positive, negatives, tau):
    """-log of the share of the positive, as it is written."""
    top = math.exp(cosine(anchor, positive) / tau)
    return -math.log(top / (top + math.fsum(math.exp(cosine(anchor, n) / tau) for n in negatives)))


# -- between images -------------------------------------------------------------------------------------------------------


def batch(scheme, volumes=3, parts=4):
    """Rows in the order of the authors: their position stands for (version, volume, partition)."""
    versions = {"gr": 2, "gd-": 3, "gd": 2}[scheme]
    if scheme == "gd":  # originals of a volume, then their views
        rows = list(itertools.product(range(volumes), range(versions), range(parts)))
        rows = [(version, volume, part) for volume, version, part in rows]
    else:
        rows = list(itertools.product(range(versions), range(volumes), range(parts)))
    version, volume, part = (torch.tensor(column) for column in zip(*rows, strict=True))
    return {"image": volume * parts + part, "partition": part, "volume": volume, "version": version}


def gr_by_hand(z, tau, volumes, parts):
    count = volumes * parts
    total = 0.0
    for i in range(count):
        negatives = [z[r] for r in range(2 * count) if r % count != i]
        total += term(z[i], z[i + count], negatives, tau) + term(z[i + count], z[i], negatives, tau)
    return total / (2 * count)


def gd_minus_by_hand(z, tau, volumes, parts):
    count = volumes * parts
    total = 0.0
    for i in range(count):
        negatives = [z[r] for r in range(3 * count) if r % count % parts != i % parts]
        for a, b in ((0, 1), (0, 2), (1, 2)):
            one, two = z[i + a * count], z[i + b * count]
            total += term(one, two, negatives, tau) + term(two, one, negatives, tau)
    return total / (3 * count)


def gd_by_hand(z, tau, volumes, parts):
    """Visit the volumes as the authors' loop does: o_k and a_k, then both with the next; the first pair from either side."""
    total = 0.0
    for s in range(parts):
        negatives = [z[r] for r in range(len(z)) if r % parts != s]
        for k in range(volumes):
            after = (k + 1) % volumes
            own, view = z[2 * k * parts + s], z[(2 * k + 1) * parts + s]
            own_after, view_after = z[2 * after * parts + s], z[(2 * after + 1) * parts + s]
            for one, two in ((own, view), (own, view), (own, own_after), (view, view_after)):
                total += term(one, two, negatives, tau) + term(two, one, negatives, tau)
    return total / len(z)


BY_HAND = {"gr": gr_by_hand, "gd-": gd_minus_by_hand, "gd": gd_by_hand}


@pytest.mark.parametrize("temperature", [0.1, 0.7])
@pytest.mark.parametrize(("volumes", "parts"), [(2, 2), (3, 4), (4, 3)])
@pytest.mark.parametrize("scheme", BY_HAND)
def test_global_loss_is_the_loop(scheme, volumes, parts, temperature):
    ids = batch(scheme, volumes, parts)
    z = random(len(ids["image"]), 5)
    found = global_loss(z, scheme=scheme, **ids, temperature=temperature)
    expected = BY_HAND[scheme](z.double().numpy(), temperature, volumes, parts)
    assert found.shape == ()
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_two_images_worked_out():
    # views at right angles to those of the other image: E of the positive e², of each of two negatives 1
    z = torch.tensor([[3.0, 0.0], [0.0, 1.0], [5.0, 0.0], [0.0, 0.1]])
    ids = torch.tensor([0, 1, 0, 1])
    found = global_loss(z, image=ids, partition=ids, volume=ids, version=torch.tensor([0, 0, 1, 1]), temperature=0.5)
    assert float(found) == pytest.approx(math.log(1 + 2 * math.exp(-2)), rel=1e-6)


@pytest.mark.parametrize(
    ("scheme", "volumes", "value"),
    [("gr", 3, math.log(23)), ("gd-", 3, 2 * math.log(28)), ("gd", 6, 4 * math.log(37)), ("gd", 2, 4 * math.log(13))],
)
def test_what_a_network_scores_that_tells_nothing_apart(scheme, volumes, value):
    ids = batch(scheme, volumes)
    flat = torch.ones(len(ids["image"]), 8)
    assert float(global_loss(flat, scheme=scheme, **ids)) == pytest.approx(value, rel=1e-6)
    assert float(global_loss(0 * flat, scheme=scheme, **ids)) == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("scheme", BY_HAND)
def test_only_ids_count_not_the_order_of_rows_nor_lengths(scheme):
    ids = batch(scheme)
    z = random(len(ids["image"]), 6)
    plain = global_loss(z, scheme=scheme, **ids)
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(1))
    lengths = torch.rand(len(z), 1, generator=torch.Generator().manual_seed(2)) * 50 + 0.01
    moved = {name: 7 * value[order] + 3 if name != "version" else value[order] for name, value in ids.items()}
    torch.testing.assert_close(global_loss((z * lengths)[order], scheme=scheme, **moved), plain)
    unread = {"gr": ["partition", "volume", "version"], "gd-": ["volume"], "gd": ["image"]}[scheme]
    other = global_loss(z, scheme=scheme, **ids | dict.fromkeys(unread, torch.zeros(1)))
    assert torch.equal(other, plain)


@pytest.mark.parametrize("scheme", BY_HAND)
def test_global_gradient_is_that_of_the_loop(scheme):
    ids = batch(scheme, 2, 2)
    z = random(len(ids["image"]), 3).requires_grad_()
    global_loss(z, scheme=scheme, **ids, temperature=0.5).backward()
    values = z.detach().double().numpy()
    for row, column in ((0, 0), (3, 2), (len(z) - 1, 1)):
        ends = []
        for step in (1e-5, -1e-5):
            moved = values.copy()
            moved[row, column] += step
            ends.append(BY_HAND[scheme](moved, 0.5, 2, 2))
        assert float(z.grad[row, column]) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-3, abs=1e-5)
    assert (z.grad.abs().sum(1) > 0).all()  # anchors, positives and negatives


@pytest.mark.parametrize("scheme", BY_HAND)
def test_black_images_and_low_temperatures_leave_everything_finite(scheme):
    ids = batch(scheme)
    z = random(len(ids["image"]), 6)
    z[::3] = 0
    z[1::3] *= 1e-30
    for temperature in (0.1, 1e-3):  # exp(1 / 0.001) is no number
        moving = z.clone().requires_grad_()
        loss = global_loss(moving, scheme=scheme, **ids, temperature=temperature)
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(moving.grad).all()
        assert moving.grad[::3].abs().max() == 0
        assert moving.grad[2::3].abs().max() > 0


def test_half_precision_in_full_precision_out():
    ids = batch("gd")
    z = random(len(ids["image"]), 16).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = global_loss(z, scheme="gd", **ids)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(gd_by_hand(z.double().numpy(), 0.1, 3, 4), rel=1e-5)


def without(ids, row):
    return {name: torch.cat([value[:row], value[row + 1 :]]) for name, value in ids.items()}


@pytest.mark.parametrize(
    ("scheme", "changed", "said"),
    [
        ("gr", lambda ids: without(ids, 5), "image 5 has 1 rows; exactly 2"),
        ("gr", lambda ids: ids | {"image": torch.zeros(24, dtype=torch.long)}, "image 0 has 24 rows"),
        ("gr", lambda ids: {name: value[[0, 12]] for name, value in ids.items()}, "all 2 rows are of one image"),
        ("gr", lambda ids: ids | {"image": ids["image"][:-1]}, "image must be one whole number for each of 24 rows"),
        ("gr", lambda ids: ids | {"image": ids["image"].float()}, "image must be one whole number"),
        ("gd-", lambda ids: ids | {"image": torch.arange(36)}, "image 0 has 1 rows; 2 or more"),
        ("gd-", lambda ids: ids | {"partition": ids["partition"].roll(1)}, None),
        ("gd-", lambda ids: ids | {"partition": torch.arange(36) % 5}, "in different partitions"),
        ("gd-", lambda ids: ids | {"partition": torch.zeros(36, dtype=torch.long)}, "all 36 rows are of one partition"),
        ("gd-", lambda ids: ids | {"version": ids["version"].clamp_max(1)}, "the same version"),
        ("gd", lambda ids: without(ids, 6), "0 rows are of volume 0, partition 2, version 1"),
        ("gd", lambda ids: ids | {"volume": torch.zeros(24, dtype=torch.long)}, "all rows are of one volume"),
        ("gd", lambda ids: ids | {"version": ids["version"] + 1}, "version must be 0"),
        ("gd", lambda ids: batch("gd", 2, 1), "all 4 rows are of one partition"),
        ("gd2", lambda ids: ids, "there are gr, gd- and gd"),
    ],
)
def test_ids_that_describe_no_such_batch(scheme, changed, said):
    ids = changed(batch(scheme if scheme != "gd2" else "gd"))
    z = random(len(ids["version"]), 4)
    if said is None:  # the partitions are only numbered otherwise
        assert torch.isfinite(global_loss(z, scheme=scheme, **ids))
        return
    with pytest.raises(ShapeError, match=said) as error:
        global_loss(z, scheme=scheme, **ids)
    assert "\n" not in str(error.value)


# -- between regions ------------------------------------------------------------------------------------------------------

# the specification's lists; * marks a corner that is no region itself
LISTS = {
    (3, 13): """00 | 02 11 12* 20 21* | 42 | 22 40 44 31 33
        02 | 00 04 11 13 22 | 44 | 23* 24 42 33 32*
        04 | 02 12* 13 23* 24 | 11 | 00 02 20 22 13
        20 | 00 11 22 40 31 | 13 | 02 04 11 22 24
        22 | 11 13 31 33 20 | 31 | 20 22 40 42 33
        24 | 04 22 44 13 33 | 33 | 22 24 42 44 31
        40 | 20 21* 42 31 32*""",
    (3, 9): """00 | 02 20 22 04 40
        02 | 00 04 20 22 24
        04 | 00 02 22 24 44
        20 | 00 02 22 40 42
        22 | 00 02 20 24 42
        24 | 02 04 22 42 44
        40 | 00 20 22 42 44
        42 | 20 22 24 40 44
        44 | 04 22 24 40 42""",
    (1, 13): """00 | 02 20 22 11 13
        02 | 00 04 22 11 13
        04 | 02 22 24 31 13
        20 | 00 22 40 11 31
        22 | 11 13 31 33 20
        24 | 04 22 44 13 33
        40 | 20 22 42 31 11
        42 | 22 40 44 31 33
        44 | 22 24 42 33 31
        11 | 00 02 20 22 13
        13 | 02 04 22 24 33
        31 | 20 22 40 02 11
        33 | 22 24 42 44 13""",
}
LISTS[1, 9] = LISTS[3, 9]


def listed(size, regions):
    """Return {region: its negatives} in quarters."""
    cells = [cell.split() for line in LISTS[size, regions].splitlines() for cell in line.split("|")]
    pairs = zip(cells[::2], cells[1::2], strict=True)
    return {tuple(map(int, u)): [(int(v[0]), int(v[1])) for v in near] for (u,), near in pairs}


def nearest(regions):
    """Return {region: the five nearest others} in 3-D; of equal distances the smallest corner first."""
    points = [p for p in itertools.product(range(5), repeat=3) if len({q % 2 for q in p}) == 1]
    points = [p for p in points if regions == 35 or p[0] % 2 == 0]
    found = {}
    for u in points:
        rest = [(sum((a - b) ** 2 for a, b in zip(u, v, strict=True)), v) for v in points if v != u]
        found[u] = [v for _, v in sorted(rest)[:5]]
    return found


def table_of(ndim, size, regions):
    return listed(size, regions) if ndim == 2 else nearest(regions)


def corners(table):
    return {*table, *itertools.chain.from_iterable(table.values())}


def region(map_, corner, size):
    """Return the window of one map [C, *S] at a corner, channels innermost."""
    start = [int(q * (n - (4 if size == 3 else 1)) / 4) for q, n in zip(corner, map_.shape[1:], strict=True)]
    values = []
    for offset in itertools.product(range(size), repeat=len(start)):
        values += [map_[(c, *(s + o for s, o in zip(start, offset, strict=True)))] for c in range(len(map_))]
    return np.array(values)


def contrast(one, other, table, size, tau, count=5):
    """Return the sum over regions of d(one, other, region)."""
    total = 0.0
    own, away = ({u: region(m, u, size) for u in corners(table)} for m in (one, other))
    for u, near in table.items():
        total += term(own[u], away[u], [m[v] for v in near[:count] for m in (own, away)], tau)
    return total


def local_by_hand(scheme, f, g, table, size, tau, parts):
    total = 0.0
    for i in range(len(f)):
        if scheme == "lr":
            total += contrast(f[i], g[i], table, size, tau) + contrast(g[i], f[i], table, size, tau)
        else:
            total += contrast(f[i], g[i], table, size, tau, 4)
            for j in range(len(f)):
                if j != i and j % parts == i % parts:
                    total += contrast(f[i], f[j], table, size, tau, 4)
    return total / (2 * len(f) * len(table))


CASES = [
    # axes, scheme, regions, side, shape of the map, rows, partitions
    (2, "lr", 13, 3, (9, 12), 2, 4),
    (2, "lr", 9, 3, (8, 8), 1, 4),
    (2, "lr", 13, 1, (6, 5), 2, 4),
    (2, "lr", 9, 1, (7, 9), 1, 4),
    (2, "ld", 13, 3, (9, 8), 12, 4),
    (2, "ld", 13, 1, (6, 5), 4, 2),
    (2, "ld", 9, 1, (5, 5), 9, 3),
    (3, "lr", 35, 3, (8, 9, 10), 1, 4),
    (3, "lr", 27, 1, (5, 6, 7), 2, 4),
    (3, "ld", 35, 1, (5, 6, 7), 6, 2),
]


@pytest.mark.parametrize(("ndim", "scheme", "regions", "size", "shape", "rows", "parts"), CASES)
def test_local_loss_is_the_loop(ndim, scheme, regions, size, shape, rows, parts):
    f, g = random(rows, 2, *shape), random(rows, 2, *shape, seed=1)
    f, g = f + 1.5 * f.mean(0), g + f  # so that some are alike
    found = local_loss(f, g, scheme=scheme, regions=regions, size=size, temperature=0.4, partitions=parts)
    table = table_of(ndim, size, regions)
    expected = local_by_hand(scheme, f.double().numpy(), g.double().numpy(), table, size, 0.4, parts)
    assert len(table) == regions
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("ndim", "scheme", "rows", "value"),
    [
        (2, "lr", 1, math.log(11)),
        (2, "ld", 12, 1.5 * math.log(9)),
        (3, "lr", 2, math.log(11)),
        (2, "ld", 8, math.log(9)),
    ],
)
def test_what_maps_score_that_tell_nothing_apart(ndim, scheme, rows, value):
    flat = torch.ones(rows, 3, *[8] * ndim)
    for scale in (1.0, 0.0):
        found = local_loss(scale * flat, scale * flat, scheme=scheme, regions=13 if ndim == 2 else 35)
        assert float(found) == pytest.approx(value, rel=1e-6)


def test_one_region_by_hand():
    # one channel per corner: the region in the middle is like itself and at right angles to all others
    f = torch.zeros(1, 25, 5, 5)
    f[0, torch.arange(25), torch.arange(25) // 5, torch.arange(25) % 5] = 1
    found = local_loss(f, f, size=1, temperature=0.5)
    assert float(found) == pytest.approx(math.log(1 + 10 * math.exp(-2)), rel=1e-6)


def test_the_authors_never_read_the_last_row_and_column():
    f, g = random(1, 2, 12, 12).requires_grad_(), random(1, 2, 12, 12, seed=1)
    local_loss(f, g).backward()
    read = f.grad.abs().sum((0, 1)) > 0
    assert not read[-1].any()
    assert not read[:, -1].any()
    assert read[0, 0]
    assert read[-2, -2]


@pytest.mark.parametrize("ndim", [2, 3])
def test_regions_are_projected_space_first(ndim):
    shape, regions = ((9, 8), 13) if ndim == 2 else ((8, 9, 8), 35)
    f, g = random(2, 3, *shape), random(2, 3, *shape, seed=1)
    weight = random(4, 3**ndim * 3, seed=2)
    found = local_loss(f, g, regions=regions, project=lambda x: x @ weight.t())
    table = table_of(ndim, 3, regions)
    projected = []
    for maps in (f, g):
        values = maps.double().numpy()
        projected.append([{u: weight.double().numpy() @ region(m, u, 3) for u in corners(table)} for m in values])
    total = 0.0
    for one, other in zip(*projected, strict=True):
        for a, b in ((one, other), (other, one)):
            total += sum(term(a[u], b[u], [m[v] for v in near for m in (a, b)], 0.1) for u, near in table.items())
    assert float(found) == pytest.approx(total / (4 * len(table)), rel=1e-5)
    cells = windows(f, region_table(ndim, regions, 3), 3)
    first = region_table(ndim, regions, 3).corners
    for number in (0, 5, len(first) - 1):
        np.testing.assert_array_equal(cells[1, number], region(f[1].numpy(), first[number], 3))


def test_tables_are_the_authors_in_two_dimensions():
    for size, regions in LISTS:
        table = region_table(2, regions, size)
        found = {
            table.corners[u]: [table.corners[v] for v in near]
            for u, near in zip(table.regions, table.near, strict=True)
        }
        assert found == listed(size, regions)
        extra = {v.strip("*") for v in LISTS[size, regions].split() if v.endswith("*")}
        assert {"".join(map(str, c)) for c in set(table.corners) - set(found)} == extra


def test_tables_in_three_dimensions_do_not_hold_a_region_against_itself():
    for regions in (35, 27):
        table = region_table(3, regions, 3)
        assert len(table.corners) == len(set(table.regions)) == regions
        for u, near in zip(table.regions, table.near, strict=True):
            assert len({*near} - {u}) == 5
    far = {table.corners[u]: near for u, near in zip(table.regions, table.near, strict=True)}
    assert [table.corners[v] for v in far[0, 0, 0]] == [(0, 0, 2), (0, 2, 0), (2, 0, 0), (0, 2, 2), (2, 0, 2)]


@pytest.mark.parametrize("scheme", ["lr", "ld"])
def test_local_gradients_are_finite_and_those_of_the_loop(scheme):
    f, g = random(4, 2, 5, 5), random(4, 2, 5, 5, seed=1)
    f[0], g[1] = 0, 1e-30
    f.requires_grad_()
    loss = local_loss(f, g, scheme=scheme, size=1, partitions=2, temperature=0.3)
    loss.backward()
    assert torch.isfinite(f.grad).all()
    assert f.grad[0].abs().max() == 0
    values, table = f.detach().double().numpy(), listed(1, 13)
    for index in ((1, 0, 0, 0), (2, 1, 2, 2), (3, 0, 3, 1)):
        ends = []
        for step in (1e-5, -1e-5):
            moved = values.copy()
            moved[index] += step
            ends.append(local_by_hand(scheme, moved, g.double().numpy(), table, 1, 0.3, 2))
        assert float(f.grad[index]) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-3, abs=1e-5)
    cold = local_loss(f, g, scheme=scheme, size=1, partitions=2, temperature=1e-3)
    assert torch.isfinite(cold)


def test_maps_that_hold_no_such_regions():
    f, deep = random(4, 2, 8, 8), random(2, 2, 8, 8, 8)
    for call, said in [
        (lambda: local_loss(f, f[:2]), "of one shape"),
        (lambda: local_loss(f[0], f[0]), "of one shape"),
        (lambda: local_loss(f[..., :7], f[..., :7]), r"maps are \[8, 7\]; regions of side 3 need 8"),
        (lambda: local_loss(f[..., :4], f[..., :4], size=1), "regions of side 1 need 5"),
        (lambda: local_loss(f, f, regions=35), "on maps of 2 axes there are 13 or 9"),
        (lambda: local_loss(deep, deep), "on maps of 3 axes there are 35 or 27"),
        (lambda: local_loss(f, f, size=2), "of side 3 or 1"),
        (lambda: local_loss(f, f, temperature=0.0), "temperature is 0"),
        (lambda: local_loss(f, f, scheme="ld"), "4 images are not two or more volumes of 4"),
        (lambda: local_loss(f[:3], f[:3], scheme="ld", partitions=2), "3 images are not"),
        (lambda: local_loss(f, f, scheme="l"), "there are lr and ld"),
        (lambda: global_loss(f, image=f, partition=f, volume=f, version=f), r"z must be \[N, D\]"),
        (lambda: global_loss(f[:, 0, 0], **batch("gr"), temperature=float("nan")), "temperature is nan"),
    ]:
        with pytest.raises(ShapeError, match=said) as error:
            call()
        assert "\n" not in str(error.value)

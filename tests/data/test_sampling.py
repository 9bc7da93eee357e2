"""Sampling, batches and augmentation."""

import numpy as np
import pytest
import torch

from labeleff.batch import IGNORE, derive_seed
from labeleff.data import augment
from labeleff.data.annotations import AnnotationStore
from labeleff.data.augment import Augment
from labeleff.data.module import StepData, make_loader
from labeleff.data.sampling import Key, Sampler, StreamPlan, part_of
from labeleff.errors import RecipeError
from labeleff.testing import toy_geometry

from .test_store import Memory, prepare


def key(step, sample, stream="labelled"):
    return Key(seed=3, stage=1, step=step, stream=stream, sample=sample)


def spots(sampler, batch, steps):
    return [sampler.spot(key(s, i), lambda case: ()) for s in range(steps) for i in range(batch)]


def test_every_case_once_per_epoch_in_a_new_order():
    names = tuple("abcdefg")
    sampler = Sampler(StreamPlan(names, batch=3), [(8, 8)] * 7, (8, 8), None)
    drawn = [spot.case for spot in spots(sampler, 3, 14)]
    epochs = [drawn[i : i + 7] for i in range(0, 42, 7)]
    assert all(sorted(epoch) == sorted(names) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 3


def test_every_slice_once_per_epoch():
    sampler = Sampler(StreamPlan(("a", "b"), batch=4), [(8, 8, 5), (8, 8, 3)], (6, 6), 2)
    drawn = [(s.case, s.origin[2]) for s in spots(sampler, 4, 2)]
    assert sorted(drawn) == [("a", i) for i in range(5)] + [("b", i) for i in range(3)]
    assert all(s.size == (6, 6, 1) for s in spots(sampler, 4, 2))


def test_origins_cover_both_ends_and_small_cases_are_centred():
    sampler = Sampler(StreamPlan(("a",), batch=1), [(10, 4)], (8, 9), None)
    origins = {s.origin for s in spots(sampler, 1, 200)}
    assert {o[0] for o in origins} == {0, 1, 2}
    assert {o[1] for o in origins} == {-2}


def test_foreground_samples_hold_their_voxel():
    sampler = Sampler(StreamPlan(("a",), batch=1, foreground=1.0), [(50, 50)], (10, 10), None)
    voxels = (np.array([[0, 49]]), np.array([[25, 25]]))
    seen = set()
    for step in range(40):
        seen.add(sampler.spot(key(step, 0), lambda case: voxels).origin)
    assert seen == {(0, 40), (20, 20)}  # the corner is clamped, the middle is centred
    half = Sampler(StreamPlan(("a",), batch=1, foreground=0.5), [(50, 50)], (10, 10), None)
    share = np.mean([half.spot(key(s, 0), lambda c: voxels).origin in seen for s in range(400)])
    assert 0.4 < share < 0.6


def test_a_spot_depends_on_nothing_but_its_key():
    one, two = (Sampler(StreamPlan(("a", "b", "c"), batch=2), [(20, 20)] * 3, (8, 8), None) for _ in range(2))
    forward = [one.spot(key(s, i), lambda c: ()) for s in range(20) for i in range(2)]
    backward = [two.spot(key(s, i), lambda c: ()) for s in reversed(range(20)) for i in reversed(range(2))]
    assert forward == backward[::-1]


def test_a_thousand_times_as_many_cases_cost_an_order_and_nothing_else():
    """Whatever their number, a sampler holds counts and the order of an epoch; where it stands is no state."""
    import tracemalloc

    found = {}
    for count in (100, 100_000):
        cases, shapes = tuple(map(str, range(count))), [(64, 64, 64)] * count
        plan = StreamPlan(cases, batch=64, partitions=0)
        tracemalloc.start()
        sampler = Sampler(plan, shapes, (32, 32, 32), None)
        for step in (0, 1, 1000):
            sampler.spot(key(step, 3, f"of {count}"), lambda case: ())
        found[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        again = Sampler(plan, shapes, (32, 32, 32), None)  # what a run that resumes has
        assert again.spot(key(1000, 3), lambda case: ()) == sampler.spot(key(1000, 3), lambda case: ())
    assert found[100_000] - found[100] < 60 * 100_000  # bytes: an order of an epoch, twice where one ends, and counts


def test_known_cases_are_drawn_by_name():
    plan = StreamPlan(("a", "b", "c"), batch=2, known=1.0)
    sampler = Sampler(plan, [(8, 8), (20, 8), (30, 8)], (4, 4), None, told=("c", "x"))
    assert sampler.told == ["c"]
    spots_ = {sampler.spot(key(s, 0), lambda c: (), lambda c: (np.array([[29, 4]]),)) for s in range(5)}
    assert {(spot.case, spot.origin) for spot in spots_} == {("c", (26, 2))}


def test_parts_are_equal_shares_of_all_places():
    for places in range(1, 30):
        for parts in range(1, 8):
            expected = [[z for z in range(places) if int(parts * (z + 0.5) / places) == p] for p in range(parts)]
            found = [list(range(*part_of(places, parts, p))) for p in range(parts)]
            assert found == expected
            assert places < parts or all(found)
    assert [part_of(12, 4, p) for p in range(4)] == [(0, 3), (3, 6), (6, 9), (9, 12)]


def test_a_step_has_one_slice_of_every_part_of_different_volumes():
    depths = [4, 5, 7, 10, 13]
    plan = StreamPlan(tuple("abcde"), batch=12, partitions=4, along=0, volumes=2)
    sampler = Sampler(plan, [(n, 9, 8) for n in depths], (8, 8), 0)
    seen = {name: set() for name in "abcde"}
    triples = set()
    for step in range(300):
        rows = [sampler.spot(key(step, i, "images"), lambda case: ()) for i in range(12)]
        volumes = [rows[i].case for i in range(0, 12, 4)]
        assert len(set(volumes)) == 3
        triples.add(tuple(volumes))
        for i, spot in enumerate(rows):
            assert spot.case == volumes[i // 4]
            depth = depths["abcde".index(spot.case)]
            assert int(4 * (spot.origin[0] + 0.5) / depth) == i % 4
            assert spot.size == (1, 8, 8)
            assert spot.origin[1] in (0, 1)
            assert spot.origin[2] == 0
            seen[spot.case].add(spot.origin[0])
    assert [len(seen[name]) for name in "abcde"] == depths  # no slice is left out
    assert len(triples) > 50  # of 60: any three, in any order
    again = Sampler(plan, [(n, 9, 8) for n in depths], (8, 8), 0)
    assert [again.spot(key(299, i, "images"), lambda case: ()) for i in range(12)] == rows


def test_parts_for_volumes_are_shares_of_the_places_of_patches():
    plan = StreamPlan(("a", "b"), batch=6, partitions=3, along=2)
    sampler = Sampler(plan, [(9, 9, 14), (9, 9, 11)], (8, 8, 8), None)
    for step in range(40):
        for i in range(6):
            spot = sampler.spot(key(step, i, "images"), lambda case: ())
            places = {"a": 7, "b": 4}[spot.case]
            assert int(3 * (spot.origin[2] + 0.5) / places) == i % 3
            assert spot.size == (8, 8, 8)


@pytest.fixture
def stores(tmp_path):
    generator = np.random.default_rng(2)
    images = {n: generator.integers(0, 255, (1, 20, 18, 4)).astype(np.uint8) for n in "abcd"}
    store = prepare(Memory(images), tmp_path / "cache", normalise="none")
    labels = [(n, (images[n][0] > 128).astype(np.uint8)) for n in "ab"]
    return store, AnnotationStore.create(tmp_path / "ann", dict.fromkeys("abcd", (20, 18, 4)), labels)


def data(stores, **options):
    plans = {"labelled": StreamPlan(("a", "b"), 4), "unlabelled": StreamPlan(("c", "d"), 4)}
    defaults = {
        "first_step": 0,
        "last_step": 6,
        "patch": (24, 12),
        "slice_axis": 2,
        "augment": Augment(),
        "seed": 1,
        "stage": 0,
    }
    return StepData(*stores, plans, **(defaults | options))


def flat(batches):
    return [t for batch in batches for share in batch.values() for t in (*share[:4], *share.geometry)]


def test_a_process_sees_whole_volumes_of_parts(stores):
    plan = StreamPlan(("a", "b", "c", "d"), 8, partitions=2, along=2, volumes=2)
    options = {"first_step": 0, "last_step": 2, "patch": (24, 12), "slice_axis": 2, "augment": Augment()}
    whole = StepData(*stores, {"images": plan}, **options, seed=1, stage=0)[1]["images"].geometry
    assert whole.case.view(4, 2).unique(dim=1).shape == (4, 1)
    assert (whole.origin[:, 2] // 2).tolist() == [0, 1] * 4
    halves = [
        StepData(*stores, {"images": plan}, **options, seed=1, stage=0, rank=r, world=2)[1]["images"] for r in (0, 1)
    ]
    assert torch.equal(torch.cat([half.geometry.origin for half in halves]), whole.origin)
    with pytest.raises(
        RecipeError, match="sees 2 samples of stream 'images' at a time, but needs 2 of each of at least 2"
    ):
        StepData(*stores, {"images": plan}, **options, seed=1, stage=0, accumulate=4)


def test_batches_hold_what_is_in_the_stores(stores):
    batch = data(stores)[3]
    share = batch["labelled"]
    assert share.image.shape == (4, 1, 24, 12)
    assert share.label.dtype == torch.int64
    for row in range(4):
        name = stores[0].ids[int(share.geometry.case[row])]
        x, y, z = share.geometry.origin[row].tolist()
        assert x == -2  # 20 voxels centred in a patch of 24
        image = stores[0].read(name)[0, :, y : y + 12, z]
        assert np.array_equal(share.image[row, 0, 2:22], image)
        assert np.array_equal(share.label[row, 2:22], (image > 128).astype(int))
        assert not share.valid[row, 0, :2].any()
        assert (share.label[row, 22:] == IGNORE).all()
    assert (batch["unlabelled"].label == IGNORE).all()
    assert share.given is share.label


def test_workers_processes_and_micro_batches_only_share_out(stores):
    whole = [data(stores)[i] for i in range(6)]
    by_workers = list(make_loader(data(stores), workers=2))
    assert all(torch.equal(a, b) or bool(a.isnan().all()) for a, b in zip(flat(whole), flat(by_workers), strict=True))
    later = data(stores, first_step=4)[0]
    assert torch.equal(later["labelled"].image, whole[4]["labelled"].image)
    parts = [data(stores, accumulate=2, rank=r, world=2)[2 * 3 + m] for m in range(2) for r in range(2)]
    assert torch.equal(torch.cat([p["labelled"].image for p in parts]), whole[3]["labelled"].image)
    with pytest.raises(RecipeError, match="cannot be shared out evenly"):
        data(stores, world=3)


def test_edits_are_seen_by_the_revision_asked_for(stores):
    from labeleff.edits import Edit

    stores[1].apply([Edit("a", np.full((20, 18, 4), 1, np.uint8), "corrected")], step=1, stage=0, author="x")
    old, new = data(stores)[0]["labelled"], data(stores, revision=1)[0]["labelled"]
    rows = [i for i in range(4) if int(new.geometry.case[i]) == 0]
    assert rows
    assert (new.label[rows][:, 2:22] == 1).all()
    assert torch.equal(new.given, old.label)


# -- augmentation -------------------------------------------------------------------------------------------------------


def batch_of(affines, shape=(8, 8), **intensity):
    from labeleff.batch import Batch

    generator = torch.Generator().manual_seed(0)
    count = len(affines)
    image = torch.randn(count, 2, *shape, generator=generator)
    label = torch.randint(3, (count, *shape), generator=generator)
    values = torch.tensor([[1.0, 0, 1, 0, 0]]).repeat(count, 1)
    for i, name in enumerate(("gain", "offset", "gamma", "noise", "blur")):
        values[:, i] = intensity.get(name, values[0, i])
    geometry = toy_geometry(count, shape)._replace(
        affine=torch.stack([torch.as_tensor(a) for a in affines]), intensity=values
    )
    return Batch(image, label, label, torch.ones(count, 1, *shape, dtype=torch.bool), geometry, extras={})


def drawn(spec, shape, purpose=0):
    return torch.from_numpy(augment.draw(spec, np.random.default_rng(purpose), shape)[0])


def test_nothing_drawn_changes_nothing():
    batch = batch_of([drawn(Augment(), (8, 8))])
    result = augment.apply(batch)
    assert result.image is batch.image
    assert result.label is batch.label


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 5)])
@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1)])
def test_flips_are_exact(shape, axes):
    wanted = next(s for s in range(200) if _flipped(shape, axes, s))
    batch = batch_of([drawn(Augment(flip=(0, 1)), shape, wanted)], shape)
    result = augment.apply(batch)
    assert torch.allclose(result.image, batch.image.flip([a + 2 for a in axes]), atol=1e-5)
    assert torch.equal(result.label, batch.label.flip([a + 1 for a in axes]))
    assert result.valid.all()


def _flipped(shape, axes, seed):
    diagonal = drawn(Augment(flip=(0, 1)), shape, seed)[:, :-1].diagonal().flip(0)
    return tuple(i for i in range(2) if diagonal[i] < 0) == axes


def test_quarter_turns_are_exact_and_all_occur():
    found = set()
    for seed in range(30):
        batch = batch_of([drawn(Augment(rot90=True), (8, 8), seed)])
        result = augment.apply(batch)
        turns = [k for k in range(4) if torch.equal(result.label, batch.label.rot90(k, (1, 2)))]
        assert len(turns) == 1
        assert torch.allclose(result.image, batch.image.rot90(turns[0], (2, 3)), atol=1e-5)
        found |= set(turns)
    assert found == {0, 1, 2, 3}


def test_a_shift_moves_by_voxels_and_leaves_the_unknown_behind():
    affine = torch.tensor([[1.0, 0, 0.5], [0, 1.0, 0]])  # x + 0.5 of [-1, 1]: two of eight voxels
    batch = batch_of([affine])
    result = augment.apply(batch)
    assert torch.allclose(result.image[..., :6], batch.image[..., 2:], atol=1e-5)
    assert torch.equal(result.label[..., :6], batch.label[..., 2:])
    assert (result.label[..., 6:] == IGNORE).all()
    assert not result.valid[..., 6:].any()


def test_rotation_is_rigid_in_voxels_whatever_the_patch():
    spec = Augment(rotate=45.0)
    affine = drawn(spec, (8, 24), 4).double()
    lengths = torch.tensor([24.0, 8.0]).double()  # x first
    in_voxels = affine[:, :2] * lengths[:, None] / lengths[None, :]
    assert torch.allclose(in_voxels @ in_voxels.T, torch.eye(2).double(), atol=1e-5)


def test_replay_repeats_the_geometry():
    batch = batch_of([drawn(Augment(rotate=30.0, shift=0.1), (8, 8), i) for i in range(3)])
    assert torch.equal(augment.replay(batch.image, batch.geometry), augment.apply(batch).image)


def test_intensity_by_hand():
    batch = batch_of([drawn(Augment(), (8, 8))], gain=2.0, offset=-1.0)
    assert torch.allclose(augment.apply(batch).image, batch.image * 2 - 1)
    batch = batch_of([drawn(Augment(), (8, 8))], gamma=2.0)
    low, high = batch.image.min(), batch.image.max()
    expected = ((batch.image - low) / (high - low)) ** 2 * (high - low) + low
    assert torch.allclose(augment.apply(batch).image, expected, atol=1e-5)


def test_noise_follows_the_sample_and_has_its_size():
    batch = batch_of([drawn(Augment(), (64, 64))] * 2, (64, 64), noise=0.5)
    one, two = (augment.apply(batch).image - batch.image for _ in range(2))
    assert torch.equal(one, two)
    assert float(one.std()) == pytest.approx(0.5, rel=0.05)
    assert not torch.equal(one[0], one[1])


@pytest.mark.parametrize("shape", [(33, 33), (17, 17, 17)])
def test_blur_is_a_gaussian_of_the_given_width(shape):
    batch = batch_of([drawn(Augment(), shape)], shape, blur=1.5)
    point = torch.zeros(1, 1, *shape)
    middle = tuple(n // 2 for n in shape)
    point[(0, 0, *middle)] = 1.0
    image = augment.apply(batch._replace(image=point)).image[0, 0]
    assert float(image.sum()) == pytest.approx(1, abs=1e-3)
    profile = image.sum(dim=tuple(range(1, len(shape))))
    offsets = torch.arange(shape[0]) - middle[0]
    assert float((profile * offsets**2).sum().sqrt()) == pytest.approx(1.5, rel=0.05)


def test_seeds_are_functions_of_their_parts():
    assert derive_seed(1, "a") == derive_seed(1, "a")
    assert len({derive_seed(1, "a"), derive_seed("1", "a"), derive_seed(1, "b"), derive_seed(11, "a")}) == 4
    assert 0 <= derive_seed("x") < 2**63

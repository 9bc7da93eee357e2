"""What leaves a worker is what went in."""

import pickle

import torch

from labeleff.batch import Batch, Geometry
from labeleff.data.parcel import Parcel


def batch():
    label = torch.randint(4, (3, 5, 7))
    numbers = torch.arange(3)
    geometry = Geometry(numbers, *(torch.rand(3, 2) for _ in range(6)), sample=numbers + 2**60)
    return Batch(
        torch.rand(3, 1, 5, 7), label, label, torch.rand(3, 1, 5, 7) > 0.5, geometry, extras={"x": torch.ones(0)}
    )


def test_a_batch_comes_out_as_it_went_in():
    sent = {"labelled": batch(), "unlabelled": batch()}
    got = pickle.loads(pickle.dumps(Parcel(sent)))
    assert list(got) == list(sent)
    for name, was in sent.items():
        now = got[name]
        assert type(now) is Batch
        assert type(now.geometry) is Geometry
        assert now.soft is None
        assert now.given is now.label
        for field in ("image", "label", "valid"):
            assert torch.equal(getattr(now, field), getattr(was, field))
            assert getattr(now, field).dtype == getattr(was, field).dtype
        assert all(torch.equal(a, b) for a, b in zip(now.geometry, was.geometry, strict=True))
        assert now.extras["x"].shape == (0,)


def test_all_tensors_share_one_block_without_touching():
    sent = {"a": batch()}
    got = pickle.loads(pickle.dumps(Parcel(sent)))["a"]
    before = got.image.clone()
    assert got.label.untyped_storage().data_ptr() == got.image.untyped_storage().data_ptr()
    got.label.fill_(-1)
    got.valid.fill_(True)
    assert torch.equal(got.image, before)
    assert torch.equal(got.geometry.case, sent["a"].geometry.case)

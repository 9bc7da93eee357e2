"""A batch on its way to a device: what need not go stays, and what is one tensor is moved once."""

import torch
from lightning_fabric.utilities.apply_func import move_data_to_device

from labeleff.batch import Batch
from labeleff.data import augment
from labeleff.testing import toy_geometry

META = torch.device("meta")
"""Tensors without numbers: what mixes devices, or asks for a number, fails."""


def batch(shape=(8, 8)):
    label = torch.zeros(2, *shape, dtype=torch.long)
    valid, prior = torch.ones(2, 1, *shape, dtype=torch.bool), torch.full((2, 3), 1 / 3)
    return Batch(torch.rand(2, 1, *shape), label, label, valid, toy_geometry(2, shape), extras={"prior": prior})


def test_a_trainer_moves_all_but_the_geometry():
    found = move_data_to_device({"labelled": batch()}, META)["labelled"]
    assert {t.device.type for t in (found.image, found.label, found.valid, found.extras["prior"])} == {"meta"}
    assert {t.device.type for t in found.geometry} == {"cpu"}
    assert found.given is found.label
    assert found.soft is None


def test_an_edited_label_is_moved_beside_the_given_one():
    plain = batch()
    found = plain._replace(given=plain.label + 1, soft=torch.rand(2, 3, 8, 8)).to(META)
    assert found.given is not found.label
    assert found.given.is_meta
    assert found.soft.is_meta


def test_on_the_cpu_nothing_is_copied():
    plain = batch()
    found = plain.to("cpu")
    assert all(one is other for one, other in zip(found[:5], plain[:5], strict=True))


def test_what_is_drawn_is_applied_without_a_look_at_the_device():
    for shape in ((8, 8), (8, 8, 8)):
        plain = batch(shape)
        intensity = torch.tensor([[1.1, 0.2, 0.9, 0.0, 0.0]]).expand(2, 5)
        drawn = plain.geometry._replace(affine=plain.geometry.affine * 0.9, intensity=intensity)
        found = augment.apply(plain._replace(geometry=drawn).to(META))
        assert found.image.is_meta
        assert found.given is found.label
        assert augment.replay(found.image, drawn).is_meta

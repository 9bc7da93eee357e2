"""Budgets, draws, roles and leaks."""

import time
from pathlib import Path

import pytest

from labeleff.data.audit import audit, check_audit
from labeleff.data.manifest import Case, Manifest, Source, read_manifest, write_manifest
from labeleff.data.split import make_split
from labeleff.errors import DataError, SplitError


def manifest(patients=12, test=3, sites=1, unlabelled=(), validation=0, official=()):
    cases = []
    for number in range(patients + test + validation):
        role = "train" if number < patients else "test" if number < patients + test else "validation"
        for frame in "ab":
            name = f"p{number:02d}"
            source = Source(Path(f"/data/{name}{frame}.npz"), "image")
            label = None if name in unlabelled else Source(source.path, "label")
            cases.append(Case(f"{name}{frame}", name, (source,), label, f"site{number % sites}", role))
    return Manifest("set", tuple(cases), ("background", "organ"), 2, official=tuple(official))


def test_many_patients_are_split_in_a_moment():
    """What grows with the square of the patients takes minutes here, and hours of a hundred thousand."""
    many = manifest(patients=20_000, sites=3)
    began = time.process_time()
    split = make_split(many, labelled=50, draw=1, development=10, evaluate_on="development")
    assert time.process_time() - began < 10
    assert len(split.unlabelled) == 2 * (20_000 - 10 - 50)


def patients_of(ids):
    return {name[:3] for name in ids}


def test_budgets_are_nested_within_a_draw_and_whole_patients():
    found = [make_split(manifest(), labelled=n, draw=4) for n in (1, 2, 5, 12)]
    sets = [patients_of(split.labelled) for split in found]
    assert [len(s) for s in sets] == [1, 2, 5, 12]
    assert sets[0] < sets[1] < sets[2] < sets[3]
    for split in found:
        assert len(split.labelled) == 2 * len(patients_of(split.labelled))
        assert not patients_of(split.labelled) & patients_of(split.unlabelled)
        assert len(patients_of(split.labelled + split.unlabelled)) == 12


def test_draws_differ_and_repeat():
    firsts = {make_split(manifest(), labelled=1, draw=d).labelled for d in range(20)}
    assert len(firsts) > 5
    assert make_split(manifest(), labelled=3, draw=7) == make_split(manifest(), labelled=3, draw=7)


def test_a_draw_depends_on_the_patients_and_not_on_their_order():
    plain = manifest()
    turned = Manifest("set", tuple(reversed(plain.cases)), plain.classes, 2)
    one, two = (make_split(m, labelled=4, draw=1) for m in (plain, turned))
    assert patients_of(one.labelled) == patients_of(two.labelled)


def test_sites_are_balanced_in_every_prefix():
    data = manifest(patients=12, sites=3)
    domain = {case.patient: case.domain for case in data.cases}
    for draw in range(5):
        chosen = patients_of(make_split(data, labelled=6, draw=draw).labelled)
        assert sorted([domain[p] for p in chosen]) == ["site0"] * 2 + ["site1"] * 2 + ["site2"] * 2


def test_fractions_all_and_the_official_order():
    data = manifest(official=("p07", "p03", "p05"))
    assert len(patients_of(make_split(data, labelled=0.25).labelled)) == 3
    assert len(patients_of(make_split(data, labelled="all").labelled)) == 12
    assert make_split(data, labelled="all").unlabelled == ()
    for draw in (0, 9):
        assert patients_of(make_split(data, labelled="first:2", draw=draw).labelled) == {"p07", "p03"}


def test_validation_comes_out_of_the_budget_or_is_said_to_be_extra():
    data = manifest(validation=2)
    split = make_split(data, labelled=5, validation=2)
    assert (len(patients_of(split.labelled)), len(patients_of(split.validation))) == (3, 2)
    assert patients_of(split.labelled + split.validation) == patients_of(make_split(data, labelled=5).labelled)
    official = make_split(data, labelled=5, validation="official")
    assert patients_of(official.validation) == {"p15", "p16"}
    assert official.notes == ("+2 labelled patients for validation (official list)",)
    assert make_split(data, labelled=5).validation == ()


def test_development_is_cut_from_training_and_never_meets_it():
    data = manifest()
    parts = [
        make_split(data, labelled=n, draw=d, evaluate_on="development", development=4) for n, d in ((2, 0), (5, 3))
    ]
    assert parts[0].test == parts[1].test
    for split in parts:
        assert len(patients_of(split.test)) == 4
        assert not patients_of(split.test) & patients_of(split.labelled + split.unlabelled)
        assert "not a test result" in split.notes[0]
    assert patients_of(make_split(data, labelled=2, development=4).test) == {"p12", "p13", "p14"}


def test_unlabelled_patients():
    data = manifest(unlabelled=("p00", "p01"))
    assert len(patients_of(make_split(data, labelled="all").labelled)) == 10
    assert patients_of(make_split(data, labelled="all").unlabelled) == {"p00", "p01"}
    assert make_split(data, labelled=2, unlabelled="none").unlabelled == ()
    assert len(patients_of(make_split(data, labelled=2, unlabelled=3).unlabelled)) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labelled": 13}, "asks for 13 patients; set has 12"),
        ({"labelled": 2, "validation": 2}, "nothing is left to learn from"),
        ({"labelled": 2, "validation": "official"}, "has no validation list"),
        ({"labelled": "first:2"}, "has no official order"),
        ({"labelled": "some"}, "give a number of patients, a fraction below 1, all, none, or first:N"),
        ({"labelled": 2.5}, "a whole number of patients or a fraction below 1"),
        ({"labelled": 2, "unlabelled": 20}, "10 are left beside the budget"),
        ({"labelled": 2, "evaluate_on": "development"}, "data.development is 0"),
    ],
)
def test_budgets_that_cannot_be_met(options, message):
    with pytest.raises(SplitError) as found:
        make_split(manifest(), **options)
    assert message in str(found.value)


def test_test_cases_need_labels():
    with pytest.raises(SplitError, match="test case 'p12a' has no label"):
        make_split(manifest(unlabelled=("p12",)), labelled=2)
    with pytest.raises(SplitError, match="nothing to evaluate on"):
        make_split(manifest(test=0), labelled=2)


def test_the_hash_follows_the_roles():
    one, two = (make_split(manifest(), labelled=2, draw=d) for d in (0, 1))
    assert one.hash != two.hash
    assert one.hash == make_split(manifest(), labelled=2, draw=0).hash


def test_leaks_stop_a_run_and_are_named():
    data = manifest()
    split = make_split(data, labelled=2)
    contents = {case.id: case.id for case in data.cases}
    clean = audit(data, split, contents=contents)
    assert clean.leaks == ()
    assert clean.warnings == ("evaluated on 3 patients: intervals will be wide",)
    copied = contents | {split.test[0]: contents[split.unlabelled[0]]}
    with pytest.raises(SplitError) as found:
        check_audit(data, split, contents=copied)
    assert f"{split.unlabelled[0]!r} (unlabelled) and {split.test[0]!r} (test) are the same image" in str(found.value)
    within = contents | {split.test[0]: contents[split.test[1]]}
    assert any("are the same image" in w for w in audit(data, split, contents=within).warnings)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"id": "p00a"}, DataError, "the case 'p00a' occurs twice"),
        ({"id": "../x"}, DataError, "cannot name a case"),
        ({"patient": "p00", "role": "test"}, SplitError, "patient 'p00' is in train"),
        ({"spacing": (1.0,)}, DataError, "2 lengths in mm are needed"),
    ],
)
def test_manifests_that_contradict_themselves(change, error, message):
    plain = manifest()
    values = {"id": "new", "patient": "new", "image": plain.cases[0].image} | change
    with pytest.raises(error) as found:
        Manifest("set", (*plain.cases, Case(**values)), plain.classes, 2)
    assert message in str(found.value)


def test_manifest_round_trip(tmp_path):
    case = Case("a", "p", (Source(tmp_path / "images" / "a.npz", "image"),), None, "site", "train", (1.0, 2.0))
    one = Manifest("set", (case,), ("background", "organ"), 2, official=("p",))
    write_manifest(one, tmp_path / "set.json")
    assert "images/a.npz" in (tmp_path / "set.json").read_text()
    assert read_manifest(tmp_path / "set.json") == one
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match="not a manifest"):
        read_manifest(tmp_path / "bad.json")
    with pytest.raises(DataError, match=r"no case 'b'"):
        one.case("b")


def test_folds_test_every_labelled_patient_once_and_train_on_the_others():
    data = manifest(patients=11, sites=2, unlabelled=("p03", "p07"))
    tested = []
    for fold in range(3):
        split = make_split(data, labelled=4, draw=5, folds=3, fold=fold)
        mine = patients_of(split.test)
        assert not mine & patients_of(split.labelled + split.unlabelled)
        assert {"p03", "p07"} <= patients_of(split.unlabelled)
        assert len(patients_of(split.labelled + split.unlabelled)) + len(mine) == 11
        tested += sorted(mine)
    assert sorted(tested) == [f"p{n:02d}" for n in range(11) if n not in (3, 7)]


def test_folds_do_not_depend_on_the_draw_or_the_budget():
    data = manifest(patients=10)
    found = {make_split(data, labelled=n, draw=d, folds=5, fold=2).test for n in (1, 3) for d in range(4)}
    assert len(found) == 1


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"folds": 13}, "12 labelled training patients"), ({"folds": 3, "fold": 3}, "0 … 2")],
)
def test_impossible_folds_are_refused(options, reason):
    with pytest.raises(SplitError, match=reason):
        make_split(manifest(), labelled=1, **options)


def test_unlabelled_patients_as_a_multiple_of_the_budget():
    assert len(patients_of(make_split(manifest(), labelled=2, unlabelled="4x").unlabelled)) == 8
    assert not make_split(manifest(), labelled=2, unlabelled="0x").unlabelled
    for wrong, reason in (("20x", "10 are left"), ("x", "5x"), ("-1", "5x")):
        with pytest.raises(SplitError, match=reason):
            make_split(manifest(), labelled=2, unlabelled=wrong)


def test_foreign_patients_are_never_labelled_and_replace_as_many_others():
    data = manifest(patients=12, sites=3)
    strangers = {case.patient for case in data.cases if case.domain == "site2"}
    for draw in range(5):
        clean = make_split(data, labelled=2, draw=draw, foreign="site2")
        assert not strangers & patients_of(clean.labelled + clean.unlabelled)
        mixed = make_split(data, labelled=2, draw=draw, foreign="site2", contamination=0.5)
        assert len(patients_of(mixed.unlabelled)) == len(patients_of(clean.unlabelled)) == 6
        assert len(patients_of(mixed.unlabelled) & strangers) == 3
        assert mixed.labelled == clean.labelled
    with pytest.raises(SplitError, match="no training patients of the domain"):
        make_split(data, labelled=2, foreign="elsewhere")
    with pytest.raises(SplitError, match="lower the share"):
        make_split(data, labelled=2, foreign="site2", contamination=0.9)


def test_some_images_of_a_patient_are_labelled_and_the_others_are_not():
    split = make_split(manifest(), labelled=3, slices=1)
    assert len(split.labelled) == 3
    assert len(patients_of(split.labelled)) == 3
    assert patients_of(split.labelled) <= patients_of(split.unlabelled)
    assert not set(split.labelled) & set(split.unlabelled)
    assert audit(manifest(), split, contents={case.id: case.id for case in manifest().cases}).leaks == ()


def test_the_same_image_twice_in_training_is_a_warning():
    data = manifest()
    split = make_split(data, labelled=2)
    contents = {case.id: case.id for case in data.cases}
    found = audit(data, split, contents=contents | {split.unlabelled[0]: contents[split.labelled[0]]})
    assert not found.leaks
    assert (
        f"{split.labelled[0]!r} (labelled) and {split.unlabelled[0]!r} (unlabelled) are the same image"
        in found.warnings[0]
    )

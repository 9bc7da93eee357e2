"""Out to a person and back: painted by a script that behaves like a program for it, and every check with what fails it."""

import json

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import apply_orientation, inv_ornt_aff
from typer.testing import CliRunner

from labeleff.batch import IGNORE
from labeleff.bundle.budget import show_budget
from labeleff.bundle.read import Terms, read_answer
from labeleff.bundle.write import write_bundle
from labeleff.cli import app
from labeleff.data.rounds import Region, Rounds
from labeleff.errors import DataError, RunError, StoreError

from .conftest import AFFINES, make_run, truth_of

K = 3


def cases_of(rounds):
    return list(dict.fromkeys(region.case for region in rounds.get(1).regions))


def paint(folder, data, rounds, change=None, cases=None):
    """Fill the regions of all cases with the truth; ``change(array, affine)`` returns what is saved in their place."""
    for case in cases or cases_of(rounds):
        path = folder / f"{case}_edit.nii.gz"
        image = nib.load(path)
        array = np.asarray(image.dataobj).copy()
        for region in rounds.get(1).regions:
            if region.case == case:
                box = (*region.box, 0) if len(region.box) == 2 else region.box
                array[box] = data.hidden_label(case)[region.box]
        affine = image.affine
        if change is not None:
            array, affine = change(array, affine)
        nib.save(nib.Nifti1Image(array, affine), path)


@pytest.fixture
def bundle(waiting):
    """A written round: run, data, rounds and folder."""
    run, data = waiting
    return run, data, Rounds(run), write_bundle(run)


def answered(rounds):
    return {n: label for answer in rounds.answers(1) for n, label in rounds.labels(1, answer).items()}


def assert_true(rounds, data):
    expected = truth_of(data, rounds.get(1).regions)
    found = answered(rounds)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[n], expected[n]) for n in expected)
    rounds.verify()


# -- out ----------------------------------------------------------------------------------------------------------------


def test_every_file_lies_where_its_image_does(bundle):
    _, data, rounds, folder = bundle
    for case in AFFINES:
        reference = nib.as_closest_canonical(nib.load(data.manifest.case(case).image[0].path))
        for part in ("image", "query", "edit", "locked"):
            file = nib.load(folder / f"{case}_{part}.nii.gz")
            np.testing.assert_allclose(file.affine, reference.affine, atol=1e-6)
            np.testing.assert_allclose(file.get_sform(), reference.affine, atol=1e-6)
            np.testing.assert_allclose(file.get_qform(), reference.affine, atol=1e-4)
            assert file.shape == reference.shape
            assert file.header["scl_slope"] in (1, 0) or np.isnan(file.header["scl_slope"])
            assert (file.get_data_dtype().kind == "u") == (part != "image")
        np.testing.assert_array_equal(nib.load(folder / f"{case}_image.nii.gz").get_fdata(), reference.get_fdata())
    regions = rounds.get(1).regions
    for region in regions:
        query = np.asarray(nib.load(folder / f"{region.case}_query.nii.gz").dataobj)
        assert (query == region.number).sum() == region.voxels
        assert (query[region.box] == region.number).all()
        edit = np.asarray(nib.load(folder / f"{region.case}_edit.nii.gz").dataobj)
        assert (edit == K).all()  # nothing is known of these cases: all of it is visibly unlabelled


def test_geometry_by_another_reader(bundle):
    sitk = pytest.importorskip("SimpleITK")
    _, data, _, folder = bundle
    for case in AFFINES:
        one = sitk.ReadImage(str(folder / f"{case}_image.nii.gz"))
        two = sitk.ReadImage(str(folder / f"{case}_edit.nii.gz"))
        affine = nib.as_closest_canonical(nib.load(data.manifest.case(case).image[0].path)).affine
        for image in (one, two):
            corner = image.TransformIndexToPhysicalPoint((3, 2, 1))
            point = affine @ [3, 2, 1, 1]
            np.testing.assert_allclose(corner, [-point[0], -point[1], point[2]], atol=1e-4)  # ITK: left, posterior


def test_the_same_round_gives_the_same_bytes(bundle, tmp_path):
    run, _, _, folder = bundle
    again = write_bundle(run, tmp_path / "again")
    assert write_bundle(run) == folder
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in again.iterdir())
    assert all((folder / n).read_bytes() == (again / n).read_bytes() for n in names)


def test_tables_marks_and_manifest(bundle):
    _, data, rounds, folder = bundle
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["labels"][-1] == {"name": "ignore", "value": K, "colour": [255, 215, 0]}
    assert [row["number"] for row in manifest["regions"]] == [r.number for r in rounds.get(1).regions]
    first = rounds.get(1).regions[0]
    affine = nib.as_closest_canonical(nib.load(data.manifest.case(first.case).image[0].path)).affine
    np.testing.assert_allclose(manifest["regions"][0]["centre_ras"], (affine @ [1.5, 2, 2.5, 1])[:3], atol=1e-3)
    assert sum(manifest["regions"][0]["predicted"].values()) == first.voxels
    marks = json.loads((folder / "regions.mrk.json").read_text())["markups"][0]["controlPoints"]
    assert [m["position"] for m in marks] == [r["centre_ras"] for r in manifest["regions"]]
    assert '"ignore"' in (folder / "labels.txt").read_text().splitlines()[-1]
    assert (folder / "labels.ctbl").read_text().splitlines()[-1].startswith(f"{K} ignore ")
    assert "Replace" in (folder / "README.txt").read_text() or "replace" in (folder / "README.txt").read_text()


def test_edited_files_are_not_written_over(bundle):
    run, data, rounds, folder = bundle
    paint(folder, data, rounds)
    before = (folder / "plain_edit.nii.gz").read_bytes()
    with pytest.raises(RunError, match="somebody has edited it"):
        write_bundle(run)
    assert (folder / "plain_edit.nii.gz").read_bytes() == before


# -- and back -----------------------------------------------------------------------------------------------------------


def flipped(array, affine):
    turn = np.array([[1, -1], [0, 1], [2, -1]])
    return apply_orientation(array, turn), affine @ inv_ornt_aff(turn, array.shape)


def as_float(array, affine):
    return array.astype(np.float32), affine


@pytest.mark.parametrize("change", [None, flipped, as_float], ids=["as it was", "flipped", "float"])
def test_painted_and_answered(bundle, change):
    run, data, rounds, folder = bundle
    paint(folder, data, rounds, change)
    handed = read_answer(run, folder, by="anna", seconds=80)
    assert_true(rounds, data)
    assert handed.open_regions == 0
    assert any("turned back" in note for note in handed.notes) == (change is flipped)
    lines = rounds.ledger()
    assert {(line["author"], line["by"]) for line in lines} == {("person", "anna")}
    assert sum(line["seconds"] for line in lines) == pytest.approx(80)
    again = read_answer(run, folder)
    assert "nothing was charged" in again.notes[-1]
    assert rounds.ledger() == lines


NAMES = [{"name": "core", "idx": 1}, {"name": "Organ", "idx": 2}]


def slicer(array, affine):
    """Number segments anew, drop ignore and background, save as float, axes flipped: what a detour through Slicer does."""
    found = np.zeros(array.shape, np.float32)
    found[array == 2], found[array == 1] = 1, 2
    return flipped(found, affine)


def test_painted_in_a_program_that_numbers_segments_anew(bundle):
    run, data, rounds, folder = bundle
    paint(folder, data, rounds, slicer)
    for case in cases_of(rounds):
        (folder / f"{case}_edit.json").write_text(json.dumps({"segments": NAMES}))
    with pytest.raises(DataError, match=r"voxels are still unlabelled.*--partial takes"):
        read_answer(run, folder)  # 0 may be background, or what nobody has looked at
    assert rounds.answers(1) == []
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["done"] = [1, 2]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    handed = read_answer(run, folder, terms=Terms(partial=True))
    assert set(handed.answer.regions) >= {1, 2}
    read_answer(run, folder, terms=Terms(done=True))
    assert_true(rounds, data)


def test_regions_one_by_one(bundle):
    run, data, rounds, folder = bundle
    paint(folder, data, rounds, cases=["plain", "oblique"])
    with pytest.raises(DataError, match="Nothing was taken"):
        read_answer(run, folder)
    assert rounds.answers(1) == []
    handed = read_answer(run, folder, terms=Terms(partial=True), by="anna")
    assert len(handed.answer.regions) == 4
    assert handed.open_regions == 4
    paint(folder, data, rounds, cases=["lefthanded", "permuted"])
    read_answer(run, folder, by="ben")
    assert_true(rounds, data)
    assert [a.by for a in rounds.answers(1)] == ["anna", "ben"]


def test_a_second_bundle_holds_what_is_still_open(bundle, tmp_path):
    run, data, rounds, folder = bundle
    paint(folder, data, rounds, cases=["plain"])
    read_answer(run, folder, terms=Terms(partial=True))
    second = write_bundle(run, tmp_path / "second")
    assert not (second / "plain_edit.nii.gz").exists()
    paint(second, data, rounds, cases=["oblique", "lefthanded", "permuted"])
    (second / "plain_edit.nii.gz").write_bytes((folder / "plain_edit.nii.gz").read_bytes())
    with pytest.raises(DataError, match="the image that was labelled"):
        read_answer(run, second)  # its manifest does not know that case
    manifest = json.loads((second / "manifest.json").read_text())
    manifest["cases"] += [
        c for c in json.loads((folder / "manifest.json").read_text())["cases"] if c["case"] == "plain"
    ]
    (second / "manifest.json").write_text(json.dumps(manifest))
    read_answer(run, second)
    assert_true(rounds, data)


def test_what_cannot_be_told_is_charged_and_stays_unknown(bundle):
    run, data, rounds, folder = bundle

    def torn(array, affine):
        array[1, 2, 2] = K
        return array, affine

    paint(folder, data, rounds, torn)
    with pytest.raises(DataError, match=r"1 of 24 voxels are still unlabelled.*--cannot-tell"):
        read_answer(run, folder)
    read_answer(run, folder, terms=Terms(cannot_tell=True))
    assert (answered(rounds)[1] == IGNORE).sum() == 1
    assert rounds.ledger()[0]["unknown"] == 1


def test_corrections_of_predictions(waiting):
    run, data = waiting
    rounds, folder = Rounds(run), write_bundle(run, mode="correct")
    for region in rounds.get(1).regions:
        edit = np.asarray(nib.load(folder / f"{region.case}_edit.nii.gz").dataobj)
        assert np.array_equal(edit[region.box], rounds.prediction(1, region.case)[region.box])
    with pytest.raises(DataError, match=r"the labels are the prediction.*--confirm"):
        read_answer(run, folder)
    paint(folder, data, rounds, cases=["plain", "oblique", "lefthanded"])
    handed = read_answer(run, folder, terms=Terms(confirm=True))
    assert handed.open_regions == 0
    found = answered(rounds)
    last = next(region for region in rounds.get(1).regions if region.case == "permuted")
    assert np.array_equal(found[last.number], rounds.prediction(1, last.case)[last.box])


def test_changes_outside(bundle):
    run, data, rounds, folder = bundle

    def astray(array, affine):
        array[-1, 0, 0] = 1
        return array, affine

    paint(folder, data, rounds, astray)
    with pytest.raises(DataError, match="1 voxels outside the regions were changed"):
        read_answer(run, folder)
    handed = read_answer(run, folder, terms=Terms(outside="drop"))
    assert any("dropped" in note for note in handed.notes)
    assert_true(rounds, data)


def moved(array, affine):
    affine = affine.copy()
    affine[0, 3] += 0.01
    return array, affine


def resampled(array, affine):
    return array[::2], affine @ np.diag([2.0, 1, 1, 1])


def fractions(array, affine):
    return array.astype(np.float32) + 0.25, affine


def unknown_value(array, affine):
    array[0, 1, 2] = 9
    return array, affine


def several(array, affine):
    return np.stack([array, array], -1), affine


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (moved, r"its geometry is not the image's \(the affines differ by up to 0\.01 mm\)"),
        (resampled, "it was resampled or cut"),
        (fractions, "no whole numbers"),
        (unknown_value, r"holds the value 9; labels are 0 … 2, and 3 for ignore"),
        (several, "has 4 axes"),
    ],
)
def test_files_that_are_refused(bundle, change, message):
    run, data, rounds, folder = bundle
    paint(folder, data, rounds, change)
    with pytest.raises(DataError, match=message):
        read_answer(run, folder)
    assert rounds.answers(1) == []


def test_a_segment_that_is_no_class(bundle):
    run, data, rounds, folder = bundle
    paint(folder, data, rounds, slicer)
    for table, message in (
        ([{"name": "tumour", "idx": 1}, {"name": "organ", "idx": 2}], "the segment 'tumour' is no class"),
        ([{"name": "organ", "idx": 2}], "the value 1 of the labels has no name"),
        ({"what": 1}, "not a list of"),
    ):
        for case in cases_of(rounds):
            (folder / f"{case}_edit.json").write_text(json.dumps(table))
        with pytest.raises(DataError, match=message):
            read_answer(run, folder, terms=Terms(done=True))


def test_earlier_labels_are_locked(waiting):
    run, data = waiting
    rounds = Rounds(run)
    regions = rounds.get(1).regions
    first = next(r for r in regions if r.case == "plain")
    rounds.answer(1, {first.number: data.hidden_label("plain")[first.box]}, author="person")
    folder = write_bundle(run)
    locked = np.asarray(nib.load(folder / "plain_locked.nii.gz").dataobj)
    assert locked.sum() == first.voxels
    edit = nib.load(folder / "plain_edit.nii.gz")
    array = np.asarray(edit.dataobj).copy()
    assert np.array_equal(array[first.box], data.hidden_label("plain")[first.box])
    paint(folder, data, rounds)
    array = np.asarray(nib.load(folder / "plain_edit.nii.gz").dataobj).copy()
    array[first.box] = (array[first.box] + 1) % 3
    nib.save(nib.Nifti1Image(array, edit.affine), folder / "plain_edit.nii.gz")
    with pytest.raises(DataError, match=f"region {first.number} was answered before with other labels"):
        read_answer(run, folder)


def test_folders_of_something_else(bundle, tmp_path):
    run, data, rounds, folder = bundle
    paint(folder, data, rounds)
    with pytest.raises(RunError, match=r"no manifest\.json"):
        read_answer(run, tmp_path)
    plain = json.loads((folder / "manifest.json").read_text())
    for change, message in (
        ({"run": "another"}, "this bundle is of the run 'another'"),
        ({"schema": 7}, "another version of labeleff"),
        ({"round": 9}, "the run has no round 9"),
        ({"mode": "x"}, "mode is blank or correct"),
        ({"cases": [c | {"image_sha256": "0"} for c in plain["cases"]]}, "not the image of this run"),
        ({"cases": 3}, "damaged"),
    ):
        (folder / "manifest.json").write_text(json.dumps(plain | change))
        with pytest.raises((RunError, DataError), match=message):
            read_answer(run, folder)
    (folder / "manifest.json").write_text(json.dumps(plain))
    (folder / "plain_edit.nii.gz").rename(folder / "elsewhere.nii.gz")
    with pytest.raises(DataError, match=r"there is no plain_edit\.nii\.gz"):
        read_answer(run, folder)
    (folder / "plain_edit.nii.gz").write_bytes(b"torn")
    with pytest.raises(DataError, match="not a readable NIfTI file"):
        read_answer(run, folder)
    with pytest.raises(RunError, match="there is no run here"):
        write_bundle(tmp_path)
    assert rounds.answers(1) == []


def test_paths_in_a_manifest_lead_nowhere(bundle):
    run, data, rounds, folder = bundle
    paint(folder, data, rounds)
    plain = json.loads((folder / "manifest.json").read_text())
    for row in plain["cases"]:
        row["edit"] = row["image"] = "../../../etc/passwd"
    (folder / "manifest.json").write_text(json.dumps(plain))
    read_answer(run, folder)
    assert_true(rounds, data)


def test_a_crash_between_the_files_of_an_answer_leaves_nothing_half(bundle, monkeypatch):
    run, data, rounds, folder = bundle
    paint(folder, data, rounds)

    def dying(path, value):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("labeleff.data.rounds.write_json", dying)
        with pytest.raises(KeyboardInterrupt):
            read_answer(run, folder)
    assert rounds.answers(1) == []
    assert len(rounds.open_regions(1)) == 8
    read_answer(run, folder)
    assert_true(rounds, data)


# -- other kinds of images, and the command line ------------------------------------------------------------------------


def test_images_of_two_axes_and_one_slice(tmp_path, monkeypatch):
    monkeypatch.setattr("labeleff.prepare.DEFAULT_CACHE", tmp_path / "cache")

    def regions(data):
        return tuple(Region(i + 1, case, (3, 4), (5, 6)) for i, case in enumerate(data.split.unlabelled))

    dataset = {"name": "phantom", "patients": 3, "test": 1, "size": [24, 20], "slices": 1}
    data = make_run(tmp_path / "run", dataset, patch=[16, 16], regions=regions)
    rounds, folder = Rounds(tmp_path / "run"), write_bundle(tmp_path / "run")
    file = nib.load(folder / f"{data.split.unlabelled[0]}_edit.nii.gz")
    assert file.shape == (24, 20, 1)
    paint(folder, data, rounds)
    read_answer(tmp_path / "run", folder)
    assert_true(rounds, data)


def test_resampled_runs_are_labelled_on_their_own_grid(tmp_path, monkeypatch):
    from .conftest import write_data

    monkeypatch.setattr("labeleff.prepare.DEFAULT_CACHE", tmp_path / "cache")
    write_data(tmp_path / "set")
    dataset = {"name": "nifti", "path": str(tmp_path / "set"), "classes": ["background", "organ", "core"]}
    data = make_run(tmp_path / "run", dataset, patch=[8, 8, 4], spacing=[1.6, 1.6, 1.25])
    rounds, folder = Rounds(tmp_path / "run"), write_bundle(tmp_path / "run")
    file, image = nib.load(folder / "oblique_edit.nii.gz"), nib.load(tmp_path / "set" / "images" / "oblique.nii.gz")
    assert file.shape == data.store.shape("oblique") != image.shape
    for corner in ((-0.5,) * 3, None):  # both grids cover the same box
        one = file.affine @ [*(corner or [n - 0.5 for n in file.shape]), 1]
        two = image.affine @ [*(corner or [n - 0.5 for n in image.shape]), 1]
        np.testing.assert_allclose(one, two, atol=1e-5)
    paint(folder, data, rounds)
    read_answer(tmp_path / "run", folder)
    assert_true(rounds, data)


def test_budget(bundle, capsys):
    run, data, rounds, folder = bundle
    paint(folder, data, rounds)
    read_answer(run, folder, seconds=120)
    (row,) = show_budget(run)
    assert (row["regions"], row["answered"], row["voxels"], row["seconds"]) == (8, 8, 4 * (24 + 27), 120)
    touched = {(r.case, z) for r in rounds.get(1).regions for z in range(r.origin[2], r.origin[2] + r.size[2])}
    assert row["slices"] == len(touched)
    printed = capsys.readouterr().out
    assert "foreground:" in printed
    assert "one more round, as the last one: 8 regions" in printed
    text = rounds.ledger_path.read_text().replace('"anna"', '"ben"').replace('"labelled": 24', '"labelled": 23')
    rounds.ledger_path.write_text(text)
    with pytest.raises(StoreError, match=r"does not follow|does not tell"):
        show_budget(run)


def test_from_the_command_line(waiting):
    run, data = waiting
    runner, rounds = CliRunner(), Rounds(run)
    done = runner.invoke(app, ["query", str(run)])
    assert done.exit_code == 0, done.output
    folder = run / "bundles" / "round_001"
    assert str(folder) in done.output
    refused = runner.invoke(app, ["answer", str(run), str(folder)])
    assert refused.exit_code == 2
    paint(folder, data, rounds)
    done = runner.invoke(app, ["answer", str(run), str(folder), "--by", "anna", "--seconds", "60"])
    assert done.exit_code == 0, done.output
    assert "8 regions taken; the round is complete" in done.output
    done = runner.invoke(app, ["budget", str(run)])
    assert done.exit_code == 0, done.output
    assert "anna" not in done.output  # who is in the ledger; here it says person
    assert runner.invoke(app, ["query", str(run)]).exit_code == 2  # nothing waits

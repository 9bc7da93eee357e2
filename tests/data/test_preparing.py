"""Preparation side by side: estimated first, the same to the byte, resumed, and stopped by name."""

import multiprocessing
import os
import signal
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch

from labeleff import machine
from labeleff.data import preparing, store
from labeleff.data.manifest import Case, Source
from labeleff.data.store import ImageStore
from labeleff.describing import describe
from labeleff.errors import DataError, RecipeError, StoreError
from labeleff.prepare import prepare as prepare_run
from labeleff.recipe_io import load_recipe
from tests.conftest import tiny


class Noisy:
    """Twelve images that are drawn where they are read; what happens on the way can be planted."""

    def __init__(self, seen=None, **planted):
        self.seen, self.planted = seen, planted

    def read_image(self, case):
        number = int(case.id)
        if self.seen is not None:
            (self.seen / f"{case.id}-{os.getpid()}").touch()
        self.planted.get(f"at_{number}", int)()
        return np.random.default_rng(number).normal(50, 20, (1, 40, 37, 5)).astype(np.float32)

    def fingerprint(self, case):
        return f"noisy|{case.id}"


CASES = [Case(f"{n:02}", f"{n:02}", (Source(Path(f"{n:02}.nii")),)) for n in range(12)]


def prepare(cache, data=None, cases=CASES, **options):
    return ImageStore.prepare(data or Noisy(), cases, axes=3, cache=cache, **options)


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    prepare(folder, processes=1)
    return content(folder)


def readers(seen):
    return {path.name.split("-")[1] for path in seen.iterdir()} - {str(os.getpid())}


def test_side_by_side_is_the_same_to_the_byte(tmp_path, alone):
    (seen := tmp_path / "seen").mkdir()
    torch.set_num_threads(2)  # a pool of threads that a fork does not copy: using it there would wait for ever
    try:
        torch.ones(1 << 20).add(1).sum()
        data = Noisy(seen, at_7=lambda: torch.ones(1 << 20).add(1).sum())
        moved, said = [], []
        prepared = prepare(
            tmp_path / "c", data, processes=3, say=said.append, on_progress=lambda *now: moved.append(now)
        )
    finally:
        torch.set_num_threads(1)
    assert content(tmp_path / "c") == alone
    assert len(readers(seen)) == 3
    assert {path.name for path in seen.iterdir() if path.name.endswith(f"-{os.getpid()}")} == {
        f"{n:02}-{os.getpid()}" for n in range(3)
    }
    assert moved == [(n, 12) for n in range(1, 13)]
    assert prepared.ids == tuple(case.id for case in CASES)
    assert len(said) == 1
    assert said[0].startswith(f"preparing 9 images in {tmp_path / 'c'}: about ")
    assert said[0].endswith(" in 3 processes")


def test_few_are_prepared_without_a_word_and_nothing_twice(tmp_path, alone):
    said = []
    prepare(tmp_path / "c", cases=CASES[:5], processes=1, say=said.append)
    (seen := tmp_path / "seen").mkdir()
    prepare(tmp_path / "c", Noisy(seen), processes=2, say=said.append)
    assert sorted(path.name[:2] for path in seen.iterdir()) == [case.id for case in CASES[5:]]
    assert said == []
    assert content(tmp_path / "c") == alone


def test_who_is_killed_leaves_nothing_half_written_and_is_taken_up(tmp_path, alone):
    (seen := tmp_path / "seen").mkdir()
    blocked = Noisy(seen, at_8=lambda: time.sleep(60), at_9=lambda: time.sleep(60))
    context = multiprocessing.get_context("fork")
    parent = context.Process(target=prepare, args=(tmp_path / "c", blocked), kwargs={"processes": 2})
    parent.start()
    end = time.monotonic() + 60
    while {p.name[:2] for p in seen.iterdir()} < {f"{n:02}" for n in range(10)} and time.monotonic() < end:
        time.sleep(0.02)
    children = [int(pid) for pid in readers(seen) - {str(parent.pid)}]
    assert len(children) == 2
    os.kill(parent.pid, signal.SIGKILL)
    parent.join()
    for pid in children:
        os.kill(pid, signal.SIGKILL)  # asleep in a case
    torn = tmp_path / "c" / f".{'0' * 32}.1.tmp"
    torn.mkdir()
    (torn / "image.b2nd").write_bytes(b"half")
    done = content(tmp_path / "c")
    assert {name for name in done if name.parent != torn.relative_to(tmp_path / "c")} < alone.keys()
    assert np.isfinite(prepare(tmp_path / "c", processes=2).read("09")).all()
    os.utime(torn, (0, 0))
    prepare(tmp_path / "c")
    assert content(tmp_path / "c") == alone  # what was torn is gone too, as nobody's


def test_processes_end_with_the_one_that_made_them(tmp_path):
    (seen := tmp_path / "seen").mkdir()
    context = multiprocessing.get_context("fork")
    data = Noisy(seen, at_11=lambda: time.sleep(0.5))
    parent = context.Process(target=prepare, args=(tmp_path / "c", data), kwargs={"processes": 3})
    parent.start()
    while not list(seen.glob("11-*")):
        time.sleep(0.01)
    os.kill(parent.pid, signal.SIGKILL)
    parent.join()
    end = time.monotonic() + 30
    left = {pid for pid in readers(seen) if pid != str(parent.pid)}
    while any(alive(pid) for pid in left) and time.monotonic() < end:
        time.sleep(0.02)
    assert left
    assert not any(alive(pid) for pid in left)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except OSError:
        return False


def test_the_first_bad_case_is_named_whoever_reads_it(tmp_path):
    def bad(name):
        def fail():
            raise DataError(f"case {name!r}: broken")

        return fail

    data = Noisy(at_5=lambda: (time.sleep(0.2), bad("05")()), at_6=bad("06"))
    for processes in (1, 2):
        with pytest.raises(DataError, match=r"case '05': broken; or do without the case: data\.leave_out=\[05\]"):
            prepare(tmp_path / str(processes), data, processes=processes)
    with pytest.raises(StoreError, match=r"case '04': the process that prepared it was killed by signal 9 \(SIGKILL\)"):
        prepare(tmp_path / "3", Noisy(at_4=lambda: os.kill(os.getpid(), signal.SIGKILL)), processes=2)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        prepare(tmp_path / "4", Noisy(at_4=lambda: 1 / 0), processes=2)


def test_a_disk_without_room_is_said_before(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(preparing.shutil, "disk_usage", lambda _: usage(0, 0, 100_000))
    with pytest.raises(DataError, match=r"the 9 images .* take about \d+ KiB, and 98 KiB are free; make room, or give"):
        prepare(tmp_path)
    monkeypatch.undo()

    def full(*args, **kwargs):
        raise RuntimeError("Error while creating the NDArray")

    monkeypatch.setattr(store.blosc2, "asarray", full)
    with pytest.raises(StoreError, match=r"case '03' cannot be written there .*; make room, or give --cache"):
        prepare(tmp_path)
    assert not list(tmp_path.glob(".*.tmp"))


def test_processes_are_as_many_as_cores_cases_and_memory_allow(monkeypatch):
    monkeypatch.setattr(machine, "cores", lambda: 6)
    monkeypatch.setattr(preparing, "free_memory", lambda: 1000)
    monkeypatch.delenv(machine.PROCESSES, raising=False)
    assert preparing._processes(100, 60.0, 10) == 6
    assert preparing._processes(4, 60.0, 10) == 4
    assert preparing._processes(100, 60.0, 200) == 2
    assert preparing._processes(100, 60.0, 2000) == 1
    assert preparing._processes(100, 1.0, 10) == 1
    monkeypatch.setenv(machine.PROCESSES, "3")
    assert preparing._processes(100, 60.0, 10) == 3
    monkeypatch.setattr(preparing, "free_memory", lambda: None)
    assert preparing._processes(100, 60.0, 2000) == 3
    monkeypatch.setattr(machine.multiprocessing, "parent_process", lambda: object())  # a run of a sweep, say
    assert preparing._processes(100, 60.0, 10) == 1


def test_what_this_process_may_use_counts(monkeypatch):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: {3, 5, 7}, raising=False)
    assert machine.cores() == 3
    monkeypatch.delattr(machine.os, "sched_getaffinity")
    assert machine.cores() == os.cpu_count()
    assert machine.free_memory() > 0


def test_memory_of_a_container_is_what_is_left_of_its_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    whole = machine.free_memory()
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 100\nactive_file 300\ninactive_file 400\nshmem 7\n")
    assert machine.free_memory() > 0.5 * whole
    (tmp_path / "memory.max").write_text("1000\n")
    assert machine.free_memory() == 1000 - 900 + 300 + 400


def test_words():
    assert [machine.in_bytes(n) for n in (2048, 3 * 2**20, 1.5 * 2**30)] == ["2 KiB", "3.0 MiB", "1.5 GiB"]
    assert [preparing.in_time(s) for s in (0.1, 89, 600, 7200)] == ["1 s", "89 s", "10 minutes", "2.0 hours"]


def test_cases_that_are_left_out_are_said(tmp_path, cache):
    def prepared(*names):
        recipe = load_recipe(tiny(), [f"data.leave_out=[{','.join(names)}]"])
        return prepare_run(recipe, tmp_path / "-".join(names), cache=cache)

    whole = prepared()
    test, train = whole.split.test[0], whole.split.unlabelled[0]
    found = prepared(test, train)
    assert set(whole.split.test) - set(found.split.test) == {test}
    assert train not in found.split.labelled + found.split.unlabelled
    assert "left_out" not in describe(whole)
    said = describe(found)
    assert said["left_out"] == {"train": [train], "test": [test]}
    assert said["notes"][:2] == [
        f"data.leave_out: 1 of 16 train cases are left out ({train})",
        f"data.leave_out: 1 of 6 test cases are left out ({test}): the result is of the others alone",
    ]
    with pytest.raises(RecipeError, match=rf"data\.leave_out: .*there is no case '{test}x'. Did you mean '{test}'"):
        prepared(f"{test}x")

"""Runs on a Ray cluster. Ray decides where and when, and starts a run anew whose node is lost; the run goes on by itself."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from labeleff.errors import Interrupted, RecipeError, RunError, one_line
from labeleff.files import write_atomically
from labeleff.sweep.keeper import Keeper, Mark, landmarks, pack, unpack
from labeleff.sweep.local import ONE_THREAD
from labeleff.sweep.worker import Outcome, Task, execute

GRACE = 60.0
"""Seconds for runs that were asked to stop to write a checkpoint and to hand it over."""


@dataclass(frozen=True)
class Cluster:
    """All runs as tasks of a Ray cluster that is there already, each in its own process.

    Every node needs this package in the same version, and the data set under the same path. A run whose node or process
    is lost goes on elsewhere from its last checkpoint: in the shared folder or, where there is none, from what was last
    pushed to the sweep's folder.

    Args:
        address: Where the cluster is, as Ray knows it: ``auto``, ``host:port``, or ``ray://host:port``.
        shared: The sweep's folder is one and the same on all nodes. Otherwise runs work in temporary folders of their
            nodes, and what they write travels to this machine, which must then be a node of the cluster.
        cpus: Cores a run takes. How many threads it starts is in its recipe.
        gpus: Devices a run takes.
        retries: How often a run is started anew after its node or process was lost.
        sync_every: Seconds between two looks for a new checkpoint to push, where nothing is shared.
    """

    address: str
    shared: bool
    cpus: float = 1
    gpus: float = 0
    retries: int = 3
    sync_every: float = 5.0

    def run(self, tasks: Sequence[Task]) -> Iterator[Outcome]:
        """Yield outcomes as runs end. Leaving early asks the runs in progress to write a checkpoint, and waits for them.

        Raises:
            RunError: Ray is missing, or there is no such cluster.
        """
        ray = _ray()
        with self._connected(ray):
            self._note_what_does_not_fit(ray)
            keeper = None if self.shared else self._keeper(ray, tasks)
            options = {"num_cpus": self.cpus, "num_gpus": self.gpus, "max_retries": self.retries}
            remote = ray.remote(max_calls=1, retry_exceptions=[Interrupted], **options)(work)
            home = Home(Path.cwd(), os.environ.get("LABELEFF_DATA"))
            pending: dict[Any, Task] = {}
            try:
                for task in tasks:
                    apart = None if keeper is None else Apart(keeper, _plugins(task), self.sync_every)
                    pending[remote.options(name=task.name).remote(task, home, apart)] = task
                while pending:
                    for ref in ray.wait(list(pending))[0]:
                        outcome = _outcome(ray, ref, pending[ref])
                        del pending[ref]
                        yield outcome
            finally:
                _cancel(ray, list(pending))
                if keeper is not None:
                    ray.kill(keeper)

    @contextmanager
    def _connected(self, ray: Any) -> Iterator[None]:
        """Be a driver of the cluster, unless this process is one already.

        Raises:
            RunError: There is no such cluster.
        """
        if ray.is_initialized():
            yield
            return
        more = {"include_dashboard": False} if self.address == "local" else {}
        try:
            with _own_signal_handlers():
                _knock(self.address)
                ray.init(address=self.address, log_to_driver=False, logging_level=logging.ERROR, **more)
        except (OSError, ValueError, RuntimeError, AssertionError, ray.exceptions.RayError) as error:
            reason = one_line(error, 300)
            raise RunError(f"{self.address}: no Ray cluster can be reached there: {reason}") from error
        try:
            yield
        finally:
            ray.shutdown()

    def _note_what_does_not_fit(self, ray: Any) -> None:
        """Say so where no node is large enough: Ray would wait for one without a word."""
        wanted = {"CPU": self.cpus, "GPU": self.gpus}
        for node in ray.nodes():
            if node["Alive"] and all(node["Resources"].get(kind, 0) >= amount for kind, amount in wanted.items()):
                return
        from labeleff.runlog import console

        console().print(
            f"{self.address}: no node has {self.cpus:g} CPUs and {self.gpus:g} GPUs for a run; waiting until one joins"
        )

    def _keeper(self, ray: Any, tasks: Sequence[Task]) -> Any:
        """Start the keeper on this very node, where the sweep's folder is.

        Raises:
            RunError: This machine is no node of the cluster.
        """
        from ray.util import client
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        if client.ray.is_connected():
            raise RunError(
                f"{self.address}: from outside a cluster, results come back by a shared folder only; "
                "share the sweep's folder with all nodes, or start the sweep on one of them"
            )
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
        return ray.remote(**options)(Keeper).remote({task.name: (task.folder, task.log) for task in tasks})


def _ray() -> Any:
    """Return Ray, quiet.

    Raises:
        RunError: It is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise RunError("runs on a cluster need Ray, which is not installed: pip install 'labeleff[ray]'") from error
    return ray


def _knock(address: str) -> None:
    """Try whether anything is there: Ray itself gives up after minutes only."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "://" not in address:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


@contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Keep the handlers of this process: Ray puts an exit of its own in the place of that of SIGTERM."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _plugins(task: Task) -> tuple[tuple[str, bytes], ...]:
    """Return names and contents of a task's plugins.

    Raises:
        RecipeError: There is no such file.
    """
    try:
        return tuple((path.name, path.read_bytes()) for path in task.plugins)
    except OSError as error:
        raise RecipeError(f"--plugin {error.filename}: no such Python file") from error


def _outcome(ray: Any, ref: Any, task: Task) -> Outcome:
    """Return what a task returned, or why Ray has given it up; the reason is left where a report looks for it."""
    try:
        outcome: Outcome = ray.get(ref)
    except ray.exceptions.RayError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
        said = lines[-1 if isinstance(error, ray.exceptions.RayTaskError) else 0][:300]
        stopped = isinstance(error, Interrupted)
        outcome = Outcome(task.name, f"given up by Ray: {type(error).__name__}: {said}; see {task.log}", 0.0, stopped)
    path = task.log.with_suffix(".error.json")
    with contextlib.suppress(OSError):
        if outcome.error:
            write_atomically(path, json.dumps({"name": task.name, "error": outcome.error}) + "\n")
        else:
            path.unlink(missing_ok=True)
    return outcome


def _cancel(ray: Any, refs: list[Any]) -> None:
    """End tasks: those that wait at once, those in progress with a checkpoint, and by force when patience ends."""
    for force in (False, True):
        for ref in refs:
            ray.cancel(ref, force=force, recursive=False)  # their calls of the keeper must get through
        if refs:
            _, refs = ray.wait(refs, num_returns=len(refs), timeout=GRACE)


# -- on the nodes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Home:
    """What relative paths and the names of data sets mean where the sweep was started.

    Args:
        folder: The current folder there.
        data: ``LABELEFF_DATA`` there.
    """

    folder: Path
    data: str | None


@dataclass(frozen=True)
class Apart:
    """What a run needs where it shares no folder with the sweep.

    Args:
        keeper: Handle of the :class:`labeleff.sweep.keeper.Keeper`.
        plugins: Names and contents of Python files to load first.
        every: Seconds between two looks for a new checkpoint.
    """

    keeper: Any
    plugins: tuple[tuple[str, bytes], ...]
    every: float


def work(task: Task, home: Home, apart: Apart | None) -> Outcome:
    """Run a task on a node.

    Args:
        task: What to run.
        home: Where the sweep was started; what the node has instead goes first.
        apart: How the state travels; None: the folder is shared.

    Raises:
        Interrupted: The node is shutting down; Ray tries elsewhere.
    """
    os.environ.update(dict.fromkeys(ONE_THREAD, "1"))  # as on one machine; Ray would say how many cores the task has
    if home.data is not None:
        os.environ.setdefault("LABELEFF_DATA", home.data)
    with contextlib.suppress(OSError):  # a node need not have that folder
        os.chdir(home.folder)
    if apart is None:
        with _printing_to(task.log):
            outcome = execute(task)
    else:
        outcome = _work_apart(task, apart)
    if outcome.interrupted:
        raise Interrupted(outcome.error)
    return outcome


def _work_apart(task: Task, apart: Apart) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="labeleff-", ignore_cleanup_errors=True) as temporary:
        place = Path(temporary)
        plugins = []
        for number, (name, content) in enumerate(apart.plugins):
            plugins.append(place / "plugins" / str(number) / name)
            write_atomically(plugins[-1], content)
        here = replace(task, folder=place / "run", log=place / "log" / task.log.name, plugins=tuple(plugins))
        sender = Sender(here, apart)
        sender.fetch()
        with _printing_to(here.log), sender.watching():
            outcome = execute(here)
        with _undisturbed():
            sender.push()
        return outcome


class Sender:
    """Fetches what is kept of a run, and pushes what has changed whenever a new checkpoint stands.

    Args:
        task: The run, with its folder and log on this node.
        apart: Where it is kept.
    """

    def __init__(self, task: Task, apart: Apart) -> None:
        self.task, self.apart = task, apart
        self._attempt = uuid.uuid4().hex
        self._known: Mapping[str, Mark] = {}
        self._done = threading.Event()

    def fetch(self) -> None:
        """Bring folder and log to the state in which an earlier attempt left them."""
        archive, log = self._call("begin")
        self.task.folder.mkdir(parents=True)
        unpack(archive, self.task.folder)
        self._known = pack(self.task.folder, {}).marks
        write_atomically(self.task.log, log)

    def push(self) -> bool:
        """Hand over what has changed; False where another attempt has taken this one's place."""
        parcel = pack(self.task.folder, self._known)
        accepted: bool = self._call("push", parcel, self.task.log.read_bytes())
        self._known = parcel.marks
        return accepted

    def _call(self, method: str, *values: Any) -> Any:
        answer = getattr(self.apart.keeper, method).remote(self.task.name, self._attempt, *values)
        return answer.future().result()  # Ray gives the cores of a task that waits in ray.get to another one

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Push in the background while the run goes on."""
        thread = threading.Thread(target=self._watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._done.set()
            thread.join()

    def _watch(self) -> None:
        before = landmarks(self.task.folder)
        while not self._done.wait(self.apart.every):
            try:
                now = landmarks(self.task.folder)
                if now == before:
                    continue
                accepted = self.push()
            except (OSError, _ray().exceptions.RayError):  # the next one may get through; the last one must
                continue
            before = now
            if not accepted:  # this node was taken for dead
                os.kill(os.getpid(), signal.SIGINT)
                return


@contextmanager
def _printing_to(path: Path) -> Iterator[None]:
    """Let everything this process prints go to a file, for Python and for libraries below it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = [os.dup(1), os.dup(2)]
    with path.open("a", buffering=1) as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        for number in (1, 2):
            os.dup2(log.fileno(), number)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, kept in enumerate(before, 1):
                os.dup2(kept, number)
                os.close(kept)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Let no wish to stop (Ray's is a SIGINT) cut off what must get through."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)

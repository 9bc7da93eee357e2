"""First stages that several runs of a sweep have in common are trained once, and taken over by all of them.

A run that starts from the directory of such stages is a run that was killed at their end and goes on: the rule of resume
makes it, bit for bit, the run that trains them itself. Stages that see every training case and no label are the same whoever is
labelled: pretraining is done once for all budgets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from labeleff import registry
from labeleff.recipe import Data, Evaluation, Recipe, Stage
from labeleff.recipe_io import to_mapping
from labeleff.rundir import ended
from labeleff.strategies.base import Strategy
from labeleff.sweep.grid import Job, key_of, plain_ways


@dataclass(frozen=True)
class Start:
    """Stages that are trained once.

    Args:
        key: Hash of what matters to their outcome.
        recipe: A recipe of these stages alone.
        after: Shorter ones that these start from, or None.
    """

    key: str
    recipe: Recipe
    after: Start | None

    def folder(self, sweep: Path) -> Path:
        """Return the directory of these stages in a sweep's folder."""
        return _place(sweep, self.key)

    def ended(self, sweep: Path) -> bool:
        """Return whether they are trained."""
        return ended(self.folder(sweep), self.recipe)


def shared_starts(jobs: Sequence[Job], sweep: Path) -> dict[str, Start]:
    """Return by a job's name the longest first stages that it has in common with another job, or that an earlier sweep left.

    Args:
        jobs: Runs that have not begun.
        sweep: The sweep's folder.
    """
    keys = {job.name: dict(_keys(job.recipe)) for job in jobs}
    users = Counter(key for own in keys.values() for key in own.values())
    known: dict[str, Start] = {}
    found: dict[str, Start] = {}
    for job in jobs:
        own = {n: key for n, key in keys[job.name].items() if users[key] > 1 or _place(sweep, key).exists()}
        start = None
        for length, key in own.items():
            longer = [users[own[n]] for n in own if n > length]
            if longer and longer[0] == users[key]:  # whoever begins with these has the longer ones in common too
                continue
            if key not in known:
                stages = job.recipe.stages[:length]
                recipe = replace(job.recipe, name=f"start-{key}", stages=stages, data=_seen(job.recipe, stages))
                known[key] = Start(key, recipe, start)
            start = known[key]
        if start is not None:
            found[job.name] = start
    return found


def _place(sweep: Path, key: str) -> Path:
    return sweep / "starts" / key


def in_order(starts: Mapping[str, Start]) -> list[list[Start]]:
    """Return all starts by their number of stages, each once: those of a group need no other of the group."""
    every: dict[str, Start] = {}
    for start in starts.values():
        one: Start | None = start
        while one is not None:
            every[one.key] = one
            one = one.after
    lengths = sorted({len(start.recipe.stages) for start in every.values()})
    return [[start for start in every.values() if len(start.recipe.stages) == n] for n in lengths]


def _keys(recipe: Recipe) -> Iterator[tuple[int, str]]:
    """Yield how many first stages, but never all, and the hash of what matters to what they leave, defaults too.

    Sizes of organs that are expected in unlabelled cases matter to stages that see unlabelled cases only. Stages without a
    step have no checkpoint to go on from.
    """
    usual = Evaluation()
    evaluation = replace(recipe.evaluation, predictors=usual.predictors, oracle=usual.oracle, rounds=usual.rounds)
    for length in range(1, len(recipe.stages)):
        stages = recipe.stages[:length]
        if any(stage.folds for stage in stages):  # they become stages of their own, and numbers of stages change
            return
        if stages[-1].steps:
            data = _seen(recipe, stages)
            data = data if any(map(_sees_more, stages)) else replace(data, prior=None)
            own = replace(plain_ways(recipe), data=data, stages=stages, evaluation=evaluation)
            yield length, key_of("start", to_mapping(own))


def _seen(recipe: Recipe, stages: Sequence[Stage]) -> Data:
    """Return a recipe's data as some of its stages see them: whoever is labelled, if they see all cases and no label."""
    data, looks = recipe.data, recipe.evaluation
    usual = Data(data.dataset)
    who_else = ("unlabelled", "slices", "foreign", "source", "target", "unlabelled_from", "prior", "validation")
    if looks.probe or looks.diagnose or any(getattr(data, name) != getattr(usual, name) for name in who_else):
        return data
    return replace(data, labelled=1, draw=0) if all(map(_is_blind, stages)) else data


def _is_blind(stage: Stage) -> bool:
    """Return whether a stage is the same whoever is labelled."""
    strategy: Strategy = registry.made("strategy", stage.strategy)
    reads = strategy.reads_labels or any(bound.known for bound in stage.streams.values())
    return not reads and stage.annotator is None and _roles(stage) == {"all"}


def _sees_more(stage: Stage) -> bool:
    """Return whether a stage sees other cases than labelled ones."""
    return _roles(stage) != {"labelled"}


def _roles(stage: Stage) -> set[str]:
    """Return which cases the streams of a stage are bound to."""
    streams = registry.made("strategy", stage.strategy).streams()
    bound = {name: stage.streams[name].role if name in stage.streams else None for name in streams}
    return {bound[name] or stream.role for name, stream in streams.items()}

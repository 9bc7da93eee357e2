"""Who is labelled: budgets in patients, drawn by seed, nested within a draw, balanced over sites."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from labeleff.batch import derive_seed
from labeleff.data.manifest import Case, Manifest
from labeleff.errors import SplitError, did_you_mean


@dataclass(frozen=True)
class Split:
    """Case ids by what they are used for. ``evaluate_on`` says what ``test`` holds: the test list or a development part."""

    labelled: tuple[str, ...]
    unlabelled: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]
    draw: int
    budget: str
    evaluate_on: str
    notes: tuple[str, ...] = ()

    @property
    def hash(self) -> str:
        """The first 16 hex digits of the SHA-256 of the roles."""
        roles = [self.labelled, self.unlabelled, self.validation, self.test, self.evaluate_on]
        return hashlib.sha256(json.dumps(roles).encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def make_split(
    manifest: Manifest,
    *,
    labelled: float | str,
    draw: int = 0,
    validation: int | str = 0,
    unlabelled: int | str = "rest",
    evaluate_on: Literal["test", "development", "none"] = "test",
    development: int = 0,
    folds: int = 0,
    fold: int = 0,
    foreign: str = "",
    contamination: float = 0.0,
    slices: int | None = None,
    source: tuple[str, ...] = (),
    target: tuple[str, ...] = (),
    unlabelled_from: tuple[str, ...] = (),
) -> Split:
    """Return the roles of all cases that a run uses.

    Args:
        manifest: The data set.
        labelled: Patients in the budget: a number, a fraction of the training patients in (0, 1), ``all``, ``first:N`` of
            the official list, or ``none``: a network that was trained elsewhere is adapted.
        draw: Seed of the order in which patients are labelled. Budgets of one draw are nested.
        validation: Patients taken out of the budget, or ``official``: the publishers' validation list, said in a note.
        unlabelled: ``rest`` of the training patients, ``none``, a number of them, or ``5x``: five times the budget.
        evaluate_on: ``test``, or ``development``: patients cut from the training list, so that settings can be chosen
            without the test list. The cut depends on the data set alone, and is made only then. ``none``: nothing.
        development: How many patients that part has.
        folds: Deal the labelled patients out to this many parts and test on one of them, in place of a test list. The
            parts depend on the data set alone; everything else is drawn from the other parts.
        fold: Which part is tested.
        foreign: Domain whose training patients are never labelled.
        contamination: Share of the unlabelled patients taken from that domain, in place of as many others.
        slices: In a 2-D data set, images labelled per labelled patient, evenly spread; the patient's others are unlabelled.
        source: Domains that labels come from, validation included; empty: all.
        target: Domains that are adapted to: unlabelled and evaluation cases are of these; empty: all. Where they are those
            of ``source`` too, labels are of the target: an oracle of adaptation.
        unlabelled_from: Domains that unlabelled cases come from, in place of those of ``target``: with those of ``source``
            among them, what is not labelled there can be learnt from too.

    Raises:
        SplitError: The budget cannot be met.
    """
    strangers = _foreign(manifest, foreign)
    sources, targets = _of_domains(manifest, "source", source), _of_domains(manifest, "target", target)
    pool = _of_domains(manifest, "unlabelled_from", unlabelled_from) if unlabelled_from else targets
    apart = set(strangers)
    reachable = [p for p in targets.patients("train") if p not in apart]
    tested = _fold(targets, reachable, folds, fold) if folds else []
    apart = set(tested)
    reachable = [p for p in reachable if p not in apart]
    held_out = _development(targets, reachable, development) if evaluate_on == "development" else []
    gone = {*strangers, *tested, *held_out}
    training = [p for p in sources.patients("train") if p not in gone]
    order = _order(sources, training, labelled, draw)
    count = _count(sources, training, order, labelled)
    chosen, validating, validation_cases, notes = _validating(sources, order[:count], validation)
    test, said = _evaluated(targets, held_out, tested, evaluate_on, folds, fold)
    notes += said
    if source or target:
        notes.append(f"labels from {_listed(source)}, adapted to and evaluated on {_listed(target)}")
    if unlabelled_from:
        notes.append(f"unlabelled images from {_listed(unlabelled_from)}")
    labelled_ids = _ids(sources.of_role("train"), chosen)
    known = set(labelled_ids)
    without = {case.patient for case in pool.of_role("train") if case.id not in known}
    left = order
    if source != (unlabelled_from or target):
        left = _order(pool, [p for p in pool.patients("train") if p not in gone], "all", draw)
    # a patient may be labelled in one domain and without a label in the other
    held = set(validating)
    others = [p for p in left if p in without and p not in held]
    wanted = _unlabelled(others, unlabelled, count)
    if contamination:
        wanted = _contaminated(wanted, strangers, contamination, draw)
        notes.append(f"{contamination:.0%} of the unlabelled patients are of the domain {foreign!r}")
    if slices is not None and manifest.axes == 2:
        labelled_ids = _some_images(manifest, labelled_ids, slices)
        wanted = [*wanted, *(chosen if unlabelled != "none" else [])]
    known, asked, within = set(labelled_ids), set(wanted), {case.id for case in pool.cases}
    return Split(
        labelled=tuple(labelled_ids),
        unlabelled=tuple(
            case.id
            for case in manifest.of_role("train")
            if case.patient in asked and case.id not in known and (case.id in within or case.domain == foreign)
        ),
        validation=tuple(validation_cases),
        test=tuple(test),
        draw=draw,
        budget=str(labelled),
        evaluate_on=evaluate_on,
        notes=tuple(notes),
    )


def _validating(
    sources: Manifest, chosen: list[str], validation: int | str
) -> tuple[list[str], list[str], list[str], list[str]]:
    """Return who is learnt from, who is validated on, the validation cases, and what must be said of them."""
    if validation == "official":
        cases = [case.id for case in sources.of_role("validation")]
        if not cases:
            raise SplitError(
                f"data.validation is official, but {sources.name} has no validation list; give a number of patients"
            )
        note = f"+{len(sources.patients('validation'))} labelled patients for validation (official list)"
        return chosen, [], cases, [note]
    count, number = len(chosen), int(validation)
    if number and number >= count:
        raise SplitError(
            f"data.validation takes {number} patients out of a budget of {count}: nothing is left to learn from; "
            "raise data.labelled"
        )
    chosen, validating = chosen[: count - number], chosen[count - number :]
    return chosen, validating, _ids(sources.of_role("train"), validating), []


def _evaluated(
    targets: Manifest, held_out: list[str], tested: list[str], evaluate_on: str, folds: int, fold: int
) -> tuple[list[str], list[str]]:
    """Return the cases that are evaluated on, and what must be said of them."""
    if evaluate_on == "none":
        return [], ["nothing was evaluated (data.evaluate_on: none)"]
    if evaluate_on == "development":
        test = _ids(targets.of_role("train"), held_out)
        note = f"evaluated on {len(held_out)} development patients cut from the training list; not a test result"
    elif folds:
        test = _ids(targets.of_role("train"), tested)
        note = (
            f"fold {fold + 1} of {folds}: tested on {len(tested)} patients of the training list, trained on the others"
        )
    else:
        test, note = [case.id for case in targets.of_role("test")], ""
    _check_labels(targets, test)
    return test, [note] if note else []


def _of_domains(manifest: Manifest, key: str, domains: tuple[str, ...]) -> Manifest:
    """Return the part of a data set that is of some domains; all of it for none.

    Raises:
        SplitError: A domain has no cases.
    """
    known = sorted({case.domain for case in manifest.cases})
    unknown = next((d for d in domains if d not in known), None)
    if unknown is not None:
        raise SplitError(
            f"data.{key}: {manifest.name} has no domain {unknown!r}.{did_you_mean(unknown, known)} It has: {known}"
        )
    return replace(manifest, cases=tuple(c for c in manifest.cases if c.domain in domains)) if domains else manifest


def _listed(domains: tuple[str, ...]) -> str:
    return " and ".join(domains) if domains else "all domains"


def _ids(cases: Iterable[Case], patients: Iterable[str]) -> list[str]:
    wanted = set(patients)
    return [case.id for case in cases if case.patient in wanted]


def _shuffled(items: Iterable[str], *key: int | str) -> list[str]:
    """Return a permutation that depends on the sorted items and the key alone."""
    items = sorted(items)
    generator = np.random.Generator(np.random.Philox(derive_seed("split", *key)))
    return [items[i] for i in generator.permutation(len(items))]


def _development(manifest: Manifest, pool: list[str], count: int) -> list[str]:
    if not 0 < count < len(pool):
        raise SplitError(
            f"data.development is {count}; {manifest.name} has {len(pool)} training patients: give 1 … {len(pool) - 1}"
        )
    return _shuffled(pool, "development", manifest.name)[:count]


def _order(manifest: Manifest, training: list[str], labelled: float | str, draw: int) -> list[str]:
    """Return labelled-able patients in the order of labelling, then those that no label is known of."""
    wanted = set(training)
    cases = [case for case in manifest.of_role("train") if case.patient in wanted]
    without = {case.patient for case in cases if not case.has_label}
    able = [p for p in training if p not in without]
    if isinstance(labelled, str) and labelled.startswith("first:"):
        if not manifest.official:
            raise SplitError(
                f"data.labelled is {labelled}, but {manifest.name} has no official order; give a number of patients"
            )
        known = set(able)
        listed = [p for p in manifest.official if p in known]
        first = set(listed)
        able = listed + [p for p in able if p not in first]
    else:
        domain_of = {case.patient: case.domain for case in reversed(cases)}  # that of a patient's first case
        domains: dict[str, list[str]] = {}
        for patient in able:
            domains.setdefault(domain_of[patient], []).append(patient)
        queues = [_shuffled(domains[d], draw, d) for d in _shuffled(domains, draw, "domains")]
        # one of each domain in turn, so that every prefix is balanced
        able = [q[i] for i in range(max(map(len, queues), default=0)) for q in queues if i < len(q)]
    return able + [p for p in training if p in without]


def _count(manifest: Manifest, training: list[str], order: list[str], labelled: float | str) -> int:
    without = {case.patient for case in manifest.of_role("train") if not case.has_label}
    able = sum(p not in without for p in order)
    text = str(labelled)
    if text == "none":
        return 0
    if text == "all":
        count = able
    elif text.startswith("first:") and text[6:].isdigit():
        count = int(text[6:])
    elif isinstance(labelled, str):
        raise SplitError(
            f"data.labelled is {labelled!r}; give a number of patients, a fraction below 1, all, none, or first:N"
        )
    elif 0 < labelled < 1:
        count = max(1, round(labelled * len(training)))
    else:
        count = int(labelled)
        if count != labelled:
            raise SplitError(f"data.labelled is {labelled}; give a whole number of patients or a fraction below 1")
    if not 1 <= count <= able:
        raise SplitError(
            f"data.labelled asks for {count} patients; {manifest.name} has {able} labelled training patients to choose from"
        )
    return count


def _unlabelled(others: list[str], unlabelled: int | str, budget: int) -> list[str]:
    text = str(unlabelled)
    if text == "rest":
        return others
    if not re.fullmatch(r"none|\d+|\d+x", text):
        raise SplitError(f"data.unlabelled is {text!r}; give rest, none, a number of patients, or 5x")
    number = 0 if text == "none" else int(text[:-1]) * budget if text.endswith("x") else int(text)
    if number > len(others):
        raise SplitError(f"data.unlabelled asks for {number} patients; {len(others)} are left beside the budget")
    return others[:number]


def evenly(length: int, count: int) -> list[int]:
    """Return ``count`` positions spread evenly over 0 … length - 1, all of them where there are no more."""
    return [int((i + 0.5) * length / count) for i in range(count)] if count < length else list(range(length))


def _some_images(manifest: Manifest, ids: list[str], count: int) -> list[str]:
    by_patient: dict[str, list[str]] = {}
    for name in ids:
        by_patient.setdefault(manifest.case(name).patient, []).append(name)
    kept = {own[i] for own in by_patient.values() for i in evenly(len(own), count)}
    return [name for name in ids if name in kept]


def _foreign(manifest: Manifest, domain: str) -> list[str]:
    if not domain:
        return []
    found = list(dict.fromkeys(case.patient for case in manifest.of_role("train") if case.domain == domain))
    if not found:
        known = sorted({case.domain for case in manifest.of_role("train")})
        raise SplitError(
            f"data.foreign: {manifest.name} has no training patients of the domain {domain!r}; it has {known}"
        )
    return found


def _contaminated(wanted: list[str], strangers: list[str], share: float, draw: int) -> list[str]:
    """Return as many patients, a share of them strangers."""
    number = round(share * len(wanted))
    if number > len(strangers):
        raise SplitError(
            f"data.contamination asks for {number} foreign patients of {len(wanted)}; there are {len(strangers)}: "
            "lower the share or data.unlabelled"
        )
    return wanted[: len(wanted) - number] + _shuffled(strangers, "foreign", draw)[:number]


def _fold(manifest: Manifest, pool: list[str], folds: int, fold: int) -> list[str]:
    """Return the patients of one part; a patient is tested only if all of its cases have labels."""
    without = {case.patient for case in manifest.of_role("train") if not case.has_label}
    order = [p for p in _order(manifest, pool, "folds", 0) if p not in without]
    if not 2 <= folds <= len(order):
        raise SplitError(
            f"evaluation.folds is {folds}; {manifest.name} has {len(order)} labelled training patients: give 2 … {len(order)}"
        )
    if not 0 <= fold < folds:
        raise SplitError(f"evaluation.fold is {fold}; with {folds} folds it is 0 … {folds - 1}")
    return order[fold::folds]


def _check_labels(manifest: Manifest, test: list[str]) -> None:
    if not test:
        raise SplitError(
            f"{manifest.name}: there is nothing to evaluate on; name test cases, or use evaluate_on: development"
        )
    missing = next((i for i in test if not manifest.case(i).has_label), None)
    if missing is not None:
        raise SplitError(f"{manifest.name}: test case {missing!r} has no label; leave it out or add the label")

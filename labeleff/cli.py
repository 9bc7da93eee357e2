"""The command line. Nothing heavy is imported until a command needs it, so that help and completion are quick."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from labeleff.errors import LabeleffError, RecipeError, Waiting, did_you_mean

app = typer.Typer(
    name="labeleff",
    help="Learn to segment images when labels are few, missing, noisy or from elsewhere.\n\n"
    "Start with [bold]labeleff run quickstart[/bold]: a semi-supervised method beside its baseline, in minutes, without data.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
new = typer.Typer(help="Write the files that something of your own begins with.", no_args_is_help=True)
app.add_typer(new, name="new")
LISTS = ("strategies", "annotators", "backbones", "datasets", "noise", "priors", "recipes", "benchmarks")
EXPORTS = ("safetensors", "bundle")
LABEL_FORMATS = ("nnunet", "manifest")
EVALUATED_ON = ("test", "development")
KINDS = {
    "strategies": "strategy",
    "annotators": "annotator",
    "backbones": "backbone",
    "datasets": "dataset",
    "noise": "noise",
    "priors": "prior",
}


def _recipes() -> list[str]:
    """Return the names of shipped recipes; looks at file names only."""
    inside = Path(__file__).parent / "recipes"
    folder = inside if inside.is_dir() else Path(__file__).parent.parent / "recipes"
    names = (path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))
    return sorted(name for name in names if not name.startswith("methods/"))


def _complete_recipe(incomplete: str) -> Iterator[str]:
    return (name for name in _recipes() if name.startswith(incomplete))


def _benchmarks() -> list[str]:
    """Return the names of shipped benchmarks; looks at file names only."""
    inside = Path(__file__).parent / "benchmarks"
    folder = inside if inside.is_dir() else Path(__file__).parent.parent / "benchmarks" / "suites"
    return sorted(path.stem for path in folder.glob("*.yaml"))


def _complete_benchmark(incomplete: str) -> Iterator[str]:
    return (name for name in _benchmarks() if name.startswith(incomplete))


def _complete_list(incomplete: str) -> Iterator[str]:
    return (name for name in LISTS if name.startswith(incomplete))


RecipeArgument = Annotated[
    str, typer.Argument(help="A .yaml file, or the name of a shipped recipe.", autocompletion=_complete_recipe)
]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="Changes, such as stages.0.steps=200 seed=1.")
]
PluginOption = Annotated[
    list[Path] | None, typer.Option("--plugin", help="Python file that registers components; repeatable. You trust it.")
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@contextmanager
def _reported(*, debug: bool) -> Iterator[None]:
    """Print what a user caused as one line, and leave with its exit code."""
    try:
        yield
    except LabeleffError as error:
        if debug:
            raise
        sign = "[bold]waiting:[/]" if isinstance(error, Waiting) else "[bold red]error:[/]"
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"{sign} {escape(str(error))}")
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; the last checkpoint stands: run the same command again to go on")
        raise typer.Exit(130) from None


def _load_plugins(files: list[Path] | None) -> None:
    if files:
        from labeleff.plugins import load_plugins

        load_plugins(files)


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    folder: Annotated[Path | None, typer.Option(help="The run directory; default runs/NAME.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Remove what is in the folder and start over.")] = False,
    extend: Annotated[bool, typer.Option("--extend", help="Go on with a last stage that has become longer.")] = False,
    cache: Annotated[Path | None, typer.Option(help="Where prepared images are kept.")] = None,
    plugin: PluginOption = None,
    debug: DebugOption = False,
) -> None:
    """Train and evaluate a recipe; run the same command again to go on after a stop.

    [dim]labeleff run quickstart[/dim]

    [dim]labeleff run left_atrium/bcp data.labelled=8 seed=1 --folder runs/la8[/dim]

    Exit codes: 0 done, 2 something is wrong with what was asked (one line says what), 75 stopped by a signal after
    writing a checkpoint (a queue may requeue it), 130 interrupted.
    """
    with _reported(debug=debug):
        _load_plugins(plugin)
        from labeleff.recipe_io import load_recipe
        from labeleff.runner import run as run_recipe

        loaded = load_recipe(recipe, overrides or [])
        run_recipe(loaded, folder or Path("runs") / loaded.name, fresh=fresh, extend=extend, cache=cache)


@app.command()
def check(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    cache: Annotated[Path | None, typer.Option(help="Where prepared images are kept.")] = None,
    plugin: PluginOption = None,
    debug: DebugOption = False,
) -> None:
    """Construct everything, audit the data, time a few steps, and estimate time and memory; trains nothing.

    [dim]labeleff check left_atrium/bcp data.labelled=8[/dim]
    """
    with _reported(debug=debug):
        _load_plugins(plugin)
        from labeleff.checking import check as check_recipe
        from labeleff.recipe_io import load_recipe

        check_recipe(load_recipe(recipe, overrides or []), cache=cache)


@app.command()
def show(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    diff: Annotated[str | None, typer.Option(help="Another recipe; print only what differs.")] = None,
    plugin: PluginOption = None,
    debug: DebugOption = False,
) -> None:
    """Print a recipe with every default spelt out, or how it differs from another.

    [dim]labeleff show quickstart[/dim]

    [dim]labeleff show left_atrium/bcp --diff left_atrium/supervised[/dim]
    """
    with _reported(debug=debug):
        _load_plugins(plugin)
        from labeleff import recipe_io

        loaded = recipe_io.load_recipe(recipe, overrides or [])
        if diff is None:
            typer.echo(recipe_io.to_yaml(loaded), nl=False)
            return
        lines = recipe_io.diff(recipe_io.load_recipe(diff), loaded)
        typer.echo("\n".join(lines) if lines else "no difference")


ClassesOption = Annotated[
    str, typer.Option(help="Names by commas, background first, in the order of the label values.")
]
PatternOption = Annotated[
    str,
    typer.Option(help="Regular expression whose first group is the patient in a case's name, such as '(p[0-9]+)_'."),
]
DomainOption = Annotated[str, typer.Option(help="Site, scanner or stain of all cases.")]
IgnoreOption = Annotated[int | None, typer.Option(help="Label value of voxels that nobody has labelled.")]
PrefixOption = Annotated[str, typer.Option(help="Put in front of the names of cases and patients.")]
TestsOption = Annotated[
    bool,
    typer.Option("--unlabelled-tests", help="Learn from test images that have no label, in place of leaving them out."),
]


@app.command()
def index(
    folder: Annotated[Path, typer.Argument(help="Images and labels in any layout of docs/your_data.md, or a .csv.")],
    out: Annotated[Path | None, typer.Option(help="The manifest; default FOLDER's name with .json, here.")] = None,
    name: Annotated[str, typer.Option(help="Name of the data set.")] = "",
    classes: ClassesOption = "",
    ignore: IgnoreOption = None,
    patient_pattern: PatternOption = "",
    test: Annotated[int, typer.Option(min=0, help="Patients to hold out as the test, where there is none.")] = 0,
    domain: DomainOption = "",
    prefix: PrefixOption = "",
    unlabelled_tests: TestsOption = False,
    overlapping: Annotated[
        bool, typer.Option("--overlapping", help="Structures with a mask each do not exclude one another.")
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Recognise a folder of images, write its manifest, and say what was understood and what was not; nothing is copied.

    [dim]labeleff index my_scans --classes background,liver,tumour --test 4[/dim]
    """
    with _reported(debug=debug):
        from labeleff.data.recognise import Choices, write_index

        named = tuple(part.strip() for part in classes.split(",")) if classes else ()
        choices = Choices(name, named, ignore, patient_pattern, test, domain, prefix, unlabelled_tests, overlapping)
        for line in write_index(folder, out or Path(f"{folder.resolve().name.removesuffix('.csv')}.json"), choices):
            typer.echo(line)


@app.command()
def add(
    manifest: Annotated[Path, typer.Argument(help="What `labeleff index` wrote.")],
    folder: Annotated[Path, typer.Argument(help="More images, or the same folder with more labels.")],
    ignore: IgnoreOption = None,
    patient_pattern: PatternOption = "",
    domain: DomainOption = "",
    prefix: PrefixOption = "",
    unlabelled_tests: TestsOption = False,
    debug: DebugOption = False,
) -> None:
    """Append the cases of a folder to a manifest; what is there keeps its place and role, and no case leaves the test.

    [dim]labeleff add my_scans.json scans_of_may --domain may[/dim]
    """
    with _reported(debug=debug):
        from labeleff.data.recognise import Choices, add_folder

        choices = Choices(
            ignore=ignore,
            patient_pattern=patient_pattern,
            domain=domain,
            prefix=prefix,
            unlabelled_tests=unlabelled_tests,
        )
        for line in add_folder(manifest, folder, choices):
            typer.echo(line)


@app.command()
def audit(
    data: Annotated[str, typer.Argument(help="A manifest (.json), or a recipe for its data set.")],
    test_labels: Annotated[
        bool, typer.Option("--test-labels", help="Look at the labels of test cases too; else they stay closed.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write what was found as JSON.")] = None,
    plugin: PluginOption = None,
    debug: DebugOption = False,
) -> None:
    """Read all images and labels once and name what is wrong: leaks, copies, broken files, outliers, sites, empty labels.

    [dim]labeleff audit my_scans.json[/dim]

    Exit codes: 0 nothing has to be repaired (warnings are to be judged), 2 leaks or broken files.
    """
    with _reported(debug=debug):
        _load_plugins(plugin)
        from labeleff.corruption import open_data
        from labeleff.data.checkup import check_up
        from labeleff.errors import DataError
        from labeleff.files import write_json

        with Console(stderr=True).status("reading") as status:
            found = check_up(
                open_data(data),
                test_labels=test_labels,
                on_progress=lambda done, of: status.update(f"reading {done} of {of}"),
            )
        for line in found.lines():
            typer.echo(line)
        typer.echo(found.verdict)
        if json_file is not None:
            write_json(json_file, found.to_dict())
        if not found.is_sound:
            raise DataError("leaks and broken files have to be repaired before a run")


@app.command()
def inspect(
    data: Annotated[str, typer.Argument(help="A manifest (.json), or a recipe for its data set.")],
    folder: Annotated[Path | None, typer.Option(help="Where the page goes; default runs/inspect.")] = None,
    shown: Annotated[int, typer.Option(min=1, help="Cases on the contact sheet.")] = 24,
    test_labels: Annotated[
        bool, typer.Option("--test-labels", help="Show the labels of test cases too; else they stay closed.")
    ] = False,
    plugin: PluginOption = None,
    debug: DebugOption = False,
) -> None:
    """Write one page of what is in a data set: counts, sizes, spacing, intensities, volumes per class, a contact sheet.

    [dim]labeleff inspect my_scans.json[/dim]
    """
    with _reported(debug=debug):
        _load_plugins(plugin)
        from labeleff.inspecting import inspect as inspect_data

        inspect_data(data, folder or Path("runs") / "inspect", test_labels=test_labels, shown=shown)


@app.command()
def init(
    data: Annotated[Path, typer.Argument(help="A folder, a table of files (.csv), or a manifest (.json).")],
    output: Annotated[Path, typer.Option(help="The recipe; must be new.")] = Path("recipe.yaml"),
    memory: Annotated[
        float | None, typer.Option(min=0.1, help="GiB to plan for; default: the GPU's, or a quarter of the machine's.")
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Propose a recipe from what the data look like, each choice with its reason; test labels stay closed.

    [dim]labeleff init my_scans.json[/dim]

    [dim]labeleff check recipe.yaml[/dim]
    """
    with _reported(debug=debug):
        from labeleff.proposing import init as propose_recipe

        propose_recipe(data, output, memory=memory)


@app.command()
def corrupt(
    data: Annotated[str, typer.Argument(help="A manifest (.json), or a recipe for its data set.")],
    noise: Annotated[str, typer.Argument(help="A label-noise model: labeleff list noise.")],
    folder: Annotated[Path, typer.Option(help="Where the noisy copy goes; must be new.")],
    options: Annotated[
        list[str] | None, typer.Argument(metavar="[OPTION=VALUE]…", help="Such as target_dice=0.8 over=1.")
    ] = None,
    plugin: PluginOption = None,
    debug: DebugOption = False,
) -> None:
    """Make a copy of a data set whose training labels are wrong, with a report of how wrong; images are not copied.

    [dim]labeleff corrupt left_atrium/supervised distance target_dice=0.8 over=1 --folder noisy[/dim]

    [dim]labeleff run my.yaml data.dataset.name=manifest data.dataset.path=noisy/manifest.json[/dim]
    """
    with _reported(debug=debug):
        _load_plugins(plugin)
        from labeleff.corruption import corrupt as corrupt_data
        from labeleff.recipe_io import load_component

        corrupt_data(data, load_component("noise", noise, options or []), folder)


@app.command()
def suspects(
    data: Annotated[str, typer.Argument(help="A manifest (.json), or a recipe for its data, network and patch.")],
    folder: Annotated[Path | None, typer.Option(help="Where the ranking goes; default runs/suspects.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps of each network.")] = 300,
    folds: Annotated[int, typer.Option(min=2, help="Networks, each without one part of the patients.")] = 3,
    top: Annotated[int, typer.Option(min=0, help="Cases that are drawn.")] = 12,
    fresh: Annotated[bool, typer.Option("--fresh", help="Remove the run in the folder and start over.")] = False,
    cache: Annotated[Path | None, typer.Option(help="Where prepared images are kept.")] = None,
    plugin: PluginOption = None,
    debug: DebugOption = False,
) -> None:
    """Rank training cases by how wrong their labels look: a CSV, and a page with pictures. Test labels are not opened.

    [dim]labeleff suspects my/manifest.json --top 20[/dim]

    [dim]labeleff suspects left_atrium/supervised[/dim]
    """
    with _reported(debug=debug):
        _load_plugins(plugin)
        from labeleff.suspects import suspects as rank_suspects

        place = folder or Path("runs") / "suspects"
        rank_suspects(data, place, steps=steps, folds=folds, top=top, fresh=fresh, cache=cache)


RunArgument = Annotated[Path, typer.Argument(help="The run directory.")]


@app.command()
def evaluate(
    run: RunArgument,
    on: Annotated[
        str,
        typer.Option(help="test: as the run did; development: cases of the training list, by what they were to it."),
    ] = "test",
    cache: Annotated[Path | None, typer.Option(help="Where prepared images are kept.")] = None,
    plugin: PluginOption = None,
    debug: DebugOption = False,
) -> None:
    """Evaluate a trained run again: test labels are opened, the opening is logged, results take the place of those before.

    [dim]labeleff evaluate runs/la8[/dim]

    [dim]labeleff evaluate runs/la8 --on development[/dim]
    """
    with _reported(debug=debug):
        if on not in EVALUATED_ON:
            raise RecipeError(
                f"--on {on}: nothing is evaluated on that.{did_you_mean(on, EVALUATED_ON)} Known: {', '.join(EVALUATED_ON)}"
            )
        _load_plugins(plugin)
        from labeleff.evaluating import evaluate as evaluate_run

        evaluate_run(run, on=on, cache=cache)  # type: ignore[arg-type]  # one of EVALUATED_ON


@app.command()
def query(
    run: RunArgument,
    out: Annotated[Path | None, typer.Option(help="The folder; default RUN/bundles/round_NNN.")] = None,
    number: Annotated[int | None, typer.Option("--round", help="Which round; default the newest that waits.")] = None,
    correct: Annotated[
        bool, typer.Option("--correct/--blank", help="Regions hold the prediction, or are empty.")
    ] = False,
    images: Annotated[bool, typer.Option(help="Copy the images, so that nothing else is needed.")] = True,
    cache: Annotated[Path | None, typer.Option(help="Where prepared images are kept.")] = None,
    plugin: PluginOption = None,
    debug: DebugOption = False,
) -> None:
    """Write out what a run asks a person: NIfTI files, colour tables for ITK-SNAP and 3D Slicer, and a short README.

    [dim]labeleff query runs/my-run --correct[/dim]
    """
    with _reported(debug=debug):
        _load_plugins(plugin)
        from labeleff.bundle.write import write_bundle

        mode = "correct" if correct else "blank"
        folder = write_bundle(run, out, number=number, mode=mode, images=images, cache=cache)  # type: ignore[arg-type]
        typer.echo(f"{folder}: see README.txt there; then: labeleff answer {run} {folder}")


@app.command()
def answer(
    run: RunArgument,
    folder: Annotated[Path, typer.Argument(help="What `labeleff query` wrote, edited.")],
    partial: Annotated[bool, typer.Option("--partial", help="Take regions in order, leave the others open.")] = False,
    cannot_tell: Annotated[
        bool, typer.Option("--cannot-tell", help="What was left at ignore cannot be told; the region is charged.")
    ] = False,
    confirm: Annotated[bool, typer.Option("--confirm", help="Labels that equal the prediction are meant.")] = False,
    done: Annotated[
        bool, typer.Option("--done", help="In files with named segments, 0 in regions is background.")
    ] = False,
    drop: Annotated[
        bool, typer.Option("--drop-outside", help="Drop changes outside the regions in place of refusing them.")
    ] = False,
    by: Annotated[str, typer.Option(help="Who labelled.")] = "",
    seconds: Annotated[float | None, typer.Option(min=0, help="How long that took.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Where prepared images are kept.")] = None,
    plugin: PluginOption = None,
    debug: DebugOption = False,
) -> None:
    """Take in labels of a round, checked: all of its regions or none. Then `labeleff run` goes on.

    [dim]labeleff answer runs/my-run runs/my-run/bundles/round_001 --by anna --seconds 900[/dim]
    """
    with _reported(debug=debug):
        _load_plugins(plugin)
        from labeleff.bundle.read import Terms, read_answer

        terms = Terms(partial, cannot_tell, confirm, done, "drop" if drop else "reject")
        handed = read_answer(run, folder, terms=terms, by=by, seconds=seconds, cache=cache)
        for line in [*handed.notes, *(f"left open: {problem}" for problem in handed.problems)]:
            typer.echo(line)
        taken = len(handed.answer.regions) if handed.answer is not None else 0
        still = (
            f"{handed.open_regions} are still open"
            if handed.open_regions
            else "the round is complete: go on with labeleff run"
        )
        typer.echo(f"{taken} regions taken; {still}")


@app.command()
def budget(run: RunArgument, debug: DebugOption = False) -> None:
    """Show what a run has asked and spent, round by round, and what one more round would cost.

    [dim]labeleff budget runs/my-run[/dim]
    """
    with _reported(debug=debug):
        from labeleff.bundle.budget import show_budget

        show_budget(run)


@app.command()
def predict(
    run: RunArgument,
    source: Annotated[
        Path,
        typer.Argument(metavar="INPUT", help="A NIfTI file (2-D: PNG, TIFF, JPEG), a folder, or a manifest (.json)."),
    ],
    target: Annotated[Path, typer.Argument(metavar="OUTPUT", help="A file for a file, or a folder.")],
    also: Annotated[
        list[Path] | None, typer.Option("--also", metavar="RUN", help="Another run of an ensemble; repeatable.")
    ] = None,
    flips: Annotated[str, typer.Option(help="Axes to mirror at test time, such as 0,1.")] = "",
    probabilities: Annotated[bool, typer.Option("--probabilities", help="Also write those of every class.")] = False,
    uncertainty: Annotated[bool, typer.Option("--uncertainty", help="Also write the entropy, nats.")] = False,
    largest: Annotated[
        bool, typer.Option("--largest-component", help="Keep only the largest component of each class.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    plugin: PluginOption = None,
    debug: DebugOption = False,
) -> None:
    """Predict images that no run has seen: label maps in the geometry of the images.

    [dim]labeleff predict runs/la8 images/ predictions/ --uncertainty[/dim]

    [dim]labeleff predict runs/seed0 scan.nii.gz scan_label.nii.gz --also runs/seed1 --flips 0,1[/dim]
    """
    with _reported(debug=debug):
        _load_plugins(plugin)
        axes = [part.strip() for part in flips.split(",") if part.strip()]
        if not all(axis.isdigit() for axis in axes):
            raise RecipeError(f"--flips {flips}: give axes as numbers, such as 0,1")
        from labeleff.predict import Wish
        from labeleff.predict import predict as predict_files

        mirrored = tuple(sorted({int(axis) for axis in axes}))
        wish = Wish(probabilities, uncertainty, largest, mirrored, overwrite)
        predict_files([run, *(also or [])], source, target, wish, device=device, say=typer.echo)


@app.command()
def export(
    run: RunArgument,
    to: Annotated[str, typer.Option("--to", help="safetensors, or bundle (MONAI).")] = "safetensors",
    out: Annotated[Path | None, typer.Option(help="The folder; default RUN/export/TO. Must be new.")] = None,
    plugin: PluginOption = None,
    debug: DebugOption = False,
) -> None:
    """Write the predictor of a run for use elsewhere, with how images are prepared, and compare it with the run.

    [dim]labeleff export runs/la8 --to bundle --out la8_bundle[/dim]
    """
    with _reported(debug=debug):
        if to not in EXPORTS:
            raise RecipeError(
                f"--to {to}: nothing is exported as that.{did_you_mean(to, EXPORTS)} Known: {', '.join(EXPORTS)}"
            )
        _load_plugins(plugin)
        from labeleff.export import export as export_run

        folder = out or (run if run.is_dir() else run.parent) / "export" / to
        found = export_run(run, to, folder)  # type: ignore[arg-type]  # one of EXPORTS
        typer.echo(f"{folder}: differs from the run by {found['largest_difference']:.2g} in a logit at most")


@app.command("export-labels")
def export_labels(
    run: RunArgument,
    folder: Annotated[Path, typer.Argument(metavar="OUTPUT", help="A folder that is new or empty.")],
    kind: Annotated[str, typer.Option("--format", help="nnunet (version 2, raw), or manifest.")] = "nnunet",
    plugin: PluginOption = None,
    debug: DebugOption = False,
) -> None:
    """Write the labels a run has come to (given, corrected, pseudo, answered) as a data set; those of the test never.

    [dim]labeleff export-labels runs/la8 nnUNet_raw/Dataset501_Atrium[/dim]

    [dim]labeleff export-labels runs/la8 la8_labels --format manifest[/dim]
    """
    with _reported(debug=debug):
        if kind not in LABEL_FORMATS:
            raise RecipeError(
                f"--format {kind}: labels are not exported as that.{did_you_mean(kind, LABEL_FORMATS)} "
                f"Known: {', '.join(LABEL_FORMATS)}"
            )
        _load_plugins(plugin)
        from labeleff.export_labels import export_labels as export_run_labels

        for line in export_run_labels(run, kind, folder):  # type: ignore[arg-type]  # one of LABEL_FORMATS
            typer.echo(line)


@app.command()
def doctor(
    cache: Annotated[Path | None, typer.Option(help="Where prepared images are kept.")] = None,
    debug: DebugOption = False,
) -> None:
    """Look at versions, devices, folders and disk, and say what is wrong and what helps; exit code 1 where something is.

    [dim]labeleff doctor[/dim]
    """
    with _reported(debug=debug):
        from labeleff.doctor import examine

        console = Console(soft_wrap=True, highlight=False)
        colours = {"good": "green", "note": "yellow", "bad": "bold red"}
        found = examine(cache=cache)
        for finding in found:
            console.print(f"[{colours[finding.state]}]{finding.state:<4}[/]  {finding.what}: {escape(finding.words)}")
        if any(finding.state == "bad" for finding in found):
            raise typer.Exit(1)


@new.command("strategy")
def new_strategy(
    name: Annotated[str, typer.Argument(help="Lower-case letters, digits and underscores.")],
    folder: Annotated[Path, typer.Option(help="Where to; default here.")] = Path(),
    debug: DebugOption = False,
) -> None:
    """Write a strategy of under 25 lines, a recipe that tries it in a minute, and a test of what every strategy promises.

    [dim]labeleff new strategy my_idea[/dim]

    [dim]labeleff run my_idea.yaml --plugin my_idea.py[/dim]
    """
    with _reported(debug=debug):
        from labeleff.scaffold import new_strategy as write_strategy

        for line in write_strategy(name, folder):
            typer.echo(line)


@app.command("list")
def list_(
    what: Annotated[str, typer.Argument(help=", ".join(LISTS) + ".", autocompletion=_complete_list)],
    name: Annotated[str | None, typer.Argument(help="Show the options of this one.")] = None,
    debug: DebugOption = False,
) -> None:
    """List what a recipe can name, or the options of one component.

    [dim]labeleff list strategies[/dim]

    [dim]labeleff list strategies bcp[/dim]
    """
    with _reported(debug=debug):
        if what not in LISTS:
            raise RecipeError(f"nothing is listed as {what!r}.{did_you_mean(what, LISTS)} Known: {', '.join(LISTS)}")
        console = Console(highlight=False)
        if what in ("recipes", "benchmarks"):
            for found in _recipes() if what == "recipes" else _benchmarks():
                console.print(found)
            return
        known: dict[str, Any] = json.loads((Path(__file__).parent / "_index.json").read_text())[KINDS[what]]
        if name is None:
            table = Table("name", "what it does", box=None, pad_edge=False)
            for entry, found in known.items():
                table.add_row(f"[bold]{entry}[/]", escape(found["summary"]))
            console.print(table)
            return
        if name not in known:
            raise RecipeError(f"unknown {KINDS[what]} {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}")
        _print_options(console, name, known[name])


@app.command()
def sweep(
    benchmark: Annotated[
        str,
        typer.Argument(help="A .yaml file, or the name of a shipped benchmark.", autocompletion=_complete_benchmark),
    ],
    overrides: OverridesArgument = None,
    folder: Annotated[Path | None, typer.Option(help="The sweep's folder; default runs/sweeps/NAME.")] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Print grid, hours and what the design can show; run nothing.")
    ] = False,
    engine: Annotated[str, typer.Option(help="local, or ray (extra).")] = "local",
    workers: Annotated[
        int | None, typer.Option(help="Runs at a time; default: one per GPU, or as many as the cores hold.")
    ] = None,
    address: Annotated[str, typer.Option(help="ray: address of the cluster.")] = "auto",
    shared: Annotated[bool, typer.Option(help="ray: all machines see the sweep's folder.")] = True,
    gpus: Annotated[float, typer.Option(help="ray: GPUs per run.")] = 0.0,
    cache: Annotated[Path | None, typer.Option(help="Where prepared images are kept.")] = None,
    plugin: PluginOption = None,
    debug: DebugOption = False,
) -> None:
    """Run methods, label budgets, draws and seeds on equal terms; the same command does what is missing.

    [dim]labeleff sweep smoke[/dim]

    [dim]labeleff sweep left_atrium draws=5 --plan[/dim]

    [dim]labeleff sweep left_atrium --engine ray --address 10.0.0.1:6379 --no-shared[/dim]
    """
    with _reported(debug=debug):
        _load_plugins(plugin)
        from labeleff.sweep.benchmark import load_benchmark
        from labeleff.sweep.orchestrate import default_workers, make_engine
        from labeleff.sweep.orchestrate import sweep as run_sweep
        from labeleff.sweep.plan import plan as make_plan

        loaded = load_benchmark(benchmark, overrides or [])
        place = folder or Path("runs") / "sweeps" / loaded.name
        if plan:
            make_plan(loaded, place, workers=workers or default_workers(loaded), cache=cache)
            return
        chosen = make_engine(engine, workers or default_workers(loaded), address=address, shared=shared, gpus=gpus)
        run_sweep(loaded, place, chosen, cache=cache, plugins=plugin or ())
        Console(soft_wrap=True, highlight=False).print(f"done; now: labeleff report {place}")


@app.command()
def report(
    sweep: Annotated[
        Path | None, typer.Argument(help="A sweep's folder; default: the newest below runs/sweeps.")
    ] = None,
    folder: Annotated[Path | None, typer.Option(help="Where the page goes; default SWEEP/report.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write all tables, versions and machine as one JSON file.")
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Write the page, figures and tables of a sweep, and print its answer.

    [dim]labeleff report runs/sweeps/smoke[/dim]
    """
    with _reported(debug=debug):
        from labeleff.report.analysis import analyse, write_export
        from labeleff.report.page import write_report
        from labeleff.report.terminal import say, write_tensorboard
        from labeleff.sweep.collect import collect, newest_sweep

        place = sweep or newest_sweep(Path("runs") / "sweeps")
        analysis = analyse(collect(place))
        say(analysis)
        page = write_report(analysis, folder or place / "report")
        write_tensorboard(analysis, place / "tensorboard")
        if json_file is not None:
            write_export(analysis, json_file)
        Console(soft_wrap=True, highlight=False).print(f"page: {page}")


@app.command()
def forecast(
    sweep: Annotated[Path, typer.Argument(help="A sweep's folder.")],
    target: Annotated[float, typer.Option(help="Mean Dice to reach, such as 0.85.")],
    method: Annotated[str | None, typer.Option(help="Whose curve; default: the baseline's.")] = None,
    upto: Annotated[
        int | None, typer.Option(help="Use budgets up to this one only, and compare with the others.")
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Say how many labels a score would take, with an interval, or why nobody can say.

    [dim]labeleff forecast runs/sweeps/left_atrium --target 0.88[/dim]
    """
    with _reported(debug=debug):
        if not 0 < target < 1:
            raise RecipeError(f"--target {target}: give a mean Dice between 0 and 1")
        from labeleff.report.terminal import forecast as make_forecast
        from labeleff.sweep.collect import collect

        make_forecast(collect(sweep), target, method=method, upto=upto)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run directories; differences are to the first.")],
    debug: DebugOption = False,
) -> None:
    """Print finished runs side by side.

    [dim]labeleff compare runs/phantom-supervised runs/phantom-bcp[/dim]
    """
    with _reported(debug=debug):
        from labeleff.report.terminal import compare_runs

        compare_runs(runs)


def _print_options(console: Console, name: str, entry: dict[str, Any]) -> None:
    console.print(f"[bold]{name}[/]  {escape(entry['summary'])}")
    table = Table("option", "type", "default", "meaning", box=None, pad_edge=False)
    for option, found in entry["options"].items():
        table.add_row(f"[bold]{option}[/]", escape(found["type"]), escape(str(found["default"])), escape(found["help"]))
    console.print(table)


@app.callback(invoke_without_command=True)
def _main(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from labeleff import __version__

        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line."""
    app()

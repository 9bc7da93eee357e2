"""Commands for what a run has left: evaluating it again, its questions, predictions, and exports."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from labeleff.cli.shared import DebugOption, PluginOption, RunArgument, load_plugins, reported
from labeleff.errors import RecipeError, did_you_mean

app = typer.Typer()
EXPORTS = ("safetensors", "bundle", "onnx")
LABEL_FORMATS = ("nnunet", "manifest")
EVALUATED_ON = ("test", "development")


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
    with reported(debug=debug):
        if on not in EVALUATED_ON:
            raise RecipeError(
                f"--on {on}: nothing is evaluated on that.{did_you_mean(on, EVALUATED_ON)} Known: {', '.join(EVALUATED_ON)}"
            )
        load_plugins(plugin)
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
    with reported(debug=debug):
        load_plugins(plugin)
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
    with reported(debug=debug):
        load_plugins(plugin)
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
    with reported(debug=debug):
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
    with reported(debug=debug):
        load_plugins(plugin)
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
    to: Annotated[str, typer.Option("--to", help="safetensors, bundle (MONAI) or onnx.")] = "safetensors",
    out: Annotated[Path | None, typer.Option(help="The folder; default RUN/export/TO. Must be new.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Where prepared images are kept.")] = None,
    plugin: PluginOption = None,
    debug: DebugOption = False,
) -> None:
    """Write the predictor of a run for use elsewhere, with how images are prepared, and compare it with the run.

    [dim]labeleff export runs/la8 --to bundle --out la8_bundle[/dim]
    """
    with reported(debug=debug):
        if to not in EXPORTS:
            raise RecipeError(
                f"--to {to}: nothing is exported as that.{did_you_mean(to, EXPORTS)} Known: {', '.join(EXPORTS)}"
            )
        load_plugins(plugin)
        from labeleff.export import export as export_run

        folder = out or (run if run.is_dir() else run.parent) / "export" / to
        found = export_run(run, to, folder, cache=cache)  # type: ignore[arg-type]  # one of EXPORTS
        differs = f"differs from the run by {found['largest_difference']:.2g} in a logit at most"
        typer.echo(f"{folder}: {differs}, on {found['of']}" + (f" ({found['why']})" if found["why"] else ""))


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
    with reported(debug=debug):
        if kind not in LABEL_FORMATS:
            raise RecipeError(
                f"--format {kind}: labels are not exported as that.{did_you_mean(kind, LABEL_FORMATS)} "
                f"Known: {', '.join(LABEL_FORMATS)}"
            )
        load_plugins(plugin)
        from labeleff.export_labels import export_labels as export_run_labels

        for line in export_run_labels(run, kind, folder):  # type: ignore[arg-type]  # one of LABEL_FORMATS
            typer.echo(line)

"""Commands for data: from a folder of images to a manifest, what is wrong with it, and a recipe to begin with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from labeleff.cli.shared import DebugOption, PluginOption, load_plugins, reported

app = typer.Typer()
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
    with reported(debug=debug):
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
    with reported(debug=debug):
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
    with reported(debug=debug):
        load_plugins(plugin)
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
    with reported(debug=debug):
        load_plugins(plugin)
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
    with reported(debug=debug):
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
    with reported(debug=debug):
        load_plugins(plugin)
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
    with reported(debug=debug):
        load_plugins(plugin)
        from labeleff.suspects import suspects as rank_suspects

        place = folder or Path("runs") / "suspects"
        rank_suspects(data, place, steps=steps, folds=folds, top=top, fresh=fresh, cache=cache)

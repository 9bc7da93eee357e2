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

from labeleff.errors import LabeleffError, RecipeError, did_you_mean

app = typer.Typer(
    name="labeleff",
    help="Learn to segment images when labels are few, missing, noisy or from elsewhere.\n\n"
    "Start with [bold]labeleff run quickstart[/bold]: a semi-supervised method beside its baseline, in minutes, without data.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
LISTS = ("strategies", "annotators", "backbones", "datasets", "recipes")
KINDS = {"strategies": "strategy", "annotators": "annotator", "backbones": "backbone", "datasets": "dataset"}


def _recipes() -> list[str]:
    """Return the names of shipped recipes; looks at file names only."""
    inside = Path(__file__).parent / "recipes"
    folder = inside if inside.is_dir() else Path(__file__).parent.parent / "recipes"
    names = (path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))
    return sorted(name for name in names if not name.startswith("methods/"))


def _complete_recipe(incomplete: str) -> Iterator[str]:
    return (name for name in _recipes() if name.startswith(incomplete))


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
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"[bold red]error:[/] {escape(str(error))}")
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
        if what == "recipes":
            for recipe in _recipes():
                console.print(recipe)
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

"""Commands that run a recipe, or look at one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from labeleff.cli.shared import DebugOption, OverridesArgument, PluginOption, RecipeArgument, load_plugins, reported

app = typer.Typer()


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
    with reported(debug=debug):
        load_plugins(plugin)
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
    with reported(debug=debug):
        load_plugins(plugin)
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
    with reported(debug=debug):
        load_plugins(plugin)
        from labeleff import recipe_io

        loaded = recipe_io.load_recipe(recipe, overrides or [])
        if diff is None:
            typer.echo(recipe_io.to_yaml(loaded), nl=False)
            return
        lines = recipe_io.diff(recipe_io.load_recipe(diff), loaded)
        typer.echo("\n".join(lines) if lines else "no difference")

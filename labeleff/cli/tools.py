"""Commands around runs: what is wrong with this machine, what there is to name, and files to begin with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from labeleff.cli.shared import PACKAGE, DebugOption, benchmarks, recipes, reported
from labeleff.errors import RecipeError, did_you_mean

app = typer.Typer()
new = typer.Typer(help="Write the files that something of your own begins with.", no_args_is_help=True)
app.add_typer(new, name="new")
LISTS = ("strategies", "annotators", "backbones", "datasets", "noise", "priors", "recipes", "benchmarks")
KINDS = {
    "strategies": "strategy",
    "annotators": "annotator",
    "backbones": "backbone",
    "datasets": "dataset",
    "noise": "noise",
    "priors": "prior",
}


@app.command()
def doctor(
    cache: Annotated[Path | None, typer.Option(help="Where prepared images are kept.")] = None,
    debug: DebugOption = False,
) -> None:
    """Look at versions, devices, folders and disk, and say what is wrong and what helps; exit code 1 where something is.

    [dim]labeleff doctor[/dim]
    """
    with reported(debug=debug):
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
    with reported(debug=debug):
        from labeleff.scaffold import new_strategy as write_strategy

        for line in write_strategy(name, folder):
            typer.echo(line)


def _complete_list(incomplete: str) -> Iterator[str]:
    return (name for name in LISTS if name.startswith(incomplete))


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
    with reported(debug=debug):
        if what not in LISTS:
            raise RecipeError(f"nothing is listed as {what!r}.{did_you_mean(what, LISTS)} Known: {', '.join(LISTS)}")
        console = Console(highlight=False)
        if what in ("recipes", "benchmarks"):
            for found in recipes() if what == "recipes" else benchmarks():
                console.print(found)
            return
        known: dict[str, Any] = json.loads((PACKAGE / "_index.json").read_text())[KINDS[what]]
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

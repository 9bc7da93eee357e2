"""The command line. Nothing heavy is imported until a command needs it, so that help and completion are quick."""

from __future__ import annotations

from typing import Annotated

import typer

from labeleff.cli import data, results, runs, tools, trained

app = typer.Typer(
    name="labeleff",
    help="Learn to segment images when labels are few, missing, noisy or from elsewhere.\n\n"
    "Start with [bold]labeleff run quickstart[/bold]: a semi-supervised method beside its baseline, in minutes, without data.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
for part in (runs, data, trained, tools, results):  # the order of the help
    app.add_typer(part.app)


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

"""What commands have in common: arguments, options, and how errors are told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from labeleff.errors import LabeleffError, Waiting

PACKAGE = Path(__file__).parent.parent
"""The folder of labeleff."""


def recipes() -> list[str]:
    """Return the names of shipped recipes; looks at file names only."""
    inside = PACKAGE / "recipes"
    folder = inside if inside.is_dir() else PACKAGE.parent / "recipes"
    names = (path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))
    return sorted(name for name in names if not name.startswith("methods/"))


def complete_recipe(incomplete: str) -> Iterator[str]:
    """Yield the names of recipes that begin so."""
    yield from (name for name in recipes() if name.startswith(incomplete))


def benchmarks() -> list[str]:
    """Return the names of shipped benchmarks; looks at file names only."""
    inside = PACKAGE / "benchmarks"
    folder = inside if inside.is_dir() else PACKAGE.parent / "benchmarks" / "suites"
    return sorted(path.stem for path in folder.glob("*.yaml"))


def complete_benchmark(incomplete: str) -> Iterator[str]:
    """Yield the names of benchmarks that begin so."""
    yield from (name for name in benchmarks() if name.startswith(incomplete))


RecipeArgument = Annotated[
    str, typer.Argument(help="A .yaml file, or the name of a shipped recipe.", autocompletion=complete_recipe)
]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="Changes, such as stages.0.steps=200 seed=1.")
]
RunArgument = Annotated[Path, typer.Argument(help="The run directory.")]
PluginOption = Annotated[
    list[Path] | None, typer.Option("--plugin", help="Python file that registers components; repeatable. You trust it.")
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@contextmanager
def reported(*, debug: bool) -> Iterator[None]:
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


def load_plugins(files: list[Path] | None) -> None:
    """Import the files that register components."""
    if files:
        from labeleff import plugins

        plugins.load_plugins(files)

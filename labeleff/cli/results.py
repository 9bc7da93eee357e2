"""Commands for many runs: sweeps, their reports, forecasts and comparisons."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from labeleff.cli.shared import DebugOption, OverridesArgument, PluginOption, complete_benchmark, load_plugins, reported
from labeleff.errors import RecipeError

app = typer.Typer()


@app.command()
def sweep(
    benchmark: Annotated[
        str,
        typer.Argument(help="A .yaml file, or the name of a shipped benchmark.", autocompletion=complete_benchmark),
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
    with reported(debug=debug):
        load_plugins(plugin)
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
    with reported(debug=debug):
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
    with reported(debug=debug):
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
    with reported(debug=debug):
        from labeleff.report.terminal import compare_runs

        compare_runs(runs)

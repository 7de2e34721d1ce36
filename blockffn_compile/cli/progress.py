"""The progress bar of training commands, which stop between two steps when asked to."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.progress import Progress

    from blockffn_compile.training.run import Run


def run_to_end(run: Run, describe: Callable[[dict[str, float]], str]) -> None:
    """Trains under a progress bar; Ctrl-C saves and exits with code 130.

    Args:
        describe: the losses of a step as a line.
    """
    from rich import progress as bar
    from rich.console import Console

    columns = [
        bar.BarColumn(),
        bar.MofNCompleteColumn(),
        bar.TimeElapsedColumn(),
        bar.TextColumn("eta"),
        bar.TimeRemainingColumn(elapsed_when_finished=False),
        bar.TextColumn("{task.fields[losses]}"),
    ]
    console = Console()
    if run.step:
        console.print(f"resuming {run.out} at step {run.step}")
    with bar.Progress(*columns, console=console, speed_estimate_period=300) as progress:
        try:
            result = run.run(_reporter(run, progress, describe))
        except KeyboardInterrupt:
            run.save()
            console.print(f"saved at step {run.step}; the same command goes on from there")
            raise typer.Exit(130) from None
    console.print(", ".join(f"{name} {value:.4g}" for name, value in result.items()))
    console.print(f"model written to {run.out}")


def _reporter(
    run: Run, progress: Progress, describe: Callable[[dict[str, float]], str]
) -> Callable[[int, dict[str, float]], None]:
    task = progress.add_task("", total=run.config.steps, completed=run.step, losses="compiling")
    interrupted = False

    # A signal may come in the middle of a step, whose state must not be saved: note it only.
    def note(*_: Any) -> None:
        nonlocal interrupted
        interrupted = True
        progress.update(task, losses="stopping after this step")

    signal.signal(signal.SIGINT, note)
    signal.signal(signal.SIGTERM, note)

    def report(step: int, losses: dict[str, float]) -> None:
        progress.update(task, completed=step, losses=describe(losses))
        if interrupted:
            raise KeyboardInterrupt

    return report

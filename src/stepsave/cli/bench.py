"""`stepsave bench`."""

from __future__ import annotations

import dataclasses
import enum
import json
import textwrap
from typing import TYPE_CHECKING, Annotated

import typer

from stepsave.cli.amounts import parse_size, size_text, time_text
from stepsave.cli.costs import SaveCost

if TYPE_CHECKING:
    from stepsave.cli.measuring import Figures

__all__ = ("bench",)

_WIDTH = 79


class Backend(enum.StrEnum):
    """Whose arrays are saved."""

    numpy = "numpy"
    jax = "jax"
    torch = "torch"
    tensorflow = "tensorflow"


def bench(
    directory: Annotated[
        str, typer.Argument(metavar="DIR", help="Where backup directories are to lie.")
    ] = ".",
    size: Annotated[
        str, typer.Option(metavar="SIZE", help="Of the state: weights, optimizer and so on.")
    ] = "1GB",
    step_time: Annotated[
        float, typer.Option(metavar="SECONDS", help="What a step of the training takes.")
    ] = 0.3,
    max_overhead: Annotated[
        float, typer.Option(metavar="SHARE", help="Of its time that it may wait for saves.")
    ] = 0.01,
    backend: Annotated[
        Backend, typer.Option(help="Whose arrays to save; with an accelerator, from there.")
    ] = Backend.numpy,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer saves.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Say it as JSON.")] = False,
) -> None:
    """Measure what saves cost here, and say how often to save.

    Saves a state of that size with the engine itself, in a directory of its own in DIR that is
    removed afterwards. Takes about a minute.
    """
    from stepsave.cli import jobs
    from stepsave.cli.measuring import measure

    size_bytes = parse_size(size)
    for name, value in (("--size", size_bytes), ("--step-time", step_time)):
        if not 0 < value < float("inf"):
            raise ValueError(f"{name}: expected more than nothing, found {value}.")
    if not 0 < max_overhead <= 1:
        raise ValueError(f"--max-overhead: expected a share, such as 0.01, found {max_overhead}.")
    figures = jobs.do(
        lambda job, _: measure(job, directory, size_bytes, backend.value, quick=quick), 1
    )
    cost = SaveCost(figures.stall_s, figures.durable_s, step_time)
    every = cost.within(max_overhead)
    if as_json:
        choices = [_as_dict(cost, one) for one in _choices(every)]
        answer = {"step_s": step_time, "max_overhead": max_overhead, "save_freq": every}
        typer.echo(json.dumps({**dataclasses.asdict(figures), **answer, "choices": choices}))
        return
    _show_figures(figures)
    _show_choices(cost, every)
    _explain(cost, every, max_overhead)


def _show_figures(figures: Figures) -> None:
    state = f"{size_text(figures.state_bytes)} in {figures.arrays} {figures.backend} arrays"
    typer.echo(f"{state} ({figures.device}) to {figures.place},")
    typer.echo(f"medians of {figures.saves} saves:\n")
    speeds = [
        ("training waits", figures.stall_s, "copied, with checksums"),
        ("durable after", figures.durable_s, f"in all, writer: {figures.writer}"),
    ]
    if figures.to_host_s is not None:
        speeds.append(("device to host", figures.to_host_s, "array by array"))
    for name, time_s, what in speeds:
        speed = f"{size_text(figures.state_bytes / time_s)}/s"
        typer.echo(f"  {name:<16}{time_text(time_s):>8}   {speed:>9}  {what}")


def _show_choices(cost: SaveCost, every: int) -> None:
    typer.echo(f"\nWith steps of {time_text(cost.step_s)}:\n")
    typer.echo("  save_freq   training is longer by   a kill undoes at most")
    for one in _choices(every):
        mark = "  <-" if one == every else ""
        share, lost = _percent(cost.overhead(one)), time_text(cost.most_lost_s(one))
        typer.echo(f"  {one:>9}   {share:>21}   {lost:>21}{mark}")


def _explain(cost: SaveCost, every: int, max_overhead: float) -> None:
    follows = cost.disk_follows_every()
    if every > follows:
        why = (
            f", so that training waits for {_percent(max_overhead)} of its time at most. The disk "
            f"could follow with save_freq={follows}."
        )
    else:
        why = ": the disk cannot follow more often, though waiting for the copies would allow it."
    text = (
        f"Recommended: save_freq={every}{why} Where training leaves no core and no memory "
        "bandwidth idle, writing in the background slows it down further. These are figures of "
        "this moment, and no promise."
    )
    typer.echo("\n" + textwrap.fill(text, _WIDTH, break_on_hyphens=False))


def _percent(share: float) -> str:
    return f"{share * 100:.0f} %" if share >= 0.095 else f"{share * 100:.2g} %"


def _choices(every: int) -> list[int]:
    return sorted({1, 10, 100, 1000, every})


def _as_dict(cost: SaveCost, every: int) -> dict[str, float]:
    return {
        "save_freq": every,
        "overhead": cost.overhead(every),
        "most_lost_s": cost.most_lost_s(every),
    }

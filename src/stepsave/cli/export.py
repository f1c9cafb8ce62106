"""`stepsave export`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from stepsave.cli.amounts import size_text

__all__ = ("export",)


def export(
    directory: Annotated[
        str,
        typer.Argument(
            metavar="DIR", help="A backup directory, s3://… or gs://…; @STEP after it means a step."
        ),
    ],
    out: Annotated[
        Path, typer.Argument(metavar="FILE", help="*.weights.h5, *.keras, *.safetensors or *.npz")
    ],
    everything: Annotated[
        bool,
        typer.Option("--all", help="Optimizer, metrics and the rest too."),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    imports: Annotated[
        list[str] | None,
        typer.Option(
            "--import", metavar="MODULE", help="A module that registers custom objects with Keras."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Say what was written as JSON.")] = False,
) -> None:
    """Write a backup as a file that other tools read.

    .weights.h5 is for `model.load_weights`, .keras for `keras.saving.load_model`: for both Keras is
    imported and rebuilds the model, by KERAS_BACKEND or on the backend that it was trained on, on
    the CPU. .safetensors and .npz need neither.

    All that is read is verified first. The file is there as a whole, or not at all.
    """
    from stepsave.cli.exporting import FORMATS, Export
    from stepsave.cli.places import open_place, split_step

    suffix = next((one for one in FORMATS if out.name.endswith(one)), None)
    if suffix is None:
        raise ValueError(f"{out}: expected a name that ends in {', '.join(FORMATS)}.")
    place, step = split_step(directory)
    order = Export(open_place(place), step, out, suffix, everything, imports or ())
    done = order.write(overwrite=overwrite)
    if as_json:
        typer.echo(json.dumps({"file": str(out), **dataclasses.asdict(done)}))
        return
    kind = "variables" if done.backend else "arrays"
    typer.echo(f"{out}: step {done.step}, {done.arrays} {kind}, {size_text(done.size_bytes)}")
    if not everything and done.arrays < done.of_arrays:
        typer.echo(
            f"The model alone, of {done.of_arrays} arrays in the backup; --all takes the state of "
            "its training too."
        )

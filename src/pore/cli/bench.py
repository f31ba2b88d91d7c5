"""`pore bench`: measure what pruning costs and saves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from pore._progress import progress
from pore.cli.about import command_line
from pore.cli.options import Average, Layer, Loading, Method, Set, budgets, takes
from pore.cli.printing import say, stdout


@dataclass(frozen=True)
class Options(Loading):
    """The options of `pore bench`."""

    shape: Annotated[
        str | None,
        typer.Option(help="Random weights of a shape: llava-1.5-7b, llava-1024x12, ..."),
    ] = None
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Hub id, folder or 'embedded', in place of a shape."),
    ] = None
    method: Method = "FastV"
    keep: Annotated[
        list[str] | None,
        typer.Option(help="Visual tokens kept: 128, 0.25 or 25%. Repeatable. [default: 128]"),
    ] = None
    average: Average = False
    layer: Layer = None
    settings: Set = None
    batch_size: Annotated[
        int, typer.Option("--batch-size", "-b", min=1, help="Prompts in one batch.")
    ] = 1
    text_before: Annotated[int, typer.Option(min=0, help="Text tokens before the image.")] = 35
    text_after: Annotated[int, typer.Option(min=1, help="Text tokens after it.")] = 20
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 16
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of every setting.")] = 10
    warmup: Annotated[int, typer.Option(min=0, help="Runs before those, not counted.")] = 2
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="JSON file for all measurements.")
    ] = None


@takes(Options)
def bench(options: Options) -> None:
    """Measure prefill, first token, decoding and memory, pruned and unpruned.

    Pruned and unpruned runs take turns, after a warm-up. Every setting is also compared with the
    attainable: the same layers on sequences that are as short, without any pruning code.

    Examples:

        pore bench --shape llava-1024x12 --keep 128 --keep 64

        pore bench --shape llava-1.5-7b --device cuda --dtype bfloat16 -b 8 --out bench.json

        pore bench --model embedded --keep 25%
    """
    from pore import bench as speed
    from pore.methods.making import make

    if (options.shape is None) == (options.model is None):
        raise typer.BadParameter("Give either --shape or --model.")
    if options.model is None and options.revision is not None:
        raise typer.BadParameter("--revision needs --model; a --shape has no revision.")
    keeps = budgets(options.keep, options.settings, "128")
    model = _model(options)
    pruners = [
        make(
            options.method,
            model,
            keep,
            average=options.average,
            texts=options.settings or (),
            layer=options.layer,
        )
        for keep in keeps
    ]
    with progress() as told:
        result = speed.measure(
            model,
            pruners,
            batch_size=options.batch_size,
            text_before=options.text_before,
            text_after=options.text_after,
            new_tokens=options.new_tokens,
            repeats=options.repeats,
            warmup=options.warmup,
            command=command_line(),
            progress=lambda run, runs, name: told(name, run / runs),
        )
    if options.out is not None:
        result.save(options.out)
    stdout().print(speed.table(result))
    if options.out is not None:
        say(f"Wrote {options.out}.")


def _model(options: Options) -> Any:
    """The named model, or one with random weights of the named shape."""
    import torch

    from pore import bench as speed
    from pore.data.loading import check_dtype, choose_device, load_model

    if options.shape is None:
        return load_model(str(options.model), **options.how)[0]
    check_dtype(options.dtype)
    device, dtype = choose_device(options.device), options.dtype
    if dtype == "auto":
        dtype = "float32" if device.type == "cpu" else "bfloat16"
    return speed.build(
        options.shape,
        device=device,
        dtype=getattr(torch, dtype),
        attention=options.attn or "sdpa",
    )

"""`pore bench`: measure what pruning costs and saves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pore._progress import progress
from pore.cli.about import command_line
from pore.cli.checks import check_file, check_method, check_reweight
from pore.cli.options import (
    Allow,
    Average,
    Layer,
    Loading,
    Method,
    Reweight,
    Set,
    budgets,
    method_of,
    size_of_image,
    takes,
)
from pore.cli.printing import note, say, stdout
from pore.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pore.data.samples import Sample
    from pore.engine.pruner import Pruner


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
    reweight: Reweight = None
    allow: Allow = None
    image: Annotated[
        str | None,
        typer.Option(
            help="With --model: width and height of the picture, such as 640x480, in the prompt of "
            "the chat template; needed where images have any size."
        ),
    ] = None
    batch_size: Annotated[
        int, typer.Option("--batch-size", "-b", min=1, help="Prompts in one batch.")
    ] = 1
    text_before: Annotated[
        int | None,
        typer.Option(min=0, help="Text tokens before the image, without --image. [default: 35]"),
    ] = None
    text_after: Annotated[
        int | None,
        typer.Option(min=1, help="Text tokens after it, without --image. [default: 20]"),
    ] = None
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 16
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of every setting.")] = 10
    warmup: Annotated[int, typer.Option(min=0, help="Runs before those, not counted.")] = 2
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="JSON file for all measurements.")
    ] = None


def _check(options: Options) -> None:
    """Refuse what can be seen to be wrong before a model is loaded."""
    if (options.shape is None) == (options.model is None):
        raise typer.BadParameter("Give either --shape or --model.")
    if options.model is None and options.revision is not None:
        raise typer.BadParameter("--revision needs --model; a --shape has no revision.")
    if options.image is not None and options.model is None:
        raise typer.BadParameter("--image needs --model; a --shape has images of one size.")
    if options.image is not None and (options.text_before, options.text_after) != (None, None):
        raise typer.BadParameter("With --image the chat template says what text there is.")
    if options.image is not None:
        size_of_image(options.image)
    budgets(options.keep, options.settings, "128")
    check_file(options.out, "--out")
    check_method(options.method, options.settings)
    check_reweight(options.reweight)


@takes(Options, check=_check, config=True)
def bench(options: Options) -> None:
    """Measure time and memory, with and without pruning.

    Measures the prefill, the first token, decoding and memory. Pruned and unpruned runs take turns,
    after a warm-up. Every setting is also compared with the attainable: the same layers on
    sequences that are as short, without any pruning code. With --reweight every budget is run
    without P and with it, so that its cost shows.

    Examples:

        pore bench --shape llava-1024x12 --keep 128 --keep 64

        pore bench --shape llava-1.5-7b --device cuda --dtype bfloat16 -b 8 --out bench.json

        pore bench --model embedded --keep 25% --reweight profile.json

        pore bench --model Qwen/Qwen2.5-VL-3B-Instruct --image 1024x768 --keep 25%
    """
    from pore import bench as speed
    from pore.data.prompts import build_inputs
    from pore.data.samples import noise

    words = {"text_before": options.text_before, "text_after": options.text_after}
    words = {name: count for name, count in words.items() if count is not None}
    keeps = budgets(options.keep, options.settings, "128")
    model, processor = _model(options)
    picture = noise(size_of_image(options.image) if options.image else (336, 336))
    inputs, visual, workload = None, None, dict[str, Any]()
    if options.image is not None:
        inputs = build_inputs(processor, [picture] * options.batch_size, model.device, model.dtype)
        visual = speed.workload_of(model, inputs)[0].visual
    else:
        workload = {**words, "batch_size": options.batch_size}
    with progress() as told:
        result = speed.measure(
            model,
            _pruners(options, model, processor, keeps, visual, [picture] if processor else []),
            inputs=inputs,
            new_tokens=options.new_tokens,
            repeats=options.repeats,
            warmup=options.warmup,
            command=command_line(),
            progress=lambda run, runs, name: told(name, run / runs),
            **workload,
        )
    if options.out is not None:
        result.save(options.out)
    first, last = speed.about(result)
    say(first)
    for part in ("time", "cost"):
        stdout().print(speed.table(result, (part,)))
    say(last, style="dim")
    if options.out is not None:
        note(f"Wrote {options.out}.")


def _pruners(
    options: Options,
    model: Any,
    processor: Any,
    keeps: Sequence[int | float],
    visual: int | None,
    samples: Sequence[Sample],
) -> list[Pruner]:
    """The method at every budget, without P and, if one is named, with it."""
    from pore.evaluation.reweighting import biases_named, with_and_without

    biases = biases_named(options.reweight, options.allow or (), model, processor, samples)
    found = []
    for keep in keeps:
        pruner = method_of(options, model, keep, visual=visual)
        found += with_and_without(pruner, biases)
    return found


def _model(options: Options) -> tuple[Any, Any]:
    """The named model with its processor, or random weights of the named shape without one."""
    import torch

    from pore import bench as speed
    from pore.data.loading import check_dtype, choose_device, load_model

    if options.shape is None:
        return load_model(str(options.model), **options.how)
    if options.device_map is not None or options.quantize is not None:
        raise InputError(
            "--device-map and --quantize are for the weights of a checkpoint (-m), and --shape has "
            "random ones."
        )
    check_dtype(options.dtype)
    device, dtype = choose_device(options.device), options.dtype
    if dtype == "auto":
        dtype = "float32" if device.type == "cpu" else "bfloat16"
    model = speed.build(
        options.shape,
        device=device,
        dtype=getattr(torch, dtype),
        attention=options.attn or "sdpa",
    )
    return model, None

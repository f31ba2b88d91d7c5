"""`pore flops`: what a prefill should cost."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pore._numbers import fixed, number, percent
from pore.cli.options import AsJson, GivenLayer, Keeps, budget, size_of_image, takes
from pore.cli.printing import say, stdout

if TYPE_CHECKING:
    from rich.table import Table

    from pore.cost.shapes import ModelShape


@dataclass(frozen=True)
class Options:
    """The options of `pore flops`."""

    shape: Annotated[str, typer.Option(help="llava-1.5-7b, llava-1.5-13b, llava-1024x12, ...")] = (
        "llava-1.5-7b"
    )
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Hub id, folder or 'embedded', in place of a shape."),
    ] = None
    # Those of the paper's Table 1.
    keep: Keeps = field(default_factory=lambda: ["50%", "25%", "128", "10%"])
    layer: GivenLayer = 2
    text: Annotated[int, typer.Option(min=1, help="Text tokens of the prompt.")] = 35
    image: Annotated[
        str | None,
        typer.Option(
            help="With --model: width and height of the picture, such as 640x480; needed where "
            "images have any size."
        ),
    ] = None
    as_json: AsJson = False


@takes(Options)
def flops(options: Options) -> None:
    """Count the FLOPs of a prefill, with and without pruning.

    The defaults are those of PoRe's Table 1 and reproduce its column: 54.6, 32.8, 30.4, 19.9. The
    paper counts the mean of the decoder layers, a multiply-add as one FLOP, two matrices in an MLP,
    and 10 % as 57.6 tokens, unrounded. The true count covers every matrix product of the model.

    Examples:

        pore flops

        pore flops --model embedded --keep 36 --layer 3

        pore flops --model Qwen/Qwen2.5-VL-3B-Instruct --image 1024x768
    """
    from pore.cost.named import model_shape
    from pore.data.loading import load_config
    from pore.families.registry import shape_of

    model = options.model
    shape = model_shape(options.shape) if model is None else shape_of(load_config(model))
    visual, tower = _seen(options, shape)
    keeps = [1.0, *map(budget, options.keep)]
    rows = list(_rows(shape, visual, tower, keeps, options.layer, options.text))
    if options.as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    say(
        f"{model or options.shape}: {options.text} text + {visual} visual tokens, "
        f"K = {options.layer}; in GFLOPs"
    )
    stdout().print(_table(rows))
    say(
        "paper: mean over the decoder layers, multiply-add = 1, MLP of two matrices",
        "true: the whole model, multiply-add = 2; share: of the true count without pruning",
        "decoder: with the row of attention that the tokens are ranked by",
        style="dim",
    )


def _seen(options: Options, shape: ModelShape) -> tuple[int, dict[str, Any]]:
    """The visual tokens of the image, and what the tower and the projector do for it."""
    if options.image is None:
        return shape.image_tokens, {}
    if options.model is None:
        raise typer.BadParameter("--image needs --model; a --shape has images of one size.")
    from pore.data.loading import load_outline
    from pore.data.prompts import build_inputs
    from pore.data.samples import noise
    from pore.engine.prefill import TowerWork
    from pore.families.registry import images_of

    model, processor = load_outline(options.model)
    images = images_of(model, build_inputs(processor, [noise(size_of_image(options.image))]))
    return sum(len(image.columns) for image in images), TowerWork.of(shape, images)._asdict()


def _rows(
    shape: ModelShape,
    visual: int,
    tower: dict[str, Any],
    keeps: Sequence[int | float],
    layer: int,
    text: int,
) -> Iterator[dict[str, Any]]:
    """Both counts at every budget."""
    from pore.cost.flops import ExtraRows, model_flops, paper_flops, tokens_per_layer
    from pore.tensors.selection import budget as tokens_kept

    layers = shape.decoder.layers
    for keep in keeps:
        kept = tokens_kept(keep, visual)
        tokens = tokens_per_layer(layers, text + visual, visual, kept, layer)
        exact = keep * visual if isinstance(keep, float) else keep
        unrounded = [text + visual] * layer + [text + exact] * (layers - layer)
        true = model_flops(
            shape, tokens, extra_rows=[ExtraRows(layer - 1)] if kept < visual else [], **tower
        )
        yield {
            "keep": keep,
            "dropped": 1 - exact / visual,
            "tokens_kept": kept,
            "tokens": list(tokens),
            "paper": paper_flops(shape.decoder, unrounded).to_dict(),
            "true": true.to_dict(),
        }


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in (
        "dropped",
        "kept",
        "paper",
        "true",
        "share",
        "decoder",
        "tower",
        "projector",
        "head",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        paper, true = row["paper"], row["true"]
        parts = true | {"decoder": true["decoder"] + true["probe"]}
        table.add_row(
            f"{percent(row['dropped'])} %",
            str(row["tokens_kept"]),
            fixed(paper["layer_mean"] / 1e9),
            number(true["total"], 1e9, 4),
            fixed(true["total"] / rows[0]["true"]["total"], 3),
            *(number(parts[name], 1e9, 4) for name in ("decoder", "tower", "projector", "head")),
        )
    return table

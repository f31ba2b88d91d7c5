"""The command line: `pore demo`, `calibrate`, `generate`, `evaluate`, `bench`, `plot` and more.

Every command does what the library does, through the same functions, for the embedded model and
for any other. Whatever is slow to import is imported by the command that needs it.
"""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from typer.core import TyperGroup

from pore._text import Screen, cell, for_terminal, visible
from pore.errors import InputError, PoreError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from pore.bias.curve import Kind
    from pore.bias.position_bias import PositionBias
    from pore.calibration.host import HostCalibration
    from pore.data.samples import Sample
    from pore.engine.pruner import Pruner
    from pore.evaluation import survey
    from pore.evaluation.guided import Guiding
    from pore.evaluation.outcome import Outcome
    from pore.methods.support import Support


_EXIT_ERROR, _EXIT_INTERRUPTED = 1, 130


_PAPER_KEEPS = ["50%", "25%", "128", "10%"]


_DEMO_KEEPS = ["50%", "25%", "22.2%", "10%"]


_SURVEYED = 700


_SEEDS = 2**63 - 1


# Wrong usage of any kind; typer has no name of its own for it.
_UsageError: Any = typer.BadParameter.__mro__[1]


# What the widest table needs where the width of the output is unknown, as in a pipe.
_WIDTH = 118


class _Group(TyperGroup):
    """Turns the errors that users can mend into messages and exit codes."""

    def make_context(self, *args: Any, **extra: Any) -> Any:
        """Read the arguments before the command."""
        with _usage():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: Any) -> Any:
        """Run a command; exit with 1 on an error, with 130 when interrupted."""
        try:
            with _usage():
                return super().invoke(ctx)
        except KeyboardInterrupt as error:
            _complain("Interrupted.", "yellow", error)
            raise typer.Exit(_EXIT_INTERRUPTED) from error
        except (PoreError, OSError) as error:
            if ctx.params.get("debug"):
                raise
            _complain("Error:", "red", error)
            raise typer.Exit(_EXIT_ERROR) from error


@contextmanager
def _usage() -> Iterator[None]:
    """Wrong usage, which typer prints itself, with nothing in it that a terminal obeys."""
    try:
        yield
    except _UsageError as error:
        error.message = for_terminal(error.message)
        raise


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Drop the visual tokens of vision-language models that do not matter, and divide out "
    "the position bias of attention first (PoRe, arXiv 2508.17807).",
)


Model = Annotated[
    str,
    typer.Option("--model", "-m", help="Hub id, folder, or 'embedded': the model shipped here."),
]


Device = Annotated[
    str, typer.Option(help="Such as cpu, cuda:0 or mps; 'auto' is the accelerator, if any.")
]


Dtype = Annotated[
    str, typer.Option(help="float32, float16, bfloat16; 'auto' is the checkpoint's own.")
]


Attn = Annotated[
    str | None,
    typer.Option(help="Attention implementation: sdpa, flash_attention_2, eager."),
]


Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]


Method = Annotated[str, typer.Option(help="Pruning method; `pore methods` lists them.")]


Keep = Annotated[
    str | None,
    typer.Option(help="Visual tokens kept per image: 128, 0.25 or 25%. [default: 25%]"),
]


Keeps = Annotated[
    list[str], typer.Option("--keep", help="Visual tokens kept: 128, 0.25 or 25%. Repeatable.")
]


Average = Annotated[
    bool,
    typer.Option(
        "--average",
        help="Read --keep as the mean over the decoder layers, not as what is left at the end.",
    ),
]


Layer = Annotated[int | None, typer.Option(help="K, the first pruned layer, counted from 0.")]


Reweight = Annotated[
    str | None,
    typer.Option(
        help="Position bias P to divide attention by: a file of `pore calibrate`, a hub id, "
        "'rope' for the data-free prior, or 'published:HOST/BENCHMARK'."
    ),
]


Allow = Annotated[
    list[str] | None,
    typer.Option(
        "--allow",
        help="Use P although it was measured with another model, revision, weights, config, layer, "
        "normalize, processor or template: the one named. Repeatable.",
    ),
]


Normalize = Annotated[
    str | None,
    typer.Option(help="Softmax over the whole 'prompt' or the 'visual' tokens alone."),
]


Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any other setting of the method, as NAME=VALUE. Repeatable."),
]


Samples = Annotated[
    str,
    typer.Option(
        "--samples",
        "-s",
        help="embedded:calibration, embedded:test, a JSONL file, a folder of images, or the hub "
        "id of a data set.",
    ),
]


Questions = Annotated[
    Path | None, typer.Option(help="For a folder of images: text file, one question a line.")
]


Split = Annotated[str, typer.Option(help="Split of a data set.")]


Limit = Annotated[int | None, typer.Option(min=1, help="At most so many samples.")]


MaxBad = Annotated[
    float,
    typer.Option(help="Share of bad samples to put up with; a single one always, unless it is 0."),
]


Batch = Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Samples of a batch.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"pore {version('pore-vlm')}")
        raise typer.Exit


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", is_eager=True, callback=_print_version),
    ] = False,
) -> None:
    # Both are read before any command: `debug` by `_Group`, `version` by its callback.
    del debug, version


# -- commands -------------------------------------------------------------------------------------


@app.command()
def demo(
    model: Model = "embedded",
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for what is found.")] = Path(
        "runs/demo"
    ),
    keep: Keeps = _DEMO_KEEPS,
    layer: Annotated[int, typer.Option(help="K, the first pruned layer, counted from 0.")] = 2,
    calibration: Annotated[
        str, typer.Option(help="Samples that P is measured on.")
    ] = "embedded:calibration",
    images: Annotated[int, typer.Option(min=1, help="Calibration samples, at most.")] = 700,
    test: Annotated[str, typer.Option(help="Samples with answers, to ask.")] = "embedded:test",
    questions: Annotated[int, typer.Option(min=1, help="Questions asked, at most.")] = 700,
    max_bad: MaxBad = 0.01,
    batch_size: Batch = 32,
    seed: Annotated[
        int, typer.Option(min=0, max=_SEEDS, help="Seed of Random and of the bootstrap.")
    ] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    attn: Attn = None,
) -> None:
    """Calibrate, fit, prune, ask, compare: the whole job, with a report.

    Measures the position bias on the calibration samples and fits P, then asks the test questions
    unpruned and with FastV, FastV + PoRe, FastV + RoPE prior, Random and Downsample. Prints the
    table and writes `results.json`, `results.csv`, `profile.json`, figures, examples and
    `report.html` into the folder.

    Examples:

        pore demo

        pore demo --questions 2100 --out runs/long

        pore demo -m llava-hf/llava-1.5-7b-hf --calibration calib.jsonl --test test.jsonl
    """
    from pore import bench as speed
    from pore.evaluation import demo as job
    from pore.evaluation.page import About, facts

    keeps = tuple(map(_keep, keep))
    settings = job.Settings(
        layer=layer,
        keeps=keeps,
        batch_size=batch_size,
        seed=seed,
        example_keep=0.25 if 0.25 in keeps else keeps[0],
        max_bad=max_bad,
    )
    began = time.monotonic()
    with _progress() as told:
        told("loading the model", 0.0)
        loaded, processor = _load(model, device, dtype, attn)
        result = job.run(
            loaded,
            processor,
            calibration=_samples(calibration, limit=images),
            test=_samples(test, limit=questions),
            out=out,
            settings=settings,
            about=About(
                model="the embedded model" if model == "embedded" else model,
                command=_command(),
                calibration=calibration,
                test=test,
                setup=_setup(loaded, speed.hardware(loaded.device), speed.versions(), seed),
                choice=_choice(layer),
            ),
            progress=told,
        )
    _print_results(result.records)
    _say(*facts(result))
    for difference in result.differences:
        if difference.second.reweight == settings.kind:
            _say(f"  {difference}")
    _say(f"\nWrote {result.report} in {time.monotonic() - began:.0f} s.")


@app.command()
def calibrate(
    out: Annotated[Path, typer.Option("--out", "-o", help="File for P.")] = Path("profile.json"),
    model: Model = "embedded",
    samples: Samples = "embedded:calibration",
    questions: Questions = None,
    split: Split = "train",
    limit: Limit = None,
    method: Annotated[
        str, typer.Option(help="Method that P is for; `pore methods` says which can divide by it.")
    ] = "FastV",
    keep: Annotated[
        str | None,
        typer.Option(
            help="Its budget, which matters where its layers depend on it. [default: 25%]"
        ),
    ] = None,
    layer: Layer = None,
    normalize: Normalize = None,
    settings: Set = None,
    kind: Annotated[
        str, typer.Option(help="exponential, exponential+offset, spline or empirical.")
    ] = "exponential",
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="File for the sums, to resume from. [default: OUT.calibration.json]"),
    ] = None,
    max_bad: Annotated[float, typer.Option(help="Share of bad samples to put up with.")] = 0.01,
    figures: Annotated[
        Path | None, typer.Option(help="Folder for figure1.png and figure2.png.")
    ] = None,
    batch_size: Batch = 8,
    device: Device = "auto",
    dtype: Dtype = "auto",
    attn: Attn = None,
    revision: Revision = None,
) -> None:
    """Measure the position bias of a model, fit P and save it.

    A method that ranks by attention at several layers gets a P for each, all in one file. Runs the
    vision tower and the decoder up to the last attention read only. Interrupted, it goes on where
    it was when called again.

    Examples:

        pore calibrate --out profile.json --figures figures

        pore calibrate --method PyramidDrop --out pyramid.json

        pore calibrate -m llava-hf/llava-1.5-7b-hf -s photos --questions ask.txt -o llava.json
    """
    from pore.bias.stages import save_biases
    from pore.calibration.calibrating import calibrate as measure

    form = _form(kind)
    (budget,) = _budgets([keep] if keep else None, settings)
    loaded, processor = _load(model, device, dtype, attn, revision)
    kept = checkpoint or out.with_name(f"{out.stem}.calibration.json")
    measured = measure(
        loaded,
        processor,
        _samples(samples, limit=limit, questions=questions, split=split),
        host=_pruner(method, settings, loaded, budget, layer=layer, normalize=normalize),
        batch_size=batch_size,
        checkpoint=kept,
        max_bad=max_bad,
        source=samples,
    )
    biases = measured.fit(form)
    save_biases(out, biases)
    _say(*map(repr, biases))
    _say(f"Wrote {out}, and the sums to {kept}.")
    if figures is not None:
        _draw_biases(measured, biases, figures)


@app.command()
def generate(
    image: Annotated[Path, typer.Argument(help="File of the image.")],
    question: Annotated[str, typer.Argument(help="What to ask about it.")],
    model: Model = "embedded",
    method: Method = "FastV",
    keep: Keep = None,
    average: Average = False,
    layer: Layer = None,
    reweight: Reweight = None,
    allow: Allow = None,
    normalize: Normalize = None,
    settings: Set = None,
    unpruned: Annotated[bool, typer.Option("--unpruned", help="Drop nothing.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    draw: Annotated[
        Path | None, typer.Option(help="PNG for the image with the tokens kept.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print answer and report as JSON.")] = (
        False
    ),
    device: Device = "auto",
    dtype: Dtype = "auto",
    attn: Attn = None,
    revision: Revision = None,
) -> None:
    """Answer a question about an image, and say what was kept of it.

    Examples:

        pore generate scene.png "What color is the circle?" --keep 25% --draw kept.png

        pore generate cat.jpg "What is this?" -m llava-hf/llava-1.5-7b-hf --reweight llava.json
    """
    import torch

    from pore.data.prompts import build_inputs
    from pore.data.samples import Sample
    from pore.evaluation.reweighting import reweighted

    sample = Sample(image.name, image, question)
    sample.load_image()
    (budget,) = _budgets([keep] if keep else None, settings)
    loaded, processor = _load(model, device, dtype, attn, revision)
    pruner = None
    if not unpruned:
        biases = _biases(reweight, allow, loaded, processor, [sample])
        pruner = _pruner(
            *(method, settings, loaded, budget, average), layer=layer, normalize=normalize
        )
        pruner = pruner if biases is None else reweighted(pruner, biases)
    inputs = build_inputs(processor, [sample], loaded.device, loaded.dtype)
    report = None
    with torch.inference_mode():
        if pruner is None:
            tokens = loaded.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        else:
            with pruner(loaded) as run:
                tokens = loaded.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
            report = run.report
    new = tokens[:, inputs["input_ids"].shape[1] :]
    answer = processor.batch_decode(new, skip_special_tokens=True)[0].strip()
    # The answer first: whatever becomes of the picture, it is not lost.
    if as_json:
        found = {"answer": answer, "report": None if report is None else report.to_dict()}
        typer.echo(json.dumps(found, indent=2))
    else:
        _say(answer, style="bold")
        if report is not None:
            _say(str(report), style="dim")
    if draw is not None:
        _draw_kept(loaded, processor, sample, report, answer, draw)
        if not as_json:
            _say(f"Wrote {draw}.")


@app.command()
def evaluate(
    model: Model = "embedded",
    samples: Samples = "embedded:test",
    questions: Questions = None,
    split: Split = "test",
    limit: Limit = None,
    every: Annotated[
        bool,
        typer.Option("--all", help="Ask every method, and PoRe on every host that takes it."),
    ] = False,
    calibration: Annotated[
        str, typer.Option(help="With --all: samples that P is measured on.")
    ] = "embedded:calibration",
    images: Annotated[
        int, typer.Option(min=1, help="With --all: calibration samples, at most.")
    ] = 700,
    guide: Annotated[
        str | None,
        typer.Option(
            help="With --all or --method SGL: a smaller model that guides SGL, of a kind that cuts "
            "images into the same tokens. [default: the model itself]"
        ),
    ] = None,
    method: Method = "FastV",
    keep: Annotated[
        list[str] | None,
        typer.Option(
            help="Visual tokens kept: 128, 0.25 or 25%. Repeatable. "
            "[default: 25%; with --all 1/3, 2/9 and 1/9, which is 192, 128 and 64 of 576]"
        ),
    ] = None,
    average: Average = False,
    layer: Layer = None,
    reweight: Reweight = None,
    allow: Allow = None,
    normalize: Normalize = None,
    settings: Set = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 16,
    timing: Annotated[bool, typer.Option(help="Measure the prefill, methods in turns.")] = True,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Folder for results. [default: none; runs/all with --all]"
        ),
    ] = None,
    max_bad: MaxBad = 0.01,
    batch_size: Batch = 16,
    seed: Annotated[
        int,
        typer.Option(min=0, max=_SEEDS, help="Seed of methods that draw and of the bootstrap."),
    ] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    attn: Attn = None,
    revision: Revision = None,
) -> None:
    """Ask a model questions with known answers: unpruned, pruned, and pruned with P.

    With --reweight every budget is run without P and with it, and the two are compared question
    by question. With --all every method is asked the same 700 questions (--limit), as its authors
    set it up, those that rank by attention with P as well, and a report is written; interrupted,
    it goes on where it was when called again.

    Examples:

        pore evaluate --keep 25% --keep 10% --reweight profile.json

        pore evaluate --all --limit 2100 --out runs/all

        pore evaluate --method SGL -m llava-hf/llava-1.5-13b-hf --guide llava-hf/llava-1.5-7b-hf

        pore evaluate -m llava-hf/llava-1.5-7b-hf -s vqa.jsonl --keep 128 --reweight llava.json
    """
    from pore.evaluation import survey
    from pore.evaluation.batches import Batches
    from pore.evaluation.guided import Guiding
    from pore.evaluation.outcome import common, compare
    from pore.evaluation.page import footnotes
    from pore.evaluation.records import skips, write_records
    from pore.evaluation.reweighting import reweighted
    from pore.evaluation.running import evaluate as ask
    from pore.evaluation.running import time_prefill
    from pore.methods.sgl import SGL

    budgets = _budgets(keep, settings)
    guided = not every and method.lower() == SGL.name.lower()
    if guide is not None and not (every or guided):
        raise InputError(
            f"--guide is for --all and for --method SGL, not for {method}: leave it away."
        )
    loaded, processor = _load(model, device, dtype, attn, revision)
    limit = _SURVEYED if every and limit is None else limit
    asked = list(_samples(samples, limit=limit, questions=questions, split=split))
    if every:
        if layer is not None or reweight or normalize or settings:
            raise InputError(
                "--all takes every method as its authors set it up; leave --layer, --reweight, "
                "--normalize and --set away."
            )
        _survey(
            loaded,
            processor,
            asked,
            _samples(calibration, limit=images),
            out or Path("runs/all"),
            survey.Settings(
                keeps=tuple(map(_keep, keep)) if keep else survey.Settings.keeps,
                average=average,
                batch_size=batch_size,
                max_new_tokens=max_new_tokens,
                timing=timing,
                seed=seed,
                max_bad=max_bad,
            ),
            (model, calibration, samples),
            None if guide in (None, model) else _load(guide, device, dtype, attn),
        )
        return
    guiding = None
    if guided:
        itself = guide in (None, model)
        other = (loaded, processor) if itself else _load(str(guide), device, dtype, attn)
        guiding = Guiding(*other, max_new_tokens=max_new_tokens, itself=itself)
    biases = _biases(reweight, allow, loaded, processor, asked[:64])
    pruners: list[Pruner | None] = [None]
    for one in budgets:
        plain = _pruner(
            *(method, settings, loaded, one, average, guiding), layer=layer, normalize=normalize
        )
        pruners += [plain] if biases is None else [plain, reweighted(plain, biases)]
    batches = Batches(loaded, processor, asked, batch_size=batch_size, max_bad=max_bad)
    done, total = 0, len(asked) * len(pruners)
    outcomes: list[Outcome] = []
    with _progress() as told:

        def advance(count: int) -> None:
            nonlocal done
            done += count
            told("asking", done / total)

        told("looking at the samples", 0.0)
        batches.sift()
        for pruner in pruners:
            outcomes.append(
                ask(
                    loaded,
                    processor,
                    batches,
                    pruner,
                    max_new_tokens=max_new_tokens,
                    progress=advance,
                )
            )
            if out is not None:  # whatever becomes of the others
                write_records(out, [outcome.record() for outcome in outcomes])
        outcomes = common(outcomes)
        if timing:
            told("timing the prefill", 1.0)
            times = time_prefill(loaded, batches, pruners, count=1)
            outcomes = [replace(o, prefill_ms=ms) for o, ms in zip(outcomes, times, strict=True)]
    records = [outcome.record() for outcome in outcomes]
    written = () if out is None else write_records(out, records)
    _print_results(records)
    _say(*skips(records), *footnotes(records))
    if biases is not None:
        for without, with_p in zip(outcomes[1::2], outcomes[2::2], strict=True):
            _say(str(compare(without, with_p, seed=seed)))
    if written:
        _say(f"Wrote {' and '.join(map(str, written))}.")


@app.command()
def bench(
    shape: Annotated[
        str | None,
        typer.Option(help="Random weights of a shape: llava-1.5-7b, llava-1024x12, ..."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Hub id, folder, or 'embedded' instead of a shape."),
    ] = None,
    method: Method = "FastV",
    keep: Annotated[
        list[str] | None,
        typer.Option(help="Visual tokens kept: 128, 0.25 or 25%. Repeatable. [default: 128]"),
    ] = None,
    average: Average = False,
    layer: Layer = None,
    settings: Set = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", "-b", min=1, help="Prompts that run together.")
    ] = 1,
    text_before: Annotated[int, typer.Option(min=0, help="Text tokens before the image.")] = 35,
    text_after: Annotated[int, typer.Option(min=1, help="Text tokens behind it.")] = 20,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of every setting.")] = 10,
    warmup: Annotated[int, typer.Option(min=0, help="Runs before, thrown away.")] = 2,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="JSON file for all measurements.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    attn: Attn = None,
) -> None:
    """Measure prefill, first token, decoding and memory, pruned and unpruned.

    Runs are interleaved and warmed up; the attainable is the same stack on the shortened prompt,
    without any pruning code.

    Examples:

        pore bench --shape llava-1024x12 --keep 128 --keep 64

        pore bench --shape llava-1.5-7b --device cuda --dtype bfloat16 -b 8 --out bench.json

        pore bench --model embedded --keep 25%
    """
    from pore import bench as speed

    if (shape is None) == (model is None):
        raise typer.BadParameter("Give either --shape or --model.")
    keeps = _budgets(keep, settings, "128")
    if model is not None:
        loaded, _ = _load(model, device, dtype, attn)
    else:
        loaded = _random_model(str(shape), device, dtype, attn)
    pruners = [_pruner(method, settings, loaded, one, average, layer=layer) for one in keeps]
    with _progress() as told:
        result = speed.measure(
            loaded,
            pruners,
            batch_size=batch_size,
            text_before=text_before,
            text_after=text_after,
            new_tokens=new_tokens,
            repeats=repeats,
            warmup=warmup,
            command=_command(),
            progress=lambda run, runs, name: told(name, run / runs),
        )
    if out is not None:
        result.save(out)
    _stdout().print(speed.table(result))
    if out is not None:
        _say(f"Wrote {out}.")


@app.command()
def plot(
    sources: Annotated[
        list[Path],
        typer.Argument(help="results.json, or calibration.json of `pore calibrate` or the demo."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the figures.")] = Path(
        "figures"
    ),
    kind: Annotated[
        str, typer.Option(help="Form of P for a calibration: exponential, spline, ...")
    ] = "exponential",
) -> None:
    """Draw the figures of saved results.

    A calibration gives figure1.png (mean attention on the grid, before and after) and figure2.png
    (over position, with fit and confidence band), results give accuracy.png (over FLOPs).

    Examples:

        pore plot runs/demo/calibration.json runs/demo/results.json --out figures

        pore plot profile.calibration.json --kind spline
    """
    from pore import plotting
    from pore._files import open_regular
    from pore.calibration.host import HostCalibration
    from pore.evaluation.records import read_records

    form = _form(kind)
    for source in sources:
        # Results are a list, a calibration is not; each reader then checks what it gets.
        with open_regular(source) as file:
            is_list = file.read(64).lstrip().startswith(b"[")
        if is_list:
            figure = plotting.accuracy_over_flops(read_records(source))
            path = plotting.save(figure, out / "accuracy.png")
            _say(f"Wrote {path}.")
        else:
            measured = HostCalibration.load(source)
            _draw_biases(measured, measured.fit(form), out)


@app.command()
def flops(
    shape: Annotated[str, typer.Option(help="llava-1.5-7b, llava-1.5-13b, llava-1024x12, ...")] = (
        "llava-1.5-7b"
    ),
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Hub id, folder or 'embedded' instead.")
    ] = None,
    keep: Keeps = _PAPER_KEEPS,
    layer: Annotated[int, typer.Option(help="K, the first pruned layer, counted from 0.")] = 2,
    text: Annotated[int, typer.Option(min=1, help="Text tokens of the prompt.")] = 35,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Count the FLOPs of a prefill: by the paper's count, and as they are.

    The defaults are those of PoRe's Table 1 and reproduce its column: 54.6, 32.8, 30.4, 19.9. Its
    count is the mean over the decoder layers, with a multiply-add as one and two MLP matrices; 10 %
    is there 57.6 tokens, unrounded. The true count is of every matrix product of the model.

    Examples:

        pore flops

        pore flops --model embedded --keep 36 --layer 3
    """
    from pore.cost.flops import ExtraRows, model_flops, paper_flops, tokens_per_layer
    from pore.cost.named import model_shape
    from pore.data.loading import load_config
    from pore.families.registry import shape_of
    from pore.tensors.selection import budget

    sizes = model_shape(shape) if model is None else shape_of(load_config(model))
    visual, layers = sizes.image_tokens, sizes.decoder.layers
    rows = []
    for one in (1.0, *map(_keep, keep)):
        kept = budget(one, visual)
        tokens = tokens_per_layer(layers, text + visual, visual, kept, layer)
        exact = one * visual if isinstance(one, float) else one
        unrounded = [text + visual] * layer + [text + exact] * (layers - layer)
        true = model_flops(
            sizes, tokens, extra_rows=[ExtraRows(layer - 1)] if kept < visual else []
        )
        rows.append(
            {
                "keep": one,
                "dropped": 1 - exact / visual,
                "tokens_kept": kept,
                "tokens": list(tokens),
                "paper": paper_flops(sizes.decoder, unrounded).to_dict(),
                "true": true.to_dict(),
            }
        )
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    title = f"{model or shape}: {text} text + {visual} visual tokens, K = {layer}"
    _stdout().print(_flops_table(rows, title))


@app.command()
def methods() -> None:
    """List the pruning methods that are installed, with their settings."""
    from pore.methods.registry import methods as registered

    table = _table("method", "reweight", "settings", "what it does", "source")
    for name, kind in registered().items():
        table.add_row(
            cell(name, "bold"),
            "yes" if kind.reweightable else "-",
            "\n".join(_setting(field) for field in fields(kind)),  # type: ignore[arg-type]
            _first_line(kind),
            kind.paper,
        )
    _stdout().print(table)


@app.command()
def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the model families that pore knows, with the methods that each takes and why not others.

    Methods are as their authors set them up; other settings may do more.

    Examples:

        pore models

        pore models --json
    """
    from pore.cost.named import SHAPES
    from pore.embedded import EMBEDDED
    from pore.methods.registry import methods as registered
    from pore.methods.support import support

    found = support()
    if as_json:
        typer.echo(json.dumps([one.to_dict() for one in found], indent=2))
        return
    table = _table("family", "methods")
    for one in found:
        name = cell(one.family.name, "bold")
        name.append_text(cell("\n" + ", ".join(one.model_types), "not bold dim"))
        table.add_row(name, "\n".join(_taken(one)))
    _stdout().print(table)
    others = sorted(registered().keys() - found[0].limits.keys())
    if others:
        _say(f"Set up with more than a model: {', '.join(others)}")
    _say(
        f"Shipped with the package: --model {EMBEDDED}",
        f"Shapes with random weights, for bench and flops: {', '.join(SHAPES)}, llava-WIDTHxLAYERS",
    )


@app.command()
def check(
    model: Annotated[
        str, typer.Argument(help="Hub id, folder, or 'embedded': the model shipped here.")
    ] = "embedded",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    attn: Attn = None,
    revision: Revision = None,
) -> None:
    """Prove pruning on this machine, with the installed versions, for a kind of model.

    Makes a tiny random twin of the model from its config alone, and runs on it what must hold:
    keeping all changes nothing, pruned equals masked, a batch its samples, cached decoding a full
    forward, and the model is left clean. Takes seconds; exits with 1 where something fails.

    Examples:

        pore check

        pore check Qwen/Qwen2.5-VL-7B-Instruct --dtype bfloat16 --attn eager
    """
    from pore.checking.proofs import check as prove
    from pore.checking.twin import load_twin

    found = prove(load_twin(model, device=device, dtype=dtype, attn=attn, revision=revision))
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    else:
        table = _table("", "weights", "what must hold", "found")
        for row in found.rows:
            mark = cell("holds", "green") if row.holds else cell("FAILS", "red")
            table.add_row(mark, row.dtype, cell(row.name), cell(row.finding))
        _stdout().print(table)
        _stdout().print(found.summary)
    if not found.passed:
        raise typer.Exit(_EXIT_ERROR)


def _taken(one: Support) -> Iterator[str]:
    """What a family takes, and by reason what it does not."""
    everywhere = [name for name, limits in one.limits.items() if not limits]
    yield "all" if len(everywhere) == len(one.limits) else ", ".join(everywhere)
    never: dict[str, list[str]] = {}
    where: dict[str, list[str]] = {}
    for name, limits in one.limits.items():
        for limit in limits:
            if limit.unless is None:
                never.setdefault(limit.reason, []).append(name)
                break  # one reason is enough
            if name in one.takes:
                where.setdefault(limit.unless, []).append(name)
    for condition, names in where.items():
        yield f"where {condition}: {', '.join(names)}"
    for reason, names in never.items():
        yield f"not {', '.join(names)}: {reason}"


# -- what the commands share ----------------------------------------------------------------------


def _stdout() -> Screen:
    console = Screen()
    return console if console.is_terminal else Screen(width=_WIDTH)


def _say(*lines: str, style: str = "") -> None:
    """Print text as it is, not broken into lines: a terminal does that, and files need none."""
    console = _stdout()
    for line in lines:
        console.print(line, style=style, soft_wrap=True)


def _complain(what: str, style: str, error: BaseException) -> None:
    console = Screen(stderr=True)
    console.print(cell(what, style), str(error), soft_wrap=True)


def _survey(
    loaded: Any,
    processor: Any,
    test: Sequence[Sample],
    calibration: Sequence[Sample],
    out: Path,
    settings: survey.Settings,
    names: tuple[str, str, str],
    guide: tuple[Any, Any] | None,
) -> None:
    """Ask every method, and print what came of it."""
    from pore import bench as speed
    from pore.evaluation import survey
    from pore.evaluation.page import About, findings, notes
    from pore.evaluation.records import table

    model, calibration_source, test_source = names
    began = time.monotonic()
    with _progress() as told:
        result = survey.run(
            loaded,
            processor,
            calibration=calibration,
            test=test,
            out=out,
            settings=settings,
            about=About(
                model="the embedded model" if model == "embedded" else model,
                command=_command(),
                calibration=calibration_source,
                test=test_source,
                setup=_setup(
                    loaded, speed.hardware(loaded.device), speed.versions(), settings.seed
                ),
            ),
            guide=guide,
            progress=told,
        )
    title = "Right answers in % with 95 % interval, by third of the image"
    parts = ("cost", "mean", "accuracy", "thirds")
    _stdout().print(table(result.records, title=title, parts=parts, taught=result.taught))
    _say(*notes(result), "", *findings(result))
    _say(*(f"Left out: {line}" for line in result.reasons))
    _say(f"\nWrote {result.report} in {time.monotonic() - began:.0f} s.")


def _print_results(records: Sequence[dict[str, Any]]) -> None:
    """One table, or two under each other on a terminal too narrow for it."""
    from pore.evaluation.records import table

    console = _stdout()
    title = "Right answers in % with 95 % interval, by kind of question and third of the image"
    whole = table(records, title=title)
    width = Screen(width=1000).measure(whole).maximum
    if not console.is_terminal:
        console = Screen(width=max(width, _WIDTH))
    if width <= console.width:
        console.print(whole)
    else:
        console.print(
            table(records, title="Right answers in %", parts=("cost", "accuracy", "thirds"))
        )
        console.print(table(records, title="Right answers in %, by kind", parts=("kinds",)))
    _say(
        "tokens: visual ones at the last layer; GFLOPs: of the prefill with tower, multiply-add = "
        "2; ms: prefill per question, median\n",
        style="dim",
    )


@contextmanager
def _progress() -> Iterator[Callable[[str, float], None]]:
    """One bar for a whole command, on stderr; gives a function of what is done and what share."""
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    with Progress(
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
        console=Screen(stderr=True, soft_wrap=True),
        transient=True,
    ) as bar:
        task = bar.add_task("", total=1.0)

        def tell(what: str, share: float) -> None:
            bar.update(task, description=visible(what), completed=share)

        yield tell


def _load(
    model: str, device: str, dtype: str, attn: str | None, revision: str | None = None
) -> tuple[Any, Any]:
    from pore.data.loading import load_model

    return load_model(model, device=device, dtype=dtype, attn=attn, revision=revision)


def _random_model(shape: str, device: str, dtype: str, attn: str | None) -> Any:
    import torch

    from pore import bench as speed
    from pore.data.loading import check_dtype, choose_device

    check_dtype(dtype)
    target = choose_device(device)
    if dtype == "auto":
        dtype = "float32" if target.type == "cpu" else "bfloat16"
    return speed.build(shape, device=target, dtype=getattr(torch, dtype), attention=attn or "sdpa")


def _samples(
    source: str, *, limit: int | None, questions: Path | None = None, split: str = "test"
) -> Sequence[Sample]:
    from pore.data.sources import load_samples

    return list(load_samples(source, questions=questions, limit=limit, split=split))


def _keep(text: str) -> int | float:
    """`128`, `0.25` or `25%` as a method's `keep`."""
    try:
        if text.endswith("%"):
            return float(text[:-1]) / 100
        return int(text) if text.strip("+-").isdigit() else float(text)
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is no number of tokens (128) and no share of them (0.25 or 25%)."
        ) from None


def _budgets(
    keep: list[str] | None, settings: list[str] | None, default: str = "25%"
) -> list[int | float]:
    """The budgets of --keep, which --set may not give once more."""
    if keep and any(setting.startswith("keep=") for setting in settings or []):
        raise InputError("keep is given twice, by --keep and by --set.")
    return list(map(_keep, keep or [default]))


def _form(text: str) -> Kind:
    """A form of P that can be fitted, seen before anything is measured."""
    from pore.bias.curve import Kind

    forms = [form for form in get_args(Kind) if form != "rope"]
    if text not in forms:
        raise InputError(f"{text!r} is no form of P to fit; choose from {', '.join(forms)}.")
    return text  # type: ignore[return-value]


def _pruner(
    method: str,
    settings: list[str] | None,
    model: Any,
    keep: int | float,
    average: bool = False,
    guiding: Guiding | None = None,
    **given: Any,
) -> Pruner:
    """A method by name, in any case of letters, as its authors set it up but for what is given."""
    from pore.methods.making import make

    usual = None if guiding is None else guiding.usual
    texts = settings or ()
    return make(
        method, model, keep, average=average, texts=texts, usual=usual, guide=guiding, **given
    )


def _biases(
    name: str | None, allow: list[str] | None, model: Any, processor: Any, samples: Sequence[Sample]
) -> list[PositionBias] | None:
    """P by name, if it was measured with this processor and template; methods check the rest."""
    from pore.data.prompts import processor_settings, prompt_template
    from pore.evaluation.reweighting import ROPE, load_bias, rope_bias

    if name is None:
        return None
    if name == ROPE:
        return [rope_bias(model, processor, samples)]
    biases = [bias.allowing(*allow or ()) for bias in load_bias(name)]
    for bias in biases:
        bias.check(processor=processor_settings(processor), template=prompt_template(processor))
    return biases


def _draw_biases(measured: HostCalibration, biases: Sequence[PositionBias], folder: Path) -> None:
    from pore import plotting

    for stage, bias in zip(measured.stages, biases, strict=True):
        which = f"-layer{bias.provenance.layer}" if len(biases) > 1 else ""
        for name, figure in (
            ("figure1", plotting.figure1(stage.mean, bias)),
            ("figure2", plotting.figure2(stage.mean, bias, stage.sem)),
        ):
            path = plotting.save(figure, folder / f"{name}{which}.png")
            _stdout().print(f"Wrote {path}.", highlight=False)


def _draw_kept(
    model: Any, processor: Any, sample: Sample, report: Any, answer: str, path: Path
) -> None:
    from pore import plotting
    from pore.data.coverage import coverage_of

    picture = sample.load_image()
    kept = None
    if report is not None:
        kept = [image.kept for image in report.samples[0].images]
    figure = plotting.layout(
        picture, coverage_of(model, processor, picture), kept, title=f"{sample.question} “{answer}”"
    )
    plotting.save(figure, path)


def _setup(
    model: Any, hardware: dict[str, Any], versions: dict[str, str], seed: int
) -> dict[str, str]:
    from pore._compat.attention import attention_name

    machine = [hardware["cpu"], f"{hardware['cpu_cores']} cores", f"{hardware['threads']} threads"]
    if "gpu" in hardware:
        machine.append(hardware["gpu"])
    return {
        "machine": ", ".join(machine),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "model": f"{model.device.type}, {str(model.dtype).removeprefix('torch.')}, "
        f"{attention_name(model.config)} attention",
        "seeds": f"{seed} for Random and the bootstrap; the scenes have seeds of their own",
        "date": time.strftime("%Y-%m-%d"),
    }


def _choice(layer: int) -> str:
    if layer == 2:
        return "K = 2 is the layer of the paper's Table 1; it was not chosen by results."
    return f"K = {layer} was asked for on the command line; the paper's Table 1 has K = 2."


def _command() -> str:
    return " ".join(["pore", *sys.argv[1:]])


def _table(*headings: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def _flops_table(rows: Sequence[dict[str, Any]], title: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in (
        "dropped",
        "kept",
        "paper's count, B",
        "true count, GFLOPs",
        "of unpruned",
        "decoder",
        "tower",
        "projector",
        "head",
    ):
        table.add_column(heading, justify="right")
    for row in rows:
        paper, true = row["paper"], row["true"]
        table.add_row(
            f"{100 * row['dropped']:.1f} %",
            str(row["tokens_kept"]),
            f"{paper['layer_mean'] / 1e9:.1f}",
            *(f"{true[part] / 1e9:,.4g}" for part in ("total",)),
            f"{true['total'] / rows[0]['true']['total']:.3f}",
            *(
                f"{(true[part] + (true['probe'] if part == 'decoder' else 0)) / 1e9:,.4g}"
                for part in ("decoder", "tower", "projector", "head")
            ),
        )
    table.caption = (
        "Paper's count: mean over the decoder layers, multiply-add = 1, MLP of two matrices. "
        "True count: whole model, multiply-add = 2, probe of scores included in the decoder."
    )
    return table


def _setting(field: Any) -> str:
    kind = field.type if isinstance(field.type, str) else field.type.__name__
    if field.default is MISSING:
        return f"{field.name}: {kind}"
    return f"{field.name} = {field.default!r}"


def _first_line(documented: object) -> str:
    kind = documented if isinstance(documented, type) else type(documented)
    return (kind.__doc__ or "").strip().split("\n", 1)[0]


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # What a terminal has no letters for is spelled out, rather than all being lost.
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="pore")


if __name__ == "__main__":
    main()

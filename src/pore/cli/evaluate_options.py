"""The options of `pore evaluate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from pore.cli.options import (
    LARGEST_SEED,
    SCENES,
    Batch,
    Columns,
    Guide,
    Limit,
    Loading,
    MaxBad,
    Metric,
    Pruning,
    Questions,
    Samples,
    Split,
)


@dataclass(frozen=True)
class Options(Loading, Pruning):
    """The options of `pore evaluate`."""

    samples: Samples = None
    questions: Questions = None
    split: Split = "test"
    columns: Columns = None
    limit: Limit = None
    metric: Metric = "exact"
    every: Annotated[
        bool,
        typer.Option("--all", help="Evaluate every method, and PoRe on every host that takes it."),
    ] = False
    corrections: Annotated[
        bool,
        typer.Option(
            "--corrections",
            help="Evaluate every correction of position bias on every host that takes one.",
        ),
    ] = False
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            help="Benchmarks of lmms-eval, with commas or repeated; 'samples' are the questions of "
            "--samples. Needs pore-vlm[eval]. [default with --methods: samples]"
        ),
    ] = None
    methods: Annotated[
        list[str] | None,
        typer.Option(
            help="Methods, with commas or repeated: fastv, sparsevlm+pore, fastv+rope; 'pore' is "
            "fastv+pore. [default with --tasks: fastv,pore]"
        ),
    ] = None
    table1: Annotated[
        bool,
        typer.Option(
            "--table1",
            help="Run what Table 1 of the PoRe paper shows, and write the paper's numbers beside: "
            "--table table1.",
        ),
    ] = False
    table: Annotated[
        str | None,
        typer.Option(
            help="Run a published table, and write its numbers beside ours: table1 (LLaVA-1.5, "
            "FastV and PoRe) or qwen2.5-vl (Qwen2.5-VL at 25 % and 10 %, nine methods)."
        ),
    ] = None
    include_path: Annotated[
        Path | None, typer.Option(help="With --tasks: folder of further tasks of lmms-eval.")
    ] = None
    calibration: Annotated[
        str | None,
        typer.Option(
            help="With --all, --corrections or --methods: samples that P is measured on. "
            f"{SCENES.format('calibration')}"
        ),
    ] = None
    images: Annotated[
        int,
        typer.Option(
            min=1, help="With --all, --corrections or --methods: calibration samples, at most."
        ),
    ] = 700
    guide: Guide = None
    keep: Annotated[  # several budgets in place of one
        list[str] | None,
        typer.Option(
            help="Visual tokens kept: 128, 0.25 or 25%. Repeatable; with --methods also 128,64. "
            "[default: 25%; with --all, --corrections or --methods 1/3, 2/9 and 1/9, which is "
            "192, 128 and 64 of 576]"
        ),
    ] = None  # type: ignore[assignment]
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 16
    timing: Annotated[
        bool, typer.Option(help="Measure the prefill time, methods taking turns.")
    ] = True
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Folder for results. [default: none; runs/all with --all, runs/corrections with "
            "--corrections, runs/sweep with --tasks or --methods]",
        ),
    ] = None
    max_bad: MaxBad = 0.01
    batch_size: Batch = 16
    seed: Annotated[
        int,
        typer.Option(
            min=0,
            max=LARGEST_SEED,
            help="Seed of methods that draw at random, of examples in prompts of lmms-eval, and of "
            "the bootstrap of differences; intervals of scores always have the same.",
        ),
    ] = 0

"""The measured cost of a prefill and a decode step, beside what they should and could cost.

Every pruned setting is timed against the same model unpruned, with the same attention kernel, in
interleaved runs (A B C A B C ...), so that a machine that slows down slows all of them. Each is
also compared with *the attainable*: stock modules run the same layers on the shortened sequence,
with one plain gather and no pruning code at all. The time beyond that is what pruning itself costs.

Times are in milliseconds, sizes in bytes. A run is one batch: vision tower, projector, prefill and
head give the first token; the others are decoded one by one, greedily, over the same cache.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from functools import partial
from typing import Any

import torch
from torch import nn
from typing_extensions import Unpack

from pore._compat.attention import attention_name
from pore.bench.attainable import LLAMA_LIKE, Attainable, cuts_of
from pore.bench.batch import workload_of
from pore.bench.rates import device_rates, roofline
from pore.bench.results import CalibrationResult, SettingResult, SpeedResult
from pore.bench.runs import Progress, Runner, in_turn, interleaved, timing
from pore.bench.setup import build, hardware, now, versions
from pore.bench.workload import Asked, AskedWithAnswer, Runs, Workload, check_number
from pore.calibration.reading import attention_rows, layer_stage
from pore.cost.named import model_shape
from pore.cost.shapes import ModelShape
from pore.engine.limits import check_layer
from pore.engine.pruner import Pruner
from pore.errors import InputError, check_options
from pore.families.registry import sizes_of
from pore.identity import names_of
from pore.plotting.labels import UNPRUNED


def measure(
    model: nn.Module | str,
    pruners: Mapping[str, Pruner] | Sequence[Pruner],
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    attention: str | None = None,
    attainable: bool = True,
    inputs: Mapping[str, Any] | None = None,
    command: str | None = None,
    progress: Progress | None = None,
    **workload: Unpack[AskedWithAnswer],
) -> SpeedResult:
    """Time a model unpruned and under pruners, in interleaved runs on random prompts of one image.

        measure("llava-1024x12", [pore.FastV(keep=128)], batch_size=8, new_tokens=1)
        measure(model, [pore.FastV(keep=0.25)], inputs=processor(images=..., text=...))

    A model of images of any size needs `inputs`, which say how large the image is.

    Args:
        model: A model, or the name of a shape to build with random weights.
        pruners: What to compare: by name, or a sequence, to be named after their settings.
        device: Where to build a shape (default: CUDA if there, else the CPU).
        dtype: Data type of the weights of a shape (default: bfloat16 on CUDA, else float32).
        attention: Attention implementation of a shape (default: "sdpa").
        attainable: Whether to time the same lengths without pruning code as well, if the decoder is
            LLaMA-like.
        inputs: What to run in place of random prompts: a batch of the model's processor, without
            padding, its images all of one size. Of `workload` it leaves new_tokens, repeats and
            warmup.
        command: The command line, to be written into the result.
        progress: Called before every run with the runs done so far, the total number of runs, and
            the setting's name.
        **workload: Fields of `Workload` except `visual`, by name: batch_size (1), text_before (35),
            text_after (20), new_tokens (16, at least 1), repeats (10), warmup (2) and seed (0),
            which is also the seed of random weights.

    Returns:
        All measurements.

    Raises:
        InputError: A number is out of range, device, dtype or attention are given for a model
            that has its own, or `inputs` do not fit.
        ModelStateError: The model is pruned.
        UnsupportedModelError: The model belongs to no family, needs `inputs`, or no shape has that
            name.
        PoreError: A pruner does not fit the model.
    """
    named = _named(pruners)
    shape = model_shape(model) if isinstance(model, str) else sizes_of(model)
    runner = _runner(model, device, dtype, attention, inputs, workload)
    model, work = runner.model, runner.workload
    check_number("new_tokens", work.new_tokens, 1)
    decoder: Any = runner.family.decoder(model)
    attainable = attainable and decoder.config.model_type in LLAMA_LIKE
    tokens = {UNPRUNED: (work.prompt,) * shape.decoder.layers}
    costs = {UNPRUNED: runner.unpruned_flops(shape)}
    contexts: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {}
    contexts[UNPRUNED] = contextlib.nullcontext
    for name, pruner in named.items():
        tokens[name], costs[name] = runner.cost(pruner)
        contexts[name] = partial(pruner, model)
        if attainable:
            where = cuts_of(tokens[name], work.prompt, runner.device)
            contexts[_attainable(name)] = partial(Attainable, decoder, where)
    runs = interleaved(runner, contexts, progress)
    rates = device_rates(runner.device, runner.dtype)
    settings = []
    for name, counts in tokens.items():
        cost = costs[name]
        took, ideal = timing(runs[name]), runs.get(_attainable(name))
        settings.append(
            SettingResult(
                name=name,
                settings=_settings(named[name]) if name in named else {},
                tokens=counts,
                flops=cost,
                timing=took,
                attainable=timing(ideal) if ideal else None,
                roofline=None if cost is None else roofline(runner, rates, cost, took),
            )
        )
    return SpeedResult(
        model=_model(model, shape, runner),
        workload=work,
        hardware=hardware(runner.device),
        versions=versions(),
        rates=rates,
        settings=tuple(settings),
        command=command,
        date=now(),
    )


def measure_calibration(
    model: nn.Module, layer: int = 2, **workload: Unpack[Asked]
) -> CalibrationResult:
    """Time the forward of a batch in calibration, and a bare forward of the tower and K layers.

    Args:
        model: A model, as loaded or from `build`.
        layer: K, the 0-based index of the first layer to be pruned.
        **workload: As in `measure`, but without `new_tokens`, as nothing is generated.

    Returns:
        The measurements.

    Raises:
        BudgetError: The decoder has no such layer to prune.
        InputError: A number is out of range, or the model lies on several devices.
        ModelStateError: The model is pruned.
        UnsupportedModelError: The model belongs to no family, or its images differ in their number
            of tokens.
    """
    shape = sizes_of(model)
    check_options("measure_calibration", workload, Asked)
    work = Workload(visual=shape.image_tokens, new_tokens=0, **workload)
    runner = Runner(model, work)
    family = runner.family
    check_layer(layer, family, model)
    decoder: Any = family.decoder(model)

    def bare() -> None:
        config, count = decoder.config, decoder.config.num_hidden_layers
        try:
            config.num_hidden_layers = layer
            family.base(model)(**runner.inputs, use_cache=False)
        finally:
            config.num_hidden_layers = count

    calibration = partial(attention_rows, model, runner.inputs, [layer_stage(layer)])
    took = in_turn((calibration, bare), runner)
    return CalibrationResult(
        model=_model(model, shape, runner),
        workload=work,
        hardware=hardware(runner.device),
        versions=versions(),
        layer=layer,
        calibration=took[0],
        attainable=took[1],
        date=now(),
    )


def _runner(
    model: nn.Module | str,
    device: str | torch.device | None,
    dtype: torch.dtype | None,
    attention: str | None,
    inputs: Mapping[str, Any] | None,
    workload: AskedWithAnswer,
) -> Runner:
    """What runs the model: on given inputs, or on random prompts."""
    if inputs is not None:
        check_options("measure", workload, Runs)
        model = _loaded(model, device, dtype, attention, 0)
        work, made = workload_of(model, inputs, **workload)  # type: ignore[misc] # checked
        return Runner(model, work, made)
    check_options("measure", workload, AskedWithAnswer)
    shape = model_shape(model) if isinstance(model, str) else sizes_of(model)
    work = Workload(visual=shape.image_tokens, **workload)
    return Runner(_loaded(model, device, dtype, attention, work.seed), work)


def _loaded(
    model: nn.Module | str,
    device: str | torch.device | None,
    dtype: torch.dtype | None,
    attention: str | None,
    seed: int,
) -> nn.Module:
    """The model, built if it is the name of a shape."""
    if isinstance(model, str):
        return build(
            model,
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            dtype=dtype or (torch.bfloat16 if torch.cuda.is_available() else torch.float32),
            attention=attention or "sdpa",
            seed=seed,
        )
    if device is not None or dtype is not None or attention is not None:
        raise InputError(
            "device, dtype and attention are for shapes; a loaded model has its own. Load the "
            "model with those that you want to measure."
        )
    return model


def _attainable(name: str) -> str:
    return f"{name}, attainable"


def _named(pruners: Mapping[str, Pruner] | Sequence[Pruner]) -> dict[str, Pruner]:
    pairs = (
        list(pruners.items())
        if isinstance(pruners, Mapping)
        else [(_label(pruner), pruner) for pruner in pruners]
    )
    names = {UNPRUNED, *(_attainable(name) for name, _ in pairs)}
    for name, _ in pairs:
        if name in names:
            raise InputError(f"Two settings are named {name!r}; give each its own name.")
        names.add(name)
    return dict(pairs)


def _settings(pruner: Pruner) -> dict[str, str]:
    """The settings of a pruner as text, its method first; a position bias is named by its kind."""
    words = {"method": pruner.name}
    for item in fields(pruner):  # type: ignore[arg-type]
        value = getattr(pruner, item.name)
        first = value[0] if isinstance(value, tuple) and value else value
        words[item.name] = str(getattr(first, "kind", value))
    return words


def _label(pruner: Pruner) -> str:
    """The method's name with its numbers, and with other settings that are not the default."""
    words = _settings(pruner)
    parts = []
    for item in fields(pruner):  # type: ignore[arg-type]
        value = getattr(pruner, item.name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if number or words[item.name] != str(item.default):
            parts.append(f"{item.name}={words[item.name]}")
    return f"{pruner.name}({', '.join(parts)})"


def _model(model: nn.Module, shape: ModelShape, runner: Runner) -> dict[str, Any]:
    decoder: Any = runner.family.decoder(model)
    weights = list(model.parameters())
    return {
        "name": names_of(model)["model"],
        "sizes": asdict(shape) if shape.decoder.known else None,
        "parameters": sum(p.numel() for p in weights),
        "weights_bytes": sum(p.nbytes for p in weights),
        "dtype": str(runner.dtype).removeprefix("torch."),
        "attention": attention_name(decoder.config),
        "matmul_precision": torch.get_float32_matmul_precision(),
    }

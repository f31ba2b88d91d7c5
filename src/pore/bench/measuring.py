"""What a prefill and a decode step do cost: measured, beside what they should and could cost.

Every pruned setting is timed against the same model unpruned, with the same attention kernel, in
interleaved runs (A B C A B C ...), so that a machine that slows down slows all of them. Each is
also timed against *the attainable*: the same stack run on the shortened sequence by stock modules
and one plain gather, with no pruning code at all. What a setting takes beyond that is what pruning
itself costs.

Times are in milliseconds, sizes in bytes. A run is one batch: vision tower, projector, prefill and
head give the first token; the others are decoded one by one, greedily, over the same cache.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from functools import partial
from typing import Any

import torch
from torch import nn

from pore._compat.attention import attention_name
from pore.bench.results import (
    UNPRUNED,
    CalibrationResult,
    Progress,
    SettingResult,
    SpeedResult,
    Spread,
    Workload,
)
from pore.bench.runs import (
    _LLAMA_LIKE,
    Attainable,
    _Clock,
    _cuts,
    _interleaved,
    _no_gc,
    _roofline,
    _Runner,
    _timing,
    device_rates,
)
from pore.bench.setup import _now, build, hardware, versions
from pore.cost.flops import model_flops
from pore.cost.shapes import ModelShape
from pore.engine.limits import check_layer
from pore.engine.pruner import Pruner
from pore.errors import InputError
from pore.families.registry import shape_of
from pore.identity import names_of

# -- what is asked for ------------------------------------------------------------------------


def measure(
    model: nn.Module | str,
    pruners: Mapping[str, Pruner] | Sequence[Pruner],
    *,
    batch_size: int = 1,
    text_before: int = 35,
    text_after: int = 20,
    new_tokens: int = 16,
    repeats: int = 10,
    warmup: int = 2,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    attention: str | None = None,
    seed: int = 0,
    attainable: bool = True,
    command: str | None = None,
    progress: Progress | None = None,
) -> SpeedResult:
    """Time a model unpruned and under pruners, in interleaved runs on random prompts of one image.

    Args:
        model: A model, or the name of a shape to build with random weights.
        pruners: What to compare, by name, or in a sequence to be named after their settings.
        batch_size: Prompts that run together.
        text_before: Text tokens before the image.
        text_after: Text tokens behind it, at least 1.
        new_tokens: Tokens to generate for each prompt, the first included.
        repeats: Timed runs of every setting.
        warmup: Runs of every setting before, thrown away.
        device: Where to build a shape (default: CUDA if there, else the CPU).
        dtype: Of the weights of a shape (default: bfloat16 on CUDA, else float32).
        attention: Attention implementation of a shape (default: "sdpa").
        seed: Seed of prompts and of random weights.
        attainable: Whether to time also the same lengths without pruning code, where the decoder is
            LLaMA-like.
        command: What the user typed, to be written into the result.
        progress: Called before every run with runs done, runs in all, and the setting's name.

    Returns:
        All measurements.

    Raises:
        InputError: A number is out of range, or device, dtype or attention are given for a model
            that has its own.
        ModelStateError: The model is pruned.
        UnsupportedModelError: The sizes of the model are not known, or the shape is none.
        PoreError: A pruner does not fit the model.
    """
    least = {
        "batch_size": (batch_size, 1),
        "text_before": (text_before, 0),
        "text_after": (text_after, 1),
        "new_tokens": (new_tokens, 1),
        "repeats": (repeats, 1),
        "warmup": (warmup, 0),
    }
    for name, (value, bound) in least.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < bound:
            raise InputError(f"{name} must be a whole number of at least {bound}, is {value!r}")
    named = _named(pruners)
    if isinstance(model, str):
        model = build(
            model,
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            dtype=dtype or (torch.bfloat16 if torch.cuda.is_available() else torch.float32),
            attention=attention or "sdpa",
            seed=seed,
        )
    elif device is not None or dtype is not None or attention is not None:
        raise InputError(
            "device, dtype and attention are for shapes; a loaded model has its own. Load it with "
            "those you want to measure."
        )
    shape = shape_of(model.config)
    workload = Workload(
        batch_size, text_before, shape.image_tokens, text_after, new_tokens, repeats, warmup, seed
    )
    runner = _Runner(model, workload)
    decoder: Any = runner.family.decoder(model)
    attainable = attainable and decoder.config.model_type in _LLAMA_LIKE
    tokens = {UNPRUNED: (workload.prompt,) * shape.decoder.layers}
    costs = {UNPRUNED: model_flops(shape, tokens[UNPRUNED])}
    contexts: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {}
    contexts[UNPRUNED] = contextlib.nullcontext
    for name, pruner in named.items():
        tokens[name], costs[name] = runner.cost(pruner)
        contexts[name] = partial(pruner, model)
        if attainable:
            cuts = _cuts(tokens[name], workload.prompt, runner.device)
            contexts[_attainable(name)] = partial(Attainable, decoder, cuts)
    samples = _interleaved(runner, contexts, progress)
    rates = device_rates(runner.device, runner.dtype)

    settings = []
    for name, counts in tokens.items():
        timing = _timing(samples[name])
        chosen = named.get(name)
        flops = costs[name]
        ideal = samples.get(_attainable(name))
        settings.append(
            SettingResult(
                name=name,
                settings=_settings(chosen) if chosen else {},
                tokens=counts,
                flops=flops,
                timing=timing,
                attainable=_timing(ideal) if ideal else None,
                roofline=_roofline(runner, rates, flops, timing),
            )
        )
    return SpeedResult(
        model=_model(model, shape, runner),
        workload=workload,
        hardware=hardware(runner.device),
        versions=versions(),
        rates=rates,
        settings=tuple(settings),
        command=command,
        date=_now(),
    )


def measure_calibration(
    model: nn.Module,
    layer: int = 2,
    *,
    batch_size: int = 1,
    text_before: int = 35,
    text_after: int = 20,
    repeats: int = 10,
    warmup: int = 2,
    seed: int = 0,
) -> CalibrationResult:
    """Time the forward that calibration makes of a batch, and a bare one of tower and K layers.

    Args:
        model: A model, as loaded or from `build`.
        layer: K, the 0-based index of the first layer to be pruned.
        batch_size: Prompts in one forward.
        text_before: Text tokens before the image.
        text_after: Text tokens behind it, at least 1.
        repeats: Timed runs of each, interleaved.
        warmup: Runs of each before, thrown away.
        seed: Seed of the prompts.

    Returns:
        The measurements.

    Raises:
        BudgetError: The decoder has no such layer to prune.
        InputError: The model lies on several devices.
        ModelStateError: The model is pruned.
        UnsupportedModelError: The sizes of the model are not known.
    """
    from pore.calibration.reading import attention_rows, layer_stage

    shape = shape_of(model.config)
    workload = Workload(
        batch_size, text_before, shape.image_tokens, text_after, 0, repeats, warmup, seed
    )
    runner = _Runner(model, workload)
    family, clock = runner.family, _Clock(runner.device)
    check_layer(layer, family, model)
    decoder: Any = family.decoder(model)

    def bare() -> None:
        config, count = decoder.config, decoder.config.num_hidden_layers
        try:
            config.num_hidden_layers = layer
            family.base(model)(**runner.inputs, use_cache=False)
        finally:
            config.num_hidden_layers = count

    works: tuple[Callable[[], object], ...] = (
        partial(attention_rows, model, runner.inputs, [layer_stage(layer)]),
        bare,
    )
    took: tuple[list[float], ...] = ([], [])
    with torch.inference_mode():
        for number in range(warmup + repeats):
            gc.collect()
            for times, work in zip(took, works, strict=True):
                with _no_gc():
                    start = clock.now()
                    work()
                    end = clock.now()
                if number >= warmup:
                    times.append(end - start)
    return CalibrationResult(
        model=_model(model, shape, runner),
        workload=workload,
        hardware=hardware(runner.device),
        versions=versions(),
        layer=layer,
        calibration=Spread(tuple(took[0])),
        attainable=Spread(tuple(took[1])),
        date=_now(),
    )


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
    """The settings of a pruner in words, its method first; a position bias by its kind."""
    words = {"method": pruner.name}
    for item in fields(pruner):  # type: ignore[arg-type]
        value = getattr(pruner, item.name)
        words[item.name] = str(getattr(value, "kind", value))
    return words


def _label(pruner: Pruner) -> str:
    """The method's name with its numbers, and with what else is not its default."""
    words = _settings(pruner)
    parts = []
    for item in fields(pruner):  # type: ignore[arg-type]
        value = getattr(pruner, item.name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if number or words[item.name] != str(item.default):
            parts.append(f"{item.name}={words[item.name]}")
    return f"{pruner.name}({', '.join(parts)})"


def _model(model: nn.Module, shape: ModelShape, runner: _Runner) -> dict[str, Any]:
    decoder: Any = runner.family.decoder(model)
    weights = list(model.parameters())
    return {
        "name": names_of(model)["model"],
        "sizes": asdict(shape),
        "parameters": sum(p.numel() for p in weights),
        "weights_bytes": sum(p.nbytes for p in weights),
        "dtype": str(runner.dtype).removeprefix("torch."),
        "attention": attention_name(decoder.config),
        "matmul_precision": torch.get_float32_matmul_precision(),
    }

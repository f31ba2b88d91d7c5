"""Budgets by the mean over decoder layers, a convention other than tokens left at the end.

`keep` is what a method leaves after its last stage. Tables of SparseVLM, PyramidDrop and VisionZip
count visual tokens averaged over the decoder layers instead, so that methods that drop early and
methods that drop late cost about the same.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from torch import nn

from pore.cost.shapes import ModelShape
from pore.engine.pruner import Pruner
from pore.errors import BudgetError, InputError
from pore.families.registry import sizes_of
from pore.methods.registry import method_named
from pore.tensors.selection import check_keep


def schedule(
    method: type[Pruner] | str,
    model: nn.Module | ModelShape,
    average: int | float,
    *,
    visual: int | None = None,
    **settings: object,
) -> Pruner:
    """The method with the budget whose visual tokens average a given number over the layers.

    It is the method's usual set-up, in which `keep` is found by bisection:

        pruner = pore.schedule("PyramidDrop", model, 192)

    The mean counts the visual tokens that enter every decoder layer, like `mean_visual_tokens` of a
    report. It is as near to `average` as whole tokens permit.

    Args:
        method: The method, or its name in any case of letters.
        model: The model, or its sizes.
        average: Visual tokens per image, averaged over the decoder layers (int), or the fraction of
            an image's visual tokens (float).
        visual: Visual tokens of an image, for a model whose images differ in it.
        **settings: Settings of the method other than its usual ones.

    Returns:
        The method.

    Raises:
        BudgetError: No budget reaches the average; the message says what the method can do.
        InputError: There is no such method or setting, `keep` is among the settings, or the method
            needs more than a model to be set up.
        UnsupportedModelError: The sizes of the model are not known, or its images differ in their
            number of tokens and `visual` is left out.
    """
    kind = method_named(method) if isinstance(method, str) else method
    known = {field.name for field in fields(kind)} - {"keep"}  # type: ignore[arg-type]
    for name in settings:
        if name not in known:
            raise InputError(
                f"{kind.name} has no setting {name!r} beside its budget; it has "
                f"{', '.join(sorted(known))}."
            )
    shape = model if isinstance(model, ModelShape) else sizes_of(model)

    def made(keep: int) -> Pruner | None:
        usual = kind.usual(keep, shape)
        return None if usual is None else replace(usual, **settings)  # type: ignore[type-var]

    return scheduled(made, kind.name, shape, average, visual)


def scheduled(
    set_up: Callable[[Any], Pruner | None],
    name: str,
    shape: ModelShape,
    average: int | float,
    visual: int | None = None,
    *,
    shares: bool = False,
) -> Pruner:
    """As `schedule`, for a method that is set up by a function of its budget.

    Args:
        set_up: Returns the method that leaves this many tokens; None if it needs more than a model.
        name: The method's name.
        shape: The model's sizes.
        average: As in `schedule`.
        visual: As in `schedule`.
        shares: Whether the method gets its budget as a share of `visual`, so that images of any
            size average the same share of their own tokens.

    Returns:
        The method.

    Raises:
        BudgetError: As in `schedule`.
        InputError: The method needs more than a model to be set up.
    """
    visual, layers = visual or shape.image_tokens, shape.decoder.layers
    check_keep(average)
    target = average * visual if isinstance(average, float) else average
    if target > visual:
        raise BudgetError(f"The mean cannot be {average} visual tokens, as there are {visual}.")

    def made(keep: int) -> Pruner:
        pruner = set_up(keep / visual if shares else keep)
        if pruner is None:
            raise InputError(
                f"{name} needs more than a model to be set up, so pore cannot search for a "
                "budget; make it yourself and see `counts`."
            )
        return pruner

    def mean(keep: int) -> float:
        try:
            return sum(made(keep).counts(visual, layers)) / layers
        except BudgetError:  # less than the method can leave
            return -math.inf

    keeps = range(1, visual + 1)
    above = bisect_left(keeps, target, key=mean)
    near = [keep for keep in (above, above + 1) if keep in keeps and mean(keep) > -math.inf]
    if not near or mean(near[0]) > target:
        raise _out_of_reach(name, target, made(near[0]) if near else None, visual, layers)
    return made(min(near, key=lambda keep: abs(mean(keep) - target)))


def _out_of_reach(
    name: str, target: float, least: Pruner | None, visual: int, layers: int
) -> BudgetError:
    wish = f"{name} cannot average {target:g} of {visual} visual tokens over {layers} layers"
    if least is None:
        return BudgetError(f"{wish}: with these settings no budget is possible.")
    counts = least.counts(visual, layers)
    full = counts.count(visual)
    return BudgetError(
        f"{wish}: it averages {sum(counts) / layers:.4g} at least, because {full} "
        f"layer{' sees' if full == 1 else 's see'} all of them. Let it act in earlier layers, or "
        "ask for a higher average."
    )

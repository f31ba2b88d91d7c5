"""A position bias by name, as the command line gives it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pore.bias.any_size import AnySizeBias
from pore.bias.position_bias import PositionBias
from pore.bias.profiles import available, published
from pore.calibration.reading import attention_stages
from pore.corrections.files import load_corrections
from pore.corrections.heads import HeadBiases
from pore.corrections.null_token import NullTokenPrior
from pore.corrections.without_rope import WithoutRoPE
from pore.data.prompts import processor_settings, prompt_template
from pore.data.samples import Sample
from pore.engine.corrections import Correction
from pore.engine.pruner import Pruner
from pore.errors import InputError
from pore.evaluation.batches import good_inputs
from pore.families.registry import family_of, images_of

ROPE = "rope"
"""The name of the data-free RoPE prior."""

UNCALIBRATED: Mapping[str, Correction] = {
    "without-rope": WithoutRoPE(),
    "null-token": NullTokenPrior(),
    "null-token-ratio": NullTokenPrior("ratio"),
}
"""The names of corrections that take no calibration."""

PUBLISHED = "published:"
"""What comes before the host and benchmark of a published bias."""


def load_bias(name: str) -> tuple[Any, ...]:
    """The corrections of a host's stages, from a file, the hub, or among those published.

    Args:
        name: A JSON file, a folder, a hub id, or "published:HOST/BENCHMARK".

    Returns:
        One bias for every stage; a single one where it is for any stage.

    Raises:
        PoreError: There is none by that name.
    """
    if not name.startswith(PUBLISHED):
        return load_corrections(name)
    host, slash, benchmark = name.removeprefix(PUBLISHED).partition("/")
    if not slash:
        names = ", ".join(f"{PUBLISHED}{'/'.join(pair)}" for pair in available()[:2])
        raise InputError(f"{name!r} names no published bias; names look like {names}.")
    return (published(host=host, benchmark=benchmark),)


def biases_named(
    name: str | None,
    allow: Sequence[str],
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
) -> Sequence[Correction] | None:
    """Load P by name, and check its processor and template; methods check the other conditions.

    Args:
        name: What `load_bias` takes, or "rope", or one of `UNCALIBRATED`; None for no correction.
        allow: Conditions that may differ from those under which it was measured.
        model: The model that it is for.
        processor: Its processor; None for random weights, which have none.
        samples: Some samples, from which the RoPE prior is made; without any it is the one over
            distances.

    Returns:
        One bias for every stage, or a single one for all; None without a name.

    Raises:
        PoreError: There is none by that name, or it was measured under other conditions.
    """
    if name is None:
        return None
    if name in UNCALIBRATED:
        return [UNCALIBRATED[name]]
    if name == ROPE:
        return [rope_bias(model, processor, samples) if samples else rope_at_distances(model)]
    biases = [bias.allowing(*allow) for bias in load_bias(name)]
    for bias in biases if processor is not None else ():
        # Every head of a stage was measured with the same.
        one = bias.biases[0] if isinstance(bias, HeadBiases) else bias
        one.check(processor=processor_settings(processor), template=prompt_template(processor))
    return biases


def with_and_without(pruner: Pruner, biases: Sequence[Correction] | None) -> list[Pruner]:
    """A method without P, where it can do without, and with it.

    Args:
        pruner: The method, without.
        biases: As in `reweighted`; None for the method alone.

    Raises:
        InputError: As in `reweighted`.
    """
    if biases is None:
        return [pruner]
    corrected = reweighted(pruner, biases)
    return [corrected] if pruner.always_reweighted else [pruner, corrected]


def reweighted(pruner: Pruner, biases: Sequence[Correction]) -> Pruner:
    """A method that corrects its scores.

    Args:
        pruner: The method.
        biases: One for every stage that reads attention, or a single one for all.

    Returns:
        The method, dividing by them.

    Raises:
        InputError: It does not rank by text-visual attention, or has another number of stages.
    """
    if not pruner.reweightable:
        raise InputError(
            f"{pruner.name} does not rank by text-visual attention, so there is nothing to "
            "divide by a position bias."
        )
    if len(biases) != 1 and len(biases) != (stages := len(attention_stages(pruner))):
        raise InputError(
            f"{pruner.name} ranks by attention at {stages} places, and there are biases for "
            f"{len(biases)}; calibrate for it (pore calibrate --method {pruner.name})."
        )
    # A single bias is what methods of one stage take, and the others take for all stages.
    bias = biases[0] if len(biases) == 1 else tuple(biases)
    return replace(pruner, reweight=bias)  # type: ignore[type-var]


def rope_bias(model: Any, processor: Any, samples: Sequence[Sample]) -> PositionBias | AnySizeBias:
    """The data-free prior of SparseVLM+ for a model and its prompts.

    The prior depends on the distance to the querying token. Where all images have one grid it is a
    list over its positions, for the median number of text tokens after them; otherwise it is read
    at the distance of every token.

    Args:
        model: The model, with rotary embeddings.
        processor: Its processor.
        samples: Some samples, each with an image; bad ones are skipped.

    Returns:
        The prior.

    Raises:
        PoreError: The samples have no images, or the model no rotary embedding of one base.
    """
    inputs, bad = good_inputs(model, processor, samples)
    if not inputs:
        raise InputError(f"All samples for the RoPE prior are bad: {'; '.join(bad.values())}")
    family = family_of(model)
    images = images_of(model, inputs)
    if not images:
        raise InputError("The RoPE prior needs an image in the samples; there is none.")
    if family.common_grid(model) is None:
        return rope_at_distances(model)
    # Prompts are padded on the left, so all end in the last column.
    length = inputs["input_ids"].shape[1]
    after = statistics.median_low(length - 1 - image.columns[-1] for image in images)
    return PositionBias.rope(
        len(images[0].columns), text_tokens=after, grid=images[0].grid, **_rotary(model)
    )


def rope_at_distances(model: Any) -> AnySizeBias:
    """The data-free prior of SparseVLM+ for prompts that are not known yet.

    It is read at the distance of every token to the querying one.

    Args:
        model: The model, with rotary embeddings.

    Returns:
        The prior.

    Raises:
        PoreError: The model has no rotary embedding of one base.
    """
    return AnySizeBias.rope(**_rotary(model))


def _rotary(model: Any) -> dict[str, Any]:
    """The size of a rotated head and the base of its rotation."""
    config: Any = family_of(model).decoder(model).config
    theta = (getattr(config, "rope_parameters", None) or {}).get("rope_theta")
    if theta is None:
        raise InputError(
            f"{type(config).__name__} has no `rope_theta`, which the RoPE prior needs."
        )
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {"head_dim": size, "theta": float(theta)}

"""What a method cannot do in a family, in a model or with a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from pore._compat.attention import ADDING, attention_name
from pore._compat.models import before_mlp
from pore.engine.stages import Limit, Method, Stage
from pore.errors import BudgetError, InputError, ModelStateError, UnsupportedModelError
from pore.families.base import Family
from pore.layout import Layout
from pore.tower.stages import TowerStage

Stages = Sequence[Stage | TowerStage]


# -- a family -------------------------------------------------------------------------------------


def family_limits(stages: Stages, family: Family) -> list[Limit]:
    """What these stages cannot do in a family, whatever the model.

    Args:
        stages: The stages of a method.
        family: The adapter.

    Returns:
        The limits; empty if a method with these stages works.
    """
    found = [rule(stages, family) for rule in _RULES]
    return [limit for limit in found if limit is not None]


def tower_stage(stages: Stages) -> TowerStage | None:
    """The stage in the vision tower, if there is one."""
    return next((stage for stage in stages if isinstance(stage, TowerStage)), None)


def reads_tower(stages: Stages) -> bool:
    """Whether stages read what goes through the vision tower, which then must run in the block."""
    return any(isinstance(s, TowerStage) or s.padding or s.tower for s in stages)


def _decoder_stages(stages: Stages) -> list[Stage]:
    return [stage for stage in stages if isinstance(stage, Stage)]


def _no_tower(stages: Stages, family: Family) -> Limit | None:
    if family.tower_refusal is None or not reads_tower(stages):
        return None
    return Limit(f"it reads the vision tower, but {family.tower_refusal}")


def _no_letterbox(stages: Stages, family: Family) -> Limit | None:
    if not family.packed or not any(stage.padding for stage in _decoder_stages(stages)):
        return None
    return Limit(
        "it looks for letterbox padding, but images go into the vision tower in their own shape, "
        "without any. Leave suppress_padding out."
    )


def _no_merging_in_tower(stages: Stages, family: Family) -> Limit | None:
    tower = tower_stage(stages)
    if tower is None or tower.merge is None or not (family.merged or family.packed):
        return None
    why = (
        "visual tokens are made of squares of them, on the full grid"
        if family.merged
        else "images of any size go through it in one sequence"
    )
    return Limit(
        f"it merges patches inside the vision tower, but {why}. Use a method that chooses among "
        "the tokens."
    )


def _no_merging_with_deepstack(stages: Stages, family: Family) -> Limit | None:
    misplaced = [s for s in stages if s.merges and not (isinstance(s, Stage) and s.in_place)]
    if not family.deepstack or not misplaced:
        return None
    reason = (
        "the first decoder layers add features to every visual token, which merged tokens have "
        "none of. Use a method that only drops tokens"
    )
    tower = tower_stage(stages)
    early = any(stage.layer == 0 for stage in _decoder_stages(misplaced))
    if early or (tower is not None and tower.merges):
        return Limit(f"{reason}.")
    return Limit(f"{reason}, or later layers.", "it acts after those layers")


def _no_merging_with_shared_keys(stages: Stages, family: Family) -> Limit | None:
    inside = [stage for stage in _decoder_stages(stages) if stage.layer > 0]
    if not family.shares_keys or not any(stage.merges for stage in inside):
        return None
    return Limit(
        "some decoder layers reuse the keys of earlier layers, from before tokens were merged. Use "
        "a method that only drops tokens.",
        "it acts before the layers whose keys are reused, or the model reuses none",
    )


def _no_attention_in_recurrent_layers(stages: Stages, family: Family) -> Limit | None:
    inside = [s for s in _decoder_stages(stages) if s.layer > 0 or s.reads_layer is not None]
    if family.recurrent_mixer is None or not inside:
        return None
    read = any(stage.reads_layer is not None for stage in inside)
    return Limit(
        "recurrent decoder layers have no attention, and none can be read or come first where "
        "tokens are dropped.",
        "the layers that it reads have attention"
        if read
        else "it acts after the first layer with attention",
    )


_RULES = (
    _no_tower,
    _no_letterbox,
    _no_merging_in_tower,
    _no_merging_with_deepstack,
    _no_merging_with_shared_keys,
    _no_attention_in_recurrent_layers,
)


def check_limits(method: Method, family: Family) -> None:
    """Refuse a method that a family does not take with its settings.

    Args:
        method: The method.
        family: The adapter.

    Raises:
        UnsupportedModelError: The family does not take it; the message says why.
    """
    for limit in method.limits(family):
        if limit.unless is None:
            raise UnsupportedModelError(
                f"{method.name} with these settings cannot be used in {family.name}: {limit.reason}"
            )


# -- a model --------------------------------------------------------------------------------------


def check_recurrent(method: Method, stages: Sequence[Stage], attending: Sequence[int]) -> None:
    """Refuse stages that need attention in layers of a decoder that have none.

    Args:
        method: The method.
        stages: Its stages in the decoder, and those on the embeddings that read attention.
        attending: The layers that have attention.

    Raises:
        UnsupportedModelError: A stage reads a recurrent layer, or comes before all others.
    """
    for stage in stages:
        if stage.reads_layer is not None and stage.reads_layer not in attending:
            raise UnsupportedModelError(
                f"{method.name} with these settings reads the attention of decoder layer "
                f"{stage.reads_layer}, which is recurrent and has none; the layers that have are "
                f"{', '.join(map(str, attending))}."
            )
        if 0 < stage.layer <= attending[0]:
            # The model takes the number of tokens so far from the first cache of attention.
            raise UnsupportedModelError(
                f"{method.name} drops tokens before decoder layer {stage.layer}, but the first "
                f"layer of this decoder with attention is layer {attending[0]}; drop them after "
                "it, or on the embeddings."
            )


def check_sharing(method: Method, stages: Sequence[Stage], sources: Mapping[int, int]) -> None:
    """Refuse to merge tokens if later layers look at keys that were made before the merge.

    Args:
        method: The method.
        stages: Its stages in the decoder.
        sources: For every layer that looks at keys of an earlier one, which one.

    Raises:
        UnsupportedModelError: A stage would merge so.
    """
    for stage in stages:
        if stage.merges and any(source < stage.layer for source in sources.values()):
            raise UnsupportedModelError(
                f"{method.name} merges tokens before decoder layer {stage.layer}, but from layer "
                f"{min(sources)} on layers look at keys of layer {min(sources.values())} and later "
                "ones, which merged tokens would not be among; merge before that, or use a method "
                "that only drops tokens."
            )


def check_proportional(method: Method, stages: Sequence[Stage], config: Any) -> None:
    """Refuse to count merged tokens by their sizes where attention cannot.

    Args:
        method: The method.
        stages: Its stages in the decoder and on the embeddings.
        config: The decoder's config.

    Raises:
        UnsupportedModelError: The attention kernel takes no mask that adds to logits.
        ModelStateError: A stage on the embeddings asks for it.
    """
    asking = [stage for stage in stages if stage.proportional]
    if any(stage.layer == 0 for stage in asking):
        raise ModelStateError(
            f"{method.name} asks for proportional attention of a stage on the embeddings, but the "
            "decoder makes the masks of its first layer itself; let it act before layer 1 or later."
        )
    if asking and attention_name(config) not in ADDING:
        raise UnsupportedModelError(
            f"{method.name} lets attention count merged tokens by their sizes, which adds to its "
            f"logits, and {attention_name(config)!r} takes no mask that does so; load the model "
            "with attn_implementation='sdpa', or set proportional=False."
        )


def check_before_mlp(method: Method, stages: Sequence[Stage], layers: Sequence[nn.Module]) -> None:
    """Refuse stages between attention and MLP of layers that do not have one after the other.

    Args:
        method: The method.
        stages: Its stages in the decoder.
        layers: The decoder's layers.

    Raises:
        UnsupportedModelError: A layer computes both from the same states.
    """
    for stage in stages:
        if stage.before_mlp and before_mlp(layers[stage.layer - 1]) is None:
            raise UnsupportedModelError(
                f"{method.name} acts between attention and MLP of decoder layer {stage.layer - 1}, "
                "which in this model run side by side; use a method that acts between the layers."
            )


def check_layer(layer: int, family: Family, model: nn.Module, first: int = 1) -> None:
    """Refuse a pruned layer that the decoder does not have.

    Args:
        layer: 0-based index of the first pruned layer; scores come from the layer before.
        family: The model's adapter.
        model: The model.
        first: The earliest layer allowed: 1, or 0 for methods that need no layer before.

    Raises:
        BudgetError: `layer` is not between `first` and the number of layers - 1.
    """
    count = len(family.layers(model))
    if isinstance(layer, bool) or not isinstance(layer, int) or not first <= layer < count:
        why = " (scores come from the layer before it)" if first == 1 else ""
        raise BudgetError(
            f"layer={layer!r} cannot be the first pruned layer of a decoder of {count} layers; "
            f"choose {first} to {count - 1}{why}."
        )


# -- a prompt -------------------------------------------------------------------------------------


def check_query(layout: Layout) -> None:
    """Refuse a prompt that ends with a visual token, for methods in the decoder or of a question.

    No text looks at the image there, and the answer follows a token that may be dropped on the way.

    Args:
        layout: Where the visual tokens lie.

    Raises:
        InputError: The last token of a sample with images is visual.
    """
    last = layout.last[layout.rows, None]
    at_end = ((layout.columns == last) & layout.valid).any(-1)
    if bool(at_end.any()):
        row = layout.images[int(at_end.nonzero()[0])].row
        raise InputError(
            f"The prompt of sample {row} ends with a visual token, so no text token looks at "
            "the image, and the answer would follow a token that may be dropped; put the question "
            "after the image, and pass both in one piece."
        )

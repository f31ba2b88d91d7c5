"""What a method keeps of images, as embeddings that a decoder can be given from its first layer on.

A method that ranks inside the decoder runs up to its last stage, and no further; what it keeps is
then told as the embeddings with which those tokens entered the first layer. A server that takes
image embeddings can encode them again, without a line of pore in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pore._compat.arguments import DEEPSTACK_WHAT
from pore.engine.pruner import Pruner
from pore.engine.run import Run
from pore.engine.stages import Limit, Selection, Stage, View
from pore.errors import UnsupportedModelError
from pore.families.base import Family
from pore.families.registry import images_of
from pore.layout import Layout
from pore.tower.stages import TowerStage


@dataclass(frozen=True)
class KeptEmbeddings:
    """What a method keeps of one image.

    Attributes:
        row: The sample of the batch that the image belongs to.
        index: Which image of that sample it is, from 0.
        seen: Visual tokens that it came with.
        kept: (k,) which of them each embedding stands for, in raster order; -1 for one that stands
            for no single patch, as the end of a row or a token merged from the rest.
        embeddings: (k, D) of what is kept, in the order of the prompt, as they enter the first
            decoder layer.
        grid: (height, width) of the image in tokens; None where they lie on no single grid.
        added: (k, D) each: what the first decoder layers add to what is kept (DeepStack), layer by
            layer; empty in a family without.
    """

    row: int
    index: int
    seen: int
    kept: tuple[int, ...]
    embeddings: Tensor
    grid: tuple[int, int] | None
    added: tuple[Tensor, ...] = ()


def last_layer(pruner: Pruner) -> int:
    """The decoder layer before which a method has decided all; 0 where it needs no layer."""
    return max((s.layer for s in pruner.stages() if isinstance(s, Stage)), default=0)


def check_embeddable(pruner: Pruner) -> None:
    """Refuse a method whose result is not a choice among the embeddings.

    Args:
        pruner: The method.

    Raises:
        UnsupportedModelError: It makes new states inside the decoder.
    """
    if any(isinstance(s, Stage) and s.layer > 0 and s.merges for s in pruner.stages()):
        raise UnsupportedModelError(
            f"{pruner.name} makes new states of several tokens inside the decoder, which are no "
            "embeddings, so they cannot be encoded again; use a method that only drops tokens "
            "there, or the exact mode in transformers (mode='in_llm')."
        )


@torch.inference_mode()
def kept_embeddings(
    model: nn.Module, inputs: Mapping[str, Any], pruner: Pruner
) -> list[KeptEmbeddings]:
    """Run a method up to its last stage, and tell what it keeps.

    Layers from that stage on do not run and need not exist, nor do the norm and the head.

    Args:
        model: A supported model that is not pruned; it is left as it was. It may have fewer decoder
            layers than its checkpoint, see `pore.data.loading.load_model`.
        inputs: The processor's output, on the model's device.
        pruner: The method.

    Returns:
        One entry for every image, by sample and then by place; empty where there is none.

    Raises:
        PoreError: The method does not fit the model or the inputs, or what it keeps is no choice
            among embeddings.
    """
    check_embeddable(pruner)
    if not images_of(model, inputs):
        return []
    deciding = _Deciding(pruner)
    run = Run(deciding, model, history=1)
    with _features_noted(run.family.decoder(model)) as features, run, suppress(_Decided):
        run.family.base(model)(**inputs, use_cache=False)
    assert deciding.view is not None
    return _with_features(_told(deciding.view), features)


@contextmanager
def _features_noted(decoder: nn.Module) -> Iterator[list[Tensor]]:
    """Gives a list that holds (V, D) features of all visual tokens once the decoder is called."""
    found: list[Tensor] = []

    def note(_: nn.Module, __: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        found[:] = kwargs.get(DEEPSTACK_WHAT) or ()

    hook = decoder.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield found
    finally:
        hook.remove()


def _with_features(
    images: list[KeptEmbeddings], features: Sequence[Tensor]
) -> list[KeptEmbeddings]:
    """What is kept, with those of all features that belong to it."""
    if not features:
        return images
    found, first = [], 0
    for image in images:
        rows = torch.tensor(image.kept, device=features[0].device) + first
        found.append(replace(image, added=tuple(one[rows] for one in features)))
        first += image.seen
    return found


class _Decided(Exception):
    """Leaves a forward once the last stage has acted."""


class _Deciding(Pruner):
    """A method with a last stage that looks at what is left, and ends the forward."""

    def __init__(self, pruner: Pruner) -> None:
        self._pruner = pruner
        self.seed = int(getattr(pruner, "seed", 0))
        self.view: View | None = None

    @property
    def name(self) -> str:  # type: ignore[override] # no string, so that it is not registered
        return self._pruner.name

    def stages(self) -> Sequence[Stage | TowerStage]:
        layer = last_layer(self._pruner)
        look = Stage(layer, self._look, earlier=0 if layer else None)
        return [*map(self._checked, self._pruner.stages()), look]

    def limits(self, family: Family) -> list[Limit]:
        return self._pruner.limits(family)

    def check(self, model: nn.Module, family: Family) -> None:
        self._pruner.check(model, family)

    def _checked(self, stage: Stage | TowerStage) -> Stage | TowerStage:
        if isinstance(stage, TowerStage):
            return stage
        return replace(stage, rule=partial(self._without_text, stage.rule))

    def _without_text(self, rule: Callable[[View], Selection], view: View) -> Selection:
        selection = rule(view)
        if selection.others is not None:
            raise UnsupportedModelError(
                f"{self.name} with these settings also drops text, which whoever encodes the "
                "images again does not know; use settings that drop visual tokens alone."
            )
        return selection

    def _look(self, view: View) -> Selection:
        self.view = view
        raise _Decided


def _told(view: View) -> list[KeptEmbeddings]:
    """What is left, from the view of a stage after the last."""
    layout, states = view.layout, view.earlier
    states = view.hidden_states if states is None else states
    found = []
    for i, image in enumerate(layout.images):
        visual, raster = layout.columns[i, layout.valid[i]], layout.raster[i, layout.valid[i]]
        columns = torch.cat([visual, _structure(layout, i)])
        kept = nn.functional.pad(raster, (0, len(columns) - len(raster)), value=-1)
        order = columns.argsort()
        found.append(
            KeptEmbeddings(
                image.row,
                image.index,
                image.count,
                tuple(kept[order].tolist()),
                states[image.row, columns[order]].clone(),
                image.grid,
            )
        )
    return found


def _structure(layout: Layout, i: int) -> Tensor:
    """(s,) columns of the tokens of an image that show no patch, as the end of a row.

    A method keeps all of an image or none, and they stay in order.
    """
    row = layout.images[i].row
    others = layout.tokens[row] & ~layout.text[row]
    others[layout.columns[layout.rows == row][layout.valid[layout.rows == row]]] = False
    columns = others.nonzero()[:, 0]
    counts = [len(image.structure) for image in layout.images if image.row == row]
    if not len(columns):
        return columns
    if len(columns) != sum(counts):
        raise UnsupportedModelError(
            f"The images of sample {row} were left with and without the ends of their rows, so "
            "nothing tells which are whose; give the prompt one image."
        )
    return torch.split(columns, counts)[layout.images[i].index]

"""A method that notes what its stages see and choose."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from helpers.models import IMAGE
from pore.engine.pruner import Pruner
from pore.engine.stages import Stage
from pore.tower.stages import TowerStage


class Seen(NamedTuple):
    """What the rule of a stage saw and chose."""

    number: int
    view: Any
    selection: Any


class Recording(Pruner):
    """A method whose stages note what they see and choose; `replays` makes the choices again.

    Choices in the vision tower are not replayed: it does not see the tokens of the answer.
    """

    def __init__(self, method: Pruner) -> None:
        self.method = method
        self.seen: list[Seen] = []
        self.replays = False

    @property
    def name(self) -> str:  # type: ignore[override] # no string, so that it is not registered
        return self.method.name

    def stages(self) -> list[Stage | TowerStage]:
        return [self._noted(i, stage) for i, stage in enumerate(self.method.stages())]

    def stages_in(self, depth: int) -> list[Stage | TowerStage]:
        return [self._noted(i, stage) for i, stage in enumerate(self.method.stages_in(depth))]

    def _noted(self, number: int, stage: Stage | TowerStage) -> Stage | TowerStage:
        if self.replays and isinstance(stage, Stage):
            made = [seen.selection for seen in self.seen if seen.number == number]
            idle = None if made else lambda _: True
            rule = partial(lambda made, _: made[-1], made)
            return replace(stage, rule=rule, attention=None, prepare=None, idle=idle)
        return replace(stage, rule=partial(self._note, number, stage.rule))

    def _note(self, number: int, rule: Any, view: Any) -> Any:
        self.seen.append(Seen(number, view, rule(view)))
        return self.seen[-1].selection


def decoded_and_whole(
    model: Any, inputs: dict[str, Tensor], method: Pruner
) -> tuple[Tensor, Tensor]:
    """Logits of a LLaVA's answer of 5 tokens, with prompts padded on the left.

    Returns:
        (B, 5, V) float32, as `generate` decodes them from its cache; and (B, 5, V) of one forward
        of prompt and answer without a cache, in which the same tokens are dropped.
    """
    recording = Recording(method)
    with torch.no_grad(), recording(model):
        out = model.generate(
            **inputs,
            max_new_tokens=5,
            do_sample=False,
            suppress_tokens=[IMAGE],
            output_logits=True,
            return_dict_in_generate=True,
        )
    recording.replays = True
    mask = nn.functional.pad(inputs["attention_mask"], (0, 4), value=1)
    full = dict(inputs, input_ids=out.sequences[:, :-1], attention_mask=mask)
    full["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad(), recording(model):
        logits = model(**full, use_cache=False).logits[:, -5:]
    return torch.stack(out.logits, 1), logits.float()

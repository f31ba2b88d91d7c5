"""The stages of the training: what each of them trains, its loss and its reports."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import measure
import torch
from corpus import TextStage
from grounding import Grounding
from lexicon import Lexicon
from model import hidden, visual_features
from moving import report as video_report
from moving import video_batch, video_features
from tokenizers import Tokenizer
from torch import Tensor, distributed, nn
from torch.nn import functional
from transformers import LlavaForConditionalGeneration
from visual import VisualBatch, instruction_batch, question_batch

from pore.embedded import embedded_model
from tower import TowerHeads, tower_batch


@dataclass(frozen=True)
class Shard:
    """One of several processes that share every batch.

    On a machine with other work, single-threaded processes that meet once in every step are far
    faster than threads that meet at every operation.
    """

    rank: int
    world: int

    def part(self, first: int, size: int) -> tuple[int, int]:
        """First index and size of this process's part of ``size`` samples from ``first`` on."""
        return first + self.rank * (size // self.world), size // self.world

    def average(self, parameters: list[nn.Parameter]) -> None:
        """Average the gradients over the processes."""
        if self.world == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        distributed.all_reduce(flat)
        pieces = torch.split(flat / self.world, [g.numel() for g in gradients])
        for gradient, piece in zip(gradients, pieces, strict=True):
            gradient.copy_(piece.view_as(gradient))


class Stage:
    """One stage of training: what is trained, on what, for how long."""

    name: str
    before: str | None
    """The stage whose weights this one starts from."""
    steps: int
    rate: float
    report_every: int
    hold = 0.0
    """Share of the steps after which the learning rate falls."""

    def __init__(
        self, model: LlavaForConditionalGeneration, tokenizer: Tokenizer, shard: Shard
    ) -> None:
        """Prepare the data.

        Args:
            model: The model to train.
            tokenizer: Its tokenizer.
            shard: Which part of every batch this process works on.
        """
        self.model, self.tokenizer, self.shard = model, tokenizer, shard

    def groups(self) -> list[tuple[float, Iterable[nn.Parameter]]]:
        """Trained parameters in groups, each with its share of the learning rate."""
        raise NotImplementedError

    def weights_before(self, out: Path) -> dict[str, Tensor]:
        """The weights that the stage before left in the folder of the training state."""
        weights: dict[str, Tensor] = torch.load(out / f"{self.before}.pt", weights_only=True)[
            "model"
        ]
        return weights

    def extra(self) -> nn.Module | None:
        """A module that is trained as well and kept in the stage's state, not in the model."""
        return None

    def loss(self, step: int) -> Tensor:
        """Loss of one step; the step's number decides the batch."""
        raise NotImplementedError

    def report(self) -> dict[str, object]:
        """What is measured every `report_every` steps."""
        raise NotImplementedError


class Text(Stage):
    """The decoder becomes a language model, on English and on scenes told in words."""

    name, before, steps, rate, report_every = "text", None, 720, 3e-3, 200
    batch, length = 24, 320

    def __init__(
        self, model: LlavaForConditionalGeneration, tokenizer: Tokenizer, shard: Shard
    ) -> None:
        super().__init__(model, tokenizer, shard)
        self.data = TextStage(tokenizer, self.length)

    def groups(self) -> list[tuple[float, Iterable[nn.Parameter]]]:
        return [(1.0, [*self.model.model.language_model.parameters(), self.model.lm_head.weight])]

    def loss(self, step: int) -> Tensor:
        objects = (1, 3) if step < 250 else (2, 6) if step < 450 else (4, 10)
        return text_loss(self.model, self.data, step, self.batch, objects, self.shard)

    def report(self) -> dict[str, object]:
        return measure.text_report(self.model, self.tokenizer, self.data)


class Tower(Stage):
    """The tower learns what covers each patch, and what is in the image."""

    name, before, steps, rate, report_every = "tower", "text", 1800, 2e-3, 200
    batch = 32

    def __init__(
        self, model: LlavaForConditionalGeneration, tokenizer: Tokenizer, shard: Shard
    ) -> None:
        super().__init__(model, tokenizer, shard)
        self.heads = TowerHeads(model.config.vision_config.hidden_size)

    def groups(self) -> list[tuple[float, Iterable[nn.Parameter]]]:
        return [(1.0, [*self.model.model.vision_tower.parameters(), *self.heads.parameters()])]

    def extra(self) -> nn.Module:
        return self.heads

    def loss(self, step: int) -> Tensor:
        images, labels = tower_batch("train", *self.shard.part(step * self.batch, self.batch))
        return self.heads.loss(self.model.model.vision_tower, images, labels)

    def report(self) -> dict[str, object]:
        return self.heads.accuracy(self.model.model.vision_tower)


class Align(Stage):
    """The projector learns the frozen decoder's words for what the patches show."""

    name, before, steps, rate, report_every = "align", "tower", 200, 3e-3, 100
    batch = 24

    def __init__(
        self, model: LlavaForConditionalGeneration, tokenizer: Tokenizer, shard: Shard
    ) -> None:
        super().__init__(model, tokenizer, shard)
        self.lexicon: Lexicon | None = None

    def groups(self) -> list[tuple[float, Iterable[nn.Parameter]]]:
        return [(1.0, self.model.model.multi_modal_projector.parameters())]

    def loss(self, step: int) -> Tensor:
        if self.lexicon is None:  # only now are the weights of the stage before in place
            self.lexicon = Lexicon(self.model, self.tokenizer)
        part = self.shard.part(3_000_000 + step * self.batch, self.batch)
        images, labels = tower_batch("train", *part)
        features = visual_features(self.model, images)
        return self.lexicon.loss(self.model.model.multi_modal_projector(features), labels)

    def report(self) -> dict[str, object]:
        return measure.visual_report(self.model, self.tokenizer, 210)


class Tune(Stage):
    """Visual instruction tuning: projector and upper decoder layers, some text in the mix."""

    name, before, steps, rate, report_every = "tune", "align", 1600, 3e-3, 200
    batch, text_batch, text_every = 24, 12, 10
    hold = 0.7
    frozen_layers = 2
    grounded_layer = 4

    def __init__(
        self, model: LlavaForConditionalGeneration, tokenizer: Tokenizer, shard: Shard
    ) -> None:
        super().__init__(model, tokenizer, shard)
        self.data = TextStage(tokenizer, Text.length)
        self.grounding = Grounding(model, self.grounded_layer)

    def groups(self) -> list[tuple[float, Iterable[nn.Parameter]]]:
        decoder = self.model.model.language_model
        upper = [p for layer in decoder.layers[self.frozen_layers :] for p in layer.parameters()]
        return [
            (0.3, self.model.model.multi_modal_projector.parameters()),
            (1.0, [*upper, *decoder.norm.parameters(), self.model.lm_head.weight]),
        ]

    def loss(self, step: int) -> Tensor:
        if step % self.text_every == self.text_every - 1:
            return text_loss(
                self.model, self.data, 10_000 + step, self.text_batch, (4, 10), self.shard
            )
        objects = (
            (1, 3) if step < 60 else (2, 6) if step < 400 else (3, 8) if step < 700 else (4, 10)
        )
        part = self.shard.part(6_000_000 + step * self.batch, self.batch)
        make = instruction_batch if step % 4 == 0 else question_batch
        batch = make(self.tokenizer, "train", *part, objects)
        weight = 0.5 * min(1.0, max(0.0, (0.9 - step / self.steps) / 0.3))
        loss = answer_loss(self.model, batch, visual_features(self.model, batch.images))
        return loss + weight * self.grounding.loss(batch, measure.FIRST_VISUAL)

    def report(self) -> dict[str, object]:
        return measure.visual_report(self.model, self.tokenizer, 700)


class Count(Tune):
    """More of the same with many questions about counts, where the model is shown what to count."""

    name, before, steps, rate, report_every = "count", "tune", 700, 2e-3, 100
    hold = 0.5
    extra_questions: ClassVar = {"count": 9, "relation": 2, "reading": 1}

    def loss(self, step: int) -> Tensor:
        if step % self.text_every == self.text_every - 1:
            return text_loss(
                self.model, self.data, 20_000 + step, self.text_batch, (4, 10), self.shard
            )
        first, size = self.shard.part(8_000_000 + step * self.batch, self.batch)
        batch = question_batch(
            self.tokenizer, "train", first, size, (4, 10), extra=self.extra_questions
        )
        loss = answer_loss(self.model, batch, visual_features(self.model, batch.images))
        weight = 0.5 * min(1.0, max(0.0, (0.9 - step / self.steps) / 0.4))
        counting = self.grounding.counting_loss(batch, measure.FIRST_VISUAL)
        return loss + weight * (self.grounding.loss(batch, measure.FIRST_VISUAL) + counting)


class Videos(Tune):
    """The model learns from videos, of which it gets the tower's patches two by two.

    It starts from the shipped weights where the stage before was not run here.
    """

    name, before, steps, rate, report_every = "videos", "count", 400, 2e-3, 50
    batch, hold = 16, 0.5

    def __init__(
        self, model: LlavaForConditionalGeneration, tokenizer: Tokenizer, shard: Shard
    ) -> None:
        Stage.__init__(self, model, tokenizer, shard)
        self.grounding = Grounding(model, self.grounded_layer)

    def weights_before(self, out: Path) -> dict[str, Tensor]:
        if (out / f"{self.before}.pt").exists():
            return super().weights_before(out)
        shipped = LlavaForConditionalGeneration.from_pretrained(embedded_model())
        weights: dict[str, Tensor] = shipped.state_dict()
        return weights

    def loss(self, step: int) -> Tensor:
        first, size = self.shard.part(10_000_000 + step * self.batch, self.batch)
        batch = video_batch(self.tokenizer, "train", first, size)
        weight = 0.5 * min(1.0, max(0.0, (0.9 - step / self.steps) / 0.4))
        loss = answer_loss(self.model, batch, video_features(self.model, batch.images))
        counting = self.grounding.counting_loss(batch, measure.FIRST_VISUAL)
        return loss + weight * (self.grounding.loss(batch, measure.FIRST_VISUAL) + counting)

    def report(self) -> dict[str, object]:
        return video_report(self.model, self.tokenizer, 240)


STAGES: dict[str, type[Stage]] = {s.name: s for s in (Text, Tower, Align, Tune, Count, Videos)}


def text_loss(
    model: LlavaForConditionalGeneration,
    data: TextStage,
    step: int,
    size: int,
    objects: tuple[int, int],
    shard: Shard,
) -> Tensor:
    """Weighted next-token loss of this process's rows of a text batch."""
    mine = slice(shard.rank, None, shard.world)
    rows, row_weights = (array[mine] for array in data.batch(step, size, objects))
    ids, weights = torch.from_numpy(rows), torch.from_numpy(row_weights)[:, 1:]
    logits = model.lm_head(hidden(model, ids)[:, :-1]).flatten(0, 1).float()
    losses = functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum()


def answer_loss(
    model: LlavaForConditionalGeneration, batch: VisualBatch, features: Tensor
) -> Tensor:
    """Next-token loss of the answers about pictures or videos, of which ``features`` are given."""
    states = hidden(model, batch.ids, features, batch.mask, batch.positions)
    answered = batch.targets >= 0
    logits = model.lm_head(states[answered]).float()
    return functional.cross_entropy(logits, batch.targets[answered])

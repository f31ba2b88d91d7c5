"""Train the embedded model, stage by stage, as LLaVA was built.

    python training/train.py --out STATE --stage text    # 1. the decoder becomes a language model
    python training/train.py --out STATE --stage tower   # 2. the tower learns to see
    python training/train.py --out STATE --stage align   # 3. the projector, on captions
    python training/train.py --out STATE --stage tune    # 4. visual instruction tuning
    python training/train.py --out STATE --stage count   # 5. the same, mostly counting
    python training/export.py --state STATE/count.pt     # the checkpoint folder

``--stage all`` runs the five one after another. A stage writes ``STATE/<stage>.pt`` every two
minutes and takes up from there; batches depend on the step's number alone, so that an interrupted
run sees what an uninterrupted one would have seen. ``STATE/log.jsonl`` gets a line per report.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import measure
import numpy as np
import torch
from corpus import TextStage, train_tokenizer
from grounding import Grounding
from lexicon import Lexicon
from model import build, hidden, visual_features
from tokenizers import Tokenizer
from torch import Tensor, distributed, nn
from torch.multiprocessing.spawn import spawn
from torch.nn import functional
from transformers import LlavaForConditionalGeneration
from visual import VisualBatch, instruction_batch, question_batch

from tower import TowerHeads, tower_batch

SAVE_EVERY = 120.0
"""Seconds between checkpoints."""


@dataclass(frozen=True)
class Shard:
    """One of several processes that share every batch.

    On a machine with other work, processes of one thread each that meet once a step are far faster
    than threads that meet at every operation.
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

    def extra(self) -> nn.Module | None:
        """A module that is trained along and kept in the stage's state, not in the model."""
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
        loss = answer_loss(self.model, batch)
        return loss + weight * self.grounding.loss(batch, measure.FIRST_VISUAL)

    def report(self) -> dict[str, object]:
        return measure.visual_report(self.model, self.tokenizer, 700)


class Count(Tune):
    """More of the same with many questions of how many, whose counting is shown to the model."""

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
        loss = answer_loss(self.model, batch)
        weight = 0.5 * min(1.0, max(0.0, (0.9 - step / self.steps) / 0.4))
        counting = self.grounding.counting_loss(batch, measure.FIRST_VISUAL)
        return loss + weight * (self.grounding.loss(batch, measure.FIRST_VISUAL) + counting)


STAGES: dict[str, type[Stage]] = {s.name: s for s in (Text, Tower, Align, Tune, Count)}


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


def answer_loss(model: LlavaForConditionalGeneration, batch: VisualBatch) -> Tensor:
    """Next-token loss of the answers about pictures."""
    features = visual_features(model, batch.images)
    states = hidden(model, batch.ids, features, batch.mask, batch.positions)
    answered = batch.targets >= 0
    logits = model.lm_head(states[answered]).float()
    return functional.cross_entropy(logits, batch.targets[answered])


def optimizers(stage: Stage) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for everything else."""
    outer = {stage.model.get_input_embeddings().weight, stage.model.lm_head.weight}
    matrices, others = [], []
    for share, parameters in stage.groups():
        rate, kept = stage.rate * share, list(parameters)
        inner = [p for p in kept if p.ndim == 2 and p not in outer and min(p.shape) > 32]
        outside = [p for p in kept if not any(p is q for q in inner)]
        matrices.append({"params": inner, "lr": rate, "base": rate})
        others.append({"params": outside, "lr": rate, "base": rate})
    return [
        torch.optim.Muon(
            [g for g in matrices if g["params"]],
            weight_decay=0.05,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW([g for g in others if g["params"]], weight_decay=0.0, betas=(0.9, 0.98)),
    ]


def schedule(step: int, steps: int, hold: float) -> float:
    """Share of the learning rate: 40 steps of warm-up, a plateau, cosine down to a fiftieth.

    Args:
        step: Number of the step.
        steps: How many there will be.
        hold: Share of the steps after which the rate falls.
    """
    if step < 40:
        return (step + 1) / 40
    fallen = max(step / steps - hold, 0.0) / (1 - hold)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * fallen))


def save(path: Path, state: dict[str, object]) -> None:
    """Write a checkpoint whole or not at all."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def run(name: str, out: Path, steps: int | None, tokenizer: Tokenizer, shard: Shard) -> None:
    """Run one stage, or the rest of it. The process of rank 0 reports and saves."""
    torch.manual_seed(0)
    model = build(tokenizer)
    stage = STAGES[name](model, tokenizer, shard)
    steps = steps or stage.steps
    model.requires_grad_(False)
    trained = [p for _, group in stage.groups() for p in group]
    for p in trained:
        p.requires_grad_(True)
    optimizer = optimizers(stage)
    extra = stage.extra()
    path, start, spent = out / f"{name}.pt", 0, 0.0
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        for opt, saved in zip(optimizer, state["optimizers"], strict=True):
            opt.load_state_dict(saved)
        if extra is not None:
            extra.load_state_dict(state["extra"])
        start, spent = state["step"], state["seconds"]
    elif stage.before:
        before = torch.load(out / f"{stage.before}.pt", weights_only=True)
        model.load_state_dict(before["model"])

    began, saved_at, recent = time.monotonic() - spent, time.monotonic(), []
    for step in range(start, steps):
        for opt in optimizer:
            for group in opt.param_groups:
                group["lr"] = group["base"] * schedule(step, steps, stage.hold)
        model.train()
        with torch.autocast("cpu", torch.bfloat16):
            loss = stage.loss(step)
        torch.autograd.backward(loss)
        shard.average(trained)
        norm = nn.utils.clip_grad_norm_(trained, 1.0)
        for opt in optimizer:
            opt.step()
            opt.zero_grad(set_to_none=True)
        recent.append(loss.item())
        done = step + 1
        if shard.rank > 0:
            continue
        if done % 10 == 0:
            seconds = time.monotonic() - began
            print(
                f"{name} {done}/{steps} loss {np.mean(recent[-10:]):.4f} norm {norm:.2f} "
                f"{seconds:.0f} s",
                flush=True,
            )
        if done % stage.report_every == 0 or done == steps:
            model.eval()
            with torch.no_grad():
                found = stage.report()
            line = {
                "stage": name,
                "step": done,
                "seconds": round(time.monotonic() - began),
                "loss": round(float(np.mean(recent[-stage.report_every :])), 4),
                **found,
            }
            print(json.dumps(line), flush=True)
            with (out / "log.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
        if done == steps or time.monotonic() - saved_at > SAVE_EVERY:
            state = {
                "model": model.state_dict(),
                "optimizers": [opt.state_dict() for opt in optimizer],
                "extra": extra.state_dict() if extra is not None else {},
                "step": done,
                "seconds": time.monotonic() - began,
            }
            save(path, state)
            saved_at = time.monotonic()


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the training state")
    parser.add_argument("--stage", choices=[*STAGES, "all"], default="all")
    parser.add_argument("--steps", type=int, help="number of steps, instead of the stage's own")
    parser.add_argument("--processes", type=int, default=2, help="of one thread each")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "meeting").unlink(missing_ok=True)
    path = arguments.out / "tokenizer.json"
    if not path.exists():
        train_tokenizer().save(str(path))
    names = list(STAGES) if arguments.stage == "all" else [arguments.stage]
    spawn(  # type: ignore[no-untyped-call]
        work,
        (arguments.processes, names, arguments.out, arguments.steps),
        nprocs=arguments.processes,
    )


def work(rank: int, world: int, names: list[str], out: Path, steps: int | None) -> None:
    """What each process does: all stages asked for, on its part of every batch."""
    torch.set_num_threads(1)
    meeting = out.resolve() / "meeting"
    distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world
    )
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    for name in names:
        run(name, out, steps, tokenizer, Shard(rank, world))
        distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()

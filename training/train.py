"""Train the embedded model, stage by stage, as LLaVA was built.

    python training/train.py --out STATE --stage text    # 1. the decoder becomes a language model
    python training/train.py --out STATE --stage tower   # 2. the tower learns to see
    python training/train.py --out STATE --stage align   # 3. the projector, on captions
    python training/train.py --out STATE --stage tune    # 4. visual instruction tuning
    python training/train.py --out STATE --stage count   # 5. the same, mostly counting
    python training/export.py --state STATE/count.pt     # the checkpoint folder
    python training/train.py --out STATE --stage videos  # 6. the same on videos, for another model
    python training/export.py --state STATE/videos.pt --videos

``--stage all`` runs all of them, one after another. A stage writes ``STATE/<stage>.pt`` every two
minutes and continues from there; batches depend only on the step's number, so an interrupted run
sees the same batches as an uninterrupted one. ``STATE/log.jsonl`` gets a line per report.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from corpus import train_tokenizer
from model import build
from stages import STAGES, Shard, Stage
from tokenizers import Tokenizer
from torch import distributed, nn
from torch.multiprocessing.spawn import spawn

from pore.embedded import embedded_model

SAVE_EVERY = 120.0
"""Seconds between checkpoints."""


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


class Training:
    """One stage of the training, or the rest of it.

    Args:
        name: The stage.
        out: Folder of the training state.
        steps: Number of steps; None is the stage's own.
        tokenizer: The model's.
        shard: Which of the processes this is; the one of rank 0 reports and saves.
    """

    def __init__(
        self, name: str, out: Path, steps: int | None, tokenizer: Tokenizer, shard: Shard
    ) -> None:
        torch.manual_seed(0)
        self.name, self.out, self.shard = name, out, shard
        self.model = build(tokenizer)
        self.stage = STAGES[name](self.model, tokenizer, shard)
        self.steps = steps or self.stage.steps
        self.model.requires_grad_(False)
        self.trained = [p for _, group in self.stage.groups() for p in group]
        for p in self.trained:
            p.requires_grad_(True)
        self.optimizers = optimizers(self.stage)
        self.extra = self.stage.extra()
        self.path, self.start, spent = out / f"{name}.pt", 0, 0.0
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            self.model.load_state_dict(state["model"])
            for opt, saved in zip(self.optimizers, state["optimizers"], strict=True):
                opt.load_state_dict(saved)
            if self.extra is not None:
                self.extra.load_state_dict(state["extra"])
            self.start, spent = state["step"], state["seconds"]
        elif self.stage.before:
            self.model.load_state_dict(self.stage.weights_before(out))
        self.began = time.monotonic() - spent

    def run(self) -> None:
        """Train to the end, reporting and saving on the way."""
        saved_at, recent = time.monotonic(), []
        for step in range(self.start, self.steps):
            loss, norm = self.step(step)
            recent.append(loss)
            done = step + 1
            if self.shard.rank > 0:
                continue
            if done % 10 == 0:
                seconds = time.monotonic() - self.began
                print(
                    f"{self.name} {done}/{self.steps} loss {np.mean(recent[-10:]):.4f} "
                    f"norm {norm:.2f} {seconds:.0f} s",
                    flush=True,
                )
            if done % self.stage.report_every == 0 or done == self.steps:
                self.report(done, float(np.mean(recent[-self.stage.report_every :])))
            if done == self.steps or time.monotonic() - saved_at > SAVE_EVERY:
                self.save(done)
                saved_at = time.monotonic()

    def step(self, step: int) -> tuple[float, float]:
        """One step of all optimizers.

        Returns:
            The loss, and the norm of the gradients before they were clipped.
        """
        for opt in self.optimizers:
            for group in opt.param_groups:
                group["lr"] = group["base"] * schedule(step, self.steps, self.stage.hold)
        self.model.train()
        with torch.autocast("cpu", torch.bfloat16):
            loss = self.stage.loss(step)
        torch.autograd.backward(loss)
        self.shard.average(self.trained)
        norm = nn.utils.clip_grad_norm_(self.trained, 1.0)
        for opt in self.optimizers:
            opt.step()
            opt.zero_grad(set_to_none=True)
        return loss.item(), float(norm)

    def report(self, done: int, loss: float) -> None:
        """Measure, print and log."""
        self.model.eval()
        with torch.no_grad():
            found = self.stage.report()
        line = {
            "stage": self.name,
            "step": done,
            "seconds": round(time.monotonic() - self.began),
            "loss": round(loss, 4),
            **found,
        }
        print(json.dumps(line), flush=True)
        with (self.out / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")

    def save(self, done: int) -> None:
        """Write the state of the training, whole or not at all."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [opt.state_dict() for opt in self.optimizers],
            "extra": self.extra.state_dict() if self.extra is not None else {},
            "step": done,
            "seconds": time.monotonic() - self.began,
        }
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.path)


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
        shipped = arguments.stage == "videos"
        tokenizer = of_shipped() if shipped else train_tokenizer()
        tokenizer.save(str(path))
    names = list(STAGES) if arguments.stage == "all" else [arguments.stage]
    spawn(  # type: ignore[no-untyped-call]
        work,
        (arguments.processes, names, arguments.out, arguments.steps),
        nprocs=arguments.processes,
    )


def of_shipped() -> Tokenizer:
    """The tokenizer of the shipped weights, from which the stage on videos starts by itself."""
    return Tokenizer.from_file(str(Path(embedded_model()) / "tokenizer.json"))


def work(rank: int, world: int, names: list[str], out: Path, steps: int | None) -> None:
    """What each process does: all stages asked for, on its part of every batch."""
    torch.set_num_threads(1)
    meeting = out.resolve() / "meeting"
    distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world
    )
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    for name in names:
        Training(name, out, steps, tokenizer, Shard(rank, world)).run()
        distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()

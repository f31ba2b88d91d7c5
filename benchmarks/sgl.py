"""PoRe on SGL: the embedded model guided by itself, with P and without.

    python benchmarks/sgl.py --questions 2100 --out benchmarks/results/embedded-2100-sgl.json

`pore evaluate --all` leaves SGL out, because a guide belongs to one batch. There is no smaller one
of the embedded model's family, so it is its own guide: this shows what P does to the ranking,
not what SGL saves. P is fitted to the mean of `guide.importance` over calibration questions.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

import pore
from pore.embedded import embedded_model
from pore.embedded.scenes import THIRDS
from pore.evaluation.answers import is_right
from pore.evaluation.statistics import paired, wilson
from pore.prompts import build_inputs
from pore.samples import load_samples

BATCH, ANSWER = 32, 8
KEEPS = (48, 32, 16)
LAYER = 3
"""int(0.4 * 8): the authors' share of the depth."""


def main() -> None:
    """Measure, fit, ask, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=2100)
    parser.add_argument("--calibration", type=int, default=700)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    folder = embedded_model()
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)

    def batches(split: str, n: int) -> Iterator[tuple[list[pore.Sample], Any, Any]]:
        samples = list(load_samples(f"embedded:{split}", limit=n))
        for first in range(0, n, BATCH):
            part = samples[first : first + BATCH]
            inputs = build_inputs(processor, part, torch.device("cpu"), torch.float32)
            yield part, inputs, pore.guide(model, inputs, max_new_tokens=ANSWER)

    total, count = torch.zeros(144, dtype=torch.float64), 0
    for _, _, guide in batches("calibration", arguments.calibration):
        total += guide.importance.double().sum(0)
        count += len(guide.importance)
    bias = pore.PositionBias.fit(total / count, provenance=guide.provenance, grid=(12, 12))
    print(bias)

    right: dict[tuple[int, bool], list[bool]] = {}
    thirds: list[str | None] = []
    for part, inputs, guide in batches("test", arguments.questions):
        thirds += [sample.third for sample in part]
        for keep in KEEPS:
            for reweight in (None, bias):
                pruner = pore.SGL(keep, layer=LAYER, guide=guide, reweight=reweight)
                with torch.inference_mode(), pruner(model):
                    tokens = model.generate(**inputs, max_new_tokens=ANSWER, do_sample=False)
                new = tokens[:, inputs["input_ids"].shape[1] :]
                given = processor.batch_decode(new, skip_special_tokens=True)
                found = right.setdefault((keep, reweight is not None), [])
                found += [
                    is_right(text, str(sample.answer))
                    for text, sample in zip(given, part, strict=True)
                ]

    records = []
    for keep in KEEPS:
        plain, divided = right[keep, False], right[keep, True]
        for name in ("all", *THIRDS):
            chosen = [i for i, third in enumerate(thirds) if name in ("all", third)]
            one, other = [plain[i] for i in chosen], [divided[i] for i in chosen]
            difference = paired(one, other, seed=0)
            records.append(
                {
                    "keep": keep,
                    "questions": name,
                    "n": len(chosen),
                    "sgl": sum(one) / len(one),
                    "sgl_ci": wilson(sum(one), len(one)),
                    "sgl_pore": sum(other) / len(other),
                    "sgl_pore_ci": wilson(sum(other), len(other)),
                    "points": 100 * difference.difference,
                    "paired": asdict(difference),
                }
            )
    result = {
        "model": "embedded, guided by itself",
        "layer": LAYER,
        "calibration": arguments.calibration,
        "P": {"last_over_first": float(bias.from_first[-1]), "r2": bias.r2, "kind": bias.kind},
        "results": records,
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    for record in records:
        print(record)


if __name__ == "__main__":
    main()

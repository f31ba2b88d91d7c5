"""Exact answers of the shipped checkpoint on test scenes, through processor and ``generate``.

python training/evaluate.py --questions 2100 --out training/evaluation.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from pore.embedded import embedded_model, scenes
from pore.embedded.asking import KINDS
from pore.embedded.things import THIRDS

BATCH = 50


def accuracy(n: int, folder: str) -> dict[str, object]:
    """Share of exact answers to ``n`` test questions, overall, per kind and per third."""
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    hits: dict[str, list[bool]] = defaultdict(list)
    pairs = list(scenes.questions("test", n))
    began = time.monotonic()
    for first in range(0, n, BATCH):
        part = pairs[first : first + BATCH]
        prompts = [
            processor.apply_chat_template(
                [
                    {
                        "role": "user",
                        "content": [{"type": "image"}, {"type": "text", "text": q.question}],
                    }
                ],
                add_generation_prompt=True,
            )
            for _, q in part
        ]
        inputs = processor(
            images=[Image.fromarray(s.image) for s, _ in part],
            text=prompts,
            padding=True,
            return_tensors="pt",
        )
        with torch.inference_mode():
            out = model.generate(**inputs, max_new_tokens=6)
        written = processor.batch_decode(
            out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        for text, (_, q) in zip(written, part, strict=True):
            hits["all"].append(text.strip() == q.answer)
            hits[q.kind].append(hits["all"][-1])
            if q.third:
                hits[q.third].append(hits["all"][-1])
    share = {k: round(float(np.mean(v)), 4) for k, v in hits.items()}
    return {
        "questions": n,
        "accuracy": share["all"],
        "by_kind": {k: share[k] for k in KINDS},
        "by_third": {k: share[k] for k in THIRDS},
        "seconds": round(time.monotonic() - began),
    }


def main() -> None:
    """Parse the command line and evaluate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=2100)
    parser.add_argument("--checkpoint", default=embedded_model())
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    found = json.dumps(accuracy(arguments.questions, arguments.checkpoint), indent=2)
    print(found)
    if arguments.out:
        arguments.out.write_text(found + "\n")


if __name__ == "__main__":
    main()

"""Right answers of the modes "in_llm" and "reencode" on the same questions, in transformers alone.

    python benchmarks/two_modes.py --out benchmarks/results/embedded-two-modes.json

FastV and FastV + PoRe, K = 2, on questions of the embedded model's fresh scenes that come after
those of the comparison of corrections. P is fitted as in the README's table. Beside them DivPrune,
for which both modes are the same, as it acts before the decoder. Prints the rows of the table in
docs/serving-vllm.md, and writes every answer.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

import pore
from pore._files import write_atomic
from pore._saved.seals import sealed_text
from pore.data.loading import load_model
from pore.data.samples import Sample
from pore.engine.embeddings import kept_embeddings
from pore.evaluation.answers import is_right
from pore.evaluation.batches import Batches
from pore.evaluation.circumstances import circumstances
from pore.evaluation.running import evaluate
from pore.evaluation.statistics import paired, wilson
from pore.serving.reencoding import reencoded

FIRST = 525
"""The questions before were asked for docs/corrections.md."""
LAYER = 2
LONGEST = 8


def answers(model: Any, processor: Any, batches: Batches, pruner: Any, mode: str) -> list[str]:
    """What a model answers to all questions.

    Args:
        model: The model.
        processor: Its processor.
        batches: The questions.
        pruner: The method; None is the unpruned model.
        mode: "in_llm" or "reencode".
    """
    if mode == "in_llm":
        outcome = evaluate(model, processor, batches, pruner, max_new_tokens=LONGEST)
        return [answer.given for answer in outcome.answers]
    found: list[str] = []
    with torch.inference_mode():
        for i in range(len(batches)):
            inputs = batches.inputs(i)
            given = reencoded(model, inputs, kept_embeddings(model, inputs, pruner))
            tokens = model.generate(**given, max_new_tokens=LONGEST, do_sample=False)
            texts = processor.batch_decode(tokens, skip_special_tokens=True)
            found += [text.strip() for text in texts]
    return found


def run(count: int, calibration: int, keeps: Sequence[int], batch: int) -> dict[str, Any]:
    """Ask everything.

    Args:
        count: Questions.
        calibration: Questions that P is measured on.
        keeps: Budgets.
        batch: Questions in one batch.

    Returns:
        The rows of the table, and every answer.
    """
    model, processor = load_model("embedded")
    bias = pore.calibrate(
        model,
        processor,
        list(pore.load_samples("embedded:calibration", limit=calibration)),
        layer=LAYER,
        progress=False,
    ).fit("exponential")
    source = pore.load_samples("embedded:fresh", limit=FIRST + count)
    samples: list[Sample] = list(islice(source, FIRST, None))
    batches = Batches(model, processor, samples, batch_size=batch)
    expected = [str(sample.answer) for sample in samples]
    rows: list[dict[str, Any]] = []
    given: dict[str, list[str]] = {}

    def ask(method: str, keep: int, pruner: Any, mode: str) -> list[bool]:
        began = time.monotonic()
        texts = answers(model, processor, batches, pruner, mode)
        right = [is_right(text, one) for text, one in zip(texts, expected, strict=True)]
        given[f"{method}, {keep}, {mode}"] = texts
        low, high = wilson(sum(right), len(right))
        row = {"method": method, "keep": keep, "mode": mode, "right": sum(right), "n": len(right)}
        rows.append({**row, "ci": [low, high]})
        print(
            f"{method:12} {keep:4} {mode:9} {100 * sum(right) / len(right):5.1f} "
            f"({time.monotonic() - began:.0f} s)",
            file=sys.stderr,
            flush=True,
        )
        return right

    ask("unpruned", 144, None, "in_llm")
    differences = []
    for keep in keeps:
        for method, reweight in (("FastV", None), ("FastV + PoRe", bias)):
            pruner = pore.FastV(keep=keep, layer=LAYER, reweight=reweight)
            inside, outside = (ask(method, keep, pruner, mode) for mode in ("in_llm", "reencode"))
            found = paired(list(map(float, inside)), list(map(float, outside)), seed=0)
            differences.append(
                {
                    "method": method,
                    "keep": keep,
                    "reencode_minus_in_llm": found.difference,
                    "ci": list(found.ci),
                    "won": found.gained,
                    "lost": found.lost,
                    "p": found.p,
                }
            )
        ask("DivPrune", keep, pore.DivPrune(keep=keep), "in_llm")
    questions = [{"id": s.id, "question": s.question, "answer": s.answer} for s in samples]
    return {"results": rows, "differences": differences, "questions": questions, "given": given}


def table(found: dict[str, Any]) -> str:
    """The rows of the document's table, in percent."""
    rates = {
        (r["method"], r["keep"], r["mode"]): 100 * r["right"] / r["n"] for r in found["results"]
    }
    lines = []
    for one in found["differences"]:
        name, keep = one["method"], one["keep"]
        low, high = (100 * end for end in one["ci"])
        lines.append(
            f"| {keep} | {name} | {rates[name, keep, 'in_llm']:.1f} "
            f"| {rates[name, keep, 'reencode']:.1f} | {100 * one['reencode_minus_in_llm']:+.1f} "
            f"[{low:+.1f}, {high:+.1f}] | {one['p']:.2g} |"
        )
    for row in found["results"]:
        if row["method"] == "DivPrune":
            lines.append(
                f"| {row['keep']} | DivPrune | {100 * row['right'] / row['n']:.1f} | | | |"
            )
    return "\n".join(lines)


def main(given: Sequence[str] | None = None) -> None:
    """Ask, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, default=525)
    parser.add_argument("--calibration", type=int, default=700)
    parser.add_argument("--keep", type=int, nargs="+", default=[72, 36, 14])
    parser.add_argument("--batch-size", type=int, default=35)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(given)
    torch.set_num_threads(1)
    found = run(options.limit, options.calibration, options.keep, options.batch_size)
    command = shlex.join(["python", "benchmarks/two_modes.py", *(given or sys.argv[1:])])
    made = circumstances(torch.device("cpu"), 0, command)
    document = {"schema": "pore.two_modes", "version": 1, "circumstances": made, **found}
    write_atomic(options.out, sealed_text(document))
    unpruned = found["results"][0]
    print(f"unpruned: {100 * unpruned['right'] / unpruned['n']:.1f}")
    print(table(found))


if __name__ == "__main__":
    main()

"""Draw the first question that FastV loses and PoRe answers, for the README.

    python docs/lost_question_figure.py

Asks the embedded model `QUESTIONS` fresh questions, which nothing was fitted to: whole, with FastV
(K = 2, a quarter of the tokens), and with FastV + PoRe, P as `pore calibrate` fits it by default,
on 700 calibration questions. Prints how many each has right and how often one of the two alone is
right. Of the questions that the whole model has right, the first that FastV has wrong and PoRe
right is drawn to `docs/images/lost-question.png`: that is the whole rule.
"""

from __future__ import annotations

from pathlib import Path

import pore
from pore import plotting
from pore.data.loading import load_model
from pore.evaluation import Answer, Batches, evaluate
from pore.evaluation.examples import seen_image

QUESTIONS, KEEP = 210, 36
OUT = Path(__file__).parent / "images" / "lost-question.png"


def main() -> None:
    """Ask, count, and draw."""
    model, processor = load_model("embedded")
    seen = pore.load_samples("embedded:calibration", limit=700)
    measured = pore.calibrate(model, processor, seen, layer=2, batch_size=32)
    bias = measured.fit("auto", mean="geometric")
    samples = list(pore.load_samples("embedded:fresh", limit=QUESTIONS))
    batches = Batches(model, processor, samples, batch_size=32)
    pruners = {
        "unpruned": None,
        "FastV": pore.FastV(keep=KEEP, layer=2),
        "FastV + PoRe": pore.FastV(keep=KEEP, layer=2, reweight=bias),
    }
    found = [evaluate(model, processor, batches, pruner) for pruner in pruners.values()]
    for name, outcome in zip(pruners, found, strict=True):
        print(f"{name}: {sum(outcome.right)} of {len(outcome.right)} right")
    rows = list(zip(*(outcome.answers for outcome in found), strict=True))
    gained = [row for row in rows if (row[1].right, row[2].right) == (False, True)]
    lost = [row for row in rows if (row[1].right, row[2].right) == (True, False)]
    print(f"right with PoRe alone: {len(gained)}; right without it alone: {len(lost)}")
    first = next(row for row in gained if row[0].right)
    (sample,) = (one for one in samples if one.id == first[0].id)
    panels = [panel(name, answer) for name, answer in zip(pruners, first, strict=True)]
    picture = seen_image(model, processor, sample.load_image())
    figure = plotting.kept_tokens(picture, panels, (12, 12), title=sample.question)
    plotting.save(figure, OUT, dpi=150)
    print(f"drawn: {sample.id}, {sample.question}")


def panel(name: str, answer: Answer) -> plotting.Panel:
    """What one method keeps, and its answer."""
    kept = answer.kept[0] if answer.kept else range(144)
    return plotting.Panel(f"{name}: {answer.given}", answer.right, tuple(kept))


if __name__ == "__main__":
    main()

"""Does pruning cost answers on your questions, and does PoRe give some back?

    python examples/evaluate.py questions.jsonl profile.json

A line of the JSONL file: {"image": "a.jpg", "question": "Which colour is it?", "answer": "red"}.
Prints how many answers were right, whole and pruned, without and with P, each with its 95 %
interval. The command `pore evaluate` does the same, and resumes where it was stopped.
"""

import argparse

import pore
from pore.data.loading import load_model
from pore.evaluation import Batches, evaluate

parser = argparse.ArgumentParser()
parser.add_argument("samples")
parser.add_argument("profile")
parser.add_argument("--model", default="llava-hf/llava-1.5-7b-hf")
parser.add_argument("--keep", type=int, default=128)
parser.add_argument("--limit", type=int)
args = parser.parse_args()

model, processor = load_model(args.model)
bias = pore.PositionBias.load(args.profile)
batches = Batches(
    model, processor, list(pore.load_samples(args.samples, limit=args.limit)), batch_size=8
)
settings = {
    "whole": None,
    "FastV": pore.FastV(keep=args.keep, layer=2),
    "FastV + PoRe": pore.FastV(keep=args.keep, layer=2, reweight=bias),
}
for name, pruner in settings.items():
    found = evaluate(model, processor, batches, pruner)
    low, high = found.ci
    print(f"{name:<13} {100 * found.accuracy:5.1f} % right [{100 * low:.1f}, {100 * high:.1f}]")

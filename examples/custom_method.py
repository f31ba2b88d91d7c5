"""A method of your own: keep the tokens that differ most from the mean of their image.

    python examples/custom_method.py photo.jpg "What is on the table?"

A method gives every visual token a score, and the highest stay. Budgets, batches, caches and
reports come with the class. Prints the answer, and how many tokens each layer had.
"""

import argparse
from dataclasses import dataclass

import pore
from pore.data.loading import load_model
from pore.data.prompts import build_inputs
from pore.methods.scorer import ScoredPruner


@dataclass(frozen=True)
class Unusual(ScoredPruner):
    """Keep the visual tokens whose states are farthest from the mean of their image."""

    name = "Unusual"

    def score(self, view):
        states = view.features.float()  # (images, tokens, width)
        valid = view.layout.valid[..., None]  # images may have different numbers of tokens
        mean = (states * valid).sum(1, keepdim=True) / valid.sum(1, keepdim=True)
        return (states - mean).norm(dim=-1)


parser = argparse.ArgumentParser()
parser.add_argument("image")
parser.add_argument("question", nargs="?", default="What is in the picture?")
parser.add_argument("--model", default="llava-hf/llava-1.5-7b-hf")
parser.add_argument("--keep", type=int, default=128)
args = parser.parse_args()

model, processor = load_model(args.model)
sample = pore.Sample("my picture", args.image, args.question)
inputs = build_inputs(processor, [sample], model.device, model.dtype)
with Unusual(keep=args.keep, layer=2)(model) as run:
    tokens = model.generate(**inputs, max_new_tokens=32, do_sample=False)
new = tokens[:, inputs["input_ids"].shape[1] :]
print(processor.batch_decode(new, skip_special_tokens=True)[0].strip())
print(run.report)

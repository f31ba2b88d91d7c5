"""Measure the position bias P on your own pictures, and learn whether dividing by it will help.

    python examples/calibrate.py photos/ "What is in the picture?" --out profile.json

Goes through all pictures of a folder. Prints the verdict and what it follows from, and writes P,
with which `pore.FastV(keep=128, layer=2, reweight=pore.PositionBias.load("profile.json"))` prunes.
The command `pore calibrate` does the same, and has more options.
"""

import argparse

import pore
from pore.data.loading import load_model

parser = argparse.ArgumentParser()
parser.add_argument("folder")
parser.add_argument("questions", nargs="+", help="the pictures take them in turn")
parser.add_argument("--model", default="llava-hf/llava-1.5-7b-hf")
parser.add_argument("--keep", type=int, default=128, help="the budget that P is for")
parser.add_argument("--out", default="profile.json")
args = parser.parse_args()

model, processor = load_model(args.model)
samples = pore.load_samples(args.folder, questions=args.questions)
measured = pore.calibrate(model, processor, samples, layer=2, batch_size=8)

diagnosis = measured.diagnose("auto", args.keep, mean="geometric")
print(diagnosis)
if diagnosis.verdict == "divide":
    measured.fit("auto", mean="geometric").save(args.out)
    print(f"P is in {args.out}")
else:
    print("No P was written.")

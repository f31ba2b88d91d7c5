"""LLaVA-1.5 answers a question about a picture with 128 of its 576 visual tokens.

    python examples/llava.py photo.jpg "What is on the table?"

Prints the answer of the whole model, the answer of the pruned one, and how many tokens each layer
had.
"""

import argparse

import PIL.Image
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import pore

parser = argparse.ArgumentParser()
parser.add_argument("image")
parser.add_argument("question", nargs="?", default="What is in the picture?")
parser.add_argument("--model", default="llava-hf/llava-1.5-7b-hf")
parser.add_argument("--keep", type=int, default=128)
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
processor = AutoProcessor.from_pretrained(args.model)
model = AutoModelForImageTextToText.from_pretrained(args.model, dtype="auto").to(device)

content = [{"type": "image"}, {"type": "text", "text": args.question}]
prompt = processor.apply_chat_template(
    [{"role": "user", "content": content}], add_generation_prompt=True
)
image = PIL.Image.open(args.image).convert("RGB")
inputs = processor(images=image, text=prompt, return_tensors="pt").to(device, model.dtype)


def answer():
    tokens = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    new = tokens[0, inputs["input_ids"].shape[1] :]
    return processor.decode(new, skip_special_tokens=True).strip()


print("whole: ", answer())
with pore.FastV(keep=args.keep, layer=2)(model) as run:
    print("pruned:", answer())
print(run.report)

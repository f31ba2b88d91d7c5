"""One question about many pictures, in batches.

    python examples/batch.py "What is in the picture?" a.jpg b.jpg c.jpg

Prints a line for every picture: its name, the answer, and how many of its visual tokens were kept.
"""

import argparse

import PIL.Image
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import pore

parser = argparse.ArgumentParser()
parser.add_argument("question")
parser.add_argument("images", nargs="+")
parser.add_argument("--model", default="llava-hf/llava-1.5-7b-hf")
parser.add_argument("--keep", type=int, default=128)
parser.add_argument("--batch-size", type=int, default=8)
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
processor = AutoProcessor.from_pretrained(args.model)
processor.tokenizer.padding_side = "left"  # generate continues where the prompts end
model = AutoModelForImageTextToText.from_pretrained(args.model, dtype="auto").to(device)

content = [{"type": "image"}, {"type": "text", "text": args.question}]
prompt = processor.apply_chat_template(
    [{"role": "user", "content": content}], add_generation_prompt=True
)
for start in range(0, len(args.images), args.batch_size):
    names = args.images[start : start + args.batch_size]
    images = [PIL.Image.open(name).convert("RGB") for name in names]
    inputs = processor(
        images=images, text=[prompt] * len(images), padding=True, return_tensors="pt"
    ).to(device, model.dtype)
    with pore.FastV(keep=args.keep, layer=2)(model) as run:
        tokens = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    new = tokens[:, inputs["input_ids"].shape[1] :]
    answers = processor.batch_decode(new, skip_special_tokens=True)
    for name, answer, sample in zip(names, answers, run.report, strict=True):
        seen = sample.images[0]
        print(f"{name}: {answer.strip()} ({len(seen.kept)} of {seen.seen} tokens)")

"""Qwen2.5-VL with a quarter of its visual tokens, on a picture of any size.

    pip install 'pore-vlm[video]'  # torchvision, which its processor wants
    python examples/qwen_vl.py photo.jpg "What does the sign say?"

A picture of Qwen-VL has as many tokens as its size asks for, so `keep` is a share here. Prints the
answer, how many tokens the picture had, and how many were kept.
"""

import argparse

import PIL.Image
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import pore

parser = argparse.ArgumentParser()
parser.add_argument("image")
parser.add_argument("question", nargs="?", default="What is in the picture?")
parser.add_argument("--model", default="Qwen/Qwen2.5-VL-3B-Instruct")
parser.add_argument("--keep", type=float, default=0.25)
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
processor = AutoProcessor.from_pretrained(args.model)
model = AutoModelForImageTextToText.from_pretrained(args.model, dtype="auto").to(device)

content = [{"type": "image"}, {"type": "text", "text": args.question}]
prompt = processor.apply_chat_template(
    [{"role": "user", "content": content}], add_generation_prompt=True
)
image = PIL.Image.open(args.image).convert("RGB")
inputs = processor(images=[image], text=[prompt], return_tensors="pt").to(device, model.dtype)

with pore.FastV(keep=args.keep, layer=2)(model) as run:
    tokens = model.generate(**inputs, max_new_tokens=32, do_sample=False)
new = tokens[:, inputs["input_ids"].shape[1] :]
print(processor.batch_decode(new, skip_special_tokens=True)[0].strip())
seen = run.report.samples[0].images[0]
print(f"{seen.seen} visual tokens, {len(seen.kept)} kept")

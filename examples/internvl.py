"""InternVL, whose processor cuts a large picture into tiles, keeps a quarter of all their tokens.

    pip install 'pore-vlm[video]'  # torchvision, which its processor wants
    python examples/internvl.py photo.jpg "What is written on the cup?"

The budget is that of the whole picture, not of every tile. Prints the answer, how many visual
tokens the picture had and how many were kept, and how many tokens each layer had.
"""

import argparse

import PIL.Image
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import pore

parser = argparse.ArgumentParser()
parser.add_argument("image")
parser.add_argument("question", nargs="?", default="What is in the picture?")
parser.add_argument("--model", default="OpenGVLab/InternVL3-1B-hf")
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

with pore.DART(keep=args.keep)(model) as run:
    tokens = model.generate(**inputs, max_new_tokens=32, do_sample=False)
new = tokens[:, inputs["input_ids"].shape[1] :]
print(processor.batch_decode(new, skip_special_tokens=True)[0].strip())
print(run.report)

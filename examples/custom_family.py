"""A model that pore does not list: VipLLaVA, described in a few lines.

    python examples/custom_family.py photo.jpg "What is on the table?"

An adapter says which models it is for and how many visual tokens an image has. Before it is
trusted, keeping everything must change nothing. Prints that check, the answer, and how many tokens
each layer had.
"""

import argparse

import PIL.Image
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import pore


class VipLLaVA(pore.Family):
    name = "VipLLaVA"
    model_types = ("vipllava",)  # config.model_type

    def grid(self, model):
        tower = model.config.vision_config
        side = tower.image_size // tower.patch_size
        return side, side  # visual tokens of an image: height, width


parser = argparse.ArgumentParser()
parser.add_argument("image")
parser.add_argument("question", nargs="?", default="What is in the picture?")
parser.add_argument("--model", default="llava-hf/vip-llava-7b-hf")
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

with torch.no_grad():
    unpruned = model(**inputs).logits
    with pore.FastV(keep=1.0)(model):
        same = torch.equal(model(**inputs).logits, unpruned)
print("keeping everything changes nothing:", same)

with pore.FastV(keep=args.keep, layer=2)(model) as run:
    tokens = model.generate(**inputs, max_new_tokens=32, do_sample=False)
new = tokens[0, inputs["input_ids"].shape[1] :]
print(processor.decode(new, skip_special_tokens=True).strip())
print(run.report)

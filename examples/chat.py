"""A conversation about one picture, which is pruned once: later turns use the short cache.

    python examples/chat.py photo.jpg "What is on the table?" "Which colour is it?"

What the first turn drops, no later turn sees: with a small budget, ask the most important question
first. Prints every answer, and the length of the cache in the first and in the last layer.
"""

import argparse
import inspect

import PIL.Image
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache

import pore

parser = argparse.ArgumentParser()
parser.add_argument("image")
parser.add_argument("questions", nargs="+")
parser.add_argument("--model", default="llava-hf/llava-1.5-7b-hf")
parser.add_argument("--keep", type=int, default=128)
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
processor = AutoProcessor.from_pretrained(args.model)
model = AutoModelForImageTextToText.from_pretrained(args.model, dtype="auto").to(device)

image = PIL.Image.open(args.image).convert("RGB")
# transformers 5.24 gave this argument another name.
names = inspect.signature(model.forward).parameters
cache_name = "cache" if "cache" in names else "past_key_values"
said, cache = None, DynamicCache(config=model.config.get_text_config())
with pore.FastV(keep=args.keep, layer=2)(model):
    for question in args.questions:
        content = [{"type": "text", "text": question}]
        if said is None:  # the picture comes with the first question
            content = [{"type": "image"}, *content]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        if said is None:
            inputs = processor(images=image, text=text, return_tensors="pt")
            inputs = inputs.to(device, model.dtype)
        else:  # all that was said so far, and the new question
            new = processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")
            ids = torch.cat([said, new["input_ids"].to(device)], dim=1)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        said = model.generate(**inputs, **{cache_name: cache}, max_new_tokens=32, do_sample=False)
        answer = said[0, inputs["input_ids"].shape[1] :]
        print(question, "->", processor.decode(answer, skip_special_tokens=True).strip())
last = model.config.get_text_config().num_hidden_layers - 1
print(f"cache: {cache.get_seq_length(0)} tokens in layer 0, {cache.get_seq_length(last)} in {last}")

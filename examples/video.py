"""A question about a video, of whose visual tokens a quarter is kept.

    pip install 'pore-vlm[video]'
    python examples/video.py clip.mp4 "What moves?"

Takes a file, a GIF or a folder of frames. Prints the answer, and how many tokens each layer had.
"""

import argparse

import pore
from pore.data.loading import load_model
from pore.data.prompts import build_inputs

parser = argparse.ArgumentParser()
parser.add_argument("video")
parser.add_argument("question", nargs="?", default="What happens in the video?")
parser.add_argument("--model", default="llava-hf/LLaVA-NeXT-Video-7B-hf")
parser.add_argument("--frames", type=int, default=16)
args = parser.parse_args()

model, processor = load_model(args.model)
video = pore.read_video(args.video, frames=args.frames)
sample = pore.Sample("my video", video, args.question)
inputs = build_inputs(processor, [sample], model.device, model.dtype)

with pore.VidCom2(keep=0.25)(model) as run:
    tokens = model.generate(**inputs, max_new_tokens=64, do_sample=False)
new = tokens[:, inputs["input_ids"].shape[1] :]
print(processor.batch_decode(new, skip_special_tokens=True)[0].strip())
print(run.report)

"""Ask a server that prunes, in OpenAI's format, with a budget for every request.

    pip install 'pore-vlm[serve]'
    pore serve llava-hf/llava-1.5-7b-hf --keep 128      # in another terminal
    python examples/serving_client.py photo.jpg "What is on the table?" --keep 64

Prints the answer, and how many visual tokens of how many reached the last layer.
"""

import argparse
import base64
from pathlib import Path

from openai import OpenAI

parser = argparse.ArgumentParser()
parser.add_argument("image")
parser.add_argument("question", nargs="?", default="What is in the picture?")
parser.add_argument("--model", default="llava-hf/llava-1.5-7b-hf", help="as the server names it")
parser.add_argument("--keep", type=int, default=64)
parser.add_argument("--server", default="http://127.0.0.1:8000")
args = parser.parse_args()

picture = Path(args.image)
kind = "png" if picture.suffix.lower() == ".png" else "jpeg"
url = f"data:image/{kind};base64,{base64.b64encode(picture.read_bytes()).decode()}"
content = [
    {"type": "image_url", "image_url": {"url": url}},
    {"type": "text", "text": args.question},
]
client = OpenAI(base_url=f"{args.server}/v1", api_key="none")
reply = client.chat.completions.with_raw_response.create(
    model=args.model,
    messages=[{"role": "user", "content": content}],
    max_tokens=32,
    extra_body={"keep": args.keep},
)
print(reply.parse().choices[0].message.content)
counts = [reply.headers[f"x-pore-visual-tokens-{what}"] for what in ("kept", "seen")]
print("{} of {} visual tokens".format(*counts))

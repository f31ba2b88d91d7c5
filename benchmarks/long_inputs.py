"""Time and memory of the prefill of long videos, pruned and unpruned.

    python benchmarks/long_inputs.py --out benchmarks/results/cpu-long-inputs.json

A LLaVA-OneVision of random weights gets videos of 1, 8, 32 and 64 frames of 196 visual tokens.
Every setting runs in a process of its own, so that its peak of memory is its own; what is measured
is one call of the model, from pixels to the logits of the next token. `--device cuda` measures on a
GPU.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

METHODS: dict[str, dict[str, Any]] = {
    "unpruned": {},
    "FastV": {"layer": 2},
    "PACT": {},
    "FrameFusion": {},
    "EVS": {},
    "VidCom2": {},
    "DyCoke": {},
    "FastVID": {},
    "HoliTom": {},
    "FlashVID": {},
    "HoliTom, layer 4": {"layer": 4},
    "FlashVID, layer 4": {"layer": 4},
}
FRAMES = (1, 8, 32, 64)
KEEP = 0.25
WIDTH, LAYERS, SIDE = 512, 8, 27
IMAGE_TOKEN, VIDEO_TOKEN = 1, 2


def model_of(device: str) -> Any:
    """A LLaVA-OneVision whose frames are 27 x 27 patches, pooled to 14 x 14 tokens."""
    import torch
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    torch.manual_seed(0)
    config = LlavaOnevisionConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 14 * SIDE,
            "patch_size": 14,
            "vision_use_head": False,
        },
        text_config={
            "model_type": "qwen2",
            "hidden_size": WIDTH,
            "intermediate_size": 1408,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "vocab_size": 1000,
        },
        image_token_index=IMAGE_TOKEN,
        video_token_index=VIDEO_TOKEN,
    )
    return LlavaOnevisionForConditionalGeneration(config).eval().to(device)


def inputs_of(frames: int, device: str) -> dict[str, Any]:
    """A prompt of 16 text tokens, a video that moves a little from frame to frame, and 16 more."""
    import torch

    generator = torch.Generator().manual_seed(frames)
    still = torch.randn(1, 1, 3, 14 * SIDE, 14 * SIDE, generator=generator)
    moving = 0.3 * torch.randn(1, frames, 3, 14 * SIDE, 14 * SIDE, generator=generator)
    text = torch.arange(10, 26)
    visual = torch.full((frames * (-(-SIDE // 2)) ** 2 + 1,), VIDEO_TOKEN)
    ids = torch.cat([text, visual, text + 20])[None]
    given = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values_videos": still + moving,
    }
    return {name: value.to(device) for name, value in given.items()}


def measure(name: str, frames: int, device: str, repeats: int) -> dict[str, Any]:
    """Time and memory of one setting, in this process."""
    import torch

    import pore

    model = model_of(device)
    method, settings = name.split(",")[0], METHODS[name]
    pruner = None if name == "unpruned" else getattr(pore, method)(keep=KEEP, **settings)

    def call(given: dict[str, Any]) -> tuple[float, Any]:
        began = time.perf_counter()
        with torch.inference_mode(), nullcontext() if pruner is None else pruner(model) as run:
            model(**given, use_cache=True, logits_to_keep=1)
        if device != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() - began, run

    call(inputs_of(8, device))  # warm-up
    given = inputs_of(frames, device)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    before = _resident()
    done = [call(given) for _ in range(repeats)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    if device != "cpu":
        peak = torch.cuda.max_memory_allocated()
    run = done[-1][1]
    return {
        "method": name,
        "frames": frames,
        "tokens_by_layer": None if run is None else run.report.samples[-1].tokens,
        "seconds": [seconds for seconds, _ in done],
        "peak_bytes": max(0, peak),
    }


def _resident() -> int:
    """Bytes of memory that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def table(records: list[dict[str, Any]]) -> str:
    """Seconds (median) and MiB above the loaded model, by method and frames, as Markdown."""
    lines = ["| frames | " + " | ".join(map(str, FRAMES)) + " |", "|---" * 5 + "|"]
    for name in METHODS:
        cells = []
        for record in (r for r in records if r["method"] == name):
            if "refused" in record:
                cells.append("refused")
            else:
                seconds = statistics.median(record["seconds"])
                cells.append(f"{seconds:.2f} s, {record['peak_bytes'] / 2**20:.0f} MiB")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure every setting in a process of its own, and write them all."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "FRAMES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        name, frames = options.one
        print(json.dumps(measure(name, int(frames), options.device, options.repeats)))
        return
    import torch

    from pore._files import write_atomic
    from pore.evaluation.circumstances import circumstances

    records = []
    for frames in FRAMES:
        for name in METHODS:
            command = [sys.executable, __file__, "--device", options.device]
            command += ["--repeats", str(options.repeats), "--one", name, str(frames)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                reason = done.stderr.strip().splitlines()[-1]
                records.append({"method": name, "frames": frames, "refused": reason})
            else:
                records.append(json.loads(done.stdout.splitlines()[-1]))
            print(records[-1], file=sys.stderr, flush=True)
    made = circumstances(torch.device(options.device), 0, " ".join(["python", *sys.argv]))
    if options.out:
        text = json.dumps(made | {"keep": KEEP, "records": records}, indent=1) + "\n"
        write_atomic(options.out, text)
    print(table(records))


if __name__ == "__main__":
    main()

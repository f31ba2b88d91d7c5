"""Models, inputs and the machine of a benchmark."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pore._compat.making import random_model
from pore.bench.workload import Workload
from pore.cost.named import llava_config
from pore.errors import InputError
from pore.families.registry import family_of

# -- building ---------------------------------------------------------------------------------


def build(
    shape: str,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    seed: int = 0,
) -> nn.Module:
    """A LLaVA with random weights, to measure speed without a checkpoint.

    Weights are made on the device in the dtype, by repeating a short random block, so that 7B
    parameters take seconds. Its answers mean nothing.

    Args:
        shape: A name for `pore.cost.named.llava_config`, such as "llava-1.5-7b" or "llava-1024x12".
        device: Where to build it.
        dtype: Data type of the weights.
        attention: "sdpa", "eager", "flash_attention_2" or another that transformers knows.
        seed: Seed of the weights.

    Returns:
        The model, in evaluation mode.

    Raises:
        UnsupportedModelError: No shape has that name.
        InputError: The attention implementation cannot be used here.
    """
    from transformers import LlavaForConditionalGeneration

    config = llava_config(shape)
    try:
        with torch.device(device):
            model = random_model(LlavaForConditionalGeneration, config, dtype, attention)
    except (ImportError, ValueError) as error:
        raise InputError(f"{shape} cannot be built with attention {attention!r}: {error}") from None
    generator = torch.Generator().manual_seed(seed)
    # A prime length: rows of a matrix do not repeat.
    block = (torch.randn(1_048_573, generator=generator) * 0.02).to(device, dtype)
    for module in model.modules():
        norm = type(module).__name__.lower().endswith("norm")
        for name, parameter in module.named_parameters(recurse=False):
            flat = parameter.data.view(-1)
            if norm or name == "bias":
                flat.fill_(float(name == "weight"))
                continue
            for part in flat.split(len(block)):
                part.copy_(block[: len(part)])
    model.config.name_or_path = f"{shape}, random weights"
    result: nn.Module = model.eval()
    return result


def random_inputs(
    model: nn.Module, workload: Workload, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Random prompts of one length: text, one image, text."""
    config: Any = model.config
    vision = config.vision_config
    generator = torch.Generator().manual_seed(workload.seed)
    words = [i for i in range(config.text_config.vocab_size) if i != config.image_token_id]
    rows, visual = workload.batch_size, workload.visual

    def text(count: int) -> Tensor:
        drawn = torch.randint(len(words), (rows, count), generator=generator)
        return torch.tensor(words)[drawn]

    image = torch.full((rows, visual), config.image_token_id)
    ids = torch.cat([text(workload.text_before), image, text(workload.text_after)], 1)
    pixels = torch.randn(
        rows, vision.num_channels, vision.image_size, vision.image_size, generator=generator
    )
    # The mask covers all tokens to come; every step takes a slice from its start.
    mask = torch.ones(rows, workload.prompt + workload.new_tokens, dtype=torch.long)
    family = family_of(model)
    made = {
        "input_ids": ids.to(device),
        family.pixels_name(model): pixels.to(device, dtype),
        "attention_mask": mask.to(device),
    }
    types = family.token_types
    if types is not None:  # processors of such families give them
        made[types] = (ids == config.image_token_id).long().to(device)
    return made


# -- where it was measured --------------------------------------------------------------------


def now() -> str:
    """The time in UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def hardware(device: torch.device) -> dict[str, Any]:
    """The machine, as far as speed depends on it.

    Args:
        device: The device of the model.

    Returns:
        Names and sizes, as plain JSON types.
    """
    record: dict[str, Any] = {
        "device": device.type,
        "cpu": _cpu(),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "peak_memory": "not measured: only CUDA keeps a peak that can be reset for each run",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        record |= {
            "gpu": properties.name,
            "gpu_memory_bytes": properties.total_memory,
            "gpu_capability": f"{properties.major}.{properties.minor}",
            "peak_memory": "torch.cuda.max_memory_allocated, weights included",
        }
    return record


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# Packages that take part only where something has imported them, with their modules.
_IF_IMPORTED = {"lmms-eval": "lmms_eval", "datasets": "datasets"}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages used; those that take no part are left out."""
    installed = {"python": platform.python_version()}
    more = [name for name, module in _IF_IMPORTED.items() if module in sys.modules]
    for name in ("pore-vlm", "torch", "transformers", "flash-attn", *more):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    if torch.version.cuda is not None:
        installed["cuda"] = torch.version.cuda
    return installed

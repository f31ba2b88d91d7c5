"""The rates that a device reaches by itself, and the shortest times that they allow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pore.bench.clock import Clock
from pore.bench.results import Rates, Roofline, Timing
from pore.bench.runs import Runner
from pore.cost.flops import Flops


def device_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """The rates of a large matrix product and a large copy on a device, the best of five runs.

    Args:
        device: The device.
        dtype: Data type of the matrices.

    Returns:
        The rates.
    """
    clock = Clock(device)
    side, count = (2048, 1 << 27) if device.type == "cpu" else (8192, 1 << 30)
    a = torch.ones(side, side, device=device, dtype=dtype)
    out = torch.empty_like(a)
    copied = torch.ones(count, device=device, dtype=torch.uint8)
    target = torch.empty_like(copied)

    def best(work: Callable[[], object]) -> float:
        took = []
        for _ in range(6):
            start = clock.now()
            work()
            took.append((clock.now() - start) / 1e3)
        return min(took[1:])

    return Rates(
        flops=2 * side**3 / best(lambda: torch.matmul(a, a, out=out)),
        bandwidth=2 * count / best(lambda: target.copy_(copied)),
    )


def roofline(runner: Runner, rates: Rates, flops: Flops, timing: Timing) -> Roofline:
    """The shortest time that a device's rates allow for prefill, first token and decode step."""
    model, family, batch = runner.model, runner.family, runner.workload.batch_size
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    weights = [*family.layers(model), head]
    parameters = [p for module in weights for p in module.parameters()]
    moved = sum(p.nbytes for p in parameters) + timing.cache
    multiplied = 2 * batch * sum(p.numel() for p in parameters if p.dim() > 1)
    return Roofline(
        prefill=batch * flops.decoder / rates.flops * 1e3,
        ttft=batch * flops.total / rates.flops * 1e3,
        decode=max(moved / rates.bandwidth, multiplied / rates.flops) * 1e3,
    )

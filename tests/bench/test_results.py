"""What a benchmark writes and shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import LlavaForConditionalGeneration

import pore
from helpers.bench import AFTER, BEFORE, FASTV, LAYERS, PROMPT, QUICK, K
from helpers.models import N
from pore.bench.measuring import measure
from pore.bench.results import Spread
from pore.bench.table import about, table


@pytest.mark.usefixtures("quick_rates")
def test_json(model: LlavaForConditionalGeneration, tmp_path: Path) -> None:
    bias = pore.PositionBias.exponential(0.1, N)
    pruner = pore.FastV(keep=0.25, layer=K, reweight=bias)
    result = measure(model, [pruner], command="pore bench", **QUICK)
    record = json.loads(result.save(tmp_path / "new" / "bench.json").read_text())
    assert record == json.loads(result.to_json())
    assert (record["schema"], record["version"]) == ("pore.bench", 1)
    assert record["command"] == "pore bench"
    assert record["workload"] == {
        "batch_size": 1,
        "text_before": BEFORE,
        "visual": N,
        "text_after": AFTER,
        "new_tokens": 3,
        "repeats": 2,
        "warmup": 1,
        "seed": 0,
    }
    assert record["model"]["dtype"] == "float32"
    assert record["model"]["attention"] == "sdpa"
    assert record["model"]["weights_bytes"] == 4 * record["model"]["parameters"]
    assert record["hardware"]["device"] == "cpu"
    assert record["hardware"]["threads"] == torch.get_num_threads()
    assert "not measured" in record["hardware"]["peak_memory"]
    assert {"python", "torch", "transformers"} <= set(record["versions"])
    assert record["rates"] == {"matmul_flops_per_s": 1e9, "copy_bytes_per_s": 1e9}
    unpruned, pruned = record["settings"]
    assert unpruned["name"] == "unpruned"
    assert unpruned["over_unpruned"]["prefill"] == {"median": 1.0, "q1": 1.0, "q3": 1.0}
    assert unpruned["attainable"] is unpruned["over_attainable"] is None
    assert pruned["name"] == "FastV(keep=0.25, layer=2, reweight=exponential)"
    assert pruned["settings"]["method"] == "FastV"
    assert pruned["settings"]["reweight"] == "exponential"
    assert pruned["tokens_per_layer"] == [PROMPT] * K + [BEFORE + 4 + AFTER] * (LAYERS - K)
    assert pruned["flops"]["count"] == "true"
    timed = {"prefill_ms", "ttft_ms", "decode_ms_per_token"}
    for one in (unpruned, pruned, pruned["attainable"]):
        assert timed | {"peak_memory_bytes", "cache_bytes"} <= set(one)
        for name in timed:
            assert set(one[name]) == {"median", "q1", "q3", "samples"}
    for one in (pruned["over_unpruned"], pruned["over_attainable"]):
        assert set(one) == {"prefill", "ttft", "decode"}
    share = pruned["roofline"]["prefill_ms"] / pruned["prefill_ms"]["median"]
    assert pruned["roofline"]["prefill_share"] == pytest.approx(share)
    assert pruned["roofline"]["prefill_ms"] == pytest.approx(
        sum(pruned["flops"]["per_layer"]) / 1e9 * 1e3
    )


@pytest.mark.usefixtures("quick_rates")
def test_table(model: LlavaForConditionalGeneration) -> None:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    result = measure(model, [FASTV, pore.Downsample(keep=4)], **QUICK)
    shown = table(result)
    console.print(shown)
    text = console.export_text()
    assert shown.row_count == 3
    for words in ("unpruned", "FastV(keep=6, layer=2)", "Downsample(keep=4)", "13 from 2", " ± "):
        assert words in text
    assert "sdpa" in about(result)[0]


def test_spread() -> None:
    spread = Spread((4.0, 1.0, 3.0, 2.0, 5.0))
    assert (spread.q1, spread.median, spread.q3) == (2.0, 3.0, 4.0)
    assert spread.over(Spread((2.0, 1.0, 1.0, 2.0, 5.0))).samples == (2.0, 1.0, 3.0, 1.0, 1.0)

"""What `pore methods`, `pore models`, `pore benchmarks` and `pore flops` list."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

from helpers.command_line import run
from pore.evaluation.harness import TASKS
from pore.evaluation.harness.benchmarks import BENCHMARKS
from pore.families.registry import families
from pore.methods.registry import methods


def test_methods_come_from_the_registry() -> None:
    text = run("methods").output
    for name, kind in methods().items():
        assert name in text
        assert all(field.name in text for field in fields(kind))  # type: ignore[arg-type]
    assert "harmed" in text


def test_models_come_from_the_registry() -> None:
    text = run("models").output
    for model_type, family in families().items():
        assert model_type in text
        assert family.name in text
    assert "Set up with more than a model: D2Pruner, SGL, Scored" in text


def test_models_as_json_say_what_works_and_why_not() -> None:
    rows = json.loads(run("models", "--json").stdout)
    assert {kind for row in rows for kind in row["model_types"]} == set(families())
    listed = {row["family"]: row["methods"] for row in rows}
    assert all(entry == {"works": True, "limits": []} for entry in listed["LLaVA-1.5"].values())
    tome = listed["LLaVA-NeXT"]["ToMe"]
    assert not tome["works"]
    assert "cannot meet a budget" in tome["limits"][0]["reason"]
    recurrent = listed["Qwen3.5"]["FastV"]
    assert recurrent["works"]
    assert recurrent["limits"][0]["unless"] == "the layers that it reads have attention"


def test_flops_reproduces_table_1() -> None:
    rows = json.loads(run("flops", "--json").stdout)
    counts = [round(row["paper"]["layer_mean"] / 1e9, 1) for row in rows]
    assert counts == [99.2, 54.6, 32.8, 30.4, 19.9]
    assert [row["tokens_kept"] for row in rows] == [576, 288, 144, 128, 58]
    text = run("flops").output
    assert all(str(count) in text for count in counts)


def test_flops_of_a_checkpoint(model: Path) -> None:
    rows = json.loads(run("flops", "-m", model, "--keep", "4", "--json").stdout)
    assert [row["tokens"] for row in rows] == [[51] * 5, [51] * 2 + [39] * 3]


def test_benchmarks_say_who_scores_them() -> None:
    text = run("benchmarks").output
    for one in BENCHMARKS:
        assert one.task in text
    assert "by a paid judge" in text
    listed = json.loads(run("benchmarks", "--json").stdout)
    assert listed["include_path"] == str(TASKS)
    assert [row["task"] for row in listed["benchmarks"]] == [one.task for one in BENCHMARKS]

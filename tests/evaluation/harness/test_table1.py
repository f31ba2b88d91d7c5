"""`pore evaluate --table1`, whole, on made documents of its benchmarks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from helpers.benchmarks import answered, made, own, plain_model, write_tasks
from helpers.command_line import run
from helpers.pages import checked_page
from pore.evaluation import published_tables
from pore.evaluation.published_tables import TABLE1

pytest.importorskip("lmms_eval", reason="needs lmms-eval, which .ci/harness installs")

DATA = {
    "llava_vqav2_val": ("vqav2", "validation"),
    "llava_gqa": ("gqa", "testdev"),
    "llava_vizwiz_val": ("vizwiz", "val"),
    "llava_sqa_img": ("sqa", "test"),
    "llava_textvqa": ("textvqa", "validation"),
    "llava_pope": ("pope", "test"),
    "llava_mme": ("mme", "test"),
    "llava_mmbench": ("mmbench", "dev"),
}
"""Data set and split of every task."""


def test_every_cell_of_table_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = plain_model(tmp_path / "model")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    found = {task: (data, own(task), split) for task, (data, split) in DATA.items()}
    write_tasks(tasks, made(answered(model)), found)
    assert set(TABLE1.tasks.values()) == set(DATA)
    columns = {name: task and f"made_{task}" for name, task in TABLE1.columns.items()}
    table = replace(TABLE1, columns=columns, visual_tokens=144, model=str(model))
    monkeypatch.setattr(published_tables, "TABLE1", table)
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    refused = run("evaluate", model, "--table1", "--include-path", tasks, code=1)
    assert "needs P of the model" in refused.stderr
    profile = tmp_path / "p.json"
    run("calibrate", model, "-s", "embedded:calibration", "--limit", "40", "-o", profile)
    said = run(
        *("evaluate", model, "--table1", "--include-path", tasks, "--reweight", profile),
        *("--device", "cpu", "--batch-size", "4", "-o", out),
    )
    assert "MM-Vet: GPT-4 gives every answer its score" in " ".join(said.output.split())
    sweep = json.loads((out / "sweep.json").read_text())
    assert len(sweep["rows"]) == 1 + len(table.keeps) * len(table.methods)
    assert all(len(one["benchmarks"]) == len(DATA) for one in sweep["rows"])
    assert all(each["ci"] for one in sweep["rows"] for each in one["benchmarks"].values())
    page = checked_page((out / "table1.html").read_text(), contents=False)
    for command in table.commands():
        assert command in page.text
    unpruned = {name: one["value"] for name, one in sweep["rows"][0]["benchmarks"].items()}
    for column, task in table.tasks.items():
        published = table.values[1.0, "unpruned"][list(columns).index(column)]
        assert f"{published:g}" in page.text
        assert f"{unpruned[task]:.1f} [" in page.text
    # Every two methods can be tested, on the mean over the eight benchmarks too.
    scores = out / "scores.json"
    asked = ("compare", scores, scores, "--first", "FastV", "--second", "FastV + PoRe", "--json")
    compared = json.loads(run(*asked).output)["comparisons"]
    assert len(compared) == len(table.keeps) * (len(DATA) + 1)
    assert {one["benchmark"] for one in compared} == {None, *table.tasks.values()}

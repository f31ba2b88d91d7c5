"""`pore compare`, on two evaluations of a tiny checkpoint folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.command_line import run


@pytest.fixture(scope="module")
def evaluated(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    common = ("evaluate", "-m", model, "-s", data / "samples.jsonl", "--no-timing")
    common = (*common, "--max-new-tokens", "2", "--keep", "4", "--keep", "50%")
    run(*common, "-o", folder / "a", "--seed", "3")
    run(*common, "-o", folder / "b", "--method", "Random")
    run(*common, "-o", folder / "c", "--limit", "5")
    return folder


def test_two_methods(evaluated: Path) -> None:
    files = (evaluated / "a" / "results.json", evaluated / "b" / "results.json")
    found = run("compare", *files, "--first", "fastv", "--second", "random")
    assert "0 of 2 differences are real" in found.output  # six questions tell nothing
    assert "seed: 3 in the first file, 0 in the second." in found.output
    document = json.loads(run("compare", *files, "--first", "FastV", "--json").output)
    assert document["correction"] == "Holm, 2 comparisons"
    assert [(one["first"], one["second"], one["keep"]) for one in document["comparisons"]] == [
        ("FastV", "Random", 4),
        ("FastV", "Random", 0.5),
    ]
    assert document["first"]["command"].startswith("pore evaluate -m ")
    assert document["first"].keys() == document["second"].keys()


def test_what_cannot_be_compared(evaluated: Path) -> None:
    files = [evaluated / name / "results.json" for name in "abc"]
    assert "no settings to compare" in run("compare", *files[:2], code=1).stderr
    assert "1 of 6 are in one of them alone" in run("compare", files[0], files[2], code=1).stderr
    nothing = evaluated / "none.json"
    assert "none.json" in run("compare", nothing, nothing, code=1).stderr

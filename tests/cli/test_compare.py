"""`pore compare`, on two evaluations of a tiny checkpoint folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.command_line import run
from pore._saved.parsing import MAX_VALUES
from pore.evaluation.sweep_scores import read_scores


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


@pytest.fixture(scope="module")
def swept(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("swept")
    common = ("evaluate", "-m", model, "-s", data / "samples.jsonl", "--no-timing")
    common = (
        *common,
        "--max-new-tokens",
        "2",
        "--keep",
        "4",
        "--methods",
        "fastv,random,fastv+rope",
    )
    run(*common, "-o", folder / "a")
    run(*common, "-o", folder / "b", "--limit", "5")
    return folder


def test_sweeps_by_what_their_scores_are_made_of(swept: Path) -> None:
    file = swept / "a" / "scores.json"
    found = run("compare", file, file, "--first", "fastv", "--second", "random", "--json").output
    (one,) = json.loads(found)["comparisons"]
    assert (one["first"], one["second"], one["benchmark"]) == ("FastV", "Random", "samples")
    results = swept / "a" / "samples" / "results.json"
    asked = ("compare", results, results, "--first", "FastV", "--second", "Random", "--json")
    (other,) = json.loads(run(*asked).output)["comparisons"]
    assert one["p"] == other["p"]
    assert one["difference"] == pytest.approx(100 * other["difference"])
    text = run("compare", file, file, "--second", "FastV + RoPE prior").output
    assert "samples" in text
    assert "2 differences are real" in text
    page = (swept / "a" / "sweep.html").read_text()
    assert "FastV + RoPE prior" in page.split('id="changes"')[1]


def test_sweeps_that_cannot_be_compared(swept: Path) -> None:
    file, other = (swept / name / "scores.json" for name in "ab")
    named = ("--first", "FastV", "--second", "FastV")
    assert "asked other questions" in run("compare", file, other, *named, code=1).stderr
    assert "no settings to compare" in run("compare", file, file, code=1).stderr
    table = swept / "a" / "sweep.json"
    assert "scores.json beside it" in run("compare", table, table, code=1).stderr
    results = swept / "a" / "samples" / "results.json"
    assert "two of one kind" in run("compare", file, results, code=1).stderr
    damaged = swept / "damaged.json"
    damaged.write_text(file.read_text().replace('"FastV"', '"FastW"', 1))
    assert "checksum" in run("compare", damaged, damaged, code=1).stderr


@pytest.mark.slow
def test_scores_of_many_questions_are_read_again(swept: Path, tmp_path: Path) -> None:
    """A table of ten benchmarks has more scores than other files of pore have values."""
    document = json.loads((swept / "a" / "scores.json").read_text())
    document.pop("checksum")
    for one in document["settings"]:
        for scores in one["benchmarks"].values():
            scores["scores"] = [1, 0] * (MAX_VALUES // 4)
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(document))
    assert len(read_scores(path)[1]) == 4

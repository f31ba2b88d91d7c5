"""The tasks that come with pore, as far as they can be tested without lmms-eval."""

from __future__ import annotations

import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import yaml

from pore.errors import InputError
from pore.evaluation.harness import TASKS, protocol
from pore.evaluation.harness.benchmarks import BENCHMARKS, not_scored_here

ROOT = Path(__file__).parents[3]
TABLE = ["VQAv2", "GQA", "VizWiz", "SQA-IMG", "TextVQA", "POPE", "MME", "MMBench", "MMBench-CN"]


class Loader(yaml.SafeLoader):
    """Reads `!function a.b` as the text "a.b"."""


Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def tasks() -> dict[str, dict[str, Any]]:
    found = {}
    for path in TASKS.rglob("*.yaml"):
        config = yaml.load(path.read_text(encoding="utf-8"), Loader)
        assert path.stem in (config.get("group"), config["task"])
        found[path.stem] = config
    return found


@pytest.mark.parametrize("protocol", ["lmms-eval", "llava"])
def test_both_protocols_have_the_columns_of_table_1(protocol: str) -> None:
    own = [one for one in BENCHMARKS if one.protocol == protocol]
    assert [one.name for one in own if one.main] == [*TABLE, "MM-Vet"]
    assert len({one.task for one in own}) == len(own)
    for one in own:
        assert (one.metric is None) <= (one.scored != "here")
        assert one.note or one.scored == "here"


def test_every_task_of_the_llava_protocol_is_there() -> None:
    found = tasks()
    group = found.pop("llava_protocol")["task"]
    listed = [one for one in BENCHMARKS if one.protocol == "llava"]
    assert {one.task for one in listed} == {name for name in found if name.startswith("llava_")}
    assert group == [one.task for one in listed if one.scored == "here"]
    for one in listed:
        metrics = [entry["metric"] for entry in found[one.task]["metric_list"]]
        assert metrics[0] == (one.metric or "submission")


def test_functions_that_tasks_name_are_there() -> None:
    names = re.findall(
        r"!function (pore\.\S+)", "".join(path.read_text() for path in TASKS.rglob("*.yaml"))
    )
    assert len(names) > 30
    for name in names:
        module, _, function = name.rpartition(".")
        assert callable(getattr(import_module(module), function)), name


def test_tasks_are_shipped() -> None:
    """The wheel has them too: .ci/harness runs them from there."""
    shipped = re.search(r"^pore = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert shipped
    package = TASKS.parents[2]
    found = {path for glob in re.findall(r'"(.*?)"', shipped[1]) for path in package.glob(glob)}
    assert {path for path in TASKS.rglob("*") if path.is_file()} <= found


def test_what_others_score_is_said() -> None:
    told = not_scored_here(["gqa", "mmvet", "llava_vqav2_testdev", "mmvet", "of_my_own"])
    assert [line.partition(":")[0] for line in told] == [
        "mmvet (MM-Vet) is scored by a paid judge",
        "llava_vqav2_testdev (VQAv2) is scored by a submission server",
    ]


@pytest.mark.parametrize(("size", "corner"), [((40, 20), (20, 9)), ((20, 40), (9, 20))])
def test_pictures_are_padded_to_a_square(size: tuple[int, int], corner: tuple[int, int]) -> None:
    white = PIL.Image.new("RGB", size, "white")
    square = protocol.padded(white)
    assert square.size == (40, 40)
    assert square.getpixel(corner) == protocol.BACKGROUND
    box = (0, 10, 40, 30) if size[0] > size[1] else (10, 0, 30, 40)
    assert square.crop(box).getcolors() == [(800, (255, 255, 255))]
    assert len(square.getcolors() or ()) == 2
    assert protocol.padded(square) == square


@pytest.mark.parametrize(
    ("answer", "counts"),
    [
        ("Yes", "yes"),
        ("no", "no"),
        ("No, there is not.", "no"),
        ("There is not any dog", "no"),
        ("Yes. It is no dog", "yes"),
        ("none of them", "yes"),
        ("", "yes"),
    ],
)
def test_an_answer_to_pope(answer: str, counts: str) -> None:
    assert protocol.yes_or_no(answer) == counts


def test_questions_of_mmbench() -> None:
    doc = {"question": "Which?", "hint": "nan", "A": "x", "B": "y", "C": "nan", "D": None}
    letters = {"post_prompt": "\nThe letter."}
    assert protocol.mmbench_question(doc, letters) == "Which?\nA. x\nB. y\nThe letter."
    doc["hint"] = "Look."
    assert protocol.mmbench_question(doc, letters).startswith("Look.\nWhich?\n")


def test_the_conversation_has_the_system_prompt_of_vicuna() -> None:
    doc = {"question": "What is x?", "image": PIL.Image.new("L", (4, 2))}
    system, user = protocol.mmvet(doc)
    assert system["content"][0]["text"].startswith("A chat between a curious user")
    picture, text = user["content"]
    assert picture["url"].size == (4, 4)
    assert text == {"type": "text", "text": "What is x?"}


def test_the_submission_of_mm_vet(tmp_path: Path) -> None:
    class Args:
        output_path = str(tmp_path)

    results = [
        protocol.mmvet_results({"question_id": name}, ["x"])["submission"] for name in ("v1_0", "1")
    ]
    protocol.mmvet_submission(results, Args())  # type: ignore[arg-type]
    written = (tmp_path / "submissions" / "llava_mmvet.json").read_text()
    assert written == '{\n  "v1_0": "x",\n  "v1_1": "x"\n}'


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (None, r"pip install 'pore-vlm\[eval\]' \(missing: lmms_eval"),
        ("raise RuntimeError('operator torchvision::nms does not exist')", "pip uninstall torchv"),
    ],
)
def test_what_to_install_is_said(
    code: str | None, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without lmms-eval, and with a torchvision that was built for another torch."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "lmms_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "pore.evaluation.harness.lmms", raising=False)
    if code is None:
        monkeypatch.setitem(sys.modules, "lmms_eval", None)
    else:
        (tmp_path / "lmms_eval").mkdir()
        (tmp_path / "lmms_eval" / "__init__.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=told):
        import_module("pore.evaluation.harness.lmms")

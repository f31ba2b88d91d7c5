"""Every script of examples/ runs: on the embedded model, or on a tiny one of its family."""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
import transformers

import pore
from helpers.calibrations import make_processor
from helpers.checkpoint import save_checkpoint
from helpers.models import IMAGE, tiny_llava
from pore.embedded import scenes
from processors import internvl, qwen_vl
from processors.base import TEXT, Kind

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOK = EXAMPLES / "first_steps.ipynb"
QUESTION = "What color is the circle?"


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    """Scenes of the embedded model, as files in a folder, and a JSONL file beside it."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    found, lines = [], []
    for i, (scene, question) in enumerate(scenes.questions("calibration", 12)):
        found.append(str(folder / f"{i}.png"))
        PIL.Image.fromarray(scene.image).save(found[-1])
        texts = f'"question": "{question.question}", "answer": "{question.answer}"'
        lines.append(f'{{"image": "pictures/{i}.png", {texts}}}')
    (tmp_path / "samples.jsonl").write_text("\n".join(lines))
    return found


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., list[str]]:
    """Runs a script with arguments; the lines that it prints."""
    for kind in (pore.Pruner, pore.Family):
        monkeypatch.setattr(kind, "registry", dict(kind.registry))

    def one(name: str, *arguments: object) -> list[str]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return one


def on_tiny(kind: Kind, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model of a family in a folder; its processor needs no torchvision."""
    monkeypatch.setitem(TEXT, "num_hidden_layers", 3)
    processor = kind.processor()
    kind.model(processor.tokenizer).save_pretrained(folder)
    auto: Any = transformers.AutoProcessor
    monkeypatch.setattr(auto, "from_pretrained", lambda *_: processor)
    return folder


def test_every_example_has_a_test_and_a_line() -> None:
    names = {path.name for path in EXAMPLES.glob("*.py")}
    called = set(re.findall(r'\brun\(\s*"(\w+\.py)"', Path(__file__).read_text()))
    assert called == names
    notebooks = {path.name for path in EXAMPLES.glob("*.ipynb")}
    assert notebooks == {NOTEBOOK.name}
    listed = re.findall(r"\]\((\w+\.(?:py|ipynb))\)", (EXAMPLES / "README.md").read_text())
    assert sorted(listed) == sorted(names | notebooks)


def test_the_notebook_is_kept_with_its_outputs() -> None:
    assert NOTEBOOK.stat().st_size < 500_000
    cells = [c for c in json.loads(NOTEBOOK.read_text())["cells"] if c["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "execute_result"}
    assert not any(output.get("name") == "stderr" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4


@pytest.mark.slow
def test_the_notebook_runs() -> None:
    nbformat = pytest.importorskip("nbformat", reason="needs the extra notebook: .ci/wrapped")
    nbclient = pytest.importorskip("nbclient", reason="needs the extra notebook: .ci/wrapped")
    notebook = nbformat.read(NOTEBOOK, 4)
    nbclient.NotebookClient(notebook, timeout=500, kernel_name="python3").execute()


def test_llava(run: Any, pictures: list[str]) -> None:
    out = run("llava.py", pictures[0], QUESTION, "--model", pore.embedded_model(), "--keep", 36)
    assert [line.split(":")[0] for line in out[:2]] == ["whole", "pruned"]
    assert "144 -> 36" in out[4]


def test_qwen_vl(
    run: Any, pictures: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (kind,) = (kind for kind in qwen_vl.KINDS if kind.name == "Qwen2.5-VL")
    folder = on_tiny(kind, tmp_path / "tiny", monkeypatch)
    out = run("qwen_vl.py", pictures[0], "look", "--model", folder)
    assert out[-1] == "9 visual tokens, 2 kept"  # 96 pixels are three patches of 28


def test_internvl(
    run: Any, pictures: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (kind,) = internvl.KINDS
    folder = on_tiny(kind, tmp_path / "tiny", monkeypatch)
    out = run("internvl.py", pictures[0], "look", "--model", folder)
    assert "256 -> 64" in out[-1]


def test_video(run: Any, tmp_path: Path) -> None:
    (sample,) = pore.load_samples("embedded:fresh:video", limit=1)
    for number, frame in enumerate(sample.image.frames):
        frame.save(tmp_path / f"{number}.png")
    out = run("video.py", tmp_path, sample.question, "--model", "embedded-video", "--frames", 8)
    assert "288 -> 72" in out[-1]


def test_chat(run: Any, pictures: list[str]) -> None:
    questions = (QUESTION, "Is there a red star?", "How many objects are red?")
    out = run("chat.py", pictures[0], *questions, "--model", pore.embedded_model(), "--keep", 36)
    assert [line.split(" -> ")[0] for line in out[:3]] == list(questions)
    first, last = map(int, re.findall(r"(\d+) (?:tokens in layer 0|in 7)", out[3]))
    assert first - last == 144 - 36


def test_batch(run: Any, pictures: list[str]) -> None:
    model = ("--model", pore.embedded_model(), "--keep", 36, "--batch-size", 2)
    out = run("batch.py", QUESTION, *pictures[:3], *model)
    assert [line.split(": ")[0] for line in out] == pictures[:3]
    assert all(line.endswith("(36 of 144 tokens)") for line in out)


def test_calibrate_and_evaluate(run: Any, pictures: list[str], tmp_path: Path) -> None:
    model = ("--model", pore.embedded_model(), "--keep", 36)
    out = run(
        "calibrate.py", Path(pictures[0]).parent, QUESTION, *model, "--out", tmp_path / "own.json"
    )
    assert out[-1] in ("No P was written.", f"P is in {tmp_path / 'own.json'}")
    assert (tmp_path / "own.json").exists() == out[-1].startswith("P is in")
    pore.PositionBias.exponential(0.01, 144).save(tmp_path / "profile.json")
    out = run("evaluate.py", tmp_path / "samples.jsonl", tmp_path / "profile.json", *model)
    assert [line.split("  ")[0] for line in out] == ["whole", "FastV", "FastV + PoRe"]


def test_custom_method(run: Any, pictures: list[str]) -> None:
    model = ("--model", pore.embedded_model(), "--keep", 36)
    out = run("custom_method.py", pictures[0], QUESTION, *model)
    assert "144 -> 36" in out[-1]


def test_custom_family(run: Any, pictures: list[str], tmp_path: Path) -> None:
    plain = tiny_llava(dtype=torch.float32).config
    transformers.VipLlavaForConditionalGeneration(
        transformers.VipLlavaConfig(
            vision_config=plain.vision_config,
            text_config=plain.text_config,
            image_token_index=IMAGE,
            vision_feature_layers=[-2],
        )
    ).save_pretrained(tmp_path / "tiny")
    make_processor().save_pretrained(tmp_path / "tiny")
    model = ("--model", tmp_path / "tiny", "--keep", 4)
    out = run("custom_family.py", pictures[0], "w6", *model)
    assert out[0] == "keeping everything changes nothing: True"
    assert "16 -> 4" in out[-2]  # the last line says that FLOPs are of the decoder alone


def test_serving_client(run: Any, pictures: list[str], tmp_path: Path) -> None:
    pytest.importorskip("openai", reason="needs the extra serve: .ci/serve runs this")
    pytest.importorskip("fastapi", reason="needs the extra serve: .ci/serve runs this")
    pytest.importorskip("uvicorn", reason="needs the extra serve: .ci/serve runs this")
    from helpers.serving import running
    from pore.data.loading import load_model
    from pore.serving.app import App
    from pore.serving.running import Server
    from pore.serving.served import Served

    model, processor = load_model(str(save_checkpoint(tmp_path / "tiny")))
    served = Served("tiny", model, processor, lambda keep: pore.FastV(keep=keep), 8)
    with running(Server(App(served))) as address:
        asked = ("--model", "tiny", "--keep", 4, "--server", address)
        out = run("serving_client.py", pictures[0], "w6 w20", *asked)
    assert out[-1] == "4 of 16 visual tokens"

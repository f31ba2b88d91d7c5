"""The examples of the documents run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from types import ModuleType
from typing import Any
from urllib.parse import unquote

import pytest
import torch

import pore
from cases import PUBLISHED
from cases.base import text_config
from helpers.models import N, batch, prompt, tiny_llava
from helpers.unknown import my_vlm
from pore.cost.decoders import DecoderShape
from pore.cost.shapes import ModelShape
from pore.cost.towers import tower_of
from pore.families.registry import family_of, shape_of
from pore.methods.registry import methods

DOCS = Path(__file__).parents[1] / "docs"


def pages(root: Path) -> list[Path]:
    """Every document: in docs/, at the root, and where figures and examples lie."""
    found = [
        page for folder in (".", "benchmarks", "examples") for page in (root / folder).glob("*.md")
    ]
    return [*found, *(root / "docs").rglob("*.md")]


def example(page: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The first Python block of a page, as a module."""
    found = re.search(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    assert found
    module = ModuleType("example")
    monkeypatch.setitem(sys.modules, "example", module)  # where dataclasses look their types up
    exec(compile(found[1], page, "exec"), module.__dict__)
    return module


def test_the_readme_runs_and_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    page = (DOCS.parent / "README.md").read_text()
    code, printed = re.findall(r"```(?:python|text)\n(.*?)```", page, re.DOTALL)[:2]
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out == printed


def test_adding_a_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pore.Pruner, "registry", dict(pore.Pruner.registry))
    method = example("adding-a-method.md", monkeypatch).LargestNorm
    assert methods()["LargestNorm"] is method
    model, inputs = tiny_llava(), batch([prompt(3, 1, 5), prompt(2, 2, 4, 1)])
    with method(keep=5)(model) as run:
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert [len(image.kept) for sample in run.report for image in sample.images] == [5, 5, 5]


def test_adding_a_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pore.Family, "registry", dict(pore.Family.registry))
    family = example("adding-a-family.md", monkeypatch).MyVLM
    model = my_vlm(text_config("LlamaConfig"))
    assert type(family_of(model)) is family
    tokens = torch.tensor([[5, *[100] * 256, 6, *[100] * 256, 7]])
    inputs = {"input_ids": tokens, "pixel_values": torch.randn(2, 3, 64, 64).double()}
    with pore.FastV(keep=64)(model) as run:
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    images = run.report.samples[0].images
    assert [(image.grid, len(image.kept)) for image in images] == [((16, 16), 64)] * 2


def test_the_shape_of_a_family() -> None:
    """The example says what PaliGemma's own adapter does."""
    page = (DOCS / "adding-a-family.md").read_text()
    found = re.search(r"```python\n(    def shape.*?)```", page, re.DOTALL)
    assert found
    names: dict[str, Any] = {"tower_of": tower_of, "ModelShape": ModelShape}
    exec(dedent(found[1]), names)
    config = PUBLISHED["PaliGemma"]()
    decoder = DecoderShape.from_config(config.text_config)
    assert names["shape"](None, config, decoder) == shape_of(config)


def test_trained_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    page = example("trained-methods.md", monkeypatch)
    model = tiny_llava(dtype=torch.float32)
    inputs = batch([prompt(3, 1, 5), prompt(2, 2, 4, 1)], dtype=torch.float32)
    states, attention = page.record(model, [inputs], layer=2)
    assert states.shape == (3 * N, 32)
    torch.manual_seed(0)
    head = page.Head(model.config.text_config.hidden_size)
    losses = page.fit(head, states, attention)
    assert losses[-1] < 0.2 * losses[0]
    with torch.no_grad(), pore.Scored(keep=5, scorer=head, layer=2)(model) as run:
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert [len(image.kept) for sample in run.report for image in sample.images] == [5, 5, 5]


def test_no_document_has_the_marks_of_a_merge() -> None:
    root = DOCS.parent
    for page in pages(root):
        assert not re.search(r"^(<{7}|={7}|>{7})( |$)", page.read_text(), re.MULTILINE), page.name


def test_links_of_the_documents_lead_somewhere() -> None:
    root = DOCS.parent
    for page in pages(root):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / unquote(target)).exists(), f"{page.name}: {target}"


def test_what_the_documents_call_is_there() -> None:
    """After `import pore` alone: here other tests may have imported more."""
    root, names = DOCS.parent, set()
    for page in pages(root):
        names |= set(re.findall(r"\bpore((?:\.[A-Za-z_]+)+)\(", page.read_text()))
    assert ".FastV" in names
    code = f"import pore; {'; '.join('pore' + name for name in sorted(names))}"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr


@pytest.mark.slow
def test_import_is_light() -> None:
    """`import pore` and the help of the command line load nothing heavy; nor, but for torch and
    transformers, do the methods."""
    heavy = {"matplotlib", "scipy", "datasets", "sklearn", "transformers.modeling_utils"}
    terminal, models = {"typer", "rich"}, {"numpy", "torch", "transformers"}
    for first, unwanted in {
        "import pore": heavy | terminal | models,
        "import pore.cli.app": heavy | models,
        "import torch, transformers, pore; pore.FastV": heavy | terminal,
    }.items():
        code = f"import sys; {first}; print(sorted({unwanted} & set(sys.modules)))"
        command = [sys.executable, "-c", code]
        out = subprocess.run(command, capture_output=True, text=True, check=True)
        assert out.stdout.strip() == "[]", first


def test_the_version_is_the_same_wherever_it_is_written() -> None:
    for name, line in ("CITATION.cff", "version: {}"), ("pyproject.toml", 'version = "{}"'):
        assert line.format(pore.__version__) in (DOCS.parent / name).read_text().splitlines()

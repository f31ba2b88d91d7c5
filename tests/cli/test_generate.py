"""`pore generate`, on a tiny checkpoint folder."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import PIL.Image
import pytest
import torch

import pore
from helpers.checkpoint import save_video, save_video_checkpoint
from helpers.command_line import run
from pore.data.loading import load_model
from pore.data.prompts import build_inputs
from pore.data.samples import Sample


def test_generate_draws_what_is_kept(
    model: Path, data: Path, profile: Path, tmp_path: Path
) -> None:
    draw = tmp_path / "kept.png"
    common = ("generate", data / "0.png", "w6 w7", "-m", model, "--max-new-tokens", "3")
    found = run(*common, "--keep", "25%", "--reweight", profile, "--draw", draw)
    assert "16 -> 4" in found.output
    with PIL.Image.open(draw) as image:
        assert image.format == "PNG"
    as_json = json.loads(run(*common, "--keep", "4", "--json").stdout)
    (image_report,) = as_json["report"]["samples"][0]["images"]
    assert len(image_report["kept"]) == 4


def test_generate_about_several_images(model: Path, data: Path, tmp_path: Path) -> None:
    draw, alone = tmp_path / "both.png", tmp_path / "one.png"
    common = ("-m", model, "--max-new-tokens", "2", "--keep", "4")
    both = ("generate", data / "0.png", data / "1.png", "w6 w7", *common)
    found = json.loads(run(*both, "--json", "--draw", draw).stdout)["report"]["samples"]
    assert [len(image["kept"]) for sample in found for image in sample["images"]] == [4, 4]
    run(*both, "--reweight", "rope")
    run("generate", data / "0.png", "w6 w7", *common, "--draw", alone)
    with PIL.Image.open(draw) as two, PIL.Image.open(alone) as one:
        assert two.height > 1.6 * one.height
    gif = (*both, "--draw", tmp_path / "kept.gif")
    assert "0.png is an image; name a PNG file" in run(*gif, code=1).stderr


def test_generate_draws_by_chance(model: Path, data: Path) -> None:
    common = ("generate", data / "0.png", "w6", "-m", model, "--max-new-tokens", "8", "--json")
    hot = (*common, "--temperature", "5")
    one, same, other = (run(*hot, "--seed", seed).stdout for seed in (1, 1, 2))
    assert one == same != other
    greedy = run(*common).stdout
    assert run(*hot, "--top-p", "0.000001").stdout == greedy  # only the likeliest token is left
    assert "above 0 and up to 1" in run(*hot, "--top-p", "2", code=1).stderr
    found = run(*common, "--top-p", "0.9", code=1)
    assert "give a --temperature above 0 too" in found.stderr


def test_the_answer_is_printed_even_if_it_cannot_be_drawn(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    common = ("generate", data / "0.png", "w6", "-m", model, "--max-new-tokens", "1", "--draw")
    found = run(*common, tmp_path / "file" / "kept.png", code=1)
    assert "16 -> 4" in found.stdout
    assert "The question was answered, but" in found.stderr
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    found = run(*common, tmp_path / "kept.png", code=1)
    assert "16 -> 4" in found.stdout
    assert "Drawing needs matplotlib" in found.stderr


def test_generate_unpruned_equals_keeping_all(model: Path, data: Path) -> None:
    common = ("generate", data / "0.png", "w6", "-m", model, "--max-new-tokens", "4", "--json")
    plain = json.loads(run(*common, "--unpruned").stdout)
    assert plain["report"] is None
    assert json.loads(run(*common, "--keep", "1.0").stdout)["answer"] == plain["answer"]


def test_generate_with_a_bias_by_name(model: Path, data: Path) -> None:
    common = ("generate", data / "0.png", "w6", "-m", model, "--max-new-tokens", "1")
    run(*common, "--reweight", "rope")
    assert "none.json" in run(*common, "--reweight", "none.json", code=1).stderr
    found = run(*common, "--reweight", "published:himap/gqa", code=1)
    assert "measured under other conditions: model" in found.stderr
    allowed = ("--reweight", "published:himap/gqa", "--allow", "model")
    assert "the profile has 576, here are 16" in run(*common, *allowed, code=1).stderr


def test_a_bias_of_another_template_is_refused(
    model: Path, data: Path, profile: Path, tmp_path: Path
) -> None:
    document = json.loads(profile.read_text())
    document["provenance"]["template"] = "Q: {question} A:"
    del document["checksum"]
    other = tmp_path / "other.json"
    other.write_text(json.dumps(document))
    common = ("generate", data / "0.png", "w6", "-m", model, "--max-new-tokens", "1")
    found = run(*common, "--reweight", other, code=1)
    assert "template: the profile says 'Q: {question} A:'" in found.stderr
    run(*common, "--reweight", other, "--allow", "template")
    assert "choose from" in run(*common, "--reweight", other, "--allow", "n0", code=1).stderr


def test_generate_sets_any_setting(model: Path, data: Path) -> None:
    common = ("generate", data / "0.png", "w6", "-m", model, "--max-new-tokens", "1", "--json")
    random = (*common, "--method", "random", "--layer", "3")
    one, same, other = (run(*random, "--set", f"seed={seed}").stdout for seed in (1, 1, 5))
    assert one == same != other
    found = run(*random, "--set", "sede=1", code=1)
    assert "Random has no setting 'sede'; it has keep, layer, seed." in found.stderr
    run(*common, "--method", "vtc-cls", "--set", "start_layer=0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pore.VTCCLS, "usual", lambda *_: None)
        run(*common, "--method", "vtc-cls", "--set", "start_layer=0")
        found = run(*common, "--method", "vtc-cls", code=1)
    assert "VTC-CLS needs more than a budget: --set start_layer=..." in found.stderr


@pytest.mark.slow
def test_generate_with_a_guide(model: Path, data: Path, tmp_path: Path) -> None:
    """The model guides itself, or that of another folder does, which here is the same."""
    other = shutil.copytree(model, tmp_path / "guide")
    common = ("generate", data / "0.png", "w6", "-m", model, "--method", "SGL", "--keep", "4")
    itself, guided = (
        json.loads(run(*common, "--json", *more).stdout) for more in ((), ("--guide", other))
    )
    assert itself == guided
    vlm, processor = load_model(str(model))
    inputs = build_inputs(processor, [Sample("0", data / "0.png", "w6")])
    guide = pore.guide(vlm, inputs, max_new_tokens=64)
    layer = int(0.4 * vlm.config.text_config.num_hidden_layers)
    with torch.inference_mode(), pore.SGL(4, layer=layer, guide=guide)(vlm) as pruned:
        vlm.generate(**inputs, max_new_tokens=64, do_sample=False)
    assert itself["report"] == json.loads(json.dumps(pruned.report.to_dict()))


def test_generate_by_the_mean_over_layers(model: Path, data: Path) -> None:
    common = ("generate", data / "0.png", "w6", "-m", model, "--max-new-tokens", "1", "--json")
    found = json.loads(run(*common, "--keep", "10", "--average").stdout)["report"]["samples"][0]
    assert found["mean_visual_tokens"] == 10  # (2 · 16 + 3 · 6) / 5
    assert len(found["images"][0]["kept"]) == 6
    assert "averages 7 at least" in run(*common, "--keep", "4", "--average", code=1).stderr


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model of videos, and a video."""
    folder = tmp_path_factory.mktemp("film")
    return save_video_checkpoint(folder / "model"), save_video(folder)


def test_generate_answers_about_a_video(film: tuple[Path, Path], tmp_path: Path) -> None:
    model, video = film
    common = ("generate", video, "w6 w7", "-m", model, "--max-new-tokens", "2", "--frames", "4")
    strip, moving = tmp_path / "kept.png", tmp_path / "kept.gif"
    evs = (*common, "--method", "EVS", "--keep", "50%")
    assert "16 -> 8" in run(*evs, "--draw", strip).output
    with PIL.Image.open(strip) as image:
        assert image.format == "PNG"
        assert image.width > 2 * image.height
    run(*common, "--method", "random", "--keep", "25%", "--draw", moving)
    with PIL.Image.open(moving) as image:
        assert image.n_frames == 4
    run(*common, "--unpruned", "--draw", strip)
    assert "16 -> 4" in run(*common, "--reweight", "rope").output


def test_generate_refuses_what_is_no_video(
    film: tuple[Path, Path], model: Path, data: Path
) -> None:
    _, video = film
    assert "takes no videos" in run("generate", video, "w6", "-m", model, code=1).stderr
    found = run("generate", data / "0.png", "w6", "-m", model, "--draw", "kept.gif", code=1)
    assert "0.png is an image; name a PNG file" in found.stderr

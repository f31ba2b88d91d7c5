"""Whose results are these? Nothing is resumed, merged, applied or handed out for another's."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

import pore
from helpers.calibrations import HOSTS, LAYERS, K, broken_after, make_processor
from helpers.models import N, tiny_llava
from helpers.survey import ABOUT, SETTINGS
from helpers.whose import Call, by_guide, by_host, by_layer, ways
from pore.bench.results import Spread
from pore.calibration.calibrating import calibrate
from pore.data.loading import load_model
from pore.data.samples import Sample
from pore.engine.pruner import Pruner
from pore.errors import CalibrationError, ProfileMismatchError, StaleCheckpointError
from pore.evaluation import own, survey
from pore.evaluation.files import read_records
from pore.evaluation.results import SurveyResult
from pore.evaluation.reweighting import reweighted
from pore.families.registry import shape_of


def another_model(call: Call) -> None:
    folder = call.folder.parent / "second" / "tiny"
    tiny_llava(layers=LAYERS, seed=1, dtype=torch.float32).save_pretrained(folder)
    make_processor(do_center_crop=False).save_pretrained(folder)
    call.model, call.processor = load_model(str(folder))


def one_weight(call: Call) -> None:
    with torch.no_grad():
        call.model.model.vision_tower.encoder.layers[0].mlp.fc1.bias[3] += 1e-3


def one_weight_unseen(call: Call) -> None:
    call.model.model.language_model.layers[0].mlp.up_proj.weight.data[2, 1] *= 1.01


def the_config(call: Call) -> None:
    call.model.config.vision_feature_layer = -1


def swap(folder: Path) -> None:
    one, other = folder / "0.png", folder / "1.png"
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)


def pictures_in_place(call: Call) -> None:
    swap(call.folder / "pictures")


def one_pixel_of_an_image(call: Call) -> None:
    pixels = np.asarray(call.samples[1].load_image()).copy()
    pixels[0, 0, 0] ^= 128
    image = PIL.Image.fromarray(pixels)
    assert isinstance(call.samples[1].image, PIL.Image.Image)
    call.samples[1] = replace(call.samples[1], image=image)


def the_words_of_the_tokenizer(call: Call) -> None:
    tokenizer = json.loads(call.processor.tokenizer.backend_tokenizer.to_str())
    words = tokenizer["model"]["vocab"]
    words["USER:"], words["w6"] = words["w6"], words["USER:"]
    from tokenizers import Tokenizer

    call.processor.tokenizer._tokenizer = Tokenizer.from_str(json.dumps(tokenizer))


def the_image_processor(call: Call) -> None:
    call.processor.image_processor.image_mean = [0.5, 0.5, 0.5]


def the_template(call: Call) -> None:
    call.processor.chat_template = call.processor.chat_template.replace("USER:", "w9")


def the_way_it_generates(call: Call) -> None:
    call.model.generation_config.repetition_penalty = 3.0


CHANGES: list[tuple[Callable[[Call], None], str]] = [
    (another_model, "weights is"),
    (one_weight, "weights is"),
    (one_weight_unseen, "weights is"),
    (the_config, r"config is \{'vision_feature_layer': -1\} here"),
    (pictures_in_place, "another picture now.*: 0/0, 0/1"),
    (one_pixel_of_an_image, r"1 of them have another picture now.*: 0/1\."),
    (the_words_of_the_tokenizer, "other tokens: 0/0, 0/1, 0/2, ..."),
    (the_image_processor, "processor is {'image_mean'"),
    (the_template, "template is"),
]


SOON = (one_weight, pictures_in_place, the_template)
"""A change of a model, of samples and of a processor: the others go the same ways, and are slow."""


def case(*given: Any, soon: bool) -> Any:
    return pytest.param(*given, marks=() if soon else pytest.mark.slow)


def as_images(call: Call) -> None:
    """Pictures as loaded images, where a change is to be made to one."""
    call.samples = [replace(s, image=s.load_image()) for s in call.samples]


class TestResume:
    @pytest.mark.parametrize(
        ("way", "change", "words"),
        [
            case(way, change, words, soon=way is by_layer or change in SOON)
            for way in (by_layer, by_host, by_guide)
            for change, words in CHANGES
        ],
    )
    def test_what_changed_is_refused(
        self, call: Call, way: Any, change: Any, words: str, tmp_path: Path
    ) -> None:
        if change is one_pixel_of_an_image:
            as_images(call)
        file = tmp_path / "state.json"
        with pytest.raises(KeyboardInterrupt):
            way(call, broken_after(call.samples, 6, KeyboardInterrupt()), checkpoint=file)
        saved = file.read_bytes()
        change(call)
        with pytest.raises(StaleCheckpointError, match=rf"(?s){words}.*delete .*state\.json"):
            way(call, call.samples, checkpoint=file)
        assert file.read_bytes() == saved

    @ways
    def test_what_is_the_same_goes_on(self, call: Call, way: Any, tmp_path: Path) -> None:
        """From elsewhere, loaded anew, with another kernel, pictures moved."""
        file, whole = tmp_path / "state.json", way(call, call.samples)
        with pytest.raises(KeyboardInterrupt):
            way(call, broken_after(call.samples, 6, KeyboardInterrupt()), checkpoint=file)
        elsewhere = tmp_path / "elsewhere"
        shutil.move(call.folder, elsewhere)
        call.model, call.processor = load_model(str(elsewhere / "tiny"))
        call.samples = [
            replace(s, image=elsewhere / "pictures" / Path(str(s.image)).name) for s in call.samples
        ]
        assert way(call, call.samples, checkpoint=file) == whole

    def test_a_bad_sample_that_was_mended(self, call: Call, tmp_path: Path) -> None:
        file, path = tmp_path / "state.json", Path(str(call.samples[1].image))
        data = path.read_bytes()
        path.unlink()
        by_layer(call, call.samples, checkpoint=file, limit=4, max_bad=0.5)
        by_layer(call, call.samples, checkpoint=file, max_bad=0.5)
        path.write_bytes(data)
        with pytest.raises(StaleCheckpointError, match="1 of them have another picture now"):
            by_layer(call, call.samples, checkpoint=file, max_bad=0.5)


class TestMerge:
    @pytest.mark.parametrize(
        ("way", "change"),
        [
            case(way, change, soon=way is by_layer or change in SOON)
            for way in (by_layer, by_host, by_guide)
            for change in (another_model, one_weight, one_weight_unseen, the_config)
        ],
    )
    def test_another_model_is_refused(self, call: Call, way: Any, change: Any) -> None:
        one = way(call, call.samples[:4])
        change(call)
        with pytest.raises(CalibrationError, match=r"(weights|config) is .* here and .* there"):
            one.merge(way(call, call.samples[4:]))

    @ways
    @pytest.mark.parametrize("loaded", [False, True])
    def test_a_sample_in_both_is_refused(
        self, call: Call, way: Any, loaded: bool, tmp_path: Path
    ) -> None:
        if loaded:
            as_images(call)
        one, other, third = (way(call, call.samples[a:b]) for a, b in ((0, 4), (3, 7), (7, 9)))
        with pytest.raises(CalibrationError, match="share 1 samples, which would count twice"):
            one.merge(other)
        # Also of what was saved, and of what was merged before.
        one = type(one).load(one.save(tmp_path / "one.json"))
        merged = one.merge(third)
        merged = type(one).load(merged.save(tmp_path / "merged.json"))
        with pytest.raises(CalibrationError, match="share 1 samples"):
            merged.merge(other)
        with pytest.raises(CalibrationError, match="share 1 samples"):
            other.merge(merged)

    def test_other_pictures_under_the_same_ids_are_others(self, call: Call) -> None:
        one = by_layer(call, call.samples[:3])
        others = [
            replace(s, image=t.image)
            for s, t in zip(call.samples[:3], call.samples[3:6], strict=True)
        ]
        assert one.merge(by_layer(call, [*others, call.samples[6]])).count == 7

    def test_the_same_pictures_under_other_ids_are_told(
        self, call: Call, caplog: pytest.LogCaptureFixture
    ) -> None:
        one = by_layer(call, call.samples[:3])
        named = [replace(call.samples[2], id="other name"), call.samples[3]]
        with caplog.at_level(logging.WARNING, "pore.calibration"):
            assert one.merge(by_layer(call, named)).count == 5
        assert "share 1 samples with the same picture and question" in caplog.text


class TestProfile:
    """P is refused for another model of the same name, and says how to use it all the same."""

    @pytest.mark.parametrize(
        ("name", "change"),
        [
            case(name, change, soon=name == "FastV" or change in SOON)
            for name in HOSTS
            for change in (another_model, one_weight, the_config)
        ],
    )
    def test_every_host(self, call: Call, name: str, change: Any) -> None:
        host = pore.methods()[name].usual(4, shape_of(call.model.config))
        assert host is not None
        found = calibrate(call.model, call.processor, call.samples[:4], host=host, batch_size=4)
        biases = [pore.PositionBias.from_json(b.to_json()) for b in found.fit("empirical")]
        with reweighted(host, biases)(call.model):
            pass
        change(call)
        what = "config" if change is the_config else "weights"
        with pytest.raises(ProfileMismatchError, match=rf"(?s){what}.*allowing\('{what}'\)"):
            reweighted(host, biases)(call.model).__enter__()
        for allowed in (what, "model", "revision"):
            with reweighted(host, [bias.allowing(allowed) for bias in biases])(call.model):
                pass

    @pytest.mark.parametrize("change", [another_model, one_weight, the_config])
    def test_a_guide(self, call: Call, change: Any) -> None:
        bias = by_guide(call, call.samples[:4]).fit("empirical")
        from pore.data.prompts import build_inputs

        inputs = build_inputs(call.processor, call.samples[:2])

        def pruner(bias: pore.PositionBias) -> pore.SGL:
            made = pore.guide(call.model, inputs, max_new_tokens=1)
            return pore.SGL(4, layer=1, guide=made, reweight=bias)

        with pruner(bias)(call.model):
            pass
        change(call)
        with pytest.raises(
            ProfileMismatchError, match=r"(weights|config): the profile says|config\."
        ):
            pruner(bias)(call.model).__enter__()
        with pruner(bias.allowing("model"))(call.model):
            pass

    def test_another_name_is_told_once(self, call: Call) -> None:
        bias = by_layer(call, call.samples[:4]).fit("empirical")
        another_model(call)
        call.model.config.name_or_path = "some/other"
        with pytest.raises(ProfileMismatchError) as raised:
            pore.FastV(4, layer=K, reweight=bias)(call.model).__enter__()
        assert "model: the profile says 'tiny'" in str(raised.value)
        assert "weights" not in str(raised.value)
        assert "allowing('model')" in str(raised.value)

    def test_another_number_format_passes(self, call: Call) -> None:
        bias = by_layer(call, call.samples[:4]).fit("empirical")
        half = copy.deepcopy(call.model).to(torch.bfloat16)
        with pore.FastV(4, layer=K, reweight=bias)(half):
            pass

    def test_weights_are_read_only_where_p_knows_them(
        self, call: Call, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bias = by_layer(call, call.samples[:4]).fit("empirical")
        unknown = replace(bias, provenance=replace(bias.provenance, weights=None))

        def read(_: Any) -> str:
            raise AssertionError("the weights were read")

        monkeypatch.setattr(pore.identity, "_read", read)
        for one in (
            unknown,
            bias,
            bias.allowing("weights"),
            pore.PositionBias.rope(N, head_dim=8, text_tokens=3),
        ):
            with pore.FastV(4, layer=K, reweight=one)(call.model):  # known since calibration
                pass
        one_weight(call)
        with pore.FastV(4, layer=K, reweight=unknown)(call.model):
            pass


class TestSurvey:
    """All methods in one folder, called again after something has changed."""

    @pytest.fixture(autouse=True)
    def _two_hosts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Pruner, "registry", {"FastV": pore.FastV, "SGL": pore.SGL})

    @staticmethod
    def run(
        call: Call, out: Path, test: list[Sample] | None = None, timing: bool = False
    ) -> SurveyResult:
        return survey.run(
            call.model,
            call.processor,
            calibration=call.samples[:5],
            test=test or call.samples[5:],
            out=out,
            settings=replace(SETTINGS, keeps=(4,), kind="empirical", timing=timing),
            about=ABOUT,
        )

    @pytest.mark.parametrize(
        "change",
        [
            *(case(one, soon=one in (one_weight, pictures_in_place)) for one, _ in CHANGES),
            case(the_way_it_generates, soon=False),
        ],
    )
    @pytest.mark.slow
    @pytest.mark.in_ci(3)
    def test_all_is_asked_anew(
        self, call: Call, change: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if change is one_pixel_of_an_image:
            as_images(call)
        asked: list[str] = []
        evaluate = own.evaluate

        def counted(*args: Any, **given: Any) -> Any:
            found = evaluate(*args, **given)
            if given["part"].start == 0:  # a call for every batch
                asked.append(found.label)
            return found

        monkeypatch.setattr(own, "evaluate", counted)
        before = self.run(call, tmp_path / "out", test=call.samples)
        assert len(asked) == 5
        self.run(call, tmp_path / "out", test=call.samples)
        assert len(asked) == 5  # the same again asks nothing
        change(call)
        after = self.run(call, tmp_path / "out", test=call.samples)
        assert len(asked) == 10
        fresh = self.run(call, tmp_path / "fresh", test=call.samples)
        assert [o.answers for o in after.outcomes] == [o.answers for o in fresh.outcomes]
        assert after.records == fresh.records == read_records(tmp_path / "out" / "results.json")
        assert after.biases == fresh.biases
        if change in (another_model, one_weight, one_weight_unseen):
            assert before.records[0]["weights"] != after.records[0]["weights"]
            assert before.records[0]["model"] == after.records[0]["model"] == "tiny"

    @pytest.mark.slow
    def test_other_pictures_of_the_calibration(self, call: Call, tmp_path: Path) -> None:
        before = self.run(call, tmp_path / "out")
        pictures_in_place(call)  # of those that P is measured on
        sample = call.samples[0]
        call.samples[0] = replace(sample, image=call.samples[8].image)
        after, fresh = (self.run(call, tmp_path / name) for name in ("out", "fresh"))
        assert before.biases != after.biases == fresh.biases

    @pytest.mark.slow
    def test_times_are_of_the_model(
        self, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        timed: list[int] = []

        def measured(_: Any, __: Any, ___: Any, pruners: Any, ____: Any) -> list[Spread]:
            timed.append(len(pruners))
            return [Spread((float(len(timed)),))] * len(pruners)

        monkeypatch.setattr(survey, "time_some", measured)
        for count in (1, 1):
            self.run(call, tmp_path / "out", timing=True)
            assert len(timed) == count
        one_weight(call)
        self.run(call, tmp_path / "out", timing=True)
        assert len(timed) == 2

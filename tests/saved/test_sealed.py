"""Every file that is saved notices damage, and those of older versions are read as before."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pore
from helpers.calibrations import LAYERS, make_processor, make_samples, run
from helpers.models import tiny_llava
from pore._saved.seals import CHECKSUM, seal, sealed_list, sealed_text, unseal
from pore.bias.position_bias import PositionBias
from pore.bias.stages import load_biases, save_biases
from pore.calibration.calibrating import calibrate
from pore.calibration.host import HostCalibration
from pore.calibration.sums import Calibration
from pore.errors import PoreError
from pore.evaluation.files import Results, read_records, write_results
from pore.evaluation.outcome import questions_of, records_of
from pore.evaluation.running import evaluate
from pore.evaluation.store import Store, read_kept

OLD = Path(__file__).parents[1] / "saved_by_0_1"
numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | st.text() | numbers,
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)
few = settings(max_examples=40)
documents = st.dictionaries(st.text().filter(lambda key: key != CHECKSUM), values)


class TestSeal:
    @few
    @given(documents)
    def test_it_comes_back(self, document: dict[str, Any]) -> None:
        for text in (
            sealed_text(document),
            json.dumps(json.loads(sealed_text(document)), indent=3),
        ):
            assert unseal(json.loads(text)) == document
        (one, other) = json.loads(sealed_list([document, {}]))
        assert (unseal(one), unseal(other)) == (document, {})

    @few
    @given(documents, documents)
    def test_other_content_is_refused(self, one: dict[str, Any], other: dict[str, Any]) -> None:
        sealed = {**other, CHECKSUM: seal(one)[CHECKSUM]}
        if json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True):
            assert unseal(sealed) == one
        else:
            with pytest.raises(ValueError, match='remove the entry "checksum"'):
                unseal(sealed)

    @few
    @given(documents)
    def test_older_files_have_none(self, document: dict[str, Any]) -> None:
        assert unseal(document) == document

    def test_what_json_makes_of_it_is_sealed(self) -> None:
        assert unseal(json.loads(sealed_text({"a": (1, 2), "b": {3: None}}))) == {
            "a": [1, 2],
            "b": {"3": None},
        }


class Saved(NamedTuple):
    """A file with what reads it, or says that it cannot."""

    path: Path
    load: Callable[[Path], Any]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saved]:
    """One of every kind of file that pore reads again."""
    folder = tmp_path_factory.mktemp("saved")
    model, processor, samples = tiny_llava(layers=LAYERS), make_processor(), make_samples(3)
    single = run(model, processor, samples)
    several = calibrate(model, processor, samples, host=pore.PyramidDrop(4, (1, 2)), batch_size=4)
    outcomes = [evaluate(model, processor, samples, p) for p in (None, pore.FastV(4))]
    content = Results({}, questions_of(outcomes), records_of(outcomes))
    write_results(folder, content)
    store = Store(folder / "answers", {"pore": "1"})
    store.save(None, outcomes[0].answers)
    (answers,) = (folder / "answers").iterdir()
    timing = folder / "timing.json"
    timing.write_text(sealed_text({"settings": ["a"], "prefill_ms": [1.25]}))
    return {
        "profile": Saved(single.fit().save(folder / "profile.json"), PositionBias.load),
        "profiles": Saved(save_biases(folder / "profiles.json", several.fit()), load_biases),
        "calibration": Saved(single.save(folder / "calibration.json"), Calibration.load),
        "calibrations": Saved(several.save(folder / "host.json"), HostCalibration.load),
        "results": Saved(folder / "results.json", read_records),
        "answers": Saved(answers, lambda path: store.load(None, samples)),
        "timing": Saved(timing, lambda path: read_kept(path).get("prefill_ms")),
    }


KINDS = ["profile", "profiles", "calibration", "calibrations", "results", "answers", "timing"]


@pytest.mark.parametrize("count", [250, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_flipped_bit_is_refused_or_harmless(
    kind: str, count: int, saved: dict[str, Saved]
) -> None:
    path, load = saved[kind]
    whole = path.read_bytes()
    content = load(path)
    assert content
    bits = range(8 * len(whole))
    refused = 0
    try:
        for bit in np.random.default_rng(0).choice(bits, min(count, len(bits)), replace=False):
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            try:
                found = load(path)
            except PoreError:
                refused += 1
                continue
            # The answers of a survey are asked again, and its times measured again.
            assert found in (content, None), f"bit {bit % 8} of byte {bit // 8}"
            refused += found != content
    finally:
        path.write_bytes(whole)
    # What is harmless lies in the name of the checksum, or beyond a number's precision.
    assert refused > 0.9 * min(count, len(bits))
    assert load(path) == content


@pytest.mark.parametrize("kind", ["profile", "profiles", "calibration", "calibrations", "results"])
def test_a_file_changed_by_hand_says_how_to_go_on(
    kind: str, saved: dict[str, Saved], tmp_path: Path
) -> None:
    path, load = saved[kind]
    document = json.loads(path.read_text())
    first: Any = document.get("stages", document.get("results", [document]))[0]
    if kind == "results":
        first["method"] = "mine"
    else:
        first["provenance"]["source"] = "mine"
    edited = tmp_path / path.name
    edited.write_text(json.dumps(document))
    with pytest.raises(PoreError, match='remove the entry "checksum"') as raised:
        load(edited)
    assert path.name in str(raised.value)
    first.pop(CHECKSUM, None)
    document.pop(CHECKSUM, None)
    edited.write_text(json.dumps(document))
    assert "mine" in str(load(edited))


def test_other_files_carry_one_too(saved: dict[str, Saved], tmp_path: Path) -> None:
    from pore.bench.measuring import measure_calibration

    model = tiny_llava(layers=3)
    result = measure_calibration(model, 2, repeats=1, warmup=0)
    path = result.save(tmp_path / "bench.json")
    assert unseal(json.loads(path.read_text())) == json.loads(json.dumps(result.to_dict()))
    assert CHECKSUM in json.loads(path.read_text())


# -- files of version 0.1, before there were checksums and fingerprints ---------------------------


class TestOld:
    def test_profiles(self) -> None:
        bias = PositionBias.load(OLD / "profile.json")
        assert (bias.kind, len(bias), bias.provenance.layer) == ("spline", 16, 3)
        assert (bias.provenance.weights, bias.provenance.config) == (None, None)
        model = tiny_llava(layers=LAYERS)
        with pore.FastV(4, layer=3, reweight=bias)(model):
            pass
        biases = load_biases(OLD / "host-profile.json")
        assert [b.provenance.layer for b in biases] == [2, 3, 5]
        with pore.PyramidDrop(4, (1, 2, 4), reweight=biases)(model):
            pass

    @pytest.mark.parametrize("name", ["calibration", "host-calibration"])
    def test_calibrations_load_with_a_note(
        self, name: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
    ) -> None:
        with caplog.at_level(logging.WARNING, "pore.calibration"):
            found = HostCalibration.load(OLD / f"{name}.json")
        assert "does not say from which weights and pictures it comes" in caplog.text
        assert (found.count, found.stages[0].samples) == (13, None)
        old = load_biases(OLD / f"{name.replace('calibration', 'profile')}.json")
        for bias, was in zip(found.fit(old[0].kind), old, strict=True):  # fitted on another machine
            assert bias.values.tolist() == pytest.approx(was.values.tolist(), rel=1e-6)
            assert bias.provenance == was.provenance
        assert HostCalibration.load(found.save(tmp_path / "again.json")) == found

    def test_a_checkpoint_is_gone_on_with(
        self, caplog: pytest.LogCaptureFixture, tmp_path: Path
    ) -> None:
        file = tmp_path / "checkpoint.json"
        file.write_bytes((OLD / "checkpoint.json").read_bytes())
        model, processor, samples = tiny_llava(layers=LAYERS), make_processor(), make_samples(13)
        with caplog.at_level(logging.WARNING, "pore.calibration"):
            found = run(model, processor, samples, checkpoint=file)
        assert "cannot be checked" in caplog.text
        assert (found.seen, found.count) == (13, 13)
        # What the first four were is unknown, and stays so.
        assert (found.samples, found.provenance.weights) == (None, None)
        assert Calibration.load(file) == found
        with pytest.raises(pore.PoreError, match="not the first ones"):
            run(model, processor, samples[::-1], checkpoint=file)

    def test_merged_with_a_new_one(self, caplog: pytest.LogCaptureFixture) -> None:
        model, processor, others = tiny_llava(layers=LAYERS), make_processor(), make_samples(5, 1)
        old = Calibration.load(OLD / "calibration.json")
        new = run(model, processor, others)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "pore.calibration"):
            merged = old.merge(new)
        assert "unknown weights or samples" in caplog.text
        assert merged == new.merge(old)
        assert (merged.count, merged.samples, merged.provenance.weights) == (18, None, None)

    def test_results(self) -> None:
        records = read_records(OLD / "results.json")
        assert [record["method"] for record in records] == ["unpruned", "FastV"]
        assert {record["weights"] for record in records} == {None}

    def test_results_of_the_benchmarks(self) -> None:
        folder = Path(__file__).parents[2] / "benchmarks" / "results"
        for name in ("all", "questions", "questions-k1", "questions-k3"):
            assert read_records(folder / f"embedded-2100-{name}.json")

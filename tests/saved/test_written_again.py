"""Files of version 0.1, with checksums and fingerprints: read, and written again byte for byte.

They were written on the tiny model by the code before its rooms were rebuilt: what calibration,
profiles, an evaluation of all methods, the benchmarks and a report leave on disk.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pore
from helpers.calibrations import LAYERS, K, make_processor, make_samples
from helpers.models import tiny_llava
from pore._saved.seals import sealed_list, sealed_text, unseal
from pore.bench.results import (
    CalibrationResult,
    Rates,
    Roofline,
    SettingResult,
    SpeedResult,
    Spread,
    Timing,
)
from pore.bench.workload import Workload
from pore.bias.position_bias import PositionBias
from pore.bias.provenance import Provenance
from pore.bias.stages import load_biases, save_biases
from pore.calibration.host import HostCalibration
from pore.calibration.seen import digest, marks_of, tokens_of
from pore.calibration.sums import Calibration
from pore.cost.flops import Flops
from pore.data.prompts import build_inputs
from pore.data.samples import Sample
from pore.engine.pruner import Pruner
from pore.evaluation.differences import compare
from pore.evaluation.files import Results, read_records, write_differences, write_results
from pore.evaluation.guided import Guiding
from pore.evaluation.outcome import Answer, Outcome
from pore.evaluation.store import Store

OLD = Path(__file__).parents[1] / "saved_by_0_1b"
PROFILES = sorted((OLD / "profiles").glob("*.json"))
ONE = [path for path in PROFILES if path.name != "host.json"]
CALIBRATIONS = ["calibration", "checkpoint", "merged", "guide-calibration", "guide-checkpoint"]
HOSTS = ["host-calibration", "host-checkpoint"]


def plain(path: Path) -> Any:
    return json.loads(path.read_text())


def test_there_is_one_of_every_kind() -> None:
    schemas = [found.get("schema") for path in OLD.rglob("*.json") if (found := first(path))]
    assert set(schemas) == {
        *("pore.position_bias", "pore.position_biases", "pore.calibration"),
        *("pore.host_calibration", "pore.report", "pore.bench", "pore.bench.calibration"),
        None,  # results, answers, times
    }
    assert {plain(path)["kind"] for path in ONE} == {
        *("exponential", "exponential+offset", "spline", "empirical", "rope"),
    }


def first(path: Path) -> dict[str, Any]:
    found = plain(path)
    return found[0] if isinstance(found, list) else found  # type: ignore[no-any-return]


# -- profiles ------------------------------------------------------------------------------------


def holds(bias: PositionBias, document: dict[str, Any]) -> bool:
    """Whether a profile has just the values that the file has."""
    return (
        bias.values.tolist() == document["values"]
        and bias.kind == document["kind"]
        and (None if bias.grid is None else list(bias.grid)) == document["grid"]
        and bias.parameters == document["parameters"]
        and bias.r2 == document["r2"]
        and (None if bias.residuals is None else bias.residuals.tolist()) == document["residuals"]
        and bias.provenance == Provenance(**document["provenance"])
    )


@pytest.mark.parametrize("path", ONE, ids=lambda path: path.stem)
def test_a_profile(path: Path, tmp_path: Path) -> None:
    bias = PositionBias.load(path)
    assert holds(bias, plain(path))
    assert load_biases(path) == (bias,)
    again = bias.save(tmp_path / "p.json")
    assert save_biases(tmp_path / "q.json", [bias]).read_bytes() == again.read_bytes()
    if path.stem == "rope":  # whose whole numbers come back as floats
        assert PositionBias.load(again) == bias
    else:
        assert again.read_bytes() == path.read_bytes()
    assert PositionBias.from_pretrained(path) == PositionBias.from_json(path.read_bytes()) == bias


def test_profiles_of_several_stages(tmp_path: Path) -> None:
    path = OLD / "profiles" / "host.json"
    biases = load_biases(path)
    assert all(map(holds, biases, plain(path)["stages"]))
    assert len(biases) == 3
    assert save_biases(tmp_path / "p.json", biases).read_bytes() == path.read_bytes()


# -- calibrations --------------------------------------------------------------------------------


def sums_are(one: Calibration, document: dict[str, Any]) -> bool:
    """Whether a calibration has just the sums and the conditions that the file has."""
    return (
        [*one.sums] == document["sums"]
        and [*one.squares] == document["squares"]
        and (one.seen, one.count, one.dtype) == tuple(map(document.get, ("seen", "count", "dtype")))
        and one.provenance == Provenance(**document["provenance"])
        and [*one.passes] == document["passes"]
    )


def same_with_what_is_unknown(written: Path, path: Path) -> bool:
    """Whether a file has all that an older one has, and says of the rest that it is unknown."""

    def content(one: Path) -> list[dict[str, Any]]:
        document = plain(one)
        stages: list[dict[str, Any]] = document.get("stages", [document])
        return [{**stage, "checksum": None} for stage in stages]

    unknown = {"halves": None, "table": None, "heads": None}
    return content(written) == [{**stage, **unknown} for stage in content(path)]


@pytest.mark.parametrize("name", CALIBRATIONS)
def test_a_calibration(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = OLD / f"{name}.json"
    found = Calibration.load(path)
    assert sums_are(found, plain(path))
    assert not caplog.text
    assert same_with_what_is_unknown(found.save(tmp_path / "c.json"), path)
    host = HostCalibration.load(path)
    assert host.stages == (found,)
    assert same_with_what_is_unknown(host.save(tmp_path / "c.json"), path)


@pytest.mark.parametrize("name", HOSTS)
def test_a_calibration_of_several_stages(name: str, tmp_path: Path) -> None:
    path = OLD / f"{name}.json"
    found = HostCalibration.load(path)
    assert all(map(sums_are, found.stages, plain(path)["stages"]))
    assert len(found.stages) == 3
    assert same_with_what_is_unknown(found.save(tmp_path / "c.json"), path)


def test_what_is_fitted_to_them() -> None:
    found = Calibration.load(OLD / "calibration.json")
    for kind in ("exponential", "exponential+offset", "spline", "empirical"):
        saved = PositionBias.load(OLD / "profiles" / f"{kind.replace('+', '-')}.json")
        bias = found.fit(kind)  # type: ignore[arg-type]
        assert bias.values.tolist() == pytest.approx(saved.values.tolist(), rel=1e-6)
        assert (bias.provenance, bias.kind) == (saved.provenance, saved.kind)
    exponential = PositionBias.load(OLD / "profiles" / "exponential.json")
    resampled = PositionBias.load(OLD / "profiles" / "resampled.json")
    again = exponential.resample(grid=(5, 5))
    assert again.values.tolist() == pytest.approx(resampled.values.tolist(), rel=1e-12)
    assert (again.provenance, again.grid) == (resampled.provenance, (5, 5))


def test_which_samples_they_are_of() -> None:
    """Digests of samples are as they were: a checkpoint goes on, and nothing counts twice."""
    tokens, samples = tokens_of(make_processor()), make_samples(13)
    for name, settings in (("calibration", ""), ("guide-calibration", "answers of 2")):
        found = Calibration.load(OLD / f"{name}.json")
        assert found.passes == (digest(settings, samples),)
        assert found.samples == marks_of(tokens, samples)
    with pytest.raises(pore.PoreError, match="the same samples"):
        Calibration.load(OLD / "calibration.json").merge(Calibration.load(OLD / "merged.json"))


# -- an evaluation of all methods ----------------------------------------------------------------


class Told(Guiding):
    """A model that guides, of which only its layers and what its guides depend on are known."""

    def __init__(self, conditions: dict[str, Any]) -> None:
        self.itself = True
        self.told = conditions

    @property
    def conditions(self) -> dict[str, Any]:
        return self.told

    @property
    def looks_at(self) -> list[int]:
        return list(range(LAYERS))


def answered() -> list[tuple[Path, dict[str, Any], Pruner | None]]:
    """The files of answers, in the order of the results, with the methods that gave them."""
    folder = OLD / "survey"
    found: list[tuple[Path, dict[str, Any], Pruner | None]] = []
    slugs = [("fastv", "fastv-1"), ("sgl", "sgl-62ea7bd8"), ("pyramiddrop", "pyramiddrop-1-2-3")]
    profiles = {slug: load_biases(folder / "profiles" / f"{name}.json") for slug, name in slugs}
    for record in read_records(folder / "results.json"):
        slug = record["method"].lower()
        more = "-plus-pore" if record["reweight"] else ""
        digits = "[0-9a-f]" * 12
        (path,) = (folder / "answers").glob(f"{slug}{more}-{digits}.json")
        setting = unseal(plain(path))["setting"]
        pruner: Any = None
        if (method := setting["method"]) is not None:
            biases = profiles[slug]
            settings = {name: value for name, value in method.items() if name != "name"}
            settings["reweight"] = None
            if record["reweight"]:
                settings["reweight"] = biases if slug == "pyramiddrop" else biases[0]
            if slug == "sgl":
                settings["guide"] = Told(settings["guide"])
            settings = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
            pruner = pore.methods()[record["method"]](**settings)
        found.append((path, setting, pruner))
    return found


@pytest.fixture(scope="module")
def outcomes() -> list[Outcome]:
    times = unseal(plain(OLD / "survey" / "timing.json"))["prefill_ms"]
    found = []
    for (path, setting, pruner), ms in zip(answered(), times, strict=True):
        kept = store_of(path.parent, setting).load(pruner, samples_of(path))
        assert kept is not None
        answers, _ = kept
        whose = {name: setting[name] for name in ("model", "revision", "weights")}
        keep = None if pruner is None else 4
        found.append(Outcome(pruner, answers, prefill=Spread((ms,)), budget=keep, asked=whose))
    return found


def store_of(folder: Path, setting: dict[str, Any]) -> Store:
    return Store(folder, {name: value for name, value in setting.items() if name != "method"})


def samples_of(path: Path) -> list[Sample]:
    return [Sample(a["id"], None, a["question"]) for a in plain(path)["answers"]]


def test_answers(outcomes: list[Outcome], tmp_path: Path) -> None:
    """Found under the name that the digest of their conditions gives, and written there again."""
    for (path, setting, pruner), outcome in zip(answered(), outcomes, strict=True):
        entries = plain(path)["answers"]
        for answer, entry in zip(outcome.answers, entries, strict=True):
            kept = tuple(map(tuple, entry["kept"]))
            assert answer == Answer(**{**entry, "kept": kept})
        store_of(tmp_path, setting).save(pruner, outcome.answers)
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_results(outcomes: list[Outcome], tmp_path: Path) -> None:
    folder = OLD / "survey"
    old = plain(folder / "results.json")
    known = [{name: value for name, value in one.items() if name != "checksum"} for one in old]
    for records in (read_records(folder / "results.json"), [o.record() for o in outcomes]):
        path, _ = write_results(tmp_path, Results({}, (), [{**r, "scores": None} for r in records]))
        for again, before in zip(plain(path)["results"], known, strict=True):
            assert {name: again[name] for name in before} == before
        assert read_records(path) == [{**r, "scores": None} for r in records]


def test_differences(outcomes: list[Outcome], tmp_path: Path) -> None:
    hosts = {outcome.method: outcome for outcome in outcomes if outcome.reweight is None}
    found = [
        compare(hosts[outcome.method], outcome, seed=0, third=third)
        for outcome in outcomes
        if outcome.reweight is not None
        for third in dict.fromkeys([None, *(answer.third for answer in outcome.answers)])
    ]
    path = write_differences(tmp_path, [one.record() for one in found], {})
    old = [unseal(one) for one in plain(OLD / "survey" / path.name)]
    assert plain(path)["differences"] == [
        {"p" if name == "p_mcnemar" else name: value for name, value in one.items()} for one in old
    ]


@pytest.mark.parametrize("name", ["timing", "left_out"])
def test_what_else_lies_in_the_folder(name: str) -> None:
    path = OLD / "survey" / f"{name}.json"
    found = plain(path)
    if isinstance(found, list):
        text = sealed_list(map(unseal, found))
    else:
        text = sealed_text(unseal(found))
    assert text == path.read_text()


# -- benchmarks and reports ----------------------------------------------------------------------


def spread(found: dict[str, Any]) -> Spread:
    return Spread(tuple(found["samples"]))


def timing(found: dict[str, Any]) -> Timing:
    decode = found["decode_ms_per_token"]
    return Timing(
        spread(found["prefill_ms"]),
        spread(found["ttft_ms"]),
        None if decode is None else spread(decode),
        found["peak_memory_bytes"],
        found["cache_bytes"],
    )


def setting(found: dict[str, Any]) -> SettingResult:
    parts = ("count", "head", "projector", "tower", "probe")
    line = found["roofline"]
    return SettingResult(
        found["name"],
        found["settings"],
        tuple(found["tokens_per_layer"]),
        Flops(
            per_layer=tuple(found["flops"]["per_layer"]),
            **{part: found["flops"][part] for part in parts},
        ),
        timing(found),
        found["attainable"] and timing(found["attainable"]),
        Roofline(line["prefill_ms"], line["ttft_ms"], line["decode_ms_per_token"]),
    )


def speed(found: dict[str, Any]) -> SpeedResult:
    return SpeedResult(
        model=found["model"],
        workload=Workload(**found["workload"]),
        hardware=found["hardware"],
        versions=found["versions"],
        rates=Rates(*found["rates"].values()),
        settings=tuple(map(setting, found["settings"])),
        command=found["command"],
        date=found["date"],
    )


def cost_of_calibration(found: dict[str, Any]) -> CalibrationResult:
    return CalibrationResult(
        **{name: found[name] for name in ("model", "hardware", "versions", "layer", "date")},
        workload=Workload(**found["workload"]),
        calibration=spread(found["calibration_ms"]),
        attainable=spread(found["attainable_ms"]),
    )


@pytest.mark.parametrize(
    ("name", "made_of"), [("bench", speed), ("bench-calibration", cost_of_calibration)]
)
def test_benchmarks(name: str, made_of: Callable[..., Any], tmp_path: Path) -> None:
    path = OLD / f"{name}.json"
    result = made_of(unseal(plain(path)))
    assert result.save(tmp_path / "b.json").read_bytes() == path.read_bytes()


def test_a_report() -> None:
    model, processor, samples = tiny_llava(layers=LAYERS), make_processor(), make_samples(13)
    bias = PositionBias.load(OLD / "profiles" / "exponential.json")
    bias = bias.allowing("weights", "config", "processor")  # other versions draw other weights
    with pore.FastV(4, layer=K, reweight=bias)(model) as run:
        model(**build_inputs(processor, samples[:3], model.device, model.dtype))
    text = run.report.to_json() + "\n"
    assert text == (OLD / "report.json").read_text()

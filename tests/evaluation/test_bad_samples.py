"""Samples that cannot be asked: skipped by every method alike, counted, and told of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch

import pore
from helpers.calibrations import make_processor, make_samples
from helpers.models import tiny_llava
from pore.data.prompts import build_inputs
from pore.data.samples import Sample
from pore.engine.pruner import Pruner
from pore.errors import InputError
from pore.evaluation.batches import Batches, Skipped
from pore.evaluation.differences import compare
from pore.evaluation.guided import Guiding
from pore.evaluation.outcome import Answer, Outcome, common
from pore.evaluation.reweighting import rope_bias
from pore.evaluation.running import evaluate, time_prefill

BAD: dict[str, dict[str, Any]] = {
    "damaged": {"image": b"\xff\xd8 broken"},
    "missing": {"image": "/nowhere/i.png"},
    "no answer": {"answer": None},
    "NaN for an answer": {"answer": float("nan")},
    "too thin": {"image": PIL.Image.new("L", (1, 5000))},
    "refused by the processor": {"question": "what is <image> here"},
}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llava(dtype=torch.float32, tower_layers=4)


@pytest.fixture(scope="module")
def processor() -> Any:
    return make_processor(do_center_crop=False)


def method(name: str | None, model: Any, processor: Any) -> Pruner | None:
    return {
        None: None,
        "FastV": pore.FastV(keep=4),
        "FasterVLM": pore.FasterVLM(keep=4),
        "VisionZip": pore.VisionZip(keep=6),
        "Random": pore.Random(keep=4),
        "padding": pore.FastV(keep=4, suppress_padding=0.5),
        "SGL itself": pore.SGL(
            4, layer=2, guide=Guiding(model, processor, max_new_tokens=2, itself=True)
        ),
        "SGL": pore.SGL(
            4, layer=2, guide=Guiding(tiny_llava(dtype=torch.float32), processor, max_new_tokens=2)
        ),
    }[name]


METHODS = (None, "FastV", "FasterVLM", "VisionZip", "Random", "padding", "SGL itself", "SGL")


def with_bad(samples: list[Sample], bad: dict[int, str]) -> list[Sample]:
    return [
        replace(sample, **BAD[bad[i]]) if i in bad else sample for i, sample in enumerate(samples)
    ]


def seen(outcome: Outcome) -> list[Any]:
    return [(a.id, a.given, a.right, a.kept, a.flops) for a in outcome.answers]


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("place", [0, 3, 6])
def test_one_bad_sample_is_skipped(model: Any, processor: Any, kind: str, place: int) -> None:
    samples = make_samples(7)
    found = evaluate(
        model, processor, with_bad(samples, {place: kind}), batch_size=3, max_new_tokens=3
    )
    whole = evaluate(model, processor, samples, batch_size=1, max_new_tokens=3)
    expected = seen(whole)
    del expected[place]
    assert [one[:4] for one in seen(found)] == [one[:4] for one in expected]
    (skipped,) = found.skipped
    assert (skipped.number, skipped.id) == (place, f"0/{place}")
    assert found.record()["n"] == 6
    assert found.record()["skipped"] == [{"id": f"0/{place}", "reason": skipped.reason}]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("memory", [0, 1 << 30])
@pytest.mark.parametrize("bad", [{3: "damaged"}, {0: "missing", 1: "no answer", 6: "damaged"}])
@pytest.mark.at_once(3)
def test_every_method_skips_the_same(
    model: Any, processor: Any, name: str | None, memory: int, bad: dict[int, str]
) -> None:
    """A whole batch is bad, and the rest answers as it does alone."""
    samples = make_samples(7)
    batches = Batches(
        model, processor, with_bad(samples, bad), batch_size=2, memory=memory, max_bad=0.5
    )
    pruner = method(name, model, processor)
    told: list[int] = []
    found = evaluate(model, processor, batches, pruner, max_new_tokens=3, progress=told.append)
    assert [one.number for one in found.skipped] == sorted(bad)
    alone = []
    for first in range(0, 7, 2):
        good = [samples[i] for i in range(first, min(first + 2, 7)) if i not in bad]
        if good:
            alone += seen(evaluate(model, processor, good, pruner, max_new_tokens=3))
    if name == "Random":  # draws by the place in the run
        assert [(one[0], len(one[3][0])) for one in seen(found)] == [(one[0], 4) for one in alone]
    else:
        assert seen(found) == alone
    assert sum(told) == 7
    assert compare(evaluate(model, processor, batches, max_new_tokens=1), found)
    times = time_prefill(model, batches, [pruner], count=2, rounds=1)
    assert times[0].median > 0


def test_samples_that_a_guide_cannot_take(model: Any, processor: Any) -> None:
    """They are skipped by the method, and the others keep their guides."""
    other = make_processor(do_center_crop=False)
    samples = make_samples(7)

    class Fussy:
        def __getattr__(self, name: str) -> Any:
            return getattr(other, name)

        def __call__(self, *args: Any, text: list[str], **kwargs: Any) -> Any:
            if any(samples[4].question in one for one in text):
                raise ValueError("not this one")
            return other(*args, text=text, **kwargs)

    small = tiny_llava(dtype=torch.float32)
    fussy, plain = (
        pore.SGL(4, layer=2, guide=Guiding(small, one, max_new_tokens=2))
        for one in (Fussy(), other)
    )
    batches = Batches(model, processor, samples, batch_size=3)
    before = evaluate(model, processor, batches, plain, max_new_tokens=2)
    found = evaluate(model, processor, batches, fussy, max_new_tokens=2)
    assert [(one.number, one.id) for one in found.skipped] == [(4, "0/4")]
    assert "which guides" in found.skipped[0].reason
    after = evaluate(model, processor, batches, plain, max_new_tokens=2)  # a guide of fewer rows
    assert after.answers == found.answers
    both = common([before, found])
    assert [a.id for a in both[0].answers] == [a.id for a in both[1].answers]
    assert compare(before, found).paired.n == 6


def test_a_sample_that_goes_bad_later_leaves_pairs(
    model: Any, processor: Any, tmp_path: Path
) -> None:
    samples = []
    for i, sample in enumerate(make_samples(9)):
        sample.load_image().save(tmp_path / f"{i}.png")
        samples.append(replace(sample, image=tmp_path / f"{i}.png"))
    batches = Batches(model, processor, samples, batch_size=4, memory=0)
    batches.sift()
    outcomes = [evaluate(model, processor, batches, max_new_tokens=2)]
    assert len(outcomes[0].answers) == 9
    (tmp_path / "5.png").unlink()
    outcomes += [
        evaluate(model, processor, batches, pruner, max_new_tokens=2)
        for pruner in (pore.FastV(keep=4), pore.Random(keep=4))
    ]
    assert [len(outcome.answers) for outcome in outcomes] == [9, 8, 8]
    alike = common(outcomes)
    assert {tuple(answer.id for answer in outcome.answers) for outcome in alike} == {
        tuple(f"0/{i}" for i in range(9) if i != 5)
    }
    assert {outcome.skipped for outcome in alike} == {outcomes[1].skipped}
    assert compare(*outcomes[:2]).paired.n == 8


def test_common_goes_by_place_and_not_by_id() -> None:
    def outcome(right: str, *skipped: int) -> Outcome:
        answers = [
            Answer("same", "q", "x", "x", one == "1", None, None, ((0,),), 1) for one in right
        ]
        return Outcome(
            None, tuple(answers), skipped=tuple(Skipped(i, "same", "?") for i in skipped)
        )

    one, other = common([outcome("100", 1), outcome("011", 2)])
    assert (one.right, other.right) == ((True, False), (False, True))
    assert [skip.number for skip in one.skipped] == [1, 2]
    with pytest.raises(InputError, match=r"No question was asked by every method\. Skipped: same"):
        common([outcome("1", 0), outcome("1", 1)])


@pytest.mark.parametrize(
    ("n", "bad", "max_bad", "fine"),
    [
        (9, 1, 0.01, True),
        (9, 2, 0.01, False),
        (9, 2, 0.25, True),
        (9, 1, 0, False),
        (3, 1, 0.01, True),
        (2, 1, 0.01, False),
        (2, 1, 0.5, True),
        (1, 1, 1, False),
        (4, 4, 1, False),
        (4, 3, 1, True),
        (10, 7, 0.7, True),
    ],
)
@pytest.mark.parametrize("kind", ["damaged", "no answer"])
def test_so_many_are_put_up_with(
    model: Any, processor: Any, n: int, bad: int, max_bad: float, fine: bool, kind: str
) -> None:
    samples = with_bad(make_samples(n), dict.fromkeys(range(n - bad, n), kind))

    def ask() -> Outcome:
        return evaluate(model, processor, samples, max_new_tokens=1, max_bad=max_bad)

    if fine:
        assert (len(ask().answers), len(ask().skipped)) == (n - bad, bad)
    else:
        with pytest.raises(InputError, match=rf"Skipped: 0/{n - bad}: ") as caught:
            ask()
        assert f"{bad} of {n} samples are bad" in str(caught.value) or bad == n
        with pytest.raises(InputError):
            Batches(model, processor, samples, max_bad=max_bad).sift()


@pytest.mark.parametrize("max_bad", [-0.1, 1.1, float("nan")])
def test_shares_that_are_none(model: Any, processor: Any, max_bad: float) -> None:
    with pytest.raises(InputError, match="a share from 0 to 1"):
        Batches(model, processor, make_samples(1), max_bad=max_bad)


def test_memory_is_given_back(model: Any, processor: Any) -> None:
    batches = Batches(model, processor, make_samples(6), batch_size=2, memory=1 << 20)
    left = batches._memory.left
    batches.sift()
    for number in (0, 2, 4):
        batches._max_bad = 1
        batches.skip(number, "gone")
    assert batches._memory.left == left


def test_the_prior_passes_over_bad_samples(model: Any, processor: Any) -> None:
    samples = make_samples(7)
    bad = with_bad(samples, {2: "damaged", 5: "refused by the processor"})
    good = [sample for i, sample in enumerate(samples) if i not in (2, 5)]
    assert rope_bias(model, processor, bad) == rope_bias(model, processor, good)
    with pytest.raises(InputError, match=r"All samples .* are bad: The image"):
        rope_bias(model, processor, bad[2:3])


def test_prompts_are_built_of_what_is_left(processor: Any, model: Any) -> None:
    """Batches give what `build_inputs` gives for the good samples alone."""
    samples = make_samples(5)
    bad = with_bad(samples, {1: "damaged", 4: "refused by the processor"})
    found = Batches(model, processor, bad, max_bad=0.5).inputs(0)
    expected = build_inputs(processor, [samples[0], samples[2], samples[3]], "cpu", model.dtype)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)

"""Every request is answered as by `generate` in the method's block, and leaves nothing behind."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers.generation.stopping_criteria import STOP_STRING_EMBEDDING_CACHE

import pore
from helpers.calibrations import make_processor
from helpers.models import tiny_llava
from helpers.serving import body, picture, traces
from pore.data.loading import load_model
from pore.data.prompts import build_inputs
from pore.data.samples import Sample
from pore.engine.pruner import Pruner
from pore.errors import BudgetError, CalibrationError, InputError
from pore.evaluation.guided import Guiding
from pore.methods.making import make
from pore.methods.registry import methods
from pore.serving.requests import ChatRequest, Limits, RequestError
from pore.serving.served import Generation, Gone, Served

IMAGE = picture()
SETTABLE = sorted(
    name
    for name, kind in methods().items()
    if not (kind.videos_only or kind.resizes) and name not in ("Scored", "VisionTrim")
)


def fastv(keep: int | float) -> Pruner:
    return pore.FastV(keep=keep)


def served(method: Any = fastv, **more: Any) -> Served:
    return Served("tiny", *loaded(), method, **more)


def loaded() -> tuple[Any, Any]:
    """A model after its first call, at which transformers adds its own hooks."""
    model = tiny_llava(layers=6, tower_layers=6, dtype=torch.float32).eval()
    processor = make_processor(do_center_crop=False)
    inputs = build_inputs(processor, [Sample("one", IMAGE, "w6")], dtype=torch.float32)
    with torch.no_grad():
        model(**inputs)
    return model, processor


def prepared(one: Served, *images: Any, **asked: Any) -> Generation:
    data = json.dumps(body(*["data:"] * len(images), **asked)).encode()
    return one.prepare(ChatRequest.read(data, "tiny", one.limits), images)


def answer(generation: Generation, **more: Any) -> torch.Tensor:
    config = generation.generation_config
    found: torch.Tensor = generation.generate(
        **generation.inputs, generation_config=config, tokenizer=None, **more
    )
    return found


def expected(one: Served, pruner: Pruner | None, **how: Any) -> torch.Tensor:
    """The same question, without a server."""
    sample = Sample("one", IMAGE, "w6 w20")
    inputs = build_inputs(one.processor, [sample], dtype=torch.float32)
    settings = {"max_new_tokens": 5, "do_sample": False, **how}
    if pruner is None:
        return one.model.generate(**inputs, **settings)
    with pruner(one.model):
        return one.model.generate(**inputs, **settings)


def test_budgets_of_requests() -> None:
    one = served(keep=4)
    before = traces(one.model)
    for asked, keep, kept in (({}, 4, 4), ({"keep": 2}, 2, 2), ({"keep": "50%"}, 0.5, 8)):
        generation = prepared(one, IMAGE, **asked)
        assert torch.equal(answer(generation), expected(one, fastv(keep)))
        assert generation.effort is not None
        assert (generation.effort.seen, generation.effort.left) == (16, kept)
        assert generation.began.done()
    for keep, kept in ((1, 1), (1.0, 16)):  # equal in Python, and not the same budget
        generation = prepared(one, IMAGE, keep=keep)
        answer(generation)
        assert generation.effort is not None
        assert generation.effort.left == kept
    assert torch.equal(answer(prepared(one, IMAGE, keep=1.0)), expected(one, None))
    assert "kept_total 47" in one.metrics.text()
    assert traces(one.model) == before
    with pytest.raises(BudgetError, match="keep=0 would keep no"):
        prepared(one, IMAGE, keep=0)
    with pytest.raises(BudgetError, match="asks for more visual tokens"):
        answer(prepared(one, IMAGE, keep=17))
    assert traces(one.model) == before


@pytest.mark.at_once(3)
@pytest.mark.parametrize("name", SETTABLE)
def test_every_method(name: str) -> None:
    model, processor = loaded()
    guiding = Guiding(model, processor, max_new_tokens=5, itself=True)

    def method(keep: int | float) -> Pruner:
        guide = guiding if methods()[name].guided else None
        made = make(name, model, keep, guide=guide)
        if not made.always_reweighted:
            return made
        return make(
            name,
            model,
            keep,
            reweight=pore.PositionBias.rope(16, text_tokens=4, head_dim=8, theta=1e4),
        )

    before = traces(model)
    one = Served("tiny", model, processor, method, keep=0.25)
    one.try_out()
    assert "pore_prefill_seconds_count 0" in one.metrics.text()
    generation = prepared(one, IMAGE)
    found = answer(generation)
    if not methods()[name].guided:  # whose guide is another for every question
        assert torch.equal(found, expected(one, method(0.25)))
    assert generation.effort is not None
    assert generation.effort.left == 4
    assert traces(model) == before


def test_what_cannot_work_is_known_at_once() -> None:
    model, _ = loaded()
    with pytest.raises(CalibrationError, match="D2Pruner divides attention"):
        served(lambda keep: make("D2Pruner", model, keep)).try_out()
    with pytest.raises(InputError, match="compares the frames of a video"):
        served(lambda keep: make("EVS", model, keep)).try_out()
    with pytest.raises(BudgetError, match="keep=0"):
        served(keep=0)
    served(keep=500).try_out()  # other pictures of other models have more tokens


def test_unpruned() -> None:
    one = served(None)
    one.try_out()
    generation = prepared(one, IMAGE)
    assert torch.equal(answer(generation), expected(one, None))
    assert generation.effort is not None
    assert (generation.effort.seen, generation.effort.left) == (16, 16)
    with pytest.raises(RequestError, match="does not prune"):
        prepared(one, IMAGE, keep=4)


def test_text_alone_and_several_images() -> None:
    one = served(keep=4)
    for images, seen, kept in (((), 0, 0), ((IMAGE, IMAGE), 32, 8)):
        generation = prepared(one, *images)
        answer(generation)
        assert generation.effort is not None
        assert (generation.effort.seen, generation.effort.left) == (seen, kept)


def test_the_coldest_temperatures_and_smallest_shares() -> None:
    one = served(keep=4)
    greedy = answer(prepared(one, IMAGE))
    for given in ({"temperature": 1e-300}, {"temperature": 1e-45}, {"temperature": 1e-5}):
        assert torch.equal(answer(prepared(one, IMAGE, **given)), greedy)
    for top_p in (0, 1e-300, 1e-45):
        answer(prepared(one, IMAGE, temperature=1, top_p=top_p))


def test_seeds_are_of_one_request() -> None:
    one = served(keep=4)
    sampled = {"temperature": 2.0, "max_tokens": 20}
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, again, other = (answer(prepared(one, IMAGE, **sampled, seed=s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), before)
    answer(prepared(one, IMAGE, **sampled))
    assert not torch.equal(torch.random.get_rng_state(), before)


def test_stop_texts() -> None:
    one = Served("embedded", *load_model("embedded", device="cpu"), fastv, keep=36)
    question = "What color is the circle?"
    whole, stopped, never = (
        answer(prepared(one, IMAGE, question=question, **more))[0]
        for more in ({}, {"stop": ["never", "e"]}, {"stop": ["never"]})
    )
    assert torch.equal(never, whole)
    assert torch.equal(stopped, whole[:-1])  # without the end of the answer
    assert "e" in one.processor.decode(stopped[-1])
    # Not by those of transformers, which keep a table of the vocabulary for each text, and fail at
    # one that no token ends.
    before = len(STOP_STRING_EMBEDDING_CACHE)
    for text in ("a" * 128, "\u2603", "never " * 20):
        assert torch.equal(answer(prepared(one, IMAGE, question=question, stop=text))[0], whole)
    assert len(STOP_STRING_EMBEDDING_CACHE) == before
    beams = served(keep=4)
    beams.model.generation_config.num_beams = 2
    assert answer(prepared(beams, IMAGE, stop="w9")).shape[0] == 1


def test_a_stop_text_across_tokens_and_in_the_prompt() -> None:
    one = served(keep=4)
    usual = answer(prepared(one, IMAGE, max_tokens=8))[0]
    length = prepared(one, IMAGE).inputs["input_ids"].shape[1]
    said = one.processor.tokenizer.decode(usual[length : length + 3])
    found = answer(prepared(one, IMAGE, max_tokens=8, stop=said[1:]))[0]
    assert torch.equal(found, usual[: length + 3])
    assert torch.equal(answer(prepared(one, IMAGE, max_tokens=8, stop="w6 w20"))[0], usual)


@pytest.mark.parametrize("limit", [7, 2000])
def test_a_request_without_a_length_gets_what_the_model_takes(limit: int) -> None:
    generation = prepared(served(keep=4, limits=Limits(new_tokens=limit)), IMAGE, max_tokens=None)
    room = 1024 - generation.inputs["input_ids"].shape[1]
    assert generation.generation_config.max_new_tokens == min(limit, room) > 0


def test_what_is_refused_before_the_model_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    one = served(keep=4, limits=Limits(new_tokens=2000))
    with pytest.raises(RequestError, match=r"The prompt has \d+ tokens .* takes 1024 in all"):
        prepared(one, IMAGE, max_tokens=1020)
    with pytest.raises(InputError, match="stands for an image"):
        prepared(one, IMAGE, question="an <image>")
    with monkeypatch.context() as patched:
        patched.setattr(one, "_encoder", None)  # which would make tokens
        with pytest.raises(RequestError, match="more than 65536 characters"):
            prepared(one, IMAGE, question="w6 " * 30_000)
    monkeypatch.setattr(one.model.generation_config, "num_beams", 2)
    answer(prepared(one, IMAGE))
    with pytest.raises(RequestError, match="cannot be streamed"):
        prepared(one, IMAGE, stream=True)
    one._encoder.chat_template = "{{ raise_exception('Roles must alternate.') }}"
    with pytest.raises(RequestError, match=r"refuses the messages: Roles must alternate\."):
        prepared(one, IMAGE)


def test_who_goes_away_is_not_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    one = served(keep=4)
    before = traces(one.model)
    waiting = prepared(one, IMAGE)
    waiting.cancel()
    with pytest.raises(Gone):
        answer(waiting)
    assert waiting.began.done()
    begun = prepared(one, IMAGE, max_tokens=50)

    class Leaves:
        tokens = 0

        def put(self, value: torch.Tensor) -> None:
            self.tokens += 1
            if self.tokens == 4:
                begun.cancel()

        def end(self) -> None:
            raise AssertionError("nobody waits for the end")

    leaves = Leaves()
    with pytest.raises(Gone):
        answer(begun, streamer=leaves)
    assert leaves.tokens == 4
    assert isinstance(begun.error, Gone)
    assert traces(one.model) == before

"""Conversations are answered in batches as they are one by one."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import PIL.Image
import pytest
import torch

import pore
from pore.data.loading import load_model
from pore.data.sources import from_scenes
from pore.errors import InputError
from pore.evaluation.features import MEMORY
from pore.evaluation.guided import Guiding
from pore.evaluation.harness import asking
from pore.evaluation.harness.asking import LONGEST, Asker, Conversation, Decoding
from pore.evaluation.harness.efforts import Asked, averages
from pore.evaluation.running import evaluate
from processors import KINDS
from processors.base import Kind, parts_or_skip

GREEDY = Decoding.read({"max_new_tokens": 8})
SAMPLES = from_scenes("test", 6)
SHAPES = ((224, 224), (320, 160))


@pytest.fixture(scope="module")
def embedded() -> tuple[Any, Any]:
    return load_model("embedded", device="cpu")


def about(*images: Any, question: str, system: str | None = None) -> Conversation:
    said = [] if system is None else [{"role": "system", "content": [text(system)]}]
    parts = [*({"type": "image"} for _ in images), text(question)]
    return Conversation("a question", [*said, {"role": "user", "content": parts}], images)


def text(said: str) -> dict[str, str]:
    return {"type": "text", "text": said}


CONVERSATIONS = [about(sample.image, question=sample.question) for sample in SAMPLES]


@pytest.mark.parametrize("pruner", [None, pore.FastV(keep=36), pore.VisionZip(keep=36)])
def test_as_in_an_evaluation_of_ones_own(embedded: Any, pruner: Any) -> None:
    replies = Asker(*embedded, pruner).ask(CONVERSATIONS, GREEDY)
    outcome = evaluate(*embedded, SAMPLES, pruner, max_new_tokens=8)
    for reply, answer in zip(replies, outcome.answers, strict=True):
        assert reply.text == answer.given
        assert (reply.effort.kept, reply.effort.flops) == (answer.kept, answer.flops)
        assert reply.effort.seen == 144
        assert reply.effort.unpruned_flops is not None
        assert (reply.effort.unpruned_flops == answer.flops) == (pruner is None)


@pytest.mark.parametrize("pruner", [None, pore.FastV(keep=36)])
def test_a_batch_is_its_prompts(embedded: Any, pruner: Any) -> None:
    asker = Asker(*embedded, pruner)
    pair = about(SAMPLES[0].image, SAMPLES[1].image, question="Is there a red circle?")
    asked = [*CONVERSATIONS[:3], pair]
    together = asker.ask(asked, GREEDY)
    assert together == [asker.ask([one], GREEDY)[0] for one in asked]
    assert [reply.effort.seen for reply in together] == [144, 144, 144, 288]
    assert together[0].input_tokens < together[3].input_tokens


def test_chance_goes_by_the_prompt(embedded: Any) -> None:
    """Every prompt has draws of its own, whatever is asked before it and together with it."""
    asked = [replace(one, id=f"few, document {i}") for i, one in enumerate(CONVERSATIONS)]

    def kept(one: Conversation, seed: int = 0) -> Any:
        (reply,) = Asker(*embedded, pore.Random(keep=36, seed=seed)).ask([one], GREEDY)
        return reply.effort.kept

    together = Asker(*embedded, pore.Random(keep=36)).ask(asked, GREEDY)
    found = [reply.effort.kept for reply in together]
    assert found == [kept(one) for one in asked]
    assert len(set(found)) == len(found)
    assert kept(asked[0], seed=1) != found[0]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.at_once(3)
def test_a_batch_in_every_family(kind: Kind) -> None:
    """Of two pictures of different shapes; half of their tokens go in the second layer."""
    processor, model = parts_or_skip(kind)
    asker = Asker(model, processor, pore.FastV(keep=0.5, layer=1))
    decoding = Decoding.read({"max_new_tokens": 2})
    asked = [about(PIL.Image.new("RGB", size, "red"), question="look") for size in SHAPES]
    found = [
        (one.effort.seen, one.effort.left, one.input_tokens) for one in asker.ask(asked, decoding)
    ]
    alone = [asker.ask([one], decoding)[0] for one in asked]
    assert found == [(one.effort.seen, one.effort.left, one.input_tokens) for one in alone]
    for seen, left, length in found:
        assert 0 < left < seen < length


PRUNERS = (None, pore.FastV(keep=36), pore.VisionZip(keep=36), pore.Random(keep=36))


@pytest.mark.parametrize(("memory", "passes"), [(MEMORY, 2 + 2 + 6), (0, 2 + 2 + 2 + 6)])
@pytest.mark.slow
def test_features_are_made_once_for_all_settings(
    embedded: Any, memory: int, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the memory and without it, logits are to the bit those of the model on its own."""
    model, processor = embedded
    logits: list[Any] = []
    tower: list[Any] = []
    model.lm_head.register_forward_hook(lambda *given: logits.append(given[2]))
    hooks = [model.lm_head._forward_hooks, model.model.vision_tower._forward_hooks]
    model.model.vision_tower.register_forward_hook(lambda *given: tower.append(given[2]))

    def run(memory: int) -> list[Any]:
        logits.clear()
        asker = Asker(model, processor, memory=memory)
        found: list[Any] = []
        for asker.pruner in PRUNERS:
            for batch in (CONVERSATIONS[:4], CONVERSATIONS[4:]):
                found += asker.ask(batch, GREEDY)
        return [*found, *logits]

    try:
        found, counted = run(memory), len(tower)
        monkeypatch.setattr(asking, "encoding_once", lambda *_: nullcontext())
        stock = run(memory)
    finally:
        for each in hooks:
            each.clear()
    assert counted == passes
    assert len(tower) - counted == 2 + 2 + 2 + 6
    for one, other in zip(found, stock, strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_without_an_image(embedded: Any) -> None:
    (reply,) = Asker(*embedded, pore.FastV(keep=36)).ask([about(question="Is it red?")], GREEDY)
    assert (reply.effort.seen, reply.effort.left) == (0, 0)
    assert reply.effort.flops == reply.effort.unpruned_flops


def test_beams(embedded: Any) -> None:
    decoding = Decoding.read({"max_new_tokens": 4, "num_beams": 2})
    replies = Asker(*embedded, pore.FastV(keep=36)).ask(CONVERSATIONS[:2], decoding)
    assert [reply.effort.left for reply in replies] == [36, 36]


def test_a_guided_method(embedded: Any) -> None:
    model, processor = embedded
    for itself in (True, False):
        guiding = Guiding(model, processor, max_new_tokens=8, itself=itself)
        pruner = pore.SGL(keep=36, layer=3, guide=guiding)  # type: ignore[arg-type]
        replies = Asker(*embedded, pruner).ask(CONVERSATIONS[:3], GREEDY)
        given = evaluate(*embedded, SAMPLES[:3], pruner, max_new_tokens=8).answers
        assert [reply.effort.kept for reply in replies] == [answer.kept for answer in given]


def test_the_placeholder_in_a_question_is_refused(embedded: Any) -> None:
    with pytest.raises(InputError, match="a question: The question 'What is <image>"):
        Asker(*embedded).ask([about(SAMPLES[0].image, question="What is <image>?")], GREEDY)


def test_a_file_that_is_no_image_is_named(embedded: Any) -> None:
    with pytest.raises(InputError, match="a question: an image cannot be read"):
        Asker(*embedded).ask([about(b"nothing", question="What is it?")], GREEDY)


def test_a_system_prompt_that_the_template_drops_is_told_once(
    embedded: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = embedded
    asked = about(SAMPLES[0].image, question="Is it red?", system="Be brief.")
    asker = Asker(model, processor)
    longer, shorter = (asker.ask([one], GREEDY)[0] for one in (asked, CONVERSATIONS[0]))
    assert longer.input_tokens > shorter.input_tokens
    assert caplog.messages == []
    template = processor.chat_template.replace(
        "for message in messages", "for message in messages[-1:]"
    )
    monkeypatch.setattr(processor, "chat_template", template)
    for _ in range(2):
        asker.ask([asked], GREEDY)
    assert caplog.messages == [
        "The chat template of this model leaves the task's system prompt out."
    ]


@pytest.mark.parametrize(
    ("given", "samples"),
    [
        ({}, False),
        ({"temperature": 0}, False),
        ({"temperature": 0, "do_sample": True}, False),
        ({"temperature": 0.2, "do_sample": False}, False),
        ({"temperature": 0.2}, True),
        ({"do_sample": True}, True),
    ],
)
def test_when_answers_are_sampled(given: dict[str, Any], samples: bool) -> None:
    options = Decoding.read({"top_p": 0.5, **given}).options
    assert options["do_sample"] is samples
    assert options["top_p"] == (0.5 if samples else None)
    assert options["max_new_tokens"] == LONGEST


def test_answers_end_where_the_task_says() -> None:
    decoding = Decoding.read({"until": ["ASSISTANT:", "\n\n", ""], "image_aspect_ratio": "pad"})
    assert decoding.cut("a\n\nb ASSISTANT: c") == "a\n\nb"
    assert decoding.ignored == ("image_aspect_ratio",)
    assert Decoding.read({"until": "."}).cut("yes. no") == "yes"


def test_averages() -> None:
    one = Asked("t", 0, 144, 36, 63.0, 50, 100, 160, 2)
    other = Asked("t", 1, 144, 72, 90.0, 70, 100, 170, 4)
    means = averages([one, other])
    assert means["prompts"] == 2
    assert means["visual_tokens_left"] == 54
    assert means["flops_saved"] == pytest.approx(0.4)
    unknown = averages([one, Asked("t", 1, 144, 72, 90.0, None, None, 170, 4)])
    assert unknown["flops"] is unknown["flops_saved"] is None

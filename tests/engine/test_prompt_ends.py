"""Prompts that end with an image: the last token stays, or the prompt is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import pore
from helpers.caches import as_argument
from helpers.methods import EVERY, KEEP, LAYERS, asked, model_of, usual
from helpers.models import IMAGE, batch, prompt
from pore.engine.pruner import Pruner
from pore.engine.stages import Stage
from pore.errors import InputError


def before_the_decoder(pruner: Pruner) -> bool:
    return all(not isinstance(stage, Stage) or stage.layer == 0 for stage in pruner.stages())


ASK = {"CDPruner", "HAWK"}  # look for a question
SHORTER = [n for n in EVERY if before_the_decoder(usual(n, KEEP)) and n not in ASK]
OTHERS: list[Pruner] = [
    pore.Scored(KEEP, lambda states, layout, _: layout.gather(states)[..., 0], layer=1),
    pore.Random(KEEP, layer=LAYERS - 1),
    pore.Chain(pore.VisionZip(9), pore.Random(KEEP)),
]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "pruner",
    [
        *(pytest.param(usual(name, KEEP), id=name) for name in EVERY if name not in SHORTER),
        *(pytest.param(pruner, id=f"{pruner.name} {i}") for i, pruner in enumerate(OTHERS)),
    ],
)
def test_refused_by_what_drops_tokens_in_the_decoder(pruner: Pruner, side: str) -> None:
    """Whichever sample of the batch it is; with text after it there is nothing to refuse."""
    model = model_of()
    refused = pytest.raises(InputError, match="sample 1 ends with a visual token")
    with torch.no_grad(), pruner(model), refused:
        model(**batch([prompt(3, 1, 5), prompt(7, 1, 0, 1)], side))
    with torch.no_grad(), pruner(model):
        model(**batch(asked(pruner.name, [prompt(3, 1, 5), prompt(7, 1, 1, 1)]), side))


@pytest.mark.parametrize("name", SHORTER)
def test_to_the_others_the_image_is_a_shorter_one(name: str) -> None:
    """What is left last is last, and a question that follows gets what it does in one piece."""
    model, inputs, pruner = model_of(), batch([prompt(3, 1, 5)]), usual(name, KEEP)
    ids, cache = inputs["input_ids"], DynamicCache(config=model.config.text_config)
    with torch.no_grad(), pruner(model) as run:
        whole = model(**inputs).logits
        image = model(
            input_ids=ids[:, :-5], pixel_values=inputs["pixel_values"], **as_argument(cache)
        )
        rest = model(input_ids=ids[:, -5:], **as_argument(cache)).logits
    assert int((ids[:, :-5] == IMAGE).sum()) == run.report.samples[1].images[0].seen
    assert run.report.samples[0].images == run.report.samples[1].images
    torch.testing.assert_close(image.logits, whole[:, :-5], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(rest, whole[:, -5:], rtol=1e-9, atol=1e-9)

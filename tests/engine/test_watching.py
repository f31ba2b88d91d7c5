"""What ranks the visual tokens can be read before and after its correction."""

from __future__ import annotations

import pytest
import torch

import pore
from helpers.calibrations import make_processor
from helpers.models import tiny_llava
from helpers.serving import picture, traces
from pore.calibration.reading import attention_rows, attention_stages
from pore.corrections.null_token import NullTokenPrior
from pore.corrections.without_rope import WithoutRoPE
from pore.data.prompts import build_inputs
from pore.data.samples import Sample
from pore.engine.watching import read_corrected
from pore.tensors.selection import top_k

P = pore.PositionBias.fit(torch.linspace(1, 3, 16).exp(), kind="empirical")
EACH = {"none": None, "P": P, "without RoPE": WithoutRoPE(), "null token": NullTokenPrior()}


@pytest.mark.parametrize("correction", EACH.values(), ids=EACH)
def test_before_and_after(correction: pore.corrections.Correction | None) -> None:
    """Before it is what calibration reads; and what is highest after it is what FastV keeps."""
    model = tiny_llava(layers=4, dtype=torch.float32).eval()
    inputs = build_inputs(
        make_processor(do_center_crop=False), [Sample("one", picture(), "w6 w20")]
    )
    with torch.no_grad():
        model(**inputs)  # at whose first call transformers adds its own hooks
    clean = traces(model)
    pruner = pore.FastV(keep=4, layer=2, reweight=correction)
    (stage,) = attention_stages(pruner)
    layout, before, after = read_corrected(model, inputs, "FastV", stage)
    assert traces(model) == clean
    plain = attention_stages(pore.FastV(keep=4, layer=2))
    torch.testing.assert_close(before, attention_rows(model, inputs, plain)[1][0])
    if correction is None:
        assert after is before
    else:
        assert not torch.equal(after.argsort(), before.argsort())
    with pruner(model) as run, torch.no_grad():
        model(**inputs)
    (image,) = run.report.samples[0].images
    highest = top_k(after, [4], layout.valid)[0]
    assert tuple(layout.raster[0][highest].tolist()) == image.kept

"""A position bias is refused under other conditions than those it was measured under."""

from __future__ import annotations

import pytest

from helpers.biases import PROVENANCE
from pore.bias.position_bias import PositionBias
from pore.errors import ProfileError, ProfileMismatchError


class TestCheck:
    bias = PositionBias.exponential(0.003, 576, provenance=PROVENANCE)

    def test_the_same_conditions_pass(self) -> None:
        self.bias.check(
            n=576,
            model="llava-hf/llava-1.5-7b-hf",
            revision="8c85e9a",
            layer=2,
            normalize="prompt",
            processor={"do_pad": False, "size": [336, 336], "do_resize": True},
            template=PROVENANCE.template,
        )

    def test_all_that_differs_is_named(self) -> None:
        with pytest.raises(ProfileMismatchError) as caught:
            self.bias.check(n=144, layer=3, normalize="visual", processor={"do_pad": True})
        message = str(caught.value)
        assert "has 576, here are 144" in message
        assert "layer: the profile says 2, here it is 3" in message
        assert "normalize: the profile says 'prompt', here it is 'visual'" in message
        assert "processor.do_pad: the profile says False, here it is True" in message
        assert "bias.allowing('layer', 'normalize', 'processor')" in message
        assert "bias.resample(n)" in message

    def test_what_is_unknown_is_not_compared(self) -> None:
        self.bias.check()
        PositionBias.exponential(0.003, 576).check(n=576, model="a/b", layer=7, template="x")

    @pytest.mark.parametrize(
        "model",
        [
            "liuhaotian/llava-v1.5-7b",
            "llava-hf/llava-1.5-7b-hf",
            "/models/llava-1.5-7b-hf",
            "./llava-v1.5-7b/",
            "C:\\models\\llava-1.5-7b-hf",
            "/cache/hub/models--llava-hf--llava-1.5-7b-hf/snapshots/8c85e9a",
        ],
    )
    def test_the_same_weights_under_another_name(self, model: str) -> None:
        self.bias.check(model=model)

    @pytest.mark.parametrize(
        "model",
        [
            "llava-hf/llava-1.5-13b-hf",
            "liuhaotian/llava-v1.6-7b",
            "someone/llava-1.5-7b-hf",
            "/models/checkpoint-100",
        ],
    )
    def test_other_weights(self, model: str) -> None:
        with pytest.raises(ProfileMismatchError, match=r"model: .*allowing\('model'\)"):
            self.bias.check(model=model)

    def test_the_override_is_for_the_named_fields_only(self) -> None:
        allowed = self.bias.allowing("layer").allowing("model")
        allowed.check(layer=3, model="a/b")
        assert "not checked: layer, model" in repr(allowed)
        with pytest.raises(ProfileMismatchError, match="normalize"):
            allowed.check(normalize="visual")
        with pytest.raises(ProfileMismatchError):
            self.bias.check(layer=3)

    def test_what_cannot_be_allowed(self) -> None:
        with pytest.raises(ProfileError, match="resample"):
            self.bias.allowing("n")
        with pytest.raises(ProfileError, match="choose from model"):
            self.bias.allowing("samples")

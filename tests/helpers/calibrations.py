"""Samples, processors and host methods for tests of calibration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import PIL.Image
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    CLIPImageProcessor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import pore
from helpers.models import IMAGE, SIDE, tiny_llava
from pore.calibration.calibrating import calibrate
from pore.calibration.sums import Calibration
from pore.data.samples import Sample
from pore.engine.readers import LastToken, LayerAttention
from pore.engine.stages import Selection, Stage, View

K = 3


LAYERS = 5


TEMPLATE = (
    "{% for m in messages %}USER: {% for c in m['content'] %}{% if c['type'] == 'image' %}<image> "
    "{% else %}{{ c['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def make_processor(**settings: Any) -> LlavaProcessor:
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    words = [*special, "USER:", "ASSISTANT:", *(f"w{i}" for i in range(6, IMAGE)), "<image>"]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    side = {"height": 8 * SIDE, "width": 8 * SIDE}
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(**{"size": side, "crop_size": side, **settings}),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="<pad>",
            bos_token="<s>",
            eos_token="</s>",
            unk_token="<unk>",
            padding_side="right",  # build_inputs pads on the left nevertheless
            extra_special_tokens={"image_token": "<image>"},
        ),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def make_samples(n: int, seed: int = 0) -> list[Sample]:
    """Noise, with questions of one to seven words."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(n):
        pixels = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
        words = rng.integers(6, IMAGE, i % 7 + 1)
        question = " ".join(f"w{w}" for w in words)
        found.append(Sample(f"{seed}/{i}", PIL.Image.fromarray(pixels), question, answer="w6"))
    return found


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    return tiny_llava(layers=LAYERS)


@pytest.fixture(scope="module")
def processor() -> LlavaProcessor:
    return make_processor()


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return make_samples(13)


def run(model: Any, processor: Any, samples: Any, layer: int = K, **settings: Any) -> Calibration:
    return calibrate(model, processor, samples, layer, **{"batch_size": 4, **settings})


# -- hosts of several stages --------------------------------------------------------------------


@dataclass(frozen=True)
class LastTwo:
    """Sums over heads and the last two tokens: up to 8 for 4 heads, beside other readings."""

    measures: str = "last two"

    def __call__(self, attention: LayerAttention) -> tuple[torch.Tensor, str]:
        index = attention.last + torch.tensor([-1, 0])
        weights = attention.logits(index).softmax(-1).sum((1, 2))
        assert attention.memory == 3
        return weights.gather(1, attention.columns), "more"


@dataclass(frozen=True)
class Stepwise(pore.Pruner):
    """Two stages: one sums rows and shares a memory, one looks ahead; positions are new."""

    keep: int | float = 4
    reweight: Any = None
    scale: float = 1.0

    paper: ClassVar[str] = "a test"
    reweightable: ClassVar[bool] = True

    @property
    def name(self) -> str:  # type: ignore[override] # no string, so that it is not registered
        return "Stepwise"

    def stages(self) -> list[Stage]:
        return [
            Stage(
                *(K, self._drop, LastTwo()),
                positions="dense",
                prepare=self._prepare,
                padding=True,
                curve=self._curve,
            ),
            Stage(K, self._drop, LastToken("visual"), ahead=True, positions="dense"),
        ]

    def _prepare(self, view: View) -> int:
        assert view.attention is None
        return 3

    def _curve(self, read: tuple[torch.Tensor, str]) -> torch.Tensor:
        return read[0] * self.scale

    def _drop(self, view: View) -> Selection:
        raise AssertionError("nothing is dropped while calibrating")


HOSTS = [
    name
    for name, kind in sorted(pore.methods().items())
    if kind.reweightable and kind.__module__.startswith("pore.") and not kind.videos_only
    # What SGL divides comes from `pore.guide`; without P there is no D2Pruner, and no attention of
    # it that FastV would not read. The others are for videos alone.
    if name not in ("SGL", "D2Pruner") and not kind.videos_only
]


def broken_after(samples: list[Sample], n: int, error: BaseException) -> Iterator[Sample]:
    yield from samples[:n]
    raise error


def same(one: Calibration, other: Calibration) -> bool:
    """Whether two calibrations agree, except for the last bits, which depend on the batches."""
    return (
        (one.count, one.seen, one.bad, one.passes)
        == (other.count, other.seen, other.bad, other.passes)
        and torch.allclose(one.mean, other.mean, rtol=1e-10, atol=0)
        and torch.allclose(one.std, other.std, rtol=1e-8, atol=0)
    )


def eager_in_float64(
    module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any
) -> Any:
    """Eager attention with its softmax in float64; transformers' own goes through float32."""
    groups = module.num_key_value_groups
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    logits = query @ key.transpose(2, 3) * kwargs["scaling"]
    hidden = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    weights = logits.masked_fill(hidden, -torch.inf).softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def tiny_eager() -> LlavaForConditionalGeneration:
    """A model with eager attention in the decoder; the tower keeps SDPA, which is in float64."""
    model = tiny_llava(layers=LAYERS, attention="eager")
    model.model.vision_tower.set_attn_implementation("sdpa")
    return model


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        name: (
            m.training,
            sorted(vars(m)),
            id(getattr(m, "config", None)),
            len(m._forward_hooks) + len(m._forward_pre_hooks),
        )
        for name, m in model.named_modules()
    } | {"registry": sorted(ALL_ATTENTION_FUNCTIONS._global_mapping)}


def spoil(samples: list[Sample], tmp_path: Path) -> list[Sample]:
    """Samples with three bad ones among them, one of which only the processor finds."""
    truncated = tmp_path / "truncated.png"
    samples[0].load_image().save(truncated)
    truncated.write_bytes(truncated.read_bytes()[:600])
    found = list(samples)
    found[1] = replace(samples[1], image=tmp_path / "missing.png")
    found[2] = replace(samples[2], image=truncated)
    found[6] = replace(samples[6], question="what <image> is")
    return found


HOST = pore.FastV(keep=1, layer=K)

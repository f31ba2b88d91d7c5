"""What a case is: one tiny random model of a family, and prompts for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor

from helpers.models import PAD

TEXT = range(3, 60)
"""Token ids of text."""


LAYERS = 6


TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 4,
    "initializer_range": 0.3,
}
"""A tower of 8 x 8 patches."""


def since(version: str) -> bool:
    """Whether transformers is at least this version."""
    return Version(transformers.__version__) >= Version(version)


def noise(seed: int, *shape: int) -> Tensor:
    """Pixels of an image."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def text_config(kind: str, **more: Any) -> Any:
    """A tiny decoder: 4 heads in groups of 2, sharp attention."""
    return getattr(transformers, kind)(
        **{
            "vocab_size": 120,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "initializer_range": 0.3,
            "pad_token_id": PAD,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **more,
        }
    )


class Case(ABC):
    """A family: how to make its model and what its prompts look like.

    A prompt is a list of text token ids, in which a number below 0 stands for image -1 - number,
    and one of -100 or below for video -100 - number.
    """

    name: str
    cousin: bool = False
    """Whether another case has the same adapter, and the model's code differs little from it."""
    layers: int = LAYERS
    tiled = False
    """Whether images have different grids."""
    deepstack: bool = False
    """Whether the first decoder layers add features to the visual tokens."""
    videos: str | None = None
    """Whether prompts can have "videos", or also videos "mixed" with images in one prompt."""
    beams: bool = True
    """Whether transformers itself can search with beams; Llama 4 cannot in 5.23."""
    static: bool = True
    """Whether transformers itself can generate with a static cache."""
    counted: bool = True
    """Whether FLOPs are known."""
    close: float = 2e-5
    """The tolerance; the norms and rotary tables of most families go through float32."""

    @abstractmethod
    def build(self) -> Any:
        """A model in float64."""

    @abstractmethod
    def image_ids(self, image: int) -> list[int]:
        """Token ids that stand for an image in a prompt."""

    @abstractmethod
    def encode(self, images: Sequence[int]) -> dict[str, Tensor]:
        """The processor's output for these images, in the order of the prompts."""

    def content(self, image: int) -> list[bool]:
        """Which of `image_ids` stand for patches."""
        return [token == self.placeholder for token in self.image_ids(image)]

    def video_ids(self, video: int) -> list[int]:
        """Token ids that stand for a video in a prompt."""
        raise NotImplementedError

    def video_content(self, video: int) -> list[bool]:
        """Which of `video_ids` stand for patches."""
        return [token == self.video_placeholder for token in self.video_ids(video)]

    def encode_videos(self, videos: Sequence[int]) -> dict[str, Tensor]:
        """The processor's output for these videos, in the order of the prompts."""
        raise NotImplementedError

    def extra(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Further outputs of the processor."""
        return {}

    def answered(self, ids: Tensor, mask: Tensor, count: int) -> dict[str, Tensor]:
        """`extra` for a prompt followed by `count` tokens of an answer."""
        return self.extra(ids, mask)

    @cache  # noqa: B019 - cases live as long as the tests
    def model(self) -> Any:
        torch.manual_seed(0)
        made = self.build().eval()
        made.generation_config.pad_token_id = PAD
        made.generation_config.eos_token_id = None
        return made

    def row(self, prompt: Sequence[int]) -> list[int]:
        """The token ids of a prompt."""
        ids: list[int] = []
        for token in prompt:
            if token >= 0:
                ids.append(token)
            else:
                ids += self.image_ids(-1 - token) if token > -100 else self.video_ids(-100 - token)
        return ids

    def inputs(self, prompts: Sequence[Sequence[int]], side: str = "left") -> dict[str, Tensor]:
        """Model inputs of several prompts, padded on a side."""
        rows = [self.row(prompt) for prompt in prompts]
        longest = max(map(len, rows))
        fill = [[PAD] * (longest - len(row)) for row in rows]
        pairs = list(zip(rows, fill, strict=True))
        ids = torch.tensor([f + r if side == "left" else r + f for r, f in pairs])
        marks = [([1] * len(r), [0] * len(f)) for r, f in pairs]
        mask = torch.tensor([f + r if side == "left" else r + f for r, f in marks])
        images = [-1 - token for prompt in prompts for token in prompt if -100 < token < 0]
        videos = [-100 - token for prompt in prompts for token in prompt if token <= -100]
        found = {"input_ids": ids, "attention_mask": mask, **self.extra(ids, mask)}
        found |= self.encode(images) if images else {}
        return found | (self.encode_videos(videos) if videos else {})

    def visual(self, prompts: Sequence[Sequence[int]], side: str = "left") -> Tensor:
        """(B, L) bool, True at the tokens of `inputs` that stand for patches."""
        rows = []
        for prompt in prompts:
            row: list[bool] = []
            for token in prompt:
                if token >= 0:
                    row.append(False)
                elif token > -100:
                    row += self.content(-1 - token)
                else:
                    row += self.video_content(-100 - token)
            rows.append(row)
        longest = max(map(len, rows))
        fill = [[False] * (longest - len(row)) for row in rows]
        pairs = zip(rows, fill, strict=True)
        return torch.tensor([f + r if side == "left" else r + f for r, f in pairs])

    @property
    def placeholder(self) -> int:
        """The token id of visual content."""
        return int(self.model().config.image_token_id)

    @property
    def video_placeholder(self) -> int:
        """The token id of visual content of videos."""
        return int(self.model().config.video_token_id)


def of(name: str, **more: Any) -> Callable[[], Any]:
    """Makes a config, by the name of its class.

    A file of cases has a table `PUBLISHED` with the configs of real models, by name: with the
    defaults of their classes, or of a published checkpoint where that tests more.
    """
    return lambda: getattr(transformers, name)(**more)

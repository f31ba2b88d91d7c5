"""Texts after which an answer ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

_MORE = 16  # tokens that may be part of a character, or of no text, among those that are read


class Stops(StoppingCriteria):  # type: ignore[misc]
    """Ends an answer with the token after which it holds one of some texts.

    The last tokens are decoded and read. The stop strings of transformers make a table of the whole
    vocabulary by the places in the texts: seconds for every new text, and hundreds of megabytes
    that the process keeps.

    Args:
        tokenizer: Decodes the answer.
        texts: The texts, none of them empty.
        start: Tokens before the answer.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str], start: int) -> None:
        self._tokenizer = tokenizer
        self._texts = tuple(texts)
        self._start = start
        # A token has a byte at least.
        self._longest = max(len(text.encode()) for text in texts) + _MORE

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        new = input_ids[:, self._start :][:, -self._longest :]
        said = self._tokenizer.batch_decode(new)
        ended = [any(text in one for text in self._texts) for one in said]
        return torch.tensor(ended, device=input_ids.device)

"""The words for what a patch shows, as targets for the projector."""

from __future__ import annotations

import torch
from corpus import encode
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from pore.embedded.things import DIGITS, LETTERS, PLACES
from tower import COLOR_NAMES, GRID, NAMES, Labels

BACKGROUND_WORD, BACKGROUND_SCALE = "the", 0.3


class Lexicon:
    """Targets for projected patches: the sum of the decoder's embeddings of the words for them.

    A patch that a red circle at the top left covers aims at ``red + circle + top + left``;
    background aims at a faint ``the``. Then the frozen decoder reads visual tokens as it reads
    text, and attends to them as it attends to text.
    """

    def __init__(self, model: LlavaForConditionalGeneration, tokenizer: Tokenizer) -> None:
        """Look the words up.

        Args:
            model: The model whose decoder has been trained as a language model.
            tokenizer: Its tokenizer.
        """
        table: Tensor = model.get_input_embeddings().weight.detach()

        def words(text: str) -> Tensor:
            return table[encode(tokenizer, [" " + text])[0]].sum(0)

        categories = {
            **dict.fromkeys(DIGITS, "digit "),
            **dict.fromkeys(LETTERS, "letter "),
        }
        self.names = torch.stack([words(categories.get(n, "") + n) for n in NAMES])
        self.colors = torch.stack([words(c) for c in COLOR_NAMES])
        third = GRID // 3
        places = [[PLACES[r // third][c // third] for c in range(GRID)] for r in range(GRID)]
        self.places = torch.stack([torch.stack([words(p) for p in row]) for row in places])
        self.background = BACKGROUND_SCALE * words(BACKGROUND_WORD)

    def loss(self, projected: Tensor, labels: Labels) -> Tensor:
        """Squared distance to the targets over their variance, for things plus for background.

        Args:
            projected: ``(B, 144, 192)`` output of the projector.
            labels: What covers each patch.
        """
        patches = labels.patches
        name, color, row, column = patches[patches[..., 0] > 0].unbind(-1)
        things = self.names[name - 1] + self.colors[color - 1] + self.places[row, column]
        scale = things.pow(2).mean()
        shown = (projected[patches[..., 0] > 0].float() - things).pow(2).mean()
        rest = (projected[patches[..., 0] == 0].float() - self.background).pow(2).mean()
        total: Tensor = (shown + rest) / scale
        return total

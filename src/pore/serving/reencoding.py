"""The mode "reencode": a method chooses in one model, and another encodes what is left again.

In the mode "in_llm", `with pruner(model)`, tokens are dropped inside the decoder: those that stay
carry what the first K layers have taken from the others. A server such as vLLM has no place for
that. Here the method runs in a model of transformers up to its last stage only; the decoder that
answers gets the kept embeddings from its first layer on, as if the image had no other tokens, and
counts positions without gaps. The answers differ; docs/serving-vllm.md says by how much.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pore._compat.arguments import EMBEDS, IDS, MASK
from pore.data.loading import load_model
from pore.data.prompts import Prompt, prompt_inputs
from pore.engine.embeddings import (
    KeptEmbeddings,
    check_embeddable,
    kept_embeddings,
    last_layer,
)
from pore.engine.pruner import Pruner
from pore.errors import InputError
from pore.families.registry import images_of


class Choice(NamedTuple):
    """What a method keeps of the images of one prompt.

    Attributes:
        ids: The token ids of the prompt, with one placeholder for each image.
        images: What is kept of each.
    """

    ids: tuple[int, ...]
    images: tuple[KeptEmbeddings, ...]


@dataclass(frozen=True)
class Ranker:
    """A model that only says which visual tokens a method keeps.

    Attributes:
        model: A supported model of transformers; the vision tower and the decoder layers before the
            method's last stage are all that it needs, see `load`.
        processor: Its processor.
        pruner: The method.

    Raises:
        UnsupportedModelError: What the method or the model makes cannot be sent as embeddings.
    """

    model: Any
    processor: Any
    pruner: Pruner

    def __post_init__(self) -> None:
        check_embeddable(self.pruner)

    @classmethod
    def load(cls, name: str, pruner: Pruner, **how: Any) -> Ranker:
        """Load as much of a model as a method needs to choose.

        That is the vision tower and, for a method that acts before layer K of the decoder, its
        first K layers and one more, which never runs. The weights of so few layers have another
        fingerprint than those that a position bias was measured on, so name and revision alone are
        compared.

        Args:
            name: Hub id, folder or "embedded".
            pruner: The method.
            **how: Further arguments of `pore.data.loading.load_model`.

        Returns:
            The ranker.

        Raises:
            PoreError: The model or the method is not supported.
            OSError: There is no such model.
        """
        check_embeddable(pruner)
        model, processor = load_model(name, layers=last_layer(pruner) + 1, **how)
        return cls(model, processor, _of_few_layers(pruner))

    @property
    def width(self) -> int:
        """How many numbers an embedding has."""
        return int(self.model.config.get_text_config().hidden_size)

    def choose(self, prompts: Sequence[Prompt]) -> list[Choice]:
        """What the method keeps of the images of some prompts.

        Args:
            prompts: The prompts, in the model's chat template.

        Returns:
            One entry for each.

        Raises:
            PoreError: The processor refuses the prompts, or the method does.
        """
        model, processor = self.model, self.processor
        resize = self.pruner.resizing(model, processor)
        inputs = prompt_inputs(processor, prompts, model.device, model.dtype, resize)
        kept = kept_embeddings(self.model, inputs, self.pruner)
        images = images_of(self.model, inputs)
        found = []
        for row, (ids, mask) in enumerate(zip(inputs[IDS], inputs[MASK], strict=True)):
            stays = mask.bool()
            for image in images:
                if image.row == row:
                    stays[sorted([*image.columns, *image.structure])[1:]] = False
            own = tuple(one for one in kept if one.row == row)
            found.append(Choice(tuple(ids[stays].tolist()), own))
        return found


def _of_few_layers(pruner: Pruner) -> Pruner:
    """The method with position biases that do not ask for the weights of all layers."""
    bias = getattr(pruner, "reweight", None)
    if bias is None:
        return pruner
    if isinstance(bias, (tuple, list)):
        return replace(pruner, reweight=tuple(map(_any_weights, bias)))  # type: ignore[type-var]
    return replace(pruner, reweight=_any_weights(bias))  # type: ignore[type-var]


def _any_weights(bias: Any) -> Any:
    return bias.allowing("weights", "config") if hasattr(bias, "allowing") else bias


def reencoded(
    model: Any, inputs: Mapping[str, Any], kept: Sequence[KeptEmbeddings]
) -> dict[str, Tensor]:
    """A batch with what is left of its images, for a model of transformers that is not pruned.

        model.generate(**reencoded(model, inputs, kept_embeddings(model, inputs, pruner)))

    Args:
        model: The model that answers.
        inputs: The batch as the processor made it.
        kept: What is kept of its images, all of them.

    Returns:
        `inputs_embeds` (B, m, D) and `attention_mask` (B, m), padded on the left.

    Raises:
        InputError: An image of the batch is missing, or is not of these inputs.
    """
    ids, mask = inputs[IDS], inputs[MASK]
    embed = model.get_input_embeddings()
    images = images_of(model, inputs)
    if [(i.row, i.index, i.count) for i in images] != [(k.row, k.index, k.seen) for k in kept]:
        raise InputError(
            f"{len(kept)} images were kept of other inputs than these, which have {len(images)}; "
            "choose in the same batch."
        )
    rows = []
    for row, tokens in enumerate(ids):
        parts, start = [], 0
        for image, one in zip(images, kept, strict=True):
            if image.row == row:
                columns = sorted([*image.columns, *image.structure])
                parts += [_text(embed, tokens, mask[row], start, columns[0]), one.embeddings]
                start = columns[-1] + 1
        parts.append(_text(embed, tokens, mask[row], start, len(tokens)))
        rows.append(torch.cat([part.to(parts[-1]) for part in parts]))
    longest = max(map(len, rows))
    embeds = rows[0].new_zeros(len(rows), longest, rows[0].shape[-1])
    shown = ids.new_zeros(len(rows), longest)
    for row, states in enumerate(rows):
        embeds[row, longest - len(states) :], shown[row, longest - len(states) :] = states, 1
    return {EMBEDS: embeds, MASK: shown}


def _text(embed: Any, tokens: Tensor, mask: Tensor, start: int, end: int) -> Tensor:
    """(n, D) embeddings of the text between two columns, without padding."""
    states: Tensor = embed(tokens[start:end][mask[start:end].bool()])
    return states

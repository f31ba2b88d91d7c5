"""What CLIP says of a question and of image patches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pore.engine.stages import View
from pore.errors import InputError, UnsupportedModelError
from pore.families.base import Family
from pore.tensors.gathering import unit, widened

Questions = str | Sequence[str] | Callable[[list[int]], str]


@dataclass(frozen=True)
class ClipQuestions:
    """A CLIP model, and the questions that methods compare images with by it (VisionTrim).

    Attributes:
        model: The `CLIPModel` that the vision tower was taken from, such as
            openai/clip-vit-large-patch14-336 for LLaVA.
        tokenizer: Its tokenizer.
        questions: The questions of a batch, one string for each prompt or one for all; or a
            function that gets the token ids of a prompt, without visual tokens and padding, and
            returns its question. `processor.decode` returns the whole prompt; the authors pass the
            bare question, without the chat template.
    """

    model: nn.Module = field(repr=False)
    tokenizer: Any = field(repr=False)
    questions: Questions

    def check(self, model: nn.Module, family: Family) -> None:
        """Refuse a model that is not CLIP, or not the CLIP model of the vision tower.

        Args:
            model: The model to be pruned.
            family: Its adapter.

        Raises:
            UnsupportedModelError: The CLIP model does not fit; the message says why.
        """
        clip: Any = self.model
        parts = ("vision_model", "visual_projection", "text_model", "text_projection")
        if missing := [part for part in parts if not hasattr(clip, part)]:
            raise UnsupportedModelError(
                f"{type(self).__name__} needs a CLIPModel, with {', '.join(parts)}; "
                f"{type(clip).__name__} has no {', '.join(missing)}."
            )
        family.tower_read(model)  # refuses several feature layers
        config: Any = family.tower(model).config
        width = clip.visual_projection.in_features
        if config.hidden_size != width:
            raise UnsupportedModelError(
                f"The vision tower is {config.hidden_size} wide, the CLIP model's {width}; give "
                f"{type(self).__name__} the CLIP model that the tower was taken from."
            )

    def of_rows(
        self, rows: Sequence[int], count: int, text: Callable[[int], list[int]]
    ) -> list[str]:
        """The question of every row.

        Args:
            rows: Numbers of prompts.
            count: How many prompts there are.
            text: Gives the token ids of a prompt, without visual tokens and padding.

        Raises:
            InputError: There is no question for each prompt.
        """
        if isinstance(self.questions, str):
            return [self.questions] * len(rows)
        if callable(self.questions):
            asked = {row: self.questions(text(row)) for row in set(rows)}
            return [asked[row] for row in rows]
        if len(self.questions) == 0 or count % len(self.questions):
            raise InputError(
                f"{type(self).__name__} has {len(self.questions)} questions for a batch of {count} "
                "prompts; give one for each, or a function that reads them off the prompts."
            )
        copies = count // len(self.questions)  # beams repeat every prompt
        return [self.questions[row // copies] for row in rows]

    @torch.no_grad()
    def patches(self, features: Tensor) -> Tensor:
        """Embed patches in the joint space, without the layer norm of the pooled feature.

        Args:
            features: (..., C) patch features, as the projector gets them.

        Returns:
            (..., E) unit embeddings.
        """
        clip: Any = self.model
        projection = clip.visual_projection
        return unit(projection(features.to(projection.weight.device, projection.weight.dtype)))

    @torch.no_grad()
    def tokens(self, questions: Sequence[str], cut_off: bool = False, fill: bool = False) -> Tensor:
        """Embed every token of questions in the joint space, with the marks of begin and end.

        Args:
            questions: Q strings.
            cut_off: Whether long questions are cut off; otherwise they come in pieces, whose tokens
                count together.
            fill: Whether the tokens that fill up shorter questions count as theirs.

        Returns:
            (Q, L, E) unit embeddings, 0 at what does not count.
        """
        clip: Any = self.model
        room = clip.config.text_config.max_position_embeddings
        every = [list(self.tokenizer(question)["input_ids"]) for question in questions]
        if cut_off:
            cut = [[ids if len(ids) <= room else [*ids[: room - 1], ids[-1]]] for ids in every]
        else:
            cut = [_cut(ids, room) for ids in every]
        pieces = [piece for one in cut for piece in one]
        ids, mask = _filled(pieces, getattr(self.tokenizer, "pad_token_id", None) or 0)
        device = clip.text_projection.weight.device
        states = clip.text_model(ids.to(device), mask.to(device)).last_hidden_state
        texts = unit(clip.text_projection(states))
        if not fill:
            texts = texts * mask[..., None].to(device)
        counts = list(map(len, cut))
        found = texts.new_zeros(len(questions), max(counts), *texts.shape[1:])
        for row, own in zip(found, torch.split(texts, counts), strict=True):
            row[: len(own)] = own
        return found.flatten(1, 2)


@dataclass(frozen=True)
class ClipRelevance(ClipQuestions):
    """Relevance by CLIP: how little a patch resembles the question in CLIP's joint space.

    Patch features, as the projector gets them, go through the layer norm and the projection that
    CLIP has for its pooled image feature. Those were never meant for single patches, and low
    similarity turns out to mark the relevant ones, so relevance is the negative cosine, as in the
    authors' code. A question longer than CLIP's context is cut into pieces, over which the cosine
    is averaged.

    Attributes:
        model: As in `ClipQuestions`.
        tokenizer: Likewise.
        questions: Likewise; the authors leave out "Answer the question using a single word or
            phrase." too.
        faithful: Cut long questions as the authors' code does: only the first piece begins and only
            the last ends as CLIP expects, so that all pieces but the last say next to nothing.
    """

    faithful: bool = False

    def check(self, model: nn.Module, family: Family) -> None:
        """Refuse a model that is not CLIP, or not the CLIP model of the vision tower."""
        try:
            super().check(model, family)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{error} Or use relevance=None.") from None

    @torch.no_grad()
    def images(self, features: Tensor) -> Tensor:
        """Embed patches in the joint space.

        Args:
            features: (..., C) patch features, as the projector gets them.

        Returns:
            (..., E) embeddings, not normalised.
        """
        clip: Any = self.model
        projection = clip.visual_projection
        features = features.to(projection.weight.device, projection.weight.dtype)
        embeds: Tensor = projection(clip.vision_model.post_layernorm(features))
        return widened(embeds)

    @torch.no_grad()
    def text(self, questions: Sequence[str]) -> Tensor:
        """Embed questions in the joint space.

        Args:
            questions: Q strings.

        Returns:
            (Q, E) mean of the unit embeddings of a question's pieces: the cosine to it is the mean
            cosine to the pieces.
        """
        clip: Any = self.model
        device = clip.text_projection.weight.device
        room = clip.config.text_config.max_position_embeddings
        pieces: list[list[int]] = []
        numbers: list[int] = []
        for number, question in enumerate(questions):
            ids = list(self.tokenizer(question)["input_ids"])
            found = _cut_by_the_authors(ids, room) if self.faithful else _cut(ids, room)
            pieces += found
            numbers += [number] * len(found)
        padded, mask = _filled(pieces, 0)
        pooled = clip.text_model(padded.to(device), mask.to(device)).pooler_output
        texts = unit(clip.text_projection(pooled))
        of = torch.tensor(numbers, device=device)
        total = texts.new_zeros(len(questions), texts.shape[-1]).index_add_(0, of, texts)
        return total / of.bincount(minlength=len(questions))[:, None]

    def of(self, view: View) -> Tensor:
        """(I, E) the embedding of the question about every image."""
        said = view.layout.text

        def text(row: int) -> list[int]:
            if view.input_ids is None:
                raise InputError(
                    "The prompt is given as inputs_embeds, so the question cannot be read off it; "
                    "give ClipRelevance the questions themselves."
                )
            ids: list[int] = view.input_ids[row].to(said.device)[said[row]].tolist()
            return ids

        every = self.of_rows(view.layout.rows.tolist(), len(view.hidden_states), text)
        places = {question: place for place, question in enumerate(dict.fromkeys(every))}
        return self.text(list(places))[[places[question] for question in every]]


def _filled(pieces: Sequence[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """(Q, L) token ids, filled up to the longest; and their mask, 0 at what fills."""
    width = max(map(len, pieces))
    ids = [piece + [pad] * (width - len(piece)) for piece in pieces]
    mask = [[1] * len(piece) + [0] * (width - len(piece)) for piece in pieces]
    return torch.tensor(ids), torch.tensor(mask)


def _cut(ids: list[int], room: int) -> list[list[int]]:
    """A question's ids in pieces of at most `room`, each with a begin mark and an end mark."""
    if len(ids) <= room:
        return [ids]
    begin, *words, end = ids
    return [[begin, *words[i : i + room - 2], end] for i in range(0, len(words), room - 2)]


def _cut_by_the_authors(ids: list[int], room: int) -> list[list[int]]:
    """A question's ids cut after every `room` of them, with no marks added."""
    return [ids[i : i + room] for i in range(0, len(ids), room)]

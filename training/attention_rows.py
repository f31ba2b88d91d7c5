"""Records what corrections of text-visual attention read, so that all of them can be tried on it.

    python training/attention_rows.py --folder runs/smollm2 --tokens 144 --split test

A method that drops tokens before layer K scores them by the attention of layer K - 1. No correction
changes the layers before, so one pass per question is enough for all of them. Every 25 questions
are written as soon as they are done, and an interrupted run continues after them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from canvas import Asked, asked
from PIL import Image
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from pore.embedded.splits import Split

LAYERS = (0, 1, 2, 4, 7)
"""Layers at which methods with K = 1, 2, 3, 5 and 8 score."""

FIRST: dict[Split, int] = {"train": 3_900_000, "calibration": 1_000_000, "test": 2_000_000}
"""Number of the first picture of a split; nothing else here uses scenes with such numbers."""

EVERY = "every-layer"
"""Stands for the split in the name of a folder with records of all layers."""

PART = 25
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Rows:
    """Records of Q questions about pictures of N patches, at L layers with H heads.

    Attributes:
        picture: ``(Q,)`` number of the picture within its split.
        question: ``(Q,)`` the text.
        patches: ``(Q, N)`` bool: those that show an object asked about.
        after: ``(Q,)`` tokens from the last visual token (excluded) to the last one (included).
        attention: ``(Q, L, H, N)`` of the last prompt token, after the softmax over the prompt.
        plain: ``(Q, L, H, N)`` logits of the same row without RoPE.
        null: ``(Q, L, N)`` attention of the first token after the image, mean over heads.
        text: ``(Q, L, N)`` attention of all tokens after the image, mean over them and heads.
    """

    picture: npt.NDArray[np.int64]
    question: npt.NDArray[np.str_]
    patches: npt.NDArray[np.bool_]
    after: npt.NDArray[np.int64]
    attention: Floats
    plain: Floats
    null: Floats
    text: Floats

    def __len__(self) -> int:
        return len(self.picture)

    def __getitem__(self, chosen: slice | npt.NDArray[np.int64]) -> Rows:
        return Rows(**{f.name: getattr(self, f.name)[chosen] for f in fields(self)})


def records_of(folder: Path, tokens: int, what: str) -> Path:
    """The folder with the records of one size: for a split, or for `EVERY` layer."""
    return folder / "rows" / f"{tokens}-{what}"


def load(folder: Path) -> Rows:
    """All records of a folder, in the order of the questions.

    Raises:
        ValueError: There are none.
    """
    parts = [np.load(path) for path in sorted(folder.glob("*.npz"))]
    if not parts:
        raise ValueError(f"{folder} holds no records; make them with training/attention_rows.py.")
    return Rows(**{f.name: np.concatenate([p[f.name] for p in parts]) for f in fields(Rows)})


def inputs_of(processor: LlavaProcessor, one: Asked) -> Any:
    """A question and its picture as the model gets them."""
    content = [{"type": "image"}, {"type": "text", "text": one.question.question}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    return processor(images=Image.fromarray(one.canvas.image), text=prompt, return_tensors="pt")


class Recorder:
    """A model with its processor, cut off after the last layer that is read."""

    def __init__(self, folder: str, layers: Sequence[int] | None = LAYERS) -> None:
        """Load the model.

        Args:
            folder: The folder of the checkpoint.
            layers: Indices of the layers to read; None for all.
        """
        self.model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
        self.processor = LlavaProcessor.from_pretrained(folder)
        decoder = self.model.model.language_model
        self.layers = tuple(range(len(decoder.layers)) if layers is None else layers)
        decoder.layers = decoder.layers[: max(self.layers) + 1]
        self.inputs: dict[int, dict[str, Any]] = {}
        for i in self.layers:
            decoder.layers[i].self_attn.register_forward_pre_hook(
                lambda _, __, kwargs, i=i: self.inputs.update({i: kwargs}), with_kwargs=True
            )

    @property
    def side(self) -> int:
        """Width of the pictures in pixels."""
        return int(self.model.config.vision_config.image_size)

    @torch.inference_mode()
    def __call__(self, one: Asked) -> Rows:
        """The record of one question."""
        inputs = inputs_of(self.processor, one)
        visual = (inputs["input_ids"][0] == self.model.config.image_token_index).nonzero()[:, 0]
        self.model.model(**inputs, use_cache=False)
        begin, end = int(visual[0]), int(visual[-1]) + 1
        found = [self._rows(i, begin, end) for i in self.layers]
        attention, plain, null, text = (
            torch.stack(parts)[None].float().numpy() for parts in zip(*found, strict=True)
        )
        return Rows(
            picture=np.array([one.index]),
            question=np.array([one.question.question], "U80"),
            patches=one.patches[None],
            after=np.array([inputs["input_ids"].shape[1] - end]),
            attention=attention,
            plain=plain,
            null=null,
            text=text,
        )

    def _rows(self, layer: int, begin: int, end: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What `Rows` holds for one layer; visual tokens lie from `begin` to before `end`."""
        attention = self.model.model.language_model.layers[layer].self_attn
        given = self.inputs[layer]
        states, (cos, sin) = given["hidden_states"], given["position_embeddings"]
        shape = (*states.shape[:2], -1, attention.head_dim)
        query = attention.q_proj(states).view(shape).transpose(1, 2)
        key = attention.k_proj(states).view(shape).transpose(1, 2)
        groups = query.shape[1] // key.shape[1]
        turned, keys = apply_rotary_pos_emb(query, key, cos, sin)
        keys, key = (k[0].repeat_interleave(groups, 0) for k in (keys, key))
        logits = turned[0, :, end:] @ keys.transpose(-1, -2) * attention.scaling
        n = states.shape[1]
        future = torch.arange(n) > torch.arange(end, n)[:, None]
        weights = logits.masked_fill(future, -torch.inf).softmax(-1)[..., begin:end]
        plain = (query[0, :, -1:] @ key.transpose(-1, -2) * attention.scaling)[:, 0, begin:end]
        mean = weights.mean(0)
        return weights[:, -1], plain, mean[0], mean.mean(0)


def joined(records: Sequence[Rows]) -> Rows:
    """Records one after another."""
    return Rows(
        **{f.name: np.concatenate([getattr(r, f.name) for r in records]) for f in fields(Rows)}
    )


def missing(folder: Path, parts: int) -> Iterator[tuple[int, Path]]:
    """The missing parts by number, with the files into which they go."""
    for i in range(parts):
        path = folder / f"{i:04d}.npz"
        if not path.exists():
            yield i, path


def main() -> None:
    """Record the questions of one split."""
    parser = argparse.ArgumentParser(description="Record attention over visual tokens.")
    parser.add_argument("--folder", type=Path, required=True, help="where the model was built")
    parser.add_argument("--tokens", type=int, default=144, help="which of its sizes")
    parser.add_argument("--split", choices=list(FIRST), required=True)
    parser.add_argument("--questions", type=int, default=350, help=f"a multiple of {PART}")
    parser.add_argument("--every-layer", action="store_true", help="record all layers")
    arguments = parser.parse_args()
    what = EVERY if arguments.every_layer else arguments.split
    out = records_of(arguments.folder, arguments.tokens, what)
    out.mkdir(parents=True, exist_ok=True)
    layers = None if arguments.every_layer else LAYERS
    recorder = Recorder(str(arguments.folder / str(arguments.tokens)), layers)
    stream = asked(arguments.split, FIRST[arguments.split], arguments.questions, recorder.side)
    done = 0
    for i, path in missing(out, arguments.questions // PART):
        for _ in islice(stream, i * PART - done):
            pass
        records = joined([recorder(one) for one in islice(stream, PART)])
        done = (i + 1) * PART
        whole = path.with_suffix(".part")
        with whole.open("wb") as file:
            np.savez(file, **{f.name: getattr(records, f.name) for f in fields(Rows)})
        whole.rename(path)
        print(f"{done} of {arguments.questions} questions", flush=True)


if __name__ == "__main__":
    main()

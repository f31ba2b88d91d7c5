"""What is tested: a twin, prompts for it, and its outputs for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from pore.checking.reference import hidden_from
from pore.checking.shrinking import VOCABULARY
from pore.engine.masks import window_of
from pore.engine.prefill import SampleReport
from pore.engine.pruner import Pruner
from pore.errors import ScoreError
from pore.families.base import Family
from pore.families.registry import images_of
from pore.methods.divprune import DivPrune
from pore.methods.fastervlm import FasterVLM
from pore.methods.fastv import FastV

KEEP = 6
"""Visual tokens that every method keeps."""

ANSWER = 4
"""Tokens of an answer."""

TOLERANCES: Mapping[torch.dtype, float] = {
    torch.float64: 5e-5,
    torch.float32: 2e-3,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}
"""How far logits may differ, as a share of the largest: most models compute norms and rotary tables
in float32 whatever the weights."""

Finding = tuple[bool, str]
"""Whether an invariant holds, and what was found."""

_TEXT = range(3, 80)  # token ids; special ones come after

_PROMPTS = ((3, True, 4), (9, True, 6), (0, False, 14))  # text before, an image, text after


class Subject:
    """A twin with prompts for it: two with an image and one without, of different lengths.

    Its outputs for them, unpruned and pruned by each method, are computed once.

    Args:
        model: The twin.
        family: Its adapter.
        cache: The kind of cache that `generate` makes; None is its default.

    Attributes:
        all: Inputs of all prompts, padded on the left.
        layer: The first pruned layer of the method in the decoder.
        methods: One method for every place where tokens can be dropped: "decoder", "embeddings"
            and, where methods can act there, "tower".
        hides: Whether a sliding window or a chunk hides a part of some prompt.
        wide: The same twin with windows that hide nothing; None if this one's hide nothing.
    """

    def __init__(self, model: Any, family: Family, cache: str | None) -> None:
        self.model = model
        self.family, self.cache = family, cache
        self.dtype: torch.dtype = self.model.dtype
        self.device: torch.device = self.model.device
        self._rows = [self._row(seed, *prompt) for seed, prompt in enumerate(_PROMPTS)]
        self.all = self.inputs(range(len(_PROMPTS)))
        self._forwards: dict[str, tuple[Tensor, list[SampleReport]]] = {}
        windows = [window_of(self._config, i) for i in range(len(family.layers(model)))]
        longest = self.all["input_ids"].shape[1] + ANSWER
        self.hides = any(window is not None and window < longest for window in windows)
        self.wide: Subject | None = None
        self.layer = self._layer()
        self.methods: dict[str, Pruner] = {
            "decoder": FastV(KEEP, layer=self.layer),
            "embeddings": DivPrune(KEEP),
        }
        if self._tower():
            self.methods["tower"] = FasterVLM(KEEP)

    # -- what it is -------------------------------------------------------------------------------

    @property
    def _config(self) -> Any:
        decoder: Any = self.family.decoder(self.model)
        return decoder.config

    def _layer(self) -> int:
        """The layer that follows the first one, from layer 1 on, with attention to all tokens."""
        layers = self.family.layers(self.model)
        attending = [i for i in range(len(layers)) if not self.family.recurrent(layers[i])]
        whole = [i for i in attending[:-1] if i > 0 and window_of(self._config, i) is None]
        return (whole[0] if whole else 1) + 1

    def _tower(self) -> bool:
        """Whether methods can act in the tower: its family permits it, and one layer is read."""
        if any(one.unless is None for one in FasterVLM(KEEP).limits(self.family)):
            return False
        return isinstance(getattr(self.model.config, "vision_feature_layer", -1), int)

    def _row(self, seed: int, before: int, image: bool, after: int) -> dict[str, Any]:
        """Token ids of a prompt, and what comes with its image."""
        generator = torch.Generator().manual_seed(seed)

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        ids, inputs = self.family.example(self.model, noise) if image else ([], {})
        words = torch.randint(_TEXT.start, _TEXT.stop, (before + after,), generator=generator)
        text = words.tolist()
        return {"ids": [*text[:before], *ids, *text[before:]], "inputs": inputs}

    def inputs(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Inputs of some of the prompts, padded on the left."""
        chosen = [self._rows[i] for i in rows]
        longest = max(len(row["ids"]) for row in chosen)
        fill = [longest - len(row["ids"]) for row in chosen]
        pairs = list(zip(chosen, fill, strict=True))
        ids = torch.tensor([[0] * count + row["ids"] for row, count in pairs])
        mask = torch.tensor([[0] * count + [1] * len(row["ids"]) for row, count in pairs])
        found = {"input_ids": ids, "attention_mask": mask}
        found |= self.family.prompt_types(self.model, ids, 0)
        for row in chosen:
            for name, value in row["inputs"].items():
                found[name] = torch.cat([found[name], value]) if name in found else value
        return {name: self._placed(value) for name, value in found.items()}

    def _placed(self, value: Tensor) -> Tensor:
        value = value.to(self.device)
        return value.to(self.dtype) if value.is_floating_point() else value

    def answered(self, inputs: dict[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
        """The inputs with an answer after the prompts.

        Args:
            inputs: Inputs of the prompts.
            ids: (B, L + n) token ids of both.
        """
        count = ids.shape[1] - inputs["input_ids"].shape[1]
        mask = nn.functional.pad(inputs["attention_mask"], (0, count), value=1)
        types = self.family.prompt_types(self.model, ids, count)
        return {**inputs, "input_ids": ids, "attention_mask": mask, **types}

    def forward(
        self, inputs: dict[str, Tensor], tokens: Tensor | None = None, **more: Any
    ) -> Tensor:
        """Logits, where every token has the position that `generate` would give it.

        Args:
            inputs: Inputs.
            tokens: (B, L) bool, the tokens that positions count; None is all but padding.
            more: Further arguments.
        """
        if not self.family.mrope:  # otherwise the model counts itself, without padding
            counted = inputs["attention_mask"] if tokens is None else tokens.long()
            positions = (counted.cumsum(-1) - 1).clamp(min=0)
            more["position_ids"] = positions + self.family.first_position
        logits: Tensor = self.model(**inputs, **more).logits
        return logits

    @cached_property
    def dense(self) -> Tensor:
        """Logits without pruning."""
        return self.forward(self.all)

    def pruned(self, place: str) -> tuple[Tensor, list[SampleReport]]:
        """Logits of a pruned forward, and what was kept of every sample."""
        if place not in self._forwards:
            with self.methods[place](self.model) as run:
                logits = self.forward(self.all)
            self._forwards[place] = logits, run.report.samples
        return self._forwards[place]

    def dropped(self, samples: Sequence[SampleReport]) -> Tensor:
        """(B, L) bool, True at the tokens that a report says were dropped."""
        found = torch.zeros_like(self.all["input_ids"], dtype=torch.bool)
        for image in images_of(self.model, self.all):
            kept = set(samples[image.row].images[image.index].kept)
            gone = [column for i, column in enumerate(image.columns) if i not in kept]
            found[image.row, gone] = True
        return found

    def references(self, place: str) -> bool:
        """Whether a method must equal a masked forward over all tokens.

        If positions are numbered anew, a sliding window shows other tokens than in that forward.
        """
        return place == "decoder" or self.family.mrope or not self.hides

    def masked(self, place: str, inputs: dict[str, Tensor], dropped: Tensor) -> Tensor:
        """Logits of a forward over all tokens that does not see the dropped ones."""
        tokens = inputs["attention_mask"].bool()
        counted = tokens if place == "decoder" else tokens & ~dropped
        first = self.layer if place == "decoder" else 0
        with hidden_from(self.model, self.family, first, dropped, tokens):
            return self.forward(inputs, counted, use_cache=False)

    def close(self, got: Tensor, wanted: Tensor) -> Finding:
        """Whether logits (..., V) are equal, up to rounding."""
        if got.shape != wanted.shape:
            return False, f"logits have the shape {tuple(got.shape)}, not {tuple(wanted.shape)}"
        if not bool(got.isfinite().all()):
            return False, "logits are not finite numbers"
        got, wanted = (logits.to("cpu", torch.float64) for logits in (got, wanted))
        difference = (got - wanted).abs().amax(-1).flatten()
        # Rounding in half precision can send single tokens to other experts.
        half = self.dtype.itemsize < 4
        apart = float(difference.median() if half else difference.max())
        share = apart / max(float(wanted.abs().max()), 1e-9)
        # Not `share > ...`: NaN must not count as equal.
        return share <= TOLERANCES[self.dtype], f"logits {share:.1e} of the largest apart"

    def warm(self) -> None:
        """Run the twin once unpruned: it must work, and transformers then leaves its own hooks.

        Raises:
            ScoreError: Logits are NaN, as eager attention makes them from padding in float64.
        """
        self.generate(self.all)
        if not bool(self.dense[self.all["attention_mask"].bool()].isfinite().all()):
            raise ScoreError("The logits are not finite numbers, even without pruning.")

    def generate(self, inputs: dict[str, Tensor]) -> Any:
        """A greedy answer of text, with its logits."""
        settings = {} if self.cache is None else {"cache_implementation": self.cache}
        return self.model.generate(
            **inputs,
            max_new_tokens=ANSWER,
            do_sample=False,
            suppress_tokens=[i for i in range(VOCABULARY) if i not in _TEXT],
            output_logits=True,
            return_dict_in_generate=True,
            disable_compile=True,
            **settings,
        )

"""The engine: a pruning method declared as stages, and the run that puts it into a model.

A method is a frozen dataclass of its settings that says in `stages` where it acts and what it does
there. Called with a model it gives a `Run`, a context manager that hooks the model, shortens the
sequence of every prefill with visual tokens, and leaves the model as it was.
"""

from __future__ import annotations

import copy
import functools
import inspect
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from threading import get_ident
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from pore._private import (
    CALL,
    CHECKPOINT,
    DEEPSTACK,
    DEEPSTACK_WHAT,
    DEEPSTACK_WHERE,
    EMBEDS,
    HIDDEN,
    IDS,
    MASK,
    POSITIONS,
    PREFILL,
    SHARED_KEYS,
    SPARED_ROWS,
    WANTED,
    before_checkpoint,
    beyond_tested,
    cache_in,
    cached_keys,
    causal_mask,
    check_interface,
    checkpointed,
    has_masks,
    has_static_slots,
    layer_number,
    slots_of,
    unwrapped,
    uses_flash,
    whereabouts,
    without_cache,
)
from pore.asked import Asked
from pore.attention import LayerAttention, Reader, hide_positions, tap_attention
from pore.caches import CacheRecord, copied_record, keep_record, record_of
from pore.changes import Changes, changes_in, is_changed
from pore.errors import (
    BudgetError,
    InputError,
    ModelStateError,
    ScoreError,
    UnsupportedModelError,
)
from pore.families import Family, family_of
from pore.given import check_tower, check_unpacked, chosen_masks, custom_masks, shown_images
from pore.layout import Image, Layout, Tiling
from pore.packed import PackedWatch
from pore.padding import letterbox_padding
from pore.precision import full_precision, scoring
from pore.report import Report
from pore.selection import budget, check_features
from pore.sequence import (
    Shortened,
    Track,
    check_own_slot,
    own_parts,
    own_slots,
    pack,
    take,
    token_mask,
    window_of,
)
from pore.tower import Encoded, TowerStage, TowerWatch, watch_tiling

if TYPE_CHECKING:
    from pore.bias import PositionBias
    from pore.shapes import ModelShape

Index = Literal["original", "dense"]
Positions = Literal["original", "dense"]

_PATIENCE = 20.0  # seconds that a thread may stand still while another waits for it to leave


@dataclass(frozen=True)
class View:
    """What a stage's rule sees: the visual tokens of all images of the batch, side by side.

    Attributes:
        layout: Where the visual tokens lie now.
        hidden_states: (B, L, D) the states that enter the stage's layer.
        attention: What the stage's reader took from its layer's attention; (I, t) text-visual
            attention A with `LastToken`, None without a reader.
        padding: (I, t) share of every token's patch that is letterbox padding, where asked for.
        generator: Source of chance for methods that draw.
        norm: The decoder's final norm.
        memory: What the stage's `prepare` made of the prompt.
        input_ids: (B, L) token ids of the prompt, of the tokens that are left; None for a prompt
            that was given as embeddings.
        tower: What the vision tower made of every image, where asked for.
        rotary: Makes the decoder's rotary tables for states (B, m, D) at positions (B, m).
        dense: Whether positions are numbered anew behind the stage.
    """

    layout: Layout
    hidden_states: Tensor
    attention: Any
    padding: Tensor | None
    generator: torch.Generator
    norm: Callable[[Tensor], Tensor]
    memory: Any = None
    input_ids: Tensor | None = None
    tower: tuple[Encoded, ...] | None = None
    rotary: Callable[[Tensor, Tensor], Any] | None = None
    dense: bool = False

    def reweighted(self, scores: Tensor, bias: PositionBias, index: Index = "original") -> Tensor:
        """Scores divided by the position bias: PoRe Eq. 2.

        Args:
            scores: (I, t) scores with the position bias in them.
            bias: P over the visual tokens of one image.
            index: Where P is read: at the "original" raster index of every token, or where a token
                of the full image has the same distance to the text as this one has now, in the
                "dense" numbering of methods that number positions anew: the last of t tokens at
                the last entry of P.

        Returns:
            (I, t) scores without.

        Raises:
            ProfileMismatchError: An image has another number of tokens than P.
        """
        for image in self.layout.images:
            bias.check(n=image.count)
        n = len(bias)
        if index == "original":
            return bias.divide(scores, self.layout.places(n))
        slots = torch.arange(scores.shape[-1], device=scores.device)
        counts = self.layout.valid.sum(-1, keepdim=True)
        return bias.divide(scores, (n - counts + slots).clamp(0, n - 1))

    @property
    def features(self) -> Tensor:
        """(I, t, D) the states of the visual tokens; arbitrary where not `valid`."""
        return self.layout.gather(self.hidden_states)

    def budget(self, keep: int | float | Callable[[int], int]) -> list[int]:
        """The number of tokens that `keep` means for every image, as it entered the model.

        Args:
            keep: Tokens per image, the fraction kept, or what gives the number for an image that
                came with so many tokens.

        Raises:
            BudgetError: An image has fewer; the message names it.
        """
        counts = []
        for image in self.layout.images:
            try:
                visual = len(image.columns)
                counts.append(keep(visual) if callable(keep) else budget(keep, visual))
            except BudgetError as error:
                raise BudgetError(f"Image {image.index} of sample {image.row}: {error}") from None
        return counts


@dataclass(frozen=True)
class Selection:
    """What a stage decides.

    Attributes:
        keep: (I, t) bool, the visual tokens that stay.
        features: (I, t, D) new states of the tokens that stay, or None to leave them.
        raster: (I, t) the original token that each new state stands for, see `Layout.raster`; None
            where they stand for what they did.
        structure: Of every image, whether its structure tokens (the end of a row) stay; None keeps
            them all.
        others: (B, L) bool, True at further tokens that go; None drops none.
    """

    keep: Tensor
    features: Tensor | None = None
    raster: Tensor | None = None
    structure: Sequence[bool] | None = None
    others: Tensor | None = None


@dataclass(frozen=True)
class Limit:
    """What of a method a family does not take.

    Attributes:
        reason: Why, and what to do.
        unless: Layers or images with which the method works all the same; None where it never does
            with its settings.
    """

    reason: str
    unless: str | None = None


@dataclass(frozen=True)
class Stage:
    """One place where a method drops visual tokens.

    Attributes:
        layer: The first decoder layer (from 0) that sees fewer tokens. 0 acts on the embeddings,
            the number of layers on what the last layer gives.
        rule: Decides which tokens stay. It runs out of any autocast, and without a graph unless it
            `merges`; so do `attention` and `prepare`, always without a graph.
        attention: Takes from the attention of layer - 1 what the rule reads, such as `LastToken`;
            None when it reads none.
        ahead: Whether the reader looks at layer instead, whose queries and keys are then computed
            once in advance from the states that enter it.
        prepare: Called once for every prompt, on what enters the decoder; reader and rule find
            what it gives in `memory`. Stages that share it share the result.
        positions: Whether the tokens that stay keep their "original" positions, or are numbered
            anew ("dense") as where the layers that follow never saw the dropped ones. None is
            dense on the embeddings and original in the decoder.
        padding: Whether the rule reads letterbox padding.
        tower: Whether the rule reads what the vision tower made of the images.
        merges: Whether the rule gives tokens that stay new states.
        curve: What of the reader's result is the attention (I, t) that a position bias divides, for
            calibration; None is the whole.
    """

    layer: int
    rule: Callable[[View], Selection]
    attention: Reader | None = None
    ahead: bool = False
    prepare: Callable[[View], Any] | None = None
    positions: Positions | None = None
    padding: bool = False
    tower: bool = False
    merges: bool = False
    curve: Callable[[Any], Tensor] | None = None

    @property
    def dense(self) -> bool:
        """Whether positions are numbered anew."""
        return self.positions == "dense" or (self.positions is None and self.layer == 0)

    @property
    def probed(self) -> int | None:
        """The decoder layer whose attention is read, or None."""
        if self.attention is None:
            return None
        return self.layer if self.ahead else self.layer - 1


class Pruner(ABC):
    """A pruning method with its settings: subclass as a frozen dataclass and give `stages`.

    Attributes:
        name: The method's name in tables and on the command line.
        source: Where it was published.
        reweightable: Whether it ranks by text-visual attention and so takes `reweight`.
        experimental: Whether it was built from a paper's description, with no code to compare with.
        registry: Every method by name.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    reweightable: ClassVar[bool] = False
    experimental: ClassVar[bool] = False
    registry: ClassVar[dict[str, type[Pruner]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if isinstance(cls.__dict__.get("name"), str):
            Pruner.registry[cls.name] = cls

    @classmethod
    def usual(cls, keep: int | float, shape: ModelShape) -> Pruner | None:
        """The method as its authors set it up, scaled to a model's depth.

        Args:
            keep: Visual tokens left at the end, per image, or the fraction.
            shape: The model's sizes.

        Returns:
            The method; None where it needs more than a model to be set up.
        """
        return cls(keep=keep)  # type: ignore[call-arg]

    @abstractmethod
    def stages(self) -> Sequence[Stage | TowerStage]:
        """Where the method acts, in the order of the data's way: tower first, then by layer."""

    def counts(self, visual: int, layers: int) -> list[int]:
        """Visual tokens of one image that enter every decoder layer.

        Args:
            visual: Visual tokens that the image comes with.
            layers: Decoder layers.

        Returns:
            One number for each layer.

        Raises:
            BudgetError: The image has fewer tokens than are to be kept.
        """
        (stage,) = self.stages()
        first = stage.layer if isinstance(stage, Stage) else 0
        kept = budget(self.keep, visual)  # type: ignore[attr-defined]
        return [visual] * first + [kept] * (layers - first)

    @property
    def tower_stage(self) -> TowerStage | None:
        """The stage in the vision tower, if there is one."""
        return next((s for s in self.stages() if isinstance(s, TowerStage)), None)

    @property
    def reads_tower(self) -> bool:
        """Whether it reads what goes through the vision tower, which then must run while pruned."""
        return any(isinstance(s, TowerStage) or s.padding or s.tower for s in self.stages())

    @property
    def looks_at(self) -> list[int]:
        """The decoder layers whose attention, or else whose output, it ranks by."""
        stages = [s for s in self.stages() if isinstance(s, Stage) and s.layer]
        return [s.layer - 1 if s.probed is None else s.probed for s in stages]

    def limits(self, family: Family) -> list[Limit]:
        """What a family does not take of the method with these settings, whatever the model.

        `pore models` prints it, and a run that cannot be is refused by it.

        Args:
            family: The adapter.

        Returns:
            The limits; none where the method works.
        """
        found = []
        stages = [stage for stage in self.stages() if isinstance(stage, Stage)]
        if self.reads_tower and family.tower_refusal is not None:
            found.append(Limit(f"it reads the vision tower, but {family.tower_refusal}"))
        if family.packed and any(stage.padding for stage in stages):
            found.append(
                Limit(
                    "it looks for letterbox padding, but images go into the vision tower in their "
                    "own shape, without any. Leave suppress_padding away."
                )
            )
        shrinking = self.tower_stage is not None and self.tower_stage.merge is not None
        if shrinking and (family.merged or family.packed):
            why = (
                "visual tokens are made of squares of them, on the full grid"
                if family.merged
                else "images of any size go through it in one sequence"
            )
            found.append(
                Limit(
                    f"it merges patches inside the vision tower, but {why}. Use a method that "
                    "chooses among the tokens."
                )
            )
        if family.deepstack and any(stage.merges for stage in self.stages()):
            reason = (
                "the first decoder layers add features to every visual token, which merged tokens "
                "have none of. Use a method that only drops tokens"
            )
            tower = self.tower_stage is not None and self.tower_stage.merges
            if tower or any(stage.merges and stage.layer == 0 for stage in stages):
                found.append(Limit(f"{reason}."))
            else:
                found.append(Limit(f"{reason}, or later layers.", "it acts behind those layers"))
        if family.shares_keys and any(stage.merges and stage.layer > 0 for stage in stages):
            found.append(
                Limit(
                    "decoder layers look at keys that earlier ones made, which tokens merged since "
                    "are not among. Use a method that only drops tokens.",
                    "it acts before those that are shared, or none are",
                )
            )
        inside = [stage for stage in stages if stage.layer > 0]
        if family.recurrent_mixer is not None and inside:
            read = any(stage.probed is not None for stage in inside)
            found.append(
                Limit(
                    "recurrent decoder layers have no attention, and none can be read or come "
                    "first where tokens are dropped.",
                    "the layers that it reads have attention"
                    if read
                    else "it acts behind the first layer with attention",
                )
            )
        return found

    def check(self, model: nn.Module, family: Family) -> None:  # noqa: B027 - optional
        """Refuse a model that the settings do not fit.

        Args:
            model: The model to be pruned.
            family: Its adapter.

        Raises:
            PoreError: Says what does not fit and what to do.
        """

    def __call__(self, model: nn.Module) -> Run:
        """The context manager that prunes `model`.

        Args:
            model: A supported vision-language model of transformers.

        Returns:
            The run; its `report` says what was kept.

        Raises:
            UnsupportedModelError: The model is of no family that pore knows.
        """
        return Run(self, model)

    def apply(self, model: nn.Module) -> Run:
        """Prune `model` until `remove`. A pruner applied before is replaced.

        The report of an applied run is of the latest prefill only, so that it cannot grow.

        Args:
            model: A supported vision-language model of transformers.

        Returns:
            The run.
        """
        remove(model)
        return Run(self, model, history=1).__enter__()


def remove(model: nn.Module) -> None:
    """Take an applied pruner off a model; a model that has none is left alone.

    Also what is left of a block that Ctrl-C kept from ending as it should.

    Args:
        model: The model.

    Raises:
        ModelStateError: The model is inside a `with` block, whose end does this; or another thread
            was generating with it, and stood still; the pruner is taken off all the same.
    """
    model = unwrapped(model)
    for changes in changes_in(model):
        if changes.overdue:
            changes.undo()
        elif isinstance(changes, Run) and changes.is_of(model):
            if changes.in_block:
                raise ModelStateError(
                    "This model is pruned by a `with` block; leave the block instead."
                )
            changes.__exit__()


def unpruned(model: nn.Module) -> nn.Module:
    """The model itself, out of the wrapping of torch.compile and peft, if it is not pruned.

    Args:
        model: The model.

    Returns:
        The module to put hooks on.

    Raises:
        ModelStateError: The model is pruned, or shares parts with one that is.
    """
    model = unwrapped(model)
    for changes in changes_in(model):
        if changes.overdue:
            changes.undo()
        elif isinstance(changes, Run):
            raise ModelStateError(
                f"This model is already pruned by {changes.pruner!r}; leave that `with` block, or "
                "call pore.remove(model), first."
            )
        else:
            raise ModelStateError(
                "This model is being measured in another thread; wait until that has ended."
            )
    return model


def check_query(layout: Layout) -> None:
    """Refuse a prompt that ends with a visual token, for methods in the decoder or of a question.

    No text looks at the image there, and the answer follows a token that may be dropped on the way.

    Args:
        layout: Where the visual tokens lie.

    Raises:
        InputError: The last token of a sample with images is visual.
    """
    last = layout.last[layout.rows, None]
    at_end = ((layout.columns == last) & layout.valid).any(-1)
    if bool(at_end.any()):
        row = layout.images[int(at_end.nonzero()[0])].row
        raise InputError(
            f"The prompt of sample {row} ends with a visual token, so no text token looks at "
            "the image, and the answer would follow a token that may be dropped; put the question "
            "after the image, and pass both in one piece."
        )


def check_layer(layer: int, family: Family, model: nn.Module, first: int = 1) -> None:
    """Refuse a pruned layer that the decoder does not have.

    Args:
        layer: 0-based index of the first pruned layer; scores come from the layer before.
        family: The model's adapter.
        model: The model.
        first: The earliest layer allowed: 1, or 0 for methods that need no layer before.

    Raises:
        BudgetError: `layer` is not between `first` and the number of layers - 1.
    """
    count = len(family.layers(model))
    if isinstance(layer, bool) or not isinstance(layer, int) or not first <= layer < count:
        why = " (scores come from the layer before it)" if first == 1 else ""
        raise BudgetError(
            f"layer={layer!r} cannot be the first pruned layer of a decoder of {count} layers; "
            f"choose {first} to {count - 1}{why}."
        )


def check_limits(pruner: Pruner, family: Family) -> None:
    """Refuse a method that a family does not take with its settings.

    Args:
        pruner: The method.
        family: The adapter.

    Raises:
        UnsupportedModelError: The family does not take it; the message says why.
    """
    for limit in pruner.limits(family):
        if limit.unless is None:
            raise UnsupportedModelError(
                f"{pruner.name} with these settings cannot be used in {family.name}: {limit.reason}"
            )


class Run(Changes):
    """One method at work in one model: a context manager that leaves the model as it was.

    A copy of a run is one of the copied model that has not been entered.

    Args:
        pruner: The method and its settings.
        model: The model.
        history: Prefills that the report remembers; None remembers all.
    """

    def __init__(self, pruner: Pruner, model: nn.Module, history: int | None = None) -> None:
        super().__init__()
        self.pruner = pruner
        self.model = unwrapped(model)
        self.family = family_of(self.model)
        self.report = Report(pruner, self.model, self.family, history)
        self._history = history
        self._marked: Tensor | None = None
        self._marked_prompt: Tensor | None = None
        self._watch: TowerWatch | None = None
        self._tilings: dict[str, Sequence[Tiling]] = {}
        self._calls: list[_Call] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return Run, (self.pruner, self.model, self._history)

    def is_of(self, model: nn.Module) -> bool:
        """Whether this is a run of a model, of a part of it, or of one that it is a part of."""
        return self.model in set(model.modules()) or model in set(self.model.modules())

    # -- entering and leaving ---------------------------------------------------------------------

    def __enter__(self) -> Run:
        """Hook the model.

        Raises:
            ModelStateError: The model is pruned already.
            PoreError: The method's settings do not fit the model.
        """
        unpruned(self.model)
        check_limits(self.pruner, self.family)
        self.pruner.check(self.model, self.family)
        if beyond_tested():
            from pore.checking import prove  # late: it prunes models by itself

            prove(self.model)
        tower = self.pruner.tower_stage
        stages = [s for s in self.pruner.stages() if isinstance(s, Stage)]
        if tower is not None:
            stages.insert(0, Stage(0, self._drop_filling, merges=True))
        self._entry = [stage for stage in stages if stage.layer == 0]
        self._stages = [stage for stage in stages if stage.layer > 0]
        self._dense = any(stage.dense for stage in self._entry)
        count = len(self.family.layers(self.model)) if self.family.shares_keys else 0
        found = {i: self.family.source(self.model, i) for i in range(count)}
        self._sources = {i: source for i, source in found.items() if source is not None}
        self._check_recurrent()
        self._check_sharing()
        self._forward: _Forward | None = None
        self._asked: Asked | None = None
        self._acts: dict[int, Callable[..., Any]] = {}
        self._checkpoints: list[Callable[..., Any]] = []
        self._left: tuple[Tensor | None, Tensor | None] = (None, None)
        self._generator = torch.Generator().manual_seed(int(getattr(self.pruner, "seed", 0)))
        try:
            super().__enter__()
            self._install(tower)
        except BaseException:
            self.undo()
            raise
        return self

    def _leave(self, *_: object) -> None:
        """Unhook the model, whatever happened inside.

        Raises:
            ModelStateError: Another thread generates with the model, and stands still.
        """
        try:
            self._wait_for_others()
        finally:
            self.undo()

    def undo(self) -> None:
        """Unhook the model at once; what still runs in another thread ends in an error."""
        for call in list(self._calls):
            call.cut_short = True
        super().undo()
        self._forward = self._watch = None

    def _wait_for_others(self) -> None:
        """Wait until no other thread is inside the model or its `generate`.

        One that streams its answer is, until the last token. It may itself wait for this thread.
        """
        before, since = None, time.monotonic()
        while calls := [call for call in list(self._calls) if call.thread != get_ident()]:
            places = whereabouts(call.thread for call in calls)
            if not places:  # these threads have died
                return
            if places != before:
                before, since = places, time.monotonic()
            elif time.monotonic() - since > _PATIENCE:
                raise ModelStateError(
                    "A block was left, or its pruner removed, while another thread still generated "
                    "with the model and did not go on: its answer is refused. Join the thread "
                    "before the block ends, and read what it streams inside the block."
                )
            time.sleep(0.005)

    def _install(self, tower: TowerStage | None) -> None:
        family, model = self.family, self.model
        base, decoder, layers = family.base(model), family.decoder(model), family.layers(model)
        for kind in {type(decoder), *map(type, layers)}:
            check_interface(kind)
        config: Any = decoder.config
        self._decoder_config = config
        windows = [window_of(config, i) for i in range(len(layers))]
        self._window = min((w for w in windows if w is not None), default=None)
        first = min([stage.layer for stage in self._stages], default=len(layers))
        if self._entry and not self._dense:
            first = 0
        self.put(
            model, "forward", functools.wraps(model.forward)(partial(self._call, model.forward))
        )
        self.after(base, self._model_done)
        self.before(base, self._before_model, with_kwargs=True)
        self.after(base, self._after_model, always_call=True)
        self.put(base, CALL, self._watched(getattr(base, CALL)))
        generate: Any = getattr(model, "generate", None)
        if generate is not None:
            self.put(model, "generate", self._watched(generate, makes_masks=True))
        self.before(decoder, self._before_decoder, with_kwargs=True)
        self.after(decoder, self._after_decoder, with_kwargs=True)
        self._acts = {i: self._layer_hook(i) for i in range(first, len(layers))}
        for i, act in self._acts.items():
            self.before(layers[i], partial(_unless_checkpointed, act), with_kwargs=True)
        if any(stage.layer == len(layers) for stage in self._stages):
            self.before(family.norm(model), self._before_norm)
        for layer in layers[first:] if uses_flash(config) else ():
            if not family.recurrent(layer):
                hide_positions(self, family.attention(layer))
        watch_tiling(self, model, family, self._note_tilings)
        if self.pruner.reads_tower:
            remember = any(stage.tower for stage in [*self._entry, *self._stages])
            watch = PackedWatch if family.packed else TowerWatch
            self._watch = watch(self, model, family, tower, remember)
            for note in self._watch.notes:
                self.report.note(note)
        if hasattr(model, PREFILL):
            self.put(model, PREFILL, partial(self._prefill_whole, getattr(model, PREFILL)))
        if hasattr(decoder, DEEPSTACK):
            self.put(decoder, DEEPSTACK, partial(self._deepstack, getattr(decoder, DEEPSTACK)))
        if hasattr(decoder, SPARED_ROWS):
            spared = partial(self._spare_rows, getattr(decoder, SPARED_ROWS))
            self.put(decoder, SPARED_ROWS, spared)
        for stage in self._stages:
            if stage.attention is not None:
                assert stage.probed is not None
                tap_attention(self, family.attention(layers[stage.probed]), self._observer(stage))

    def _check_recurrent(self) -> None:
        """Refuse stages that need attention where a decoder has layers without."""
        layers = self.family.layers(self.model)
        attending = [i for i, layer in enumerate(layers) if not self.family.recurrent(layer)]
        names = ", ".join(map(str, attending))
        for stage in self._stages:
            if stage.probed is not None and stage.probed not in attending:
                raise UnsupportedModelError(
                    f"{self.pruner.name} with these settings reads the attention of decoder layer "
                    f"{stage.probed}, which is recurrent and has none; the layers that have are "
                    f"{names}."
                )
            if stage.layer <= attending[0]:
                # The model takes the number of tokens so far from the first cache of attention.
                raise UnsupportedModelError(
                    f"{self.pruner.name} drops tokens before decoder layer {stage.layer}, but the "
                    f"first layer of this decoder with attention is layer {attending[0]}; drop "
                    "them behind it, or on the embeddings."
                )

    def _check_sharing(self) -> None:
        """Refuse to merge tokens where layers look at keys that were made before."""
        for stage in self._stages:
            if stage.merges and any(source < stage.layer for source in self._sources.values()):
                first = min(self._sources)
                raise UnsupportedModelError(
                    f"{self.pruner.name} merges tokens before decoder layer {stage.layer}, but "
                    f"from layer {first} on layers look at keys of layer "
                    f"{min(self._sources.values())} and later ones, which merged tokens would not "
                    "be among; merge before that, or use a method that only drops tokens."
                )

    def _prefill_whole(
        self,
        prefill: Callable[..., Any],
        input_ids: Tensor,
        generation_config: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """The prefill of `generate`, never in chunks: an early one has no question to score by."""
        if generation_config.prefill_chunk_size is not None:
            generation_config = copy.copy(generation_config)
            generation_config.prefill_chunk_size = None
            self.report.note(
                "prefill_chunk_size was set aside: what matters in an image is known once the "
                "whole prompt is, so it was prefilled in one piece."
            )
        return prefill(input_ids, generation_config, *args, **kwargs)

    def _note_tilings(self, tilings: Sequence[Tiling], videos: bool) -> None:
        self._tilings["video_tilings" if videos else "tilings"] = tilings

    # -- telling what cannot be seen --------------------------------------------------------------

    def mark_visual(self, visual: Tensor | None) -> None:
        """Say where the visual tokens are in prompts given as `inputs_embeds`.

        Embeddings do not tell a visual token from text. The marks hold for every following prefill
        that is given as embeddings; each unbroken run of them is one image. What goes on over the
        same cache is text, unless new marks are given for it.

        Args:
            visual: (B, L) bool, True at visual tokens; None forgets the marks.
        """
        self._marked = None if visual is None else visual.detach().to("cpu", torch.bool)
        self._marked_prompt = None

    # -- hooks ------------------------------------------------------------------------------------

    def _before_model(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._forward is not None and self._forward.thread != get_ident():
            raise ModelStateError(
                "A pruned model was called while another thread runs it; let one thread at a time "
                "in, by a lock around `generate`, or give every thread a model of its own."
            )
        self._forward = _Forward(self.family.inputs(self.model, args, kwargs))

    def _call(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The forward of the whole model, of whose output the caller asks something."""
        self._asked = asked = Asked(forward, args, kwargs)
        self._left = None, None
        try:
            output = asked.with_loss(self.model, forward(**asked.kwargs), *self._left)
        finally:
            self._asked = None
            self._left = None, None
        self.report.finished()
        return output

    def _model_done(self, *_: object) -> None:
        """After a forward without its head, which was called by itself."""
        if self._asked is None:
            self.report.finished()

    def _after_model(self, *_: object) -> None:
        if self._forward is not None and self._forward.thread == get_ident():
            self._forward = None

    def _watched(
        self, function: Callable[..., Any], makes_masks: bool = False
    ) -> Callable[..., Any]:
        """A forward or `generate` whose end is known, also where it is an interrupt.

        Hooks alone tell too little: torch runs none after Ctrl-C, and `generate` is many forwards.

        Args:
            function: The forward or `generate`.
            makes_masks: Whether it may make 4-D masks of a mask of padding.
        """

        @functools.wraps(function)  # `generate` reads signatures, and so do trainers
        def watched(*args: Any, **kwargs: Any) -> Any:
            if self.pruner.reads_tower:
                check_tower(kwargs, self.model.config)
            given = kwargs.get(MASK)
            given_2d = given is None or (isinstance(given, Tensor) and given.dim() == 2)
            call = _Call(makes_masks and given_2d)
            try:
                self._calls.append(call)
                result = function(*args, **kwargs)
            finally:  # at first what no interrupt can come between
                if self._forward is not None and self._forward.thread == call.thread:
                    self._forward = None
                if call in self._calls:
                    self._calls.remove(call)
            if call.cut_short:
                raise ModelStateError(
                    f"The model was pruned by {self.pruner.name} when this call began, and no "
                    "more when it ended, so that what it gives is neither pruned nor unpruned; "
                    "join the thread that calls before the `with` block ends."
                )
            return result

        return watched

    def _before_decoder(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        forward = self._forward
        if forward is None:
            raise ModelStateError(
                "The language model of a pruned model was called by itself; call the whole model, "
                "or leave the `with` block first."
            )
        embeds, cache = kwargs[EMBEDS], cache_in(kwargs)
        self._act_before_checkpoints()
        batch, length = embeds.shape[:2]
        forward.state = state = self._record(cache, batch, length)
        images, state.marked = self._images(forward.inputs, embeds, state)
        if self._marked_prompt is None and state.marked is not None:
            self._marked_prompt = embeds.detach()
        mask = forward.inputs.get(MASK)  # of which the model may have made others
        if length > 1 or not state.checked:
            self._check_goes_on(state, forward.inputs.get(POSITIONS), mask, length)
        mine = any(c.makes_masks for c in list(self._calls) if c.thread == forward.thread)
        made = mine or has_static_slots(cache)
        forward.custom = custom_masks(mask, state.seen, length, made)
        # Reading the mask of a single new token would cost a synchronisation and tells nothing.
        mask = mask if images or length > 1 else None
        if state.seen and length > 1:
            forward.starts = own_slots(cache, sliding=False), own_slots(cache, sliding=True)
        start = forward.starts[0] if forward.custom is None else state.seen
        padding = None if images or state.entry is None else state.padding
        tokens = token_mask(mask, batch, state.seen, length, embeds.device, start, padding)
        forward.past, forward.tokens = tokens[:, : state.seen], tokens[:, state.seen :]
        forward.every = forward.tokens
        if state.padding is None:
            state.padding = _padding_before(tokens)
        layout: Layout | None = None
        if images:
            check_unpacked(forward.inputs, cache is not None)
            layout = Layout.of(images, forward.tokens)
            forward.right = not bool(forward.tokens[:, -1].all())
            if self._watch is not None:
                forward.encoded = self._which(self._watch, layout, embeds)
            if not bool((layout.gather(layout.tokens) | ~layout.valid).all()):
                layout = self._without_hidden(forward, images)
        if layout is not None:
            forward.layout = layout
            if self._stages:
                check_query(layout)
            types = self._types(forward, length)
            if types is not None and state.seen:
                forward.own = self.family.masks(self.model, embeds, forward.tokens, None, types)
            self.report.start(layout)
            if self._watch is not None:
                self.report.tower(self._watch.tokens)
        elif state.seen == 0:  # or it is a new token, a further turn, or an assistant's draft
            self.report.without_images(forward.tokens)
        if length > 1 or not state.checked:  # of single tokens once: it asks the device
            first = min((self._stages[number].layer for number in state.tracks), default=0)
            if any(window_of(self._decoder_config, i) is not None for i in range(first)):
                check_own_slot(kwargs.get(MASK), cache, length)
            state.checked = state.checked or length == 1
        state.seen += length
        if self._entry:
            kwargs = self._before_first_layer(forward, kwargs)
        if forward.layout is not None:
            self._prepare(forward, kwargs[EMBEDS])
        forward.start, forward.cached = state.cached, forward.past
        forward.length = kwargs[EMBEDS].shape[1]
        state.cached += forward.length
        forward.span = state.cached if forward.columns is None else state.seen
        return args, kwargs

    def _after_decoder(self, _: nn.Module, __: object, kwargs: dict[str, Any], output: Any) -> None:
        forward = self._forward
        if forward is None or forward.state is None:
            return
        cache = cache_in(kwargs)
        if cache is None:  # made by the model where the caller gave none
            cache = cache_in(output)
        if cache is not None:
            if forward.state.lacks:
                forward.state.settings = self.pruner
                forward.state.is_open = partial(_is_pruned, weakref.ref(self.model))
            keep_record(cache, forward.state)
        rows, wanted = None, kwargs.get(WANTED)
        if self._asked is not None:
            rows = self._asked.rows(forward.slots, forward.tokens, forward.every)
            self._left = forward.slots, forward.tokens
        if rows is not None:
            output.last_hidden_state = take(output.last_hidden_state, rows, 1)
        elif isinstance(wanted, int) and wanted > 0:
            # A model that leaves this to its decoder takes fewer tokens for those it asked for.
            output.last_hidden_state = output.last_hidden_state[:, -wanted:]

    def _layer_hook(self, i: int) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]] | None]:
        stages = [number for number, stage in enumerate(self._stages) if stage.layer == i]
        layer = self.family.layers(self.model)[i]
        attention = None if self.family.recurrent(layer) else self.family.attention(layer)
        extra = self.family.token_inputs
        names = list(inspect.signature(layer.forward).parameters) if extra else []
        is_source = i in self._sources.values()

        def before(
            args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            forward = self._forward
            assert forward is not None
            if forward.looking_ahead:  # the layer itself, where its states are checkpointed
                return None
            if extra:
                args, kwargs = args[:1], {**dict(zip(names[1:], args[1:], strict=False)), **kwargs}
            hidden = args[0] if args else kwargs[HIDDEN]
            for number in stages:
                if self._stages[number].ahead and forward.layout is not None:
                    self._look_ahead(forward, number, layer, hidden, args, kwargs)
                hidden = self._before_layer(forward, number, hidden)
            if is_source:
                forward.held[i] = forward.short
            if forward.short is None:
                return None
            kwargs = self._kwargs(forward, forward.short, i, kwargs, hidden, attention)
            if args:
                return (hidden, *args[1:]), kwargs
            return args, {**kwargs, HIDDEN: hidden}

        return before

    def _act_before_checkpoints(self) -> None:
        """Let layers drop tokens before what is computed again in the backward.

        There the prompt is not known any more, nor need the block last.
        """
        for i, layer in enumerate(self.family.layers(self.model)):
            if i in self._acts and checkpointed(layer):
                checkpoint = getattr(layer, CHECKPOINT)
                if checkpoint not in self._checkpoints:
                    checkpoint = before_checkpoint(self._acts[i], checkpoint)
                    self._checkpoints.append(checkpoint)
                    self.put(layer, CHECKPOINT, checkpoint)

    def _kwargs(
        self,
        forward: _Forward,
        short: Shortened,
        i: int,
        kwargs: dict[str, Any],
        hidden: Tensor,
        attention: nn.Module | None,
    ) -> dict[str, Any]:
        """The keyword arguments of a decoder layer that gets a shorter sequence."""
        more = partial(short.kwargs, token_inputs=self.family.token_inputs)
        source = self._sources.get(i)
        if source is None:
            return more(kwargs, hidden, attention)
        kind = self._decoder_config.layer_types[i]
        states = kwargs[SHARED_KEYS][kind]
        held = forward.held.get(source)
        if held is None:
            held = self._shortened(forward, self._whole(forward, hidden), forward.length)
            forward.held[source] = held
        if held.track is short.track:
            return more(kwargs, hidden, attention, slots=states[0].shape[2])
        shared = copy.copy(kwargs[SHARED_KEYS])
        shared[kind] = states = short.shared(states, held)
        kwargs = {**kwargs, SHARED_KEYS: shared}
        return more(kwargs, hidden, attention, slots=states[0].shape[2], source=held)

    def _whole(self, forward: _Forward, hidden: Tensor) -> Track:
        """What layers before the first stage hold in the cache, this forward included."""
        assert forward.state is not None
        if forward.columns is not None:
            assert forward.state.entry is not None
            return forward.state.entry
        every = torch.ones(
            len(hidden), forward.state.cached, dtype=torch.bool, device=hidden.device
        )
        columns = torch.arange(forward.state.cached, device=hidden.device)
        return Track(columns.expand_as(every), every, True)

    def _spare_rows(
        self,
        process: Callable[..., Any],
        hidden: Tensor,
        inputs: Any,
        tables: Any,
        masks: Any,
        wanted: Any,
        **kwargs: Any,
    ) -> Any:
        """Which tokens go through the layers that look at keys of earlier ones."""
        forward = self._forward
        assert forward is not None
        late = any(stage.layer >= min(self._sources) for stage in self._stages)
        if late and hidden.shape[1] > 1:
            self.report.note(
                f"Layers from {min(self._sources)} on look at keys of earlier ones, and the model "
                "itself computes only the last token there; as this method drops tokens in them, "
                "all that are left were."
            )
        asked = self._asked is not None and self._asked.single
        if late or asked or (forward.slots is not None and wanted != 1):
            wanted = 0  # all: the last ones of the full sequence need not be those left
        return process(hidden, inputs, tables, masks, wanted, **kwargs)

    def _before_norm(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        assert self._forward is not None
        hidden, *others = args
        for number, stage in enumerate(self._stages):
            if stage.layer == len(self.family.layers(self.model)):
                hidden = self._before_layer(self._forward, number, hidden)
        return (hidden, *others)

    def _deepstack(
        self, process: Callable[..., Tensor], hidden: Tensor, visual: Tensor, embeds: Tensor
    ) -> Tensor:
        """Features that lower layers add to the visual tokens: only kept rows get theirs."""
        forward = self._forward
        assert forward is not None
        if forward.index is not None:
            self._check_deepstack(forward)
            visual, embeds = deepstack_of(visual, embeds, forward.index)
        return process(hidden, visual, embeds)

    def _check_deepstack(self, forward: _Forward) -> None:
        if forward.merged:
            raise UnsupportedModelError(
                f"{self.family.name} adds features to every visual token in its first decoder "
                f"layers, and {self.pruner.name} has merged tokens before; give it a later layer, "
                "or use a method that only drops tokens."
            )

    def _look_ahead(
        self,
        forward: _Forward,
        number: int,
        layer: Any,
        hidden: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Run a layer up to its attention, whose tap then reads it and stops."""
        attention = self.family.attention(layer)
        cache, given = cache_in(kwargs), kwargs.get(MASK)
        index = layer_number(attention)
        past = self._track(forward, number)
        short = self._shortened(forward, self._extended(forward, past, hidden), hidden.shape[1])
        if index in self._sources:
            forward.earlier = None, past.valid
            kwargs = self._kwargs(forward, short, index, kwargs, hidden, attention)
        else:
            forward.earlier = _keys_before(cache, index, past.valid, hidden.shape[1])
            if forward.short is not None:
                kwargs = self._kwargs(forward, forward.short, index, kwargs, hidden, attention)
            kwargs = {**kwargs, MASK: short.mask(given, hidden, cache, index)}
        # What it computes is not to be cached.
        kwargs = without_cache(kwargs)
        if not args:
            kwargs[HIDDEN] = hidden
        forward.looking_ahead = True
        try:
            with torch.no_grad():  # only to be scored by
                # Past the hooks of the layer, of which this is one.
                layer.forward(*([hidden, *args[1:]] if args else []), **kwargs)
        except _Seen:
            pass
        finally:
            forward.looking_ahead = False

    def _observer(self, stage: Stage) -> Callable[..., None]:
        assert stage.attention is not None
        assert stage.probed is not None
        read: Reader = stage.attention
        window = window_of(self._decoder_config, stage.probed)

        def observe(
            query: Tensor,
            key: Tensor,
            mask: Tensor | None,
            scaling: float,
            softcap: float | None,
            causal: bool,
        ) -> None:
            forward = self._forward
            if forward is None or forward.layout is None or forward.looking_ahead != stage.ahead:
                return
            layout = forward.layout = forward.layout.to(query.device)
            past, length = forward.past.to(query.device), query.shape[2]
            if stage.ahead:
                assert forward.earlier is not None
                keys, past = forward.earlier
                past = past.to(query.device)
                if keys is not None and past.shape[1]:
                    if keys[:, :, :0].shape != key[:, :, :0].shape:
                        raise UnsupportedModelError(
                            f"The cache of decoder layer {stage.probed} holds latent states in "
                            f"place of keys, so {self.pruner.name} cannot look at them ahead of "
                            "it; give every prompt with images a cache of its own."
                        )
                    # No cache was given, so what it has is put before by hand.
                    key = torch.cat([keys.to(key), key], 2)
            else:  # a cache lets go of what is out of a sliding window
                past = past[:, max(past.shape[1] + length - key.shape[2], 0) :]
            origin = forward.index
            if origin is None:
                origin = torch.arange(length, device=query.device).expand(len(query), -1)
            attention = LayerAttention(
                layout=layout,
                query=query,
                key=key,
                mask=mask,
                scaling=scaling,
                softcap=softcap,
                causal=causal,
                past=past,
                origin=origin.to(query.device),
                memory=forward.memory.get(stage.prepare),
                window=window if window is not None and window < forward.span else None,
                hides=forward.custom is not None,
            )
            forward.attention = read(attention)
            assert stage.probed is not None
            self.report.probe(stage.probed, sum(attention.read), stage.ahead, layout)
            if stage.ahead:
                raise _Seen

        return observe

    # -- what happens at a stage ------------------------------------------------------------------

    def _view(self, stage: Stage, forward: _Forward, hidden: Tensor) -> View:
        assert forward.layout is not None
        forward.layout = layout = forward.layout.to(hidden.device)
        check_features(layout.gather(hidden), layout.valid)
        attention = forward.attention if stage.attention is not None else None
        if isinstance(attention, Tensor):
            if attention.is_floating_point() and not bool(torch.isfinite(attention).all()):
                raise ScoreError(
                    f"Attention of decoder layer {stage.probed} holds NaN or infinity; look for "
                    "overflow (fp16 where the model needs bf16?), damaged weights or bad inputs."
                )
            attention = attention.to(hidden.device)
        padding = self._padding(forward) if stage.padding else None
        tower = None
        if stage.tower:
            assert self._watch is not None
            tower = tuple(self._watch.encoded(image) for image in forward.encoded)
        return View(
            layout=layout,
            hidden_states=hidden,
            attention=attention,
            padding=None if padding is None else padding.to(hidden.device),
            generator=self._generator,
            norm=self.family.norm(self.model),
            memory=forward.memory.get(stage.prepare),
            input_ids=forward.ids,
            tower=tower,
            rotary=partial(self.family.rotary, self.model, layer=max(stage.layer - 1, 0)),
            dense=self._renumbers(stage),
        )

    def _renumbers(self, stage: Stage) -> bool:
        """Whether positions are numbered anew behind a stage in the decoder."""
        return stage.dense and not self.family.mrope

    def _prepare(self, forward: _Forward, embeds: Tensor) -> None:
        for stage in self._stages:
            if stage.prepare is not None and stage.prepare not in forward.memory:
                with scoring():
                    made = stage.prepare(self._view(stage, forward, embeds))
                forward.memory[stage.prepare] = made

    def _shorten(
        self, stage: Stage, forward: _Forward, hidden: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Apply a stage to the states: the new states, and the old position of each (None: all)."""
        with full_precision() if stage.merges else scoring():
            selection = stage.rule(self._view(stage, forward, hidden))
        layout = forward.layout
        assert layout is not None
        if selection.features is not None:
            if not stage.merges:
                raise ModelStateError(
                    f"{self.pruner.name} gives tokens that stay new states and does not say so; "
                    "make its stage with merges=True."
                )
            rows = layout.rows[:, None].expand_as(layout.columns)[selection.keep]
            columns = layout.columns[selection.keep]
            features = selection.features[selection.keep].to(hidden.dtype)
            hidden = hidden.index_put((rows, columns), features)
            forward.merged = True
        if selection.raster is not None:
            layout = forward.layout = replace(layout, raster=selection.raster)
        kept = layout.kept_tokens(selection.keep)
        for image, stays in zip(layout.images, selection.structure or (), strict=False):
            if not stays:
                kept[image.row, list(image.structure)] = False
        if selection.others is not None:
            kept = kept & ~selection.others
        index = None
        if not torch.equal(kept, layout.tokens):
            index, tokens = pack(kept, forward.right)
            hidden = take(hidden, index, 1)
            if forward.ids is not None:
                forward.ids = take(forward.ids, index, 1)
            forward.layout = layout = layout.shorten(selection.keep, index, tokens)
            forward.tokens = tokens
        self.report.stage(stage.layer, layout)
        return hidden, index

    def _before_first_layer(self, forward: _Forward, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Stages on the embeddings: the decoder gets a shorter prompt."""
        assert forward.state is not None
        state, shorter, every = forward.state, kwargs[EMBEDS], forward.tokens
        length = shorter.shape[1]
        index: Tensor | None = None
        if forward.layout is not None:
            for stage in self._entry:
                shorter, chosen = self._shorten(stage, forward, shorter)
                if chosen is not None:
                    index = chosen if index is None else index.gather(1, chosen)
        if index is None and state.entry is None:
            return {**kwargs, EMBEDS: shorter}
        forward.entered = index
        if state.total is None:
            state.total = forward.past.sum(-1, keepdim=True).to(every.device)
        start = self.family.first_position
        original = (state.total + every.cumsum(-1) - 1).clamp(min=0) + start
        state.total = state.total + every.sum(-1, keepdim=True)
        forward.before = before = state.entry or Track.unpruned(forward.past)
        columns = torch.arange(length, device=shorter.device).expand(len(shorter), -1)
        columns = (columns if index is None else index) + (state.seen - length)
        # A single new token is never padding, and asking would cost a synchronisation.
        full = length == 1 or bool(forward.tokens.all())
        state.entry = before.extended(columns, forward.tokens, full)
        prompt = state.entry.valid
        forward.past = prompt[:, : -shorter.shape[1]]
        if self._dense and index is not None:
            state.padding = _padding_before(prompt)
        mask = self._entry_mask(forward, kwargs, shorter, index)
        given = forward.inputs.get(POSITIONS)
        state.last = None
        if isinstance(given, Tensor):
            state.last = take(given, _last_valid(every)[:, None], -1)
        own = given is not None
        given = kwargs.get(POSITIONS)  # of which the model may have made others
        if isinstance(given, Tensor) and given.dim() == 3:
            # Several axes. A plane of text positions in front only serves masks, which are given.
            given = given[-3:]
            names = (POSITIONS, MASK)
            if all(forward.inputs.get(name) is None for name in names):
                # The model counted the slots of the cache, which lack the dropped tokens.
                given = given + (state.seen - length - state.cached)
            positions = given if index is None else take(given, index, -1)
        elif self._dense:
            positions = (prompt.cumsum(-1) - 1).clamp(min=0)[:, -shorter.shape[1] :] + start
            if own and isinstance(given, Tensor):
                positions = positions + self._offset(given - original, every)
        else:
            positions = given if own and isinstance(given, Tensor) else None
            if positions is None:  # as the model itself counts, padding too
                positions = torch.arange(length, device=every.device)[None]
                positions = positions + (state.seen - length + start)
            positions = positions.expand(len(shorter), -1)
            positions = positions if index is None else take(positions, index, -1)
        if index is not None and kwargs.get(DEEPSTACK_WHERE) is not None:
            self._check_deepstack(forward)
            stack, embeds = kwargs[DEEPSTACK_WHERE], kwargs[DEEPSTACK_WHAT]
            kept = [deepstack_of(stack, one, index) for one in embeds]
            kwargs = {
                **kwargs,
                DEEPSTACK_WHERE: kept[0][0],
                DEEPSTACK_WHAT: [one for _, one in kept],
            }
        for name in self.family.token_inputs:
            if index is not None and kwargs.get(name) is not None:
                kwargs = {**kwargs, name: take(kwargs[name], index, 1)}
        return {
            **kwargs,
            EMBEDS: shorter,
            MASK: mask,
            POSITIONS: positions,
        }

    def _offset(self, offset: Tensor, tokens: Tensor) -> Tensor:
        """(B, 1) how far positions of the caller are from those counted from the first token."""
        last = offset.expand(len(tokens), -1).gather(1, _last_valid(tokens)[:, None])
        if tokens.shape[1] > 1 and bool(((offset != last) & tokens).any()):
            raise InputError(
                f"{self.pruner.name} numbers the tokens that are left anew, which it cannot where "
                f"the {POSITIONS} given do not count up by one; leave them away, or use a method "
                "that keeps positions."
            )
        return last

    def _check_goes_on(self, state: CacheRecord, given: Any, mask: Any, length: int) -> None:
        """Refuse tokens that do not follow those in the cache.

        `generate` cuts a whole conversation by the length of the cache, which lacks what was
        dropped before the first layer.
        """
        if state.last is None or not isinstance(given, Tensor):
            return
        column = torch.zeros(state.last.shape[-2], 1, dtype=torch.long, device=given.device)
        if isinstance(mask, Tensor) and mask.dim() == 2:  # the first after padding
            column = mask[:, -length:].long().argmax(1)[:, None].to(given.device)
        first, last = take(given, column, -1), state.last.to(given.device)
        if first.dim() == 3 and first.shape != last.shape:
            # With and without a plane of text positions in front.
            first, last = first[-1], last[-1]
        if bool((first != last + 1).any()):
            raise ModelStateError(
                f"The tokens given do not follow those in the cache. {self.pruner.name} drops "
                "tokens before the first layer, so the cache is shorter than the conversation: "
                "give only the tokens that are not in it yet, with an attention_mask over all, and "
                "no mm_token_type_ids of earlier turns."
            )

    def _entry_mask(
        self, forward: _Forward, kwargs: dict[str, Any], shorter: Tensor, index: Tensor | None
    ) -> Any:
        """What tells the decoder which tokens of a shortened prompt see each other.

        That is the mask of padding, unless some see those behind them; or where there is a sliding
        window, which reaches as far as in the full sequence where positions are kept.
        """
        state, cache = forward.state, cache_in(kwargs)
        assert state is not None
        assert state.entry is not None
        length = kwargs[EMBEDS].shape[1]
        track = state.entry
        columns = track.columns[:, -shorter.shape[1] :]
        if not self._dense and self._window is not None:
            forward.columns = columns
        if forward.custom is not None:
            rows = columns - (state.seen - length)
            masks = chosen_masks(forward.custom, rows, track.columns, track.valid)
            if forward.columns is None:
                forward.custom = masks
            return masks
        if forward.columns is not None:
            assert self._window is not None
            if state.seen > self._window:
                short = Shortened(
                    index,
                    track,
                    length=shorter.shape[1],
                    chunk=length,
                    span=state.seen,
                    config=self._decoder_config,
                    starts=forward.fitting(state.seen - length),
                    padding=state.padding,
                    own=forward.own,
                )
                masks = short.masks(kwargs.get(MASK), shorter, cache)
                forward.own = own_parts(masks, shorter.shape[1], state.cached)
                return masks
        types = None if forward.layout is None else self._types(forward, length)
        if types is None:
            return self._padding_mask(track, kwargs.get(MASK), shorter, cache)
        types = types.to(shorter.device) if index is None else take(types, index, -1)
        make = partial(self.family.masks, self.model, shorter)
        forward.own = make(forward.tokens, None, types) if state.cached else None
        # What is in the cache lies behind, like text.
        return make(track.valid, cache, nn.functional.pad(types, (state.cached, 0)))

    def _padding_mask(self, track: Track, given: Any, shorter: Tensor, cache: Any) -> Any:
        """What tells the decoder which tokens of a shortened prompt are padding."""
        config, length = self._decoder_config, shorter.shape[1]
        if has_masks(config):
            return track.valid.long()
        if given is None and track.full:
            return None
        slots = track.valid.shape[1] if cache is None else slots_of(cache, length, 0)
        left = track.valid[:, -slots:]
        valid = nn.functional.pad(left, (0, slots - left.shape[1]))
        if given is not None:
            return valid.to(given.dtype)
        offset = left.shape[1] - length
        return causal_mask(shorter, valid, config=config, length=length, offset=offset)

    def _types(self, forward: _Forward, length: int) -> Tensor | None:
        """(B, length) types of a forward's tokens, in a family where they make masks."""
        name = self.family.token_types
        types = None if name is None else forward.inputs.get(name)
        return None if types is None else types[:, -length:]

    def _before_layer(self, forward: _Forward, number: int, hidden: Tensor) -> Tensor:
        """A stage before a decoder layer: from here on the sequence and the cache are shorter."""
        assert forward.state is not None
        tracks = forward.state.tracks
        if forward.layout is not None:
            hidden, index = self._shorten(self._stages[number], forward, hidden)
            if index is not None:
                old = forward.index
                forward.index = index if old is None else old.to(index.device).gather(1, index)
        if number not in tracks and forward.index is None:
            return hidden
        past = self._track(forward, number)
        forward.past = past.valid
        tracks[number] = track = self._extended(forward, past, hidden)
        dense = self._renumbers(self._stages[number])
        rotary = partial(self.family.rotary, self.model) if dense else None
        forward.short = self._shortened(forward, track, hidden.shape[1], rotary)
        return hidden

    def _track(self, forward: _Forward, number: int) -> Track:
        """What the layers from a stage on hold in the cache before this forward."""
        assert forward.state is not None
        track = forward.state.tracks.get(number)
        if track is None and forward.columns is not None:
            track = forward.before
        return track or Track.unpruned(forward.cached)

    def _extended(self, forward: _Forward, track: Track, hidden: Tensor) -> Track:
        """A track with the tokens of this forward that are left."""
        index = forward.index
        if index is None:
            index = torch.arange(hidden.shape[1], device=hidden.device).expand(len(hidden), -1)
        if forward.columns is None:
            columns = index + forward.start
        else:
            columns = forward.columns.to(index.device).gather(1, index)
        # A single new token is never padding, and asking would cost a synchronisation.
        full = hidden.shape[1] == 1 or bool(forward.tokens.all())
        return track.extended(columns, forward.tokens, full)

    def _shortened(
        self,
        forward: _Forward,
        track: Track,
        length: int,
        rotary: Callable[..., Any] | None = None,
    ) -> Shortened:
        """This forward as layers get it that hold a track in the cache."""
        assert forward.state is not None
        return Shortened(
            forward.index,
            track,
            length=length,
            chunk=forward.length,
            span=forward.span,
            config=self._decoder_config,
            starts=forward.fitting(forward.start),
            padding=forward.state.padding,
            own=forward.own,
            custom=forward.custom,
            rotary=rotary,
            first_position=self.family.first_position,
        )

    # -- what the hooks need to know --------------------------------------------------------------

    def _record(self, cache: Any, batch: int, length: int) -> CacheRecord:
        """What there is to know of a cache, to be brought up to date by this forward.

        Raises:
            ModelStateError: It lacks tokens that others have dropped, or is not what it was.
        """
        if cache is None:
            return CacheRecord()
        known = record_of(cache)
        cached = cache.get_seq_length()
        if isinstance(cached, Tensor):  # a static cache's, on its device
            cached = int(cached) if known is None or length > 1 else known.cached
        if known is None:
            known = self._begun_elsewhere(cache, cached)
        if cached == 0:
            return CacheRecord()
        if not known.lacks:  # it holds all that came, in blocks or not
            return CacheRecord(seen=cached, cached=cached, marked=known.marked)
        if not _same(known.settings, self.pruner):
            raise ModelStateError(
                "Some layers of this cache lack tokens that were dropped in another block, by "
                f"{known.settings!r}. A conversation goes on in the block where it began, or in "
                "one of the same method and settings, over the same cache or a copy."
            )
        if cached != known.cached or batch != known.rows:
            raise ModelStateError(
                f"This cache holds {cached} tokens, where {known.cached} of {known.rows} samples "
                f"were left, and {batch} samples follow: a forward failed halfway, or it was "
                "changed otherwise than by its own methods. Begin again with a new cache."
            )
        return known.copied()

    def _begun_elsewhere(self, cache: Any, cached: int) -> CacheRecord:
        """What there is to know of a cache without a record.

        It is empty, or of the unpruned model; or it was copied tensor by tensor.
        """
        if cached == 0:
            return CacheRecord()
        own = [
            layer_number(self.family.attention(layer))
            for i, layer in enumerate(self.family.layers(self.model))
            if not self.family.recurrent(layer) and i not in self._sources
        ]
        copied = copied_record(cache, own)
        if copied is not None:
            return copied
        if any(int(cache.get_seq_length(i)) != cached for i in own):
            raise ModelStateError(
                "Some layers of this cache lack tokens: they were dropped in another block, or a "
                "forward failed halfway. Begin again with a new cache."
            )
        return CacheRecord(seen=cached, cached=cached)

    def _images(
        self, inputs: dict[str, Any], embeds: Tensor, state: CacheRecord
    ) -> tuple[list[Image], Tensor | None]:
        """The images of this forward, and the marks that were used for the cache."""
        batch, length = embeds.shape[:2]
        if inputs.get(IDS) is not None:
            return self.family.images(self.model, {**inputs, **self._tilings}), state.marked
        fresh = self._marked is not None and self._marked is not state.marked
        if length == 1 or (state.seen > 0 and not fresh):
            return [], state.marked
        if self._marked is None:
            raise InputError(
                "The prompt is given as inputs_embeds, which do not tell visual tokens from text; "
                "say where they are with run.mark_visual(mask), or pass input_ids and pixels."
            )
        marked = self._marked
        more = length - marked.shape[1]  # tokens of an answer that is generated without a cache
        goes_on = more > 0 and self._goes_on_from_marked(embeds)
        if batch % marked.shape[0] or (more != 0 and not goes_on):
            raise InputError(
                f"mark_visual was given a mask of shape {tuple(marked.shape)}, but the prompt has "
                f"{batch} samples of {length} tokens; mark every prompt before it is given."
            )
        repeated = marked.repeat_interleave(batch // marked.shape[0], 0)
        repeated = nn.functional.pad(repeated, (0, more))
        return marked_images(repeated, self.family.grid(self.model)), marked

    def _goes_on_from_marked(self, embeds: Tensor) -> bool:
        """Whether a prompt begins with the whole one that the marks were first used for."""
        begun = self._marked_prompt
        return begun is not None and torch.equal(embeds[:, : begun.shape[1]], begun.to(embeds))

    def _without_hidden(self, forward: _Forward, images: Sequence[Image]) -> Layout | None:
        """The layout of what the attention mask shows of the images; None where that is nothing.

        Raises:
            InputError: What is kept was chosen in the vision tower, where no mask is known.
        """
        if self.pruner.tower_stage is not None:
            raise InputError(
                f"The {MASK} hides visual tokens, but {self.pruner.name} chooses among them in the "
                "vision tower, which knows of no mask; show them, or use a method that acts on the "
                "embeddings or in the decoder."
            )
        shown = shown_images(images, forward.tokens)
        if forward.encoded:
            forward.encoded = [forward.encoded[number] for number, _ in shown]
        return Layout.of([image for _, image in shown], forward.tokens) if shown else None

    def _which(self, watch: TowerWatch, layout: Layout, embeds: Tensor) -> list[int]:
        which = watch.which(layout, embeds)
        if which is not None:
            return which
        raise InputError(
            f"{self.pruner.name} with these settings reads what goes through the vision tower, "
            f"but the features of these {len(layout.images)} images were made before; pass "
            "pixel_values inside the block."
        )

    def _drop_filling(self, view: View) -> Selection:
        """Drop what fills the projected features up to the number that the model expects."""
        assert self._forward is not None
        watch, layout = self._watch, view.layout
        assert watch is not None
        assert watch.selection is not None
        encoded = self._forward.encoded
        if watch.selection.valid is None and watch.tilings is None:
            raster = watch.selection.raster[encoded].to(layout.raster.device)
            slots = torch.arange(layout.raster.shape[1], device=raster.device)
            filled = nn.functional.pad(raster, (0, len(slots) - raster.shape[1]))
            return Selection(layout.valid & (slots < raster.shape[1]), raster=filled)
        keep, raster = torch.zeros_like(layout.valid), torch.zeros_like(layout.raster)
        features, structure = view.features.clone(), []
        for i, (image, number) in enumerate(zip(layout.images, encoded, strict=True)):
            found, places, apart = watch.tokens_of(number)
            own_order = watch.selection.order is not None or not watch.selection.structure
            in_place = not own_order and len(image.structure) > 0 and bool((places >= 0).all())
            slots = places if in_place else torch.arange(len(places), device=places.device)
            if apart is not None:
                slots, in_place = apart, True
            slots, places = slots.to(keep.device), places.to(keep.device)
            keep[i, slots], raster[i, slots] = True, places
            features[i, slots] = found.to(features)
            structure.append(in_place)
        return Selection(keep, None if watch.in_place else features, raster, structure)

    def _padding(self, forward: _Forward) -> Tensor:
        assert forward.layout is not None
        assert self._watch is not None
        pixels, grid = self._watch.pixels, forward.layout.images[0].grid
        assert pixels is not None
        if grid is None or any(image.grid != grid for image in forward.layout.images):
            raise InputError("Visual tokens without a grid cannot be matched with padding.")
        raster, valid = (x.to(pixels.device) for x in (forward.layout.raster, forward.layout.valid))
        tiles = [self._watch.tiles_of(image).start for image in forward.encoded]
        shares = letterbox_padding(pixels, grid)[tiles].gather(1, raster.clamp(min=0))
        return shares.masked_fill(raster < 0, 0.0).masked_fill(~valid, 1.0)


def marked_images(marked: Tensor, grid: tuple[int, int] | None) -> list[Image]:
    """The images of a mask of visual tokens: each unbroken run is one.

    Args:
        marked: (B, L) bool.
        grid: (height, width) of the family's images; kept where a run has that many tokens.

    Returns:
        The images.
    """
    images = []
    for row, line in enumerate(marked.tolist()):
        index, start = 0, None
        for column, visual in enumerate([*line, False]):
            if visual and start is None:
                start = column
            elif not visual and start is not None:
                columns = range(start, column)
                fits = grid is not None and grid[0] * grid[1] == len(columns)
                images.append(Image(row, index, columns, grid if fits else None))
                index, start = index + 1, None
    return images


def deepstack_of(visual: Tensor, embeds: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """What DeepStack adds to a shortened sequence.

    Args:
        visual: (B, L) bool, True at the visual tokens of the full sequence.
        embeds: (V, D) what is added to each of them, row by row.
        index: (B, M) the position in the full sequence of every token left.

    Returns:
        The same two for the tokens left.
    """
    index = index.to(visual.device)
    number = visual.flatten().cumsum(0).view(visual.shape) - 1
    left = visual.gather(1, index)
    return left, embeds[number.gather(1, index)[left].to(embeds.device)]


def _same(settings: Any, other: Any) -> bool:
    """Whether two methods are the same with the same settings."""
    if settings is other:
        return True
    try:
        return type(settings) is type(other) and bool(settings == other)
    except (RuntimeError, TypeError, ValueError):  # of settings that do not compare, as tensors
        return False


class _Call:
    """A call of the model or of its `generate` that has not ended yet.

    Attributes:
        thread: The thread that runs it.
        cut_short: Whether the model was unhooked meanwhile.
        makes_masks: Whether 4-D masks in it are made by transformers.
    """

    def __init__(self, makes_masks: bool) -> None:
        self.thread = get_ident()
        self.makes_masks = makes_masks
        self.cut_short = False


class _Forward:
    """One forward of the model, as it travels through the hooks.

    Attributes:
        inputs: Arguments of the multimodal model by name.
        thread: The thread that runs it.
        state: What is known of its cache.
        layout: The visual tokens among the tokens of this forward; None where there are none.
        tokens: (B, m) bool, False at padding and filling, of this forward's tokens as they are now.
        ids: (B, m) their ids; None where they came as embeddings.
        past: (B, n) bool, the same of the slots in the cache of the layers reached.
        cached: (B, n) bool, the same of the slots in the cache of the first layer.
        right: Whether the batch is padded on the right, which it then stays.
        start: Slots in the cache of the first layer before this forward.
        length: Tokens of this forward that enter the first layer.
        span: Tokens so far, of the sequence over which a sliding window is counted.
        columns: (B, m) where in it the tokens that enter the first layer are; None where they are
            all there.
        before: Which of it the cache of the first layer holds; None likewise.
        starts: Where they start in the model's masks, of layers without and with a sliding window.
        custom: The caller's masks of which token sees which, over all tokens of that sequence;
            None where only padding was told.
        every: (B, length) bool, `tokens` as they came.
        entered: (B, m) where in this forward the tokens that enter the first layer came; None: all.
        own: Masks of this forward's tokens alone, where they see more than those before them and
            the model's masks may not fit; else None.
        index: (B, m) where the tokens were when they entered the first layer; None: all are there.
        short: What the layers reached get; None: what the model passes.
        held: What layers got at whose keys later ones look.
        merged: Whether states of visual tokens were replaced.
        looking_ahead: Whether a layer runs in advance, only to show its attention.
        earlier: What that layer has cached: keys (B, G, n, d), None where it gets them with those
            of this forward, and (B, n) bool, False at padding.
        memory: What the stages' `prepare` made of the prompt.
        attention: What the latest reader took.
        encoded: Which of the images that went through the vision tower every image is.
    """

    def __init__(self, inputs: dict[str, Any]) -> None:
        self.inputs = inputs
        self.thread = get_ident()
        self.ids: Tensor | None = inputs.get(IDS)
        self.state: CacheRecord | None = None
        self.layout: Layout | None = None
        self.tokens: Tensor
        self.past: Tensor
        self.cached: Tensor
        self.right = False
        self.start = 0
        self.length = 0
        self.span = 0
        self.columns: Tensor | None = None
        self.before: Track | None = None
        self.starts = (0, 0)
        self.custom: Any = None
        self.every: Tensor
        self.entered: Tensor | None = None
        self.own: Any = None
        self.index: Tensor | None = None
        self.short: Shortened | None = None
        self.held: dict[int, Shortened | None] = {}
        self.merged = False
        self.looking_ahead = False
        self.earlier: tuple[Tensor | None, Tensor] | None = None
        self.memory: dict[Any, Any] = {}
        self.attention: Any = None
        self.encoded: list[int] = []

    @property
    def slots(self) -> Tensor | None:
        """(B, m) where in this forward the tokens that are left came; None: all are left."""
        if self.index is None or self.entered is None:
            return self.entered if self.index is None else self.index
        return self.entered.to(self.index.device).gather(1, self.index)

    def fitting(self, start: int) -> tuple[int | None, int | None]:
        """`starts`, but None where the model made masks for a cache of other than `start` slots."""
        first, second = self.starts
        return (first if first == start else None), (second if second == start else None)


def _unless_checkpointed(
    act: Callable[..., Any], layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """A pre-hook of a layer, which has acted already where the layer's states are checkpointed."""
    return None if checkpointed(layer) else act(args, kwargs)


def _is_pruned(model: weakref.ref[nn.Module]) -> bool:
    """Whether a model is pruned now."""
    found = model()
    return found is not None and is_changed(found)


def _last_valid(tokens: Tensor) -> Tensor:
    """(B,) the place of the last of (B, n) tokens that is no padding; 0 where all are."""
    return (torch.arange(tokens.shape[1], device=tokens.device) * tokens).amax(1)


def _padding_before(tokens: Tensor) -> Tensor:
    """(B,) how many of (B, n) tokens come before the first that is no padding."""
    return (tokens.cumsum(1) == 0).sum(1)


def _keys_before(cache: Any, layer: int, past: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """What `length` new tokens see in the cache of a layer.

    Args:
        cache: The cache, or None.
        layer: The layer, from 0.
        past: (B, n) bool, False at padding, of the slots that it was given.
        length: New tokens.

    Returns:
        keys (B, G, m, d) and (B, m) bool, of the m latest slots that a sliding window leaves.
    """
    keys, count = cached_keys(cache, layer), past.shape[1]
    if count == 0 or keys is None:
        return past.new_empty(len(past), 1, 0, 1), past[:, :0]
    left = min(count, slots_of(cache, length, layer) - length)
    keys = keys[:, :, :count]
    return keys[:, :, keys.shape[2] - left :], past[:, count - left :]


class _Seen(Exception):
    """Ends a layer that ran in advance, once its attention is known."""

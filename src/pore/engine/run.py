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
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from threading import get_ident
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pore._compat.arguments import (
    DEEPSTACK_WHAT,
    DEEPSTACK_WHERE,
    EMBEDS,
    HIDDEN,
    IDS,
    MASK,
    POSITIONS,
    SHARED_KEYS,
    WANTED,
    check_interface,
)
from pore._compat.attention import layer_number, uses_flash
from pore._compat.caches import cache_in, has_static_slots, slots_of, without_cache
from pore._compat.checkpointing import CHECKPOINT, before_checkpoint, checkpointed
from pore._compat.masks import causal_mask, has_masks
from pore._compat.models import DEEPSTACK, PREFILL, SPARED_ROWS
from pore._compat.modules import CALL, unwrapped
from pore._compat.threads import whereabouts
from pore._compat.versions import beyond_tested
from pore.changes import Changes, changes_in, is_changed
from pore.engine.asked import Asked
from pore.engine.cache import CachedTokens, _keys_before, _padding_before
from pore.engine.forward import _Forward, marked_images
from pore.engine.given import check_tower, check_unpacked, chosen_masks, custom_masks, shown_images
from pore.engine.layer_inputs import LayerInputs
from pore.engine.layers import deepstack_of
from pore.engine.limits import check_limits, check_query
from pore.engine.masks import check_own_slot, own_parts, own_slots, token_mask, window_of
from pore.engine.probing import _Seen
from pore.engine.readers import LayerAttention, Reader
from pore.engine.records import CacheRecord, copied_record, keep_record, record_of
from pore.engine.report import Report
from pore.engine.stages import Selection, Stage, View
from pore.errors import InputError, ModelStateError, ScoreError, UnsupportedModelError
from pore.families.registry import family_of
from pore.hooks import hide_positions, tap_attention
from pore.layout import Image, Layout, Tiling
from pore.tensors.gathering import pack, take
from pore.tensors.padding import letterbox_padding
from pore.tensors.precision import full_precision, scoring
from pore.tensors.selection import check_features
from pore.tower.packed import PackedTowerRun
from pore.tower.run import TowerRun
from pore.tower.stacked import StackedTowerRun
from pore.tower.stages import TowerStage
from pore.tower.watching import watch_tiling

if TYPE_CHECKING:
    from pore.engine.pruner import Pruner


_PATIENCE = 20.0  # seconds that a thread may stand still while another waits for it to leave


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
        self._watch: TowerRun | None = None
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
            from pore.checking.proofs import prove  # late: it prunes models by itself

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
            watch = PackedTowerRun if family.packed else StackedTowerRun
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
                assert stage.reads_layer is not None
                tap_attention(
                    self, family.attention(layers[stage.reads_layer]), self._observer(stage)
                )

    def _check_recurrent(self) -> None:
        """Refuse stages that need attention where a decoder has layers without."""
        layers = self.family.layers(self.model)
        attending = [i for i, layer in enumerate(layers) if not self.family.recurrent(layer)]
        names = ", ".join(map(str, attending))
        for stage in self._stages:
            if stage.reads_layer is not None and stage.reads_layer not in attending:
                raise UnsupportedModelError(
                    f"{self.pruner.name} with these settings reads the attention of decoder layer "
                    f"{stage.reads_layer}, which is recurrent and has none; the layers that have "
                    f"are {names}."
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
        if self._watch is not None:
            self._watch.note_tilings(tilings, videos)

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
                self.report.tower(self._watch.block_tokens)
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
        short: LayerInputs,
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

    def _whole(self, forward: _Forward, hidden: Tensor) -> CachedTokens:
        """What layers before the first stage hold in the cache, this forward included."""
        assert forward.state is not None
        if forward.columns is not None:
            assert forward.state.entry is not None
            return forward.state.entry
        every = torch.ones(
            len(hidden), forward.state.cached, dtype=torch.bool, device=hidden.device
        )
        columns = torch.arange(forward.state.cached, device=hidden.device)
        return CachedTokens(columns.expand_as(every), every, True)

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
        assert stage.reads_layer is not None
        read: Reader = stage.attention
        window = window_of(self._decoder_config, stage.reads_layer)

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
                            f"The cache of decoder layer {stage.reads_layer} holds latent states "
                            f"in place of keys, so {self.pruner.name} cannot look at them ahead of "
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
            assert stage.reads_layer is not None
            self.report.probe(stage.reads_layer, sum(attention.read), stage.ahead, layout)
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
                    f"Attention of decoder layer {stage.reads_layer} holds NaN or infinity; look "
                    "for overflow (fp16 where the model needs bf16?), damaged weights or bad "
                    "inputs."
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
        forward.before = before = state.entry or CachedTokens.unpruned(forward.past)
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
                short = LayerInputs(
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

    def _padding_mask(self, track: CachedTokens, given: Any, shorter: Tensor, cache: Any) -> Any:
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

    def _track(self, forward: _Forward, number: int) -> CachedTokens:
        """What the layers from a stage on hold in the cache before this forward."""
        assert forward.state is not None
        track = forward.state.tracks.get(number)
        if track is None and forward.columns is not None:
            track = forward.before
        return track or CachedTokens.unpruned(forward.cached)

    def _extended(self, forward: _Forward, track: CachedTokens, hidden: Tensor) -> CachedTokens:
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
        track: CachedTokens,
        length: int,
        rotary: Callable[..., Any] | None = None,
    ) -> LayerInputs:
        """This forward as layers get it that hold a track in the cache."""
        assert forward.state is not None
        return LayerInputs(
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

    def _which(self, watch: TowerRun, layout: Layout, embeds: Tensor) -> list[int]:
        which = watch.match(layout, embeds)
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
        assert self._watch is not None
        placed = self._watch.placed(view.layout, self._forward.encoded, view.features)
        return Selection(placed.keep, placed.features, placed.raster, placed.structure)

    def _padding(self, forward: _Forward) -> Tensor:
        assert forward.layout is not None
        assert self._watch is not None
        grid = forward.layout.images[0].grid
        if grid is None or any(image.grid != grid for image in forward.layout.images):
            raise InputError("Visual tokens without a grid cannot be matched with padding.")
        pixels = self._watch.pictures(forward.encoded)
        raster, valid = (x.to(pixels.device) for x in (forward.layout.raster, forward.layout.valid))
        shares = letterbox_padding(pixels, grid).gather(1, raster.clamp(min=0))
        return shares.masked_fill(raster < 0, 0.0).masked_fill(~valid, 1.0)


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

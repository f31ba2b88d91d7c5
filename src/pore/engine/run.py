"""`Run`: a method at work in a model, which is hooked, and afterwards left as it was.

A block, a call and a cache last for different times, and a separate class holds what is known about
each: `Setup` what holds for the whole block, `Forward` what is known about one call of the model,
`CacheBook` what is known about caches. The hooks set here call these modules:

    images go through the vision tower      tower
    a call goes into the model              calls
    its tokens come to the decoder          decoder, images; stages on the embeddings: entry
    a layer runs                            layer_hooks; a reader: probing; a stage: dropping
    tokens leave the decoder                decoder
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from pore._compat.arguments import check_interface
from pore._compat.attention import uses_flash
from pore._compat.models import DEEPSTACK, PREFILL, SPARED_ROWS
from pore._compat.modules import CALL, unwrapped
from pore.changes import Changes, changes_in
from pore.engine.book import CacheBook
from pore.engine.calls import Calls, alone
from pore.engine.decoder import arrive, leave
from pore.engine.deepstack import added_inside
from pore.engine.given import check_tower
from pore.engine.images import Images
from pore.engine.layer_hooks import hook_layers
from pore.engine.layers import spare_rows
from pore.engine.probing import tap_readers
from pore.engine.report import Report
from pore.engine.setup import Setup
from pore.engine.stages import Method
from pore.engine.without_rope import FirstLayer
from pore.errors import ModelStateError
from pore.families.registry import family_of
from pore.hooks import hide_positions
from pore.layout import Tiling
from pore.tower.runs import TowerRuns
from pore.tower.watching import watch_tiling


def remove(model: nn.Module) -> None:
    """Remove an applied pruner from a model; a model that has none is left alone.

    Also removes what is left of a block that Ctrl-C prevented from ending properly.

    Args:
        model: The model.

    Raises:
        ModelStateError: The model is inside a `with` block, whose end does this; or another thread
            was generating with it and made no progress: then the pruner is removed all the same.
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
    """The model itself, without the wrappers of torch.compile and peft, if it is not pruned.

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
                "This model is being measured in another thread; wait until that is finished."
            )
    return model


class Run(Changes):
    """One method at work in one model: a context manager that leaves the model as it was.

    A copy of a run belongs to the copied model and has not been entered.

    Args:
        pruner: The method and its settings.
        model: The model.
        history: How many prefills the report remembers; None means all.

    Attributes:
        pruner: The method and its settings.
        report: What was kept of every prompt.
    """

    def __init__(self, pruner: Method, model: nn.Module, history: int | None = None) -> None:
        super().__init__()
        self.pruner = pruner
        self.model = unwrapped(model)
        self.family = family_of(self.model)
        config: Any = self.model.config
        layers = len(self.family.layers(self.model))
        self.report = Report(pruner, layers, config, history)
        self._history = history
        self._images = Images(self.model, self.family)
        self._calls = Calls(self.model, self.family.inputs, pruner, self.report.add)

    def __reduce__(self) -> tuple[Any, ...]:
        return Run, (self.pruner, self.model, self._history)

    def is_of(self, model: nn.Module) -> bool:
        """Whether this run prunes a model, a part of it, or a model that it is a part of."""
        return self.model in set(model.modules()) or model in set(self.model.modules())

    def mark_visual(self, visual: Tensor | None) -> None:
        """Say where the visual tokens are in prompts given as `inputs_embeds`.

        Embeddings do not tell a visual token from text. The marks hold for every following prefill
        that is given as embeddings; each unbroken run of them is one image. Later tokens over the
        same cache count as text, unless new marks are given for them.

        Args:
            visual: (B, L) bool, True at visual tokens; None forgets the marks.
        """
        self._images.mark(visual)

    # -- entering and leaving ---------------------------------------------------------------------

    def __enter__(self) -> Run:
        """Hook the model.

        Raises:
            ModelStateError: The model is pruned already.
            PoreError: The method's settings do not fit the model.
        """
        unpruned(self.model)
        setup = Setup.of(self.pruner, self.model, self.family)
        try:
            super().__enter__()
            tower = self._watch_tower(setup)
            self._hook_model(setup)
            self._hook_decoder(setup, tower)
        except BaseException:
            self.undo()
            raise
        return self

    def _leave(self, *_: object) -> None:
        """Unhook the model, whatever happened inside.

        Raises:
            ModelStateError: Another thread is generating with the model and makes no progress.
        """
        try:
            self._calls.wait_for_others()
        finally:
            self.undo()

    def undo(self) -> None:
        """Unhook the model at once; a call that still runs in another thread ends in an error."""
        self._calls.cut_short()
        super().undo()
        self._calls.inside = None

    # -- hooks ------------------------------------------------------------------------------------

    def _watch_tower(self, setup: Setup) -> TowerRuns | None:
        """Watch how images are encoded, and what the tower computes if a method reads it."""
        tower: TowerRuns | None = None
        if setup.reads_tower:
            stages = (*setup.entry, *setup.inner)
            tower = TowerRuns(
                self,
                setup.model,
                setup.family,
                setup.tower,
                remember=any(stage.tower for stage in stages),
                attend=frozenset(s.tower_attention for s in stages if s.tower_attention),
                note=self.report.note,
            )

        def note_tilings(tilings: Sequence[Tiling], videos: bool) -> None:
            if tower is not None:
                tower.note_tilings(tilings, videos)
            self._images.note_tilings(tilings, videos)

        def done() -> None:
            if tower is not None:
                tower.encoding_done()

        watch_tiling(self, setup.model, setup.family, note_tilings, done)
        return tower

    def _hook_model(self, setup: Setup) -> None:
        """Notice when calls of the model, and of its `generate`, begin and end."""
        model, calls, base = setup.model, self._calls, setup.family.base(setup.model)
        forward = functools.wraps(model.forward)(partial(calls.answered, model.forward))
        self.put(model, "forward", forward)
        self.after(base, calls.model_done)
        self.before(base, calls.before_model, with_kwargs=True)
        self.after(base, calls.after_model, always_call=True)
        config: Any = model.config
        check = partial(check_tower, config=config) if setup.reads_tower else None
        self.put(base, CALL, calls.watched(getattr(base, CALL), check=check))
        generate: Any = getattr(model, "generate", None)
        if generate is not None:
            watched = calls.watched(generate, makes_masks=True, check=check)
            self.put(model, "generate", watched)
        if hasattr(model, PREFILL):
            whole = partial(_prefill_whole, self.report.note, getattr(model, PREFILL))
            self.put(model, PREFILL, whole)

    def _hook_decoder(self, setup: Setup, tower: TowerRuns | None) -> None:
        """Let stages act, and readers read."""
        family, calls, book = setup.family, self._calls, CacheBook(setup)
        decoder: Any = family.decoder(setup.model)
        for kind in {type(decoder), *map(type, setup.layers)}:
            check_interface(kind)
        act_before_checkpoints = hook_layers(self, setup, calls)
        images = self._images
        reads = any(stage.attention is not None for stage in setup.entry)
        first = FirstLayer(self, setup) if reads else None

        def before(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            act_before_checkpoints()
            call = calls.inside
            if call is None:
                raise alone()
            inputs = call.inputs
            call.forward, kwargs = arrive(setup, book, images, tower, first, calls, inputs, kwargs)
            return args, kwargs

        def after(_: nn.Module, __: object, kwargs: dict[str, Any], output: Any) -> None:
            call = calls.inside
            if call is not None and call.forward is not None:
                leave(book, call.forward, kwargs, output)

        self.before(decoder, before, with_kwargs=True)
        self.after(decoder, after, with_kwargs=True)
        for layer in setup.layers[setup.first :] if uses_flash(setup.config) else ():
            if not family.recurrent(layer):
                hide_positions(self, family.attention(layer))
        if hasattr(decoder, DEEPSTACK):
            added = partial(added_inside, setup, calls, getattr(decoder, DEEPSTACK))
            self.put(decoder, DEEPSTACK, added)
        if hasattr(decoder, SPARED_ROWS):
            process = getattr(decoder, SPARED_ROWS)
            spared = partial(spare_rows, setup, calls, self.report.note, process)
            self.put(decoder, SPARED_ROWS, spared)
        tap_readers(self, setup, calls)


def _prefill_whole(
    note: Callable[[str], None],
    prefill: Callable[..., Any],
    input_ids: Tensor,
    generation_config: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The prefill of `generate`, never in chunks: an early chunk has no question to score by."""
    if generation_config.prefill_chunk_size is not None:
        generation_config = copy.copy(generation_config)
        generation_config.prefill_chunk_size = None
        note(
            "prefill_chunk_size was ignored: what matters in an image is known only once the "
            "whole prompt is known, so it was prefilled in one piece."
        )
    return prefill(input_ids, generation_config, *args, **kwargs)

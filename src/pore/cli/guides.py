"""`--guide`: the model that guides a method, where one does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pore.cli.asking import is_guided
from pore.errors import InputError

if TYPE_CHECKING:
    from pore.evaluation.guided import Guiding


def check_guide(options: Any) -> None:
    """Refuse --guide for a method that no other model guides.

    Args:
        options: They have `guide` and `method`.
    """
    if options.guide is not None and not is_guided(options.method):
        raise InputError(f"--guide is for --method SGL, not for {options.method}; leave it out.")


def guiding_for(options: Any, model: Any, processor: Any) -> Guiding | None:
    """What guides the method that the options name; None if nothing does.

    Args:
        options: They have `guide`, `method`, `model`, `max_new_tokens` and those of `Loading`.
        model: The model that is pruned. It guides itself where --guide names no other.
        processor: Its processor.

    Raises:
        PoreError: The guide cannot be loaded, or cuts images into other tokens.
    """
    from pore.data.loading import load_model
    from pore.evaluation.guided import Guiding

    if not is_guided(options.method):
        return None
    longest = options.max_new_tokens
    if options.guide in (None, options.model):
        return Guiding(model, processor, max_new_tokens=longest, itself=True)
    # --revision is the revision of the model that answers, not of its guide.
    guide = load_model(str(options.guide), **{**options.how, "revision": None})
    guiding = Guiding(*guide, max_new_tokens=longest)
    guiding.check(model)
    return guiding

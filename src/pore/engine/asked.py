"""What the caller asks for in the output of a pruned model: logits of some tokens, and a loss.

Both are given by positions in the whole prompt, but the output holds only the tokens that are left.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pore._compat.arguments import LABELS, ROUTER_LOGITS, WANTED
from pore._compat.models import loss_of, text_vocabulary
from pore.engine.prefill import Prefill
from pore.errors import InputError

_IGNORED = -100
"""The label of tokens that do not count in the loss."""


class Asked:
    """What one call of a model asks for, and what is needed to answer it once the decoder has run.

    Args:
        forward: The model's forward.
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    Attributes:
        kwargs: The arguments that the forward is to be called with, all by name.
        positions: Where logits are asked for: a number of last tokens, or (n,) positions in the
            prompt; None means all.
        labels: (B, L) labels of the prompt's tokens, or None.
        prefill: What goes into the report once the call has succeeded; None for nothing.

    Raises:
        InputError: What is asked for cannot be given.
    """

    def __init__(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        if args:
            bound = inspect.signature(forward).bind_partial(*args, **kwargs).arguments
            kwargs = {**bound, **bound.pop("kwargs", {})}
        self.kwargs = dict(kwargs)
        self.labels: Tensor | None = self.kwargs.pop(LABELS, None)
        self.prefill: Prefill | None = None
        self._left: tuple[Tensor, Tensor] | None = None
        wanted = self.kwargs.get(WANTED)
        self.positions: int | Tensor | None = wanted
        if isinstance(wanted, Tensor):
            if wanted.dtype == torch.bool:
                wanted = wanted.nonzero().flatten()
            self.positions = wanted
            # The head will only be given the rows that are asked for.
            self.kwargs[WANTED] = torch.arange(wanted.numel(), device=wanted.device)
        elif not wanted:
            self.positions = None
        if self.labels is not None and self.positions is not None:
            raise InputError(f"A loss needs all tokens: give {LABELS} without {WANTED}.")

    @property
    def single(self) -> bool:
        """Whether positions are asked for one by one."""
        return isinstance(self.positions, Tensor)

    def note_left(self, slots: Tensor | None, valid: Tensor) -> None:
        """Note which tokens of the prompt the decoder's output belongs to.

        Args:
            slots: (B, m) the position in the prompt of every token left; None where all are.
            valid: (B, m) bool, False at filling.
        """
        self._left = None if slots is None else (slots, valid)

    def rows(self, before: Tensor) -> Tensor | None:
        """Which of the tokens that are left are asked for.

        Args:
            before: (B, L) bool, False at padding of the prompt.

        Returns:
            (B, n) of the m that are left, in the order asked for; None where it is the same as with
            all tokens.

        Raises:
            InputError: A token asked for was dropped, or is not in the prompt.
        """
        wanted, (batch, length) = self.positions, before.shape
        if wanted is None or (self._left is None and not isinstance(wanted, Tensor)):
            return None
        if isinstance(wanted, int):
            valid = before if self._left is None else self._left[1]
            if wanted == 1 and valid.shape[1] and bool(valid[:, -1].all()):
                return None  # the last token is text, and nothing fills up after it
            wanted = torch.arange(max(length - wanted, 0), length)
        wanted = wanted.to(before.device)
        if wanted.dim() != 1 or bool(((wanted < -length) | (wanted >= length)).any()):
            raise InputError(
                f"{WANTED} must be a number of last tokens or a list of positions from 0 to "
                f"{length - 1}, not {wanted.tolist()}."
            )
        wanted = wanted % length
        if self._left is None:
            return wanted.expand(batch, -1)
        where = _where(*self._left, length)[:, wanted]
        lost = (where < 0) & before[:, wanted]
        if bool(lost.any()):
            row, place = lost.nonzero()[0].tolist()
            raise InputError(
                f"{WANTED} asks for position {int(wanted[place])} of sample {row}, a token that "
                f"was dropped; ask for text tokens, or leave {WANTED} out to get all that are left."
            )
        return where.clamp(min=0)

    def with_loss(self, model: nn.Module, output: Any) -> Any:
        """The output with the loss that the labels ask for.

        Every token that is left predicts the label of the token after it in the whole prompt.

        Args:
            model: The model.
            output: Its output, or a tuple of it.

        Raises:
            InputError: A label would have to be predicted by a token that was dropped.
        """
        if self.labels is None:
            return output
        config: Any = model.config
        if self.kwargs.get(ROUTER_LOGITS, getattr(config.get_text_config(), ROUTER_LOGITS, False)):
            raise InputError(
                f"The loss that balances experts needs all tokens; set {ROUTER_LOGITS}=False."
            )
        is_tuple = isinstance(output, tuple)
        logits = output[0] if is_tuple else output.logits
        known = inspect.signature(type(model).forward).parameters
        more = {name: value for name, value in self.kwargs.items() if name not in known}
        if self._left is not None:
            more["shift_labels"] = _following(self.labels, *self._left).to(logits.device)
        loss = loss_of(model)(
            logits=logits, labels=self.labels, vocab_size=text_vocabulary(config), **more
        )
        if is_tuple:
            return (loss, *output)
        output.loss = loss
        return output


def _following(labels: Tensor, slots: Tensor, valid: Tensor) -> Tensor:
    """(B, m) for every token that is left, the label of the token after it."""
    labels = labels.to(slots.device)
    after = nn.functional.pad(labels[:, 1:], (0, 1), value=_IGNORED)
    lost = (_where(slots, valid, labels.shape[1]) < 0) & (after != _IGNORED)
    if bool(lost.any()):
        row, place = lost.nonzero()[0].tolist()
        raise InputError(
            f"The label at position {place + 1} of sample {row} follows a token that was "
            f"dropped or is padding, so nothing predicts it; set it to {_IGNORED}, or put text "
            "between the image and the answer."
        )
    return after.gather(1, slots).masked_fill(~valid, _IGNORED)


def _where(slots: Tensor, valid: Tensor, length: int) -> Tensor:
    """(B, length) for every position of the prompt, which of the tokens left it is; -1 for none."""
    batch, left = slots.shape
    numbers = torch.arange(left, device=slots.device).expand(batch, -1)
    # Filling goes to an extra column, which is cut off.
    columns = torch.where(valid.to(slots.device), slots, length)
    where = slots.new_full((batch, length + 1), -1).scatter_(1, columns, numbers)
    return where[:, :length]

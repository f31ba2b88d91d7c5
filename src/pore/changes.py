"""Changes to a model that are always undone, whatever happens, and that copies do not have.

Every change is noted before it is made, is undone without asking whether it was made, and is
forgotten only once it is undone. So wherever Ctrl-C comes, undoing again does the rest. The notes
lie in the changed modules themselves: nothing else holds a reference to the model.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from pore._compat.attention import forget_attention, register_attention
from pore._compat.modules import AFTER, BEFORE, HOOKS, STATE

State = dict[str, Any]


_NOTHING = object()


class _Leaving:
    """`__exit__` of `Changes`, as an object that lives as long as the `with` block.

    The statement gets it before it calls `__enter__`, and releases it when the block has ended,
    even if an interrupt came right after `__enter__` or before `__exit__`.
    """

    def __get__(self, changes: Changes | None, kind: type[Changes]) -> Callable[..., None]:
        if changes is None:
            return kind._leave
        leave = changes._leave
        changes._offered = weakref.ref(leave, changes._let_go)
        return leave


class Changes:
    """Changes to modules, for a `with` block or until `undo`.

    A change hides what a module had, and belongs to this one object: a copy, a deep copy or a
    pickle that is made meanwhile holds the module without it.
    """

    def __init__(self) -> None:
        self._made: list[Callable[[], None]] = []
        self._offered: weakref.ref[Callable[..., None]] | None = None
        self._block: weakref.ref[Callable[..., None]] | None = None

    # -- the block --------------------------------------------------------------------------------

    def __enter__(self) -> Changes:
        offered = self._offered
        self._block = None if offered is None or offered() is None else offered
        return self

    def _leave(self, *_: object) -> None:
        self.undo()

    if TYPE_CHECKING:

        def __exit__(self, *_: object) -> None: ...
    else:
        __exit__ = _Leaving()

    def _let_go(self, block: object) -> None:
        if block is self._block:  # None once everything is undone
            self.undo()

    @property
    def in_block(self) -> bool:
        """Whether this is inside a `with` block, whose end will undo the changes."""
        return self._block is not None and self._block() is not None

    @property
    def overdue(self) -> bool:
        """Whether the block has ended, but an interrupt has kept some changes from being undone."""
        return self._block is not None and self._block() is None

    # -- making changes ---------------------------------------------------------------------------

    def put(self, module: nn.Module, name: str, value: Any) -> None:
        """Give one module its own attribute, such as a function in place of its class's.

        Args:
            module: The module.
            name: The attribute, which is not a parameter, buffer or module.
            value: Its value.
        """
        own = vars(module).get(name, _NOTHING)  # accelerate puts a `forward` there too

        def restore(state: State) -> None:
            if own is _NOTHING:
                state.pop(name, None)
            else:
                state[name] = own

        self._note(module, restore)
        vars(module)[name] = value

    def before(self, module: nn.Module, hook: Callable[..., Any], **how: bool) -> None:
        """Hook what goes into a module, as `register_forward_pre_hook` does."""
        self._note(module, partial(_without, hook, BEFORE))
        module.register_forward_pre_hook(hook, **how)

    def after(self, module: nn.Module, hook: Callable[..., Any], **how: bool) -> None:
        """Hook what comes out of a module, as `register_forward_hook` does."""
        self._note(module, partial(_without, hook, AFTER))
        module.register_forward_hook(hook, **how)

    def kernel(self, name: str, kernel: Callable[..., Any]) -> None:
        """Make an attention kernel known to transformers by an unused name."""

        def forget(_: object = kernel) -> None:  # by which it is held; the name does not
            forget_attention(name)

        self._made.append(forget)
        register_attention(name, kernel)

    def _note(self, module: nn.Module, restore: Callable[[State], None]) -> None:
        edit = _Edit(self, module, restore)
        self._made.append(edit)
        mark = _mark(module)
        if mark is None:
            vars(module)[STATE] = _Mark(module, edit)
        else:
            mark.edits.append(edit)

    # -- and undoing them -------------------------------------------------------------------------

    def undo(self) -> None:
        """Undo all changes, the latest first; changes that were undone before are left alone."""
        while self._made:
            latest = self._made[-1]
            latest()
            if latest in self._made:
                self._made.remove(latest)
        self._block = self._offered = None


class _Edit:
    """One change to what a module holds.

    Args:
        changes: The changes to which it belongs.
        module: The module.
        restore: Undoes it, in the module's `__dict__` or in a copy of that.
    """

    def __init__(
        self, changes: Changes, module: nn.Module, restore: Callable[[State], None]
    ) -> None:
        self.changes = changes
        self.module = module
        self.restore = restore

    def __call__(self) -> None:
        """Undo it."""
        self.restore(vars(self.module))
        mark = _mark(self.module)
        if mark is not None and mark.edits == [self]:
            vars(self.module).pop(STATE, None)
        elif mark is not None and self in mark.edits:
            mark.edits.remove(self)


class _Mark:
    """The `__getstate__` of a changed module, with which Python copies and pickles it."""

    def __init__(self, module: nn.Module, edit: _Edit) -> None:
        self.module = module
        self.edits = [edit]

    def __call__(self) -> State:
        """What the module would hold without the changes."""
        kind: Any = type(self.module)
        whole = getattr(kind, STATE, None)  # every class has it since Python 3.11
        state: State = dict(vars(self.module) if whole is None else whole(self.module))
        for hooks, flags in HOOKS.items():
            for name in (hooks, *flags):
                state[name] = state[name].copy()
        for edit in reversed(self.edits):
            edit.restore(state)
        state.pop(STATE, None)
        return state


def changes_in(model: nn.Module) -> list[Changes]:
    """The changes that a module or a part of it has now.

    Args:
        model: The module.

    Returns:
        Every `Changes` once.
    """
    marks = [mark for mark in map(_mark, model.modules()) if mark is not None]
    return list(dict.fromkeys(edit.changes for mark in marks for edit in mark.edits))


def is_changed(module: nn.Module) -> bool:
    """Whether a module itself, rather than a part of it, has changes now."""
    return isinstance(vars(module).get(STATE), _Mark)


def _mark(module: nn.Module) -> _Mark | None:
    mark = vars(module).get(STATE)
    return mark if isinstance(mark, _Mark) else None


def _without(hook: Callable[..., Any], hooks: str, state: State) -> None:
    """Remove a hook from a module's `__dict__`, or from a copy of that."""
    for number in [number for number, own in list(state[hooks].items()) if own is hook]:
        for name in (*HOOKS[hooks], hooks):  # last the table through which it is found
            state[name].pop(number, None)

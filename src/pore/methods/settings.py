"""Reads settings of a method from text, as on the command line, or says how else to give them."""

from __future__ import annotations

import math
import re
import types
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pore._saved.parsing import parse_json
from pore.engine.corrections import Correction
from pore.engine.pruner import Pruner
from pore.errors import InputError
from pore.methods.guides import Guide

# Python's spelling of the constants; JSON's spelling is read as JSON.
_CONSTANTS = {"none": None, "true": True, "false": False}

# A budget. (?a): digits of other scripts are none.
_NUMBER = re.compile(
    r"(?a)[+-]?(\d{1,40}(\.\d{0,40})?|\.\d{1,40})(e[+-]?\d{1,3})?%?", re.IGNORECASE
)

_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


class _Unfit(Exception):
    """A value does not have the type asked for."""


def read_settings(kind: type[Pruner], given: Sequence[str]) -> dict[str, Any]:
    """The settings given by texts such as "alpha=0.2" or "layers=[2, 4]", in their own types.

    Args:
        kind: The method.
        given: Texts of the form NAME=VALUE, where VALUE is JSON, or the text itself.

    Returns:
        Values by name.

    Raises:
        InputError: A text has another form, or names a setting that the method does not have, that
            text cannot give or that is given twice; or its value has another type.
    """
    values: dict[str, Any] = {}
    for setting in given:
        name, equals, text = setting.partition("=")
        if not equals:
            raise InputError(f"--set {setting!r} is not of the form NAME=VALUE.")
        if name in values:
            raise InputError(f"--set {name}=... is given twice.")
        values[name] = _value(kind, name, text)
    return values


def read_budget(text: str) -> int | float:
    """The budget that a text names.

    Args:
        text: A number of visual tokens such as "128", or a share of them: "0.25" or "25%".

    Returns:
        The number or the share, as methods take it for `keep`.

    Raises:
        InputError: It is neither.
    """
    # Python's own reading takes digits of all scripts, "1_0" and "nan" too.
    if not _NUMBER.fullmatch(text):
        raise InputError(
            f"{text[:80]!r} is neither a number of tokens (128) nor a share of them (0.25 or 25%)."
        )
    if text.endswith("%"):
        return float(text[:-1]) / 100
    return int(text) if text.strip("+-").isdigit() else float(text)


def check_names(kind: type[Pruner], names: Sequence[str]) -> None:
    """Refuse names of settings that a method does not have.

    Args:
        kind: The method.
        names: The names.

    Raises:
        InputError: There is no such setting; the message says which there are.
    """
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    for name in names:
        if name not in known:
            raise InputError(
                f"{kind.name} has no setting {name!r}; it has {', '.join(sorted(known))}."
            )


def how_else(kind: type[Pruner], name: str) -> str | None:
    """How to give a setting that text cannot give.

    Args:
        kind: The method.
        name: The setting.

    Returns:
        What to do, as the end of a sentence; None if text can give it.
    """
    options = _options(_hint(kind, name))
    if Correction in options:
        return "give a position bias or another correction with --reweight of generate or evaluate"
    if Guide in options:
        return (
            "`pore generate`, `pore evaluate` and `pore serve` take --guide MODEL, and without it "
            "the model guides itself; in Python, pore.guide makes a guide"
        )
    # Text can always say None, which switches the setting off; but there must be a way to set it.
    settable = any(_readable(option) for option in options if option is not type(None))
    return None if settable else f"make it in Python: pore.{kind.__name__}(..., {name}=...)"


def _value(kind: type[Pruner], name: str, text: str) -> Any:
    check_names(kind, [name])
    hint = _hint(kind, name)
    for value in _parsed(text):
        for exact in (True, False):
            try:
                return _read(value, hint, exact)
            except _Unfit:
                continue
    shown = f"{name}={text[:80]!r}"
    if (how := how_else(kind, name)) is not None:
        raise InputError(f"{kind.name} takes no {name!r} from --set {shown}: {how}.")
    raise InputError(f"{kind.name} takes no --set {shown}: {name!r} is {_in_words(hint)}.")


def _hint(kind: type[Pruner], name: str) -> Any:
    """The type of a setting; `Any` if it is not known."""
    try:
        return get_type_hints(kind)[name]
    except NameError:
        return Any


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _parsed(text: str) -> list[Any]:
    """What a text may mean: a constant or JSON, and the text itself."""
    if text.lower() in _CONSTANTS:
        return [_CONSTANTS[text.lower()], text]
    try:
        return [parse_json(text), text]
    except ValueError:
        return [text]


def _read(value: Any, hint: Any, exact: bool) -> Any:
    """A value as a type; unless `exact`, whole numbers and "25%" count as numbers too."""
    if hint is Any:
        return value
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        for option in inner:
            try:
                return _read(value, option, exact)
            except _Unfit:
                continue
    elif origin is Literal:
        if isinstance(value, str) and value in inner:
            return value
    elif origin in (tuple, list):
        if isinstance(value, list):
            if origin is list or inner[-1] is Ellipsis:
                inner = (inner[0],) * len(value)
            if len(inner) == len(value):
                return origin(_read(v, one, exact) for v, one in zip(value, inner, strict=True))
    elif hint is type(None):
        if value is None:
            return None
    elif hint is float:
        return _number(value, exact)
    elif hint in _KINDS:
        if type(value) is hint:
            return value
    elif is_dataclass(hint) and _readable(hint):
        types_of = get_type_hints(hint)
        if isinstance(value, dict) and value.keys() == types_of.keys():
            read = {name: _read(value[name], one, exact) for name, one in types_of.items()}
            return hint(**read)  # type: ignore[operator]
    raise _Unfit


def _number(value: Any, exact: bool) -> float:
    if not exact and isinstance(value, str) and value.endswith("%"):
        try:
            value = float(value[:-1]) / 100
        except ValueError:
            raise _Unfit from None
    if type(value) is float or (type(value) is int and not exact):
        with_point = float(value) if abs(value) < 1e300 else math.inf
        if math.isfinite(with_point):
            return with_point
    raise _Unfit


def _readable(hint: Any) -> bool:
    """Whether text can give a value of this type."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any or hint in _KINDS or origin is Literal or hint is type(None):
        return True
    if origin in (Union, types.UnionType, tuple, list):
        return all(_readable(one) for one in inner if one is not Ellipsis)
    if not is_dataclass(hint) or hint is Guide:
        return False
    try:
        return all(map(_readable, get_type_hints(hint).values()))
    except NameError:
        return False


def _in_words(hint: Any) -> str:
    """What values of a type look like on the command line."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_in_words(one) for one in inner if _readable(one))
    if origin is Literal:
        return f"one of {', '.join(inner)}"
    if origin in (tuple, list):
        if origin is list or inner[-1] is Ellipsis:
            return f"a list such as [2, 4], each of them {_in_words(inner[0])}"
        return f"a list [{', '.join(map(_in_words, inner))}]"
    if is_dataclass(hint):
        inside = (f'"{name}": {_in_words(one)}' for name, one in get_type_hints(hint).items())
        return f"{{{', '.join(inside)}}}"
    return "none" if hint is type(None) else _KINDS.get(hint, "a value")

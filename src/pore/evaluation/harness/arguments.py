"""The settings of the model in lmms-eval, as `--model_args` gives them: NAME=VALUE,NAME=VALUE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from pore.engine.pruner import Pruner
from pore.errors import InputError
from pore.methods.registry import method_named
from pore.methods.settings import read_budget

_FOR_A_METHOD = ("keep", "average", "layer", "normalize", "reweight", "allow", "guide")

# What lmms-eval adds to what the user gives.
_BY_THE_HARNESS = ("device", "batch_size", "max_batch_size")


@dataclass(frozen=True)
class Arguments:
    """Which model is evaluated, and how it is pruned.

    Attributes:
        pretrained: Hub id, folder or "embedded".
        revision: Branch, tag or commit on the hub.
        dtype: Number format, as in `pore.data.loading.DTYPES`.
        attn: Attention implementation, such as "sdpa".
        method: Pruning method; None evaluates the unpruned model.
        keep: Visual tokens kept per image (int), or the fraction (float).
        average: Whether `keep` is the mean over the decoder layers.
        layer: K, the first pruned layer; None leaves it to the method.
        normalize: Softmax over the whole "prompt" or the "visual" tokens; None leaves it to the
            method.
        reweight: The correction of position bias: a file, hub id or name, as in `pore evaluate`.
        allow: Conditions that may differ from those under which P was measured.
        guide: A smaller model that guides SGL; None is the model itself.
        report: JSON file for the tokens kept and the FLOPs; None writes none.
        settings: Other settings of the method, as texts NAME=VALUE.
        device: Such as "cuda"; "auto" takes the accelerator, if there is one.
        batch_size: Prompts in one batch.
    """

    pretrained: str
    revision: str | None = None
    dtype: str = "auto"
    attn: str | None = None
    method: str | None = None
    keep: int | float = 0.25
    average: bool = False
    layer: int | None = None
    normalize: str | None = None
    reweight: str | None = None
    allow: tuple[str, ...] = ()
    guide: str | None = None
    report: str | None = None
    settings: tuple[str, ...] = ()
    device: str = "auto"
    batch_size: int = 1

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Arguments:
        """Read settings as lmms-eval hands them over: as str, int, float or bool.

        Args:
            given: Values by name.

        Returns:
            The settings.

        Raises:
            InputError: One is unknown, misspelt, missing or of another type; the message says which
                there are.
        """
        known = {field.name: field for field in fields(cls) if field.name != "settings"}
        method = given.get("method")
        kind = None if method is None else method_named(_text("method", method))
        others = {} if kind is None else {name: given[name] for name in given if name not in known}
        _check_names(given, set(known), kind)
        if kind is None and (stray := [name for name in _FOR_A_METHOD if name in given]):
            raise InputError(
                f"Without a pruning method there is no use for {', '.join(stray)}; name one, such "
                "as method=fastv."
            )
        if kind is not None and not kind.guided and "guide" in given:
            raise InputError(f"{kind.name} is not guided by another model; leave guide out.")
        values: dict[str, Any] = {
            name: _READ.get(name, _text)(name, given[name]) for name in known if name in given
        }
        for name, field in known.items():
            if field.default is MISSING and name not in values:
                raise InputError(f"Which model? Give {name}=..., a hub id, a folder or embedded.")
        others.pop("max_batch_size", None)
        return cls(**values, settings=tuple(f"{name}={_written(others[name])}" for name in others))


def _check_names(given: Mapping[str, Any], known: set[str], kind: type[Pruner] | None) -> None:
    """Refuse names that neither the model nor the method has."""
    own = set() if kind is None else {field.name for field in fields(kind)}  # type: ignore[arg-type]
    for name in given:
        if name in known | own or name in _BY_THE_HARNESS:
            continue
        told = ", ".join(sorted(known - set(_BY_THE_HARNESS)))
        more = "" if kind is None else f"; {kind.name} also has {', '.join(sorted(own - known))}"
        raise InputError(f"There is no setting {name!r}; the settings are {told}{more}.")


def _text(name: str, value: Any) -> str:
    if isinstance(value, (bool, float)):
        raise InputError(
            f"{name}={value!r} is not a name: lmms-eval takes what looks like a number for one."
        )
    return str(value)


def _budget(name: str, value: Any) -> int | float:
    if isinstance(value, bool):
        raise InputError(f"{name} is a number of tokens (128) or a share (0.25), not {value!r}.")
    return value if isinstance(value, (int, float)) else read_budget(str(value))


def _whole(name: str, value: Any) -> int:
    if isinstance(value, str) and value.isdecimal():  # the harness hands over its --batch_size so
        value = int(value)
    if type(value) is not int:
        raise InputError(f"{name} is a whole number, not {value!r}.")
    return value


def _batch_size(name: str, value: Any) -> int:
    if value == "auto" or (size := _whole(name, value)) < 1:
        raise InputError(f"{name} is a whole number from 1, not {value!r}.")
    return size


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"{name} is true or false, not {value!r}.")
    return value


def _names(name: str, value: Any) -> tuple[str, ...]:
    return tuple(_text(name, value).split("+"))


_READ = {
    "keep": _budget,
    "average": _flag,
    "layer": _whole,
    "allow": _names,
    "batch_size": _batch_size,
}


def _written(value: Any) -> str:
    """A value of a method's own setting as text, which `read_settings` reads."""
    if isinstance(value, bool):
        return str(value).lower()
    # lmms-eval makes a float of every negative number.
    if isinstance(value, float) and value < 0 and value.is_integer():
        return str(int(value))
    return str(value)

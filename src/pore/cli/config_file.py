"""`--config FILE` and `--save-config FILE`: the options of a command as a YAML file.

    # pore evaluate --config run.yaml
    model: llava-hf/llava-1.5-7b-hf
    keep: [25%, 10%]
    all: true

YAML, because transformers brings the library that reads it, and because other evaluation tools take
YAML too. Every value is read as text and then as if it stood on the command line, so that `25%`,
`no` and `0123` mean here what they mean there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer

from pore._files import read_regular, write_atomic
from pore.cli.verbosity import PANEL
from pore.errors import InputError

CONFIG = "pore.config"
"""Under which name the context of a command holds the file that its options are from."""

_LARGEST = 1 << 20  # bytes

PLACED = "placed"
"""Under which name a command has the model that stands without --model."""

_OTHERS = (PLACED, "help", "debug", "verbose", "quiet", "config", "save-config")


def _read(ctx: typer.Context, path: Path | None) -> Path | None:
    if path is not None and not ctx.resilient_parsing:
        ctx.default_map = read(path, names_of(ctx.command.params))
        ctx.meta[CONFIG] = str(path)
    return path


Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        is_eager=True,
        callback=_read,
        help="YAML file with options of this command, such as `keep: [25%, 10%]`. What stands on "
        "the line counts more than the file.",
        rich_help_panel=PANEL,
    ),
]
SaveConfig = Annotated[
    Path | None,
    typer.Option(
        "--save-config",
        help="Write the options of this run to a YAML file for --config, and then run.",
        rich_help_panel=PANEL,
    ),
]


def names_of(parameters: Iterable[Any]) -> dict[str, Any]:
    """The parameters of a command by their names in a file: those of the line, without dashes."""
    found = {}
    for one in parameters:
        long = [name for name in one.opts if name.startswith("--")]
        found[long[0].removeprefix("--") if long else one.name] = one
    return {name: one for name, one in found.items() if name not in _OTHERS}


def given_of(
    context: typer.Context, chosen: Mapping[str, Any], defaults: Mapping[str, Any]
) -> frozenset[str]:
    """The options that somebody asked for.

    Args:
        context: That of the command.
        chosen: The values, by the names that the command's function has for them.
        defaults: Their defaults.

    Returns:
        The names of options on the line, and of those in a file with another value than the
        default: a file that `save` wrote has all values.
    """

    def is_given(name: str) -> bool:
        source = context.get_parameter_source(name)
        if source is None or source.name in ("DEFAULT", "DEFAULT_MAP"):
            return (chosen[name] or None) != (defaults[name] or None)
        return True

    return frozenset(filter(is_given, chosen))


def read(path: Path, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The values that a file gives, as text, by the names that the command's function has for them.

    Args:
        path: The file.
        parameters: What `names_of` gives for the command.

    Returns:
        A text for each option, or a list of them where it is repeatable.

    Raises:
        OSError: The file cannot be read.
        InputError: It is not YAML, names what is no option of the command, or names one twice.
    """
    import yaml

    try:
        top = yaml.compose(read_regular(path, _LARGEST), Loader=yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"--config: {path} is not YAML: {' '.join(str(error).split())}") from error
    if top is None:
        return {}
    if not isinstance(top, yaml.MappingNode):
        raise InputError(f"--config: {path} must have a line for every option, such as `seed: 1`.")
    found: dict[str, Any] = {}
    for key, value in top.value:
        where = f"--config: line {key.start_mark.line + 1} of {path}"
        if key.value not in parameters:
            raise InputError(f"{where} names {key.value!r}, {_no_option(key.value, parameters)}")
        one = parameters[key.value]
        if one.name in found:
            raise InputError(f"{where} names {key.value!r} for the second time.")
        several = getattr(one, "multiple", False) or one.nargs != 1
        nodes = value.value if isinstance(value, yaml.SequenceNode) else [value]
        if not all(isinstance(node, yaml.ScalarNode) for node in nodes):
            raise InputError(f"{where} must give a value, or a list of values.")
        if isinstance(value, yaml.SequenceNode) and not several:
            raise InputError(f"{where} gives a list, and {key.value!r} takes one value.")
        texts = [node.value for node in nodes]
        found[one.name] = texts if several else texts[0]
    return found


def _no_option(name: object, parameters: Mapping[str, Any]) -> str:
    near = get_close_matches(str(name), parameters, n=1, cutoff=0.0)
    return f"which is no option of this command; the nearest is {near[0]!r}."


def save(path: Path, command: str, parameters: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Write the options of a run, whole or not at all.

    Args:
        path: The file.
        command: The name of the command.
        parameters: What `names_of` gives for the command.
        given: The values, by the names that the command's function has for them.

    Raises:
        OSError: The file cannot be written.
    """
    import yaml

    values = {name: _plain(given[one.name]) for name, one in parameters.items()}
    chosen = {name: value for name, value in values.items() if value not in (None, [])}

    class Dumper(yaml.SafeDumper):  # type: ignore[misc]
        """Spells out, in quotes, characters that YAML would read as the end of a line."""

        def represent_str(self, data: str) -> Any:
            style = None if data.isprintable() else '"'
            return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)

    Dumper.add_representer(str, Dumper.represent_str)
    text = yaml.dump(chosen, None, Dumper, sort_keys=False, allow_unicode=True, width=float("inf"))
    write_atomic(path, f"# pore {command} --config {path.name}\n{text}" if chosen else "")


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value

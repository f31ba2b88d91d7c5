"""What the shell completes after an option, found without loading torch.

pore generate photo.jpg "What is this?" --method fa<TAB>
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import pore
from pore.embedded import EMBEDDED, EMBEDDED_VIDEO

# How a method is named, in the file that defines it.
_NAME = re.compile(r'^    name: ClassVar\[str\] = "(.+)"$', re.MULTILINE)


def one_of(*names: str) -> Callable[[str], list[str]]:
    """A completer of names that are known beforehand."""
    return lambda incomplete: _matching(names, incomplete)


def methods(incomplete: str) -> list[str]:
    """The methods that come with pore, and those that other packages register."""
    from importlib import metadata

    folder = Path(str(pore.__file__)).with_name("methods")
    files = sorted(folder.glob("*.py"))
    names = [name for file in files for name in _NAME.findall(file.read_text(encoding="utf-8"))]
    names += [entry.name for entry in metadata.entry_points(group="pore.methods")]
    return _matching(sorted(names), incomplete)


models = one_of(EMBEDDED, EMBEDDED_VIDEO)
"""The models that come with pore; for folders the shell itself completes."""

samples = one_of(
    *(f"embedded:{split}" for split in ("calibration", "test", "fresh")),
    *(
        f"embedded:{split}:{kind}"
        for split in ("calibration", "test")
        for kind in ("mixed", "video")
    ),
)
"""The samples that come with pore."""


def _matching(names: Iterable[str], incomplete: str) -> list[str]:
    # In any case of letters, as the commands take methods.
    found = [name for name in names if name.lower().startswith(incomplete.lower())]
    exact = [name for name in found if name.startswith(incomplete)]
    # What is completed must begin as typed: shells drop the rest.
    return exact or [incomplete + name[len(incomplete) :] for name in found]

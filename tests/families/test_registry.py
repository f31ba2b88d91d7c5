"""Families are found by their files alone."""

from __future__ import annotations

from pathlib import Path

import pore
from cases import CASES, COUSINS, PUBLISHED
from pore.families.registry import families, family_of, family_of_config

SOURCE = Path(pore.__file__).parent / "families"


def own() -> set[type[pore.Family]]:
    """The adapters that come with pore; a test may have described more."""
    return {type(one) for one in families().values() if type(one).__module__.startswith("pore.")}


def test_every_file_with_an_adapter_is_found() -> None:
    written = {path.stem for path in SOURCE.glob("*.py") if "model_types" in path.read_text()}
    written -= {"base", "registry"}
    assert {kind.__module__.split(".")[-1] for kind in own()} == written


def test_every_family_has_a_case_in_a_file_of_its_name() -> None:
    for kind in own():
        files = {
            type(case).__module__.split(".")[-1]
            for case in [*CASES, *COUSINS]
            if type(family_of(case.model())) is kind
        }
        assert files == {kind.__module__.split(".")[-1]}, kind.__name__


def test_every_family_has_a_config_of_real_size() -> None:
    """On which `pore check` is tried."""
    assert {type(family_of_config(make(), name)) for name, make in PUBLISHED.items()} == own()

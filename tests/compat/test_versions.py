"""Versions are compared as versions."""

from __future__ import annotations

import pytest

from pore._compat.versions import beyond_tested


def test_versions_are_compared_as_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pore._compat.versions.TESTED", ("5.9.0", "5.10.0"))
    for version, beyond in (("5.9.5", False), ("5.10.0", False), ("5.10.1", True), ("5.11", True)):
        monkeypatch.setattr("transformers.__version__", version)
        assert beyond_tested() is beyond

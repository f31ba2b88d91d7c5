"""Which versions of transformers all tests were run on."""

from __future__ import annotations

TESTED = ("5.16.0", "5.20.0", "5.23.0", "5.24.0")
"""The versions of transformers that all tests were run on, the newest last.

On a newer one the library proves itself for a kind of model before it prunes one (`checking`)."""


def newest_tested() -> str:
    """The newest version of transformers that all tests were run on."""
    return TESTED[-1]


def beyond_tested() -> bool:
    """Whether this transformers is newer than that."""
    import transformers  # late: it takes transformers seconds
    from packaging.version import Version

    return Version(transformers.__version__) > Version(newest_tested())

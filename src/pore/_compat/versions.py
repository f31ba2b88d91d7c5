"""The versions of transformers on which all tests were run."""

from __future__ import annotations

TESTED = ("5.16.0", "5.20.0", "5.23.0", "5.24.0")
"""The versions of transformers on which all tests were run, the newest last.

On a newer one the library tests itself for a kind of model before it prunes it (`checking`)."""


def newest_tested() -> str:
    """The newest version of transformers on which all tests were run."""
    return TESTED[-1]


def beyond_tested() -> bool:
    """Whether this transformers is newer than that."""
    import transformers  # late: it takes transformers seconds
    from packaging.version import Version

    return Version(transformers.__version__) > Version(newest_tested())

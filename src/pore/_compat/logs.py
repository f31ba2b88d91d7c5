"""What transformers logs, and how much of it."""

from __future__ import annotations

LEVEL = "TRANSFORMERS_VERBOSITY"
"""The environment variable that transformers reads when it is imported."""


def level(verbose: bool) -> str:
    """The value of `LEVEL` with which everything is logged, or else errors alone."""
    return "info" if verbose else "error"


def log_at(verbose: bool) -> None:
    """Let transformers, imported already, log everything, or else errors alone."""
    from transformers.utils import logging

    logging.set_verbosity(logging.log_levels[level(verbose)])

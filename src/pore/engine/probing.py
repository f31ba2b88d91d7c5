"""A reader is fed by the attention of one layer."""

from __future__ import annotations


class _Seen(Exception):
    """Ends a layer that ran in advance, once its attention is known."""

"""Fixtures of several files of this folder."""

from helpers.calibrations import model, processor, samples
from helpers.whose import call

__all__ = ["call", "model", "processor", "samples"]

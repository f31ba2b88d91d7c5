"""Helpers of tests: what several of them use."""

from __future__ import annotations

from pore.evaluation import page, survey

SETTINGS = survey.Settings(keeps=(0.5, 0.25), batch_size=4, max_new_tokens=3)


ABOUT = page.About("tiny <model>", "pore evaluate --all", "cal", "test", {"machine": "a & b"})

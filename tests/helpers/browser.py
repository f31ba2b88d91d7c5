"""Chromium, where there is one, and what is measured in it."""

from __future__ import annotations

import shutil
from typing import Any

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
"""Where it is; None if there is none."""

ARGUMENTS = ["--no-sandbox", "--disable-gpu"]


def contrast(page: Any, selector: str) -> float:
    """The contrast of an element's text, as WCAG counts it."""
    text, behind = page.evaluate(
        """(selector) => {
          let one = document.querySelector(selector);
          const text = getComputedStyle(one).color;
          const clear = "rgba(0, 0, 0, 0)";
          while (getComputedStyle(one).backgroundColor === clear && one.parentElement)
            one = one.parentElement;
          return [text, getComputedStyle(one).backgroundColor];
        }""",
        selector,
    )
    high, low = sorted((luminance(text), luminance(behind)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def luminance(color: str) -> float:
    parts = [int(part) / 255 for part in color.removeprefix("rgb(").rstrip(")").split(",")]
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

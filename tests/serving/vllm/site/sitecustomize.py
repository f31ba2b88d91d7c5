"""Lets PyPI's torchvision, which is built for torch with CUDA, be imported beside one without.

Its compiled operators are missing there. Nothing here calls them, but it registers further kernels
for two of them when it is imported, and so they must have been defined. On the path of the tests'
environment alone, where Python runs it at every start; torch is not imported before torchvision is.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_kept: list[Any] = []


class _BeforeTorchvision(MetaPathFinder):
    """Defines the operators once torchvision is looked for, and leaves finding it to the others."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name == "torchvision" and not _kept and "torch" in sys.modules:
            import torch

            _kept.append(torch.library.Library("torchvision", "FRAGMENT"))
            for operator in _OPERATORS:
                _kept[0].define(operator)
        return None


sys.meta_path.insert(0, _BeforeTorchvision())

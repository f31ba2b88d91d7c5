"""The entry point through which lmms-eval finds the model: it loads this file at every start."""

from __future__ import annotations

from typing import Any

MODEL, ALIASES = "pore_hf", ("pore",)


def manifests() -> list[Any]:
    """The models for lmms-eval's registry; the class itself is imported when it is chosen."""
    from lmms_eval.models.registry_v2 import ModelManifest

    path = "pore.evaluation.harness.model.PoreHF"
    return [ModelManifest(model_id=MODEL, chat_class_path=path, aliases=ALIASES)]

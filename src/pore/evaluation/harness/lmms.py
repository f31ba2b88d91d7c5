"""What pore uses of lmms-eval, under the names that lmms-eval has for it.

Importing this module needs the extra `eval`; everything else of pore does without.
"""

from __future__ import annotations

from pore.evaluation.harness import lmms_eval_needed

with lmms_eval_needed():
    from lmms_eval.api.instance import GenerationResult as GenerationResult
    from lmms_eval.api.instance import Instance as Instance
    from lmms_eval.api.instance import TokenCounts as TokenCounts
    from lmms_eval.api.model import lmms
    from lmms_eval.models.model_utils.gen_metrics import log_metrics as log_metrics
    from lmms_eval.protocol import ChatMessages as ChatMessages

Lmms = lmms
"""The base class of its models."""

PADDING = "__padding_only__"
"""Marks, in a request's metadata, a copy that only makes all processes do equally much."""

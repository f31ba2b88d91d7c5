"""The names of lmms-eval that run its tasks, imported in one place."""

from __future__ import annotations

from lmms_eval.evaluator import simple_evaluate as simple_evaluate
from lmms_eval.tasks import TaskManager as TaskManager
from lmms_eval.utils import load_yaml_config as load_yaml_config

# First, because it says what to do where lmms-eval is missing.
import pore.evaluation.harness.lmms  # noqa: F401

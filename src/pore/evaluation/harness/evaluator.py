"""The names of lmms-eval that run its tasks, imported in one place."""

from __future__ import annotations

from pore.evaluation.harness import lmms_eval_needed

with lmms_eval_needed():
    from lmms_eval.evaluator import simple_evaluate as simple_evaluate
    from lmms_eval.tasks import TaskManager as TaskManager
    from lmms_eval.tasks import get_task_dict as get_task_dict
    from lmms_eval.utils import load_yaml_config as load_yaml_config

"""Evaluation on benchmarks by lmms-eval: the model that it runs, its tasks, and what they need.

lmms-eval is an extra (`pip install 'pore-vlm[eval]'`); only `lmms` and `model` import it.
"""

from pathlib import Path

TASKS = Path(__file__).with_name("tasks")
"""The folder of the tasks that come with pore, which lmms-eval takes as `--include_path`."""

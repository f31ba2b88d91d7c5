"""Evaluation on benchmarks by lmms-eval: the model that it runs, its tasks, and what they need.

lmms-eval is an extra (`pip install 'pore-vlm[eval]'`); only `lmms`, `evaluator` and `plugin` import
it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pore.errors import InputError

TASKS = Path(__file__).with_name("tasks")
"""The folder of the tasks that come with pore, which lmms-eval takes as `--include_path`."""


@contextmanager
def lmms_eval_needed() -> Iterator[None]:
    """What is imported in the block is lmms-eval's; where that fails, say what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise InputError(
            "Evaluating on benchmarks needs lmms-eval: pip install 'pore-vlm[eval]' "
            f"(missing: {error.name})."
        ) from error
    except (ImportError, RuntimeError) as error:
        raise InputError(
            f"lmms-eval is installed but cannot be imported: {error}. If torchvision or timm is "
            "named, they were built for another torch: pip uninstall torchvision timm (LLaVA does "
            "without), or install the torchvision that belongs to this torch."
        ) from error

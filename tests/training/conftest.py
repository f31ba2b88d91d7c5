"""The scripts of `training/` import each other by their plain names."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "training"))

"""PoRe: drop the visual tokens that do not matter, on stock transformers.

import pore

bias = pore.PositionBias.load("profile.json")
with pore.FastV(keep=128, layer=2, reweight=bias)(model) as run:
    tokens = model.generate(**inputs)
print(run.report)
"""

from pore import profiles as profiles
from pore.bias import PositionBias as PositionBias
from pore.bias import Provenance as Provenance
from pore.budgets import schedule as schedule
from pore.calibration import Calibration as Calibration
from pore.calibration import HostCalibration as HostCalibration
from pore.calibration import calibrate as calibrate
from pore.calibration import calibrate_guide as calibrate_guide
from pore.chain import Chain as Chain
from pore.checking import CheckResult as CheckResult
from pore.checking import check as check
from pore.embedded import embedded_model as embedded_model
from pore.errors import PoreError as PoreError
from pore.families import Family as Family
from pore.guiding import Guide as Guide
from pore.guiding import guide as guide
from pore.methods import *  # noqa: F403 - the registry lists the methods, so that a new one is one line
from pore.methods import methods as methods
from pore.pruner import Pruner as Pruner
from pore.pruner import Run as Run
from pore.pruner import remove as remove
from pore.samples import Sample as Sample
from pore.samples import load_samples as load_samples

__version__ = "0.1.0"

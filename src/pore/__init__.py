"""PoRe: drop the visual tokens that do not matter, on stock transformers.

import pore

bias = pore.PositionBias.load("profile.json")
with pore.FastV(keep=128, layer=2, reweight=bias)(model) as run:
    tokens = model.generate(**inputs)
print(run.report)
"""

from pore.bias import profiles as profiles
from pore.bias.position_bias import PositionBias as PositionBias
from pore.bias.provenance import Provenance as Provenance
from pore.calibration.calibrating import calibrate as calibrate
from pore.calibration.calibrating import calibrate_guide as calibrate_guide
from pore.calibration.host import HostCalibration as HostCalibration
from pore.calibration.sums import Calibration as Calibration
from pore.checking.proofs import check as check
from pore.checking.result import CheckResult as CheckResult
from pore.data.samples import Sample as Sample
from pore.data.sources import load_samples as load_samples
from pore.embedded import embedded_model as embedded_model
from pore.engine.pruner import Pruner as Pruner
from pore.engine.run import Run as Run
from pore.engine.run import remove as remove
from pore.errors import PoreError as PoreError
from pore.families.base import Family as Family
from pore.methods import *  # noqa: F403 - the registry lists the methods, so that a new one is one line
from pore.methods import methods as methods
from pore.methods.budgets import schedule as schedule
from pore.methods.chain import Chain as Chain
from pore.methods.guiding import Guide as Guide
from pore.methods.guiding import guide as guide

__version__ = "0.1.0"

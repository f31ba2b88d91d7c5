"""PoRe: drop the visual tokens that do not matter, on stock transformers.

import pore

bias = pore.PositionBias.load("profile.json")
with pore.FastV(keep=128, layer=2, reweight=bias)(model) as run:
    tokens = model.generate(**inputs)
print(run.report)
"""

import importlib as _importlib
import typing as _typing

__version__ = "0.1.0"

# Names are imported when they are first used, so that `import pore` and the help of the command
# line do not wait for torch. Methods are found by looking into their folder.
_HOME = {
    "Video": "pore._videos",
    "read_video": "pore._videos",
    "corrections": "pore.corrections",
    "profiles": "pore.bias.profiles",
    "PositionBias": "pore.bias.position_bias",
    "Provenance": "pore.bias.provenance",
    "calibrate": "pore.calibration.calibrating",
    "calibrate_guide": "pore.calibration.calibrating",
    "HostCalibration": "pore.calibration.host",
    "Calibration": "pore.calibration.sums",
    "check": "pore.checking.proofs",
    "CheckResult": "pore.checking.result",
    "Sample": "pore.data.samples",
    "load_samples": "pore.data.sources",
    "embedded_model": "pore.embedded",
    "embedded_video_model": "pore.embedded",
    "Pruner": "pore.engine.pruner",
    "Run": "pore.engine.run",
    "remove": "pore.engine.run",
    "PoreError": "pore.errors",
    "Family": "pore.families.base",
    "methods": "pore.methods.registry",
    "ClipQuestions": "pore.methods._clip",
    "ClipRelevance": "pore.methods._clip",
    "schedule": "pore.methods.budgets",
    "Chain": "pore.methods.chain",
    "Guide": "pore.methods.guides",
    "guide": "pore.methods.guiding",
    "consistency": "pore.methods.sgl",
    "early_exit": "pore.methods.sgl",
    "RankBudget": "pore.methods.sparsevlm",
}

# Type checkers and editors cannot look, so for them alone all are listed, each method with its own
# settings; a test holds the list complete.
if _typing.TYPE_CHECKING:
    from pore import corrections as corrections
    from pore._videos import Video as Video
    from pore._videos import read_video as read_video
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
    from pore.embedded import embedded_video_model as embedded_video_model
    from pore.engine.pruner import Pruner as Pruner
    from pore.engine.run import Run as Run
    from pore.engine.run import remove as remove
    from pore.errors import PoreError as PoreError
    from pore.families.base import Family as Family
    from pore.methods._clip import ClipQuestions as ClipQuestions
    from pore.methods._clip import ClipRelevance as ClipRelevance
    from pore.methods.budgets import schedule as schedule
    from pore.methods.cdpruner import CDPruner as CDPruner
    from pore.methods.chain import Chain as Chain
    from pore.methods.clse import CLSE as CLSE
    from pore.methods.d2pruner import D2Pruner as D2Pruner
    from pore.methods.dart import DART as DART
    from pore.methods.divprune import DivPrune as DivPrune
    from pore.methods.downsample import Downsample as Downsample
    from pore.methods.dycoke import DyCoke as DyCoke
    from pore.methods.evs import EVS as EVS
    from pore.methods.fastervlm import FasterVLM as FasterVLM
    from pore.methods.fastv import FastV as FastV
    from pore.methods.fastvid import FastVID as FastVID
    from pore.methods.feather import FEATHER as FEATHER
    from pore.methods.fitprune import FitPrune as FitPrune
    from pore.methods.flashvid import FlashVID as FlashVID
    from pore.methods.framefusion import FrameFusion as FrameFusion
    from pore.methods.gprune import GPrune as GPrune
    from pore.methods.guides import Guide as Guide
    from pore.methods.guiding import guide as guide
    from pore.methods.hawk import HAWK as HAWK
    from pore.methods.himap import HiMAP as HiMAP
    from pore.methods.hiprune import HiPrune as HiPrune
    from pore.methods.hired import HiRED as HiRED
    from pore.methods.holitom import HoliTom as HoliTom
    from pore.methods.holov import HoloV as HoloV
    from pore.methods.ivcprune import IVCPrune as IVCPrune
    from pore.methods.pact import PACT as PACT
    from pore.methods.pixel_budget import PixelBudget as PixelBudget
    from pore.methods.priortr import PriorTR as PriorTR
    from pore.methods.prumerge import PruMerge as PruMerge
    from pore.methods.prumerge_plus import PruMergePlus as PruMergePlus
    from pore.methods.pyramiddrop import PyramidDrop as PyramidDrop
    from pore.methods.random import Random as Random
    from pore.methods.registry import methods as methods
    from pore.methods.scope import SCOPE as SCOPE
    from pore.methods.scored import Scored as Scored
    from pore.methods.sgl import SGL as SGL
    from pore.methods.sgl import consistency as consistency
    from pore.methods.sgl import early_exit as early_exit
    from pore.methods.sparsevlm import RankBudget as RankBudget
    from pore.methods.sparsevlm import SparseVLM as SparseVLM
    from pore.methods.sparsevlm import SparseVLMPlus as SparseVLMPlus
    from pore.methods.st3 import ST3Style as ST3Style
    from pore.methods.tokencarve import TokenCarve as TokenCarve
    from pore.methods.tome import ToMe as ToMe
    from pore.methods.topv import TopV as TopV
    from pore.methods.uniform_frames import UniformFrames as UniformFrames
    from pore.methods.v2drop import V2Drop as V2Drop
    from pore.methods.vidcom2 import VidCom2 as VidCom2
    from pore.methods.visiontrim import VisionTrim as VisionTrim
    from pore.methods.visionzip import VisionZip as VisionZip
    from pore.methods.vispruner import VisPruner as VisPruner
    from pore.methods.vtc_cls import VTCCLS as VTCCLS
else:

    def __getattr__(name: str) -> _typing.Any:
        """A public name, or a method of another package by the name of its class."""
        if name in _HOME:
            home = _importlib.import_module(_HOME[name])
            return home if home.__name__.endswith(f".{name}") else getattr(home, name)
        if name[:1].isupper():  # so that no other name makes methods be loaded
            from pore.methods.registry import built_in, methods

            if name in built_in():
                return built_in()[name]
            for kind in methods().values():
                if kind.__name__ == name:
                    return kind
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        """All public names, the methods too."""
        from pore.methods.registry import built_in

        return sorted({*globals(), *_HOME, *built_in()})

"""The pruning methods, one published method per file, and their registry."""

from __future__ import annotations

from functools import cache
from importlib import metadata

from pore.errors import PoreError
from pore.methods.cdpruner import CDPruner as CDPruner
from pore.methods.cdpruner import ClipRelevance as ClipRelevance
from pore.methods.dart import DART as DART
from pore.methods.divprune import DivPrune as DivPrune
from pore.methods.downsample import Downsample as Downsample
from pore.methods.fastervlm import FasterVLM as FasterVLM
from pore.methods.fastv import FastV as FastV
from pore.methods.fitprune import FitPrune as FitPrune
from pore.methods.gprune import GPrune as GPrune
from pore.methods.hiprune import HiPrune as HiPrune
from pore.methods.hired import HiRED as HiRED
from pore.methods.prumerge import PruMerge as PruMerge
from pore.methods.prumerge_plus import PruMergePlus as PruMergePlus
from pore.methods.pyramiddrop import PyramidDrop as PyramidDrop
from pore.methods.random import Random as Random
from pore.methods.scored import Scored as Scored
from pore.methods.sgl import SGL as SGL
from pore.methods.sgl import consistency as consistency
from pore.methods.sgl import early_exit as early_exit
from pore.methods.sparsevlm import RankBudget as RankBudget
from pore.methods.sparsevlm import SparseVLM as SparseVLM
from pore.methods.sparsevlm import SparseVLMPlus as SparseVLMPlus
from pore.methods.st3 import ST3Style as ST3Style
from pore.methods.tome import ToMe as ToMe
from pore.methods.topv import TopV as TopV
from pore.methods.visionzip import VisionZip as VisionZip
from pore.methods.vispruner import VisPruner as VisPruner
from pore.methods.vtc_cls import VTCCLS as VTCCLS
from pore.pruner import Pruner


@cache
def _load_entry_points() -> None:
    for entry in metadata.entry_points(group="pore.methods"):
        kind = entry.load()
        if not (isinstance(kind, type) and issubclass(kind, Pruner)):
            raise PoreError(
                f"Entry point {entry.name!r} of group 'pore.methods' gives {kind!r}, "
                "which is no subclass of pore.Pruner."
            )


def methods() -> dict[str, type[Pruner]]:
    """All methods, built in or from the entry points `pore.methods`, by name.

    Returns:
        The class of every method.

    Raises:
        PoreError: An entry point does not give a `Pruner`.
    """
    _load_entry_points()
    return dict(sorted(Pruner.registry.items()))

"""The engine: a pruning method declared as stages, and the run that puts it into a model."""

from pore.engine.limits import check_layer as check_layer
from pore.engine.limits import check_limits as check_limits
from pore.engine.limits import check_query as check_query
from pore.engine.pruner import Pruner as Pruner
from pore.engine.run import Run as Run
from pore.engine.run import remove as remove
from pore.engine.run import unpruned as unpruned
from pore.engine.stages import Limit as Limit
from pore.engine.stages import Selection as Selection
from pore.engine.stages import Stage as Stage
from pore.engine.stages import View as View

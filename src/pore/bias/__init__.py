"""The position bias P: where it comes from, and how it is fitted, divided by and saved."""

from pore.bias.position_bias import PositionBias as PositionBias
from pore.bias.provenance import Provenance as Provenance
from pore.bias.stages import load_biases as load_biases
from pore.bias.stages import save_biases as save_biases

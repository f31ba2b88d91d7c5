"""Other corrections of position bias than `pore.PositionBias`, for a method's `reweight`."""

from pore.corrections.files import load_corrections as load_corrections
from pore.corrections.files import save_corrections as save_corrections
from pore.corrections.heads import HeadBiases as HeadBiases
from pore.corrections.null_token import NullTokenPrior as NullTokenPrior
from pore.corrections.subtracted import Subtracted as Subtracted
from pore.corrections.without_rope import WithoutRoPE as WithoutRoPE

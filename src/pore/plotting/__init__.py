"""Figures: the position bias, kept tokens, accuracy over cost. matplotlib is imported late."""

from pore.plotting.accuracy import accuracy_over_flops as accuracy_over_flops
from pore.plotting.any_size import any_size as any_size
from pore.plotting.attention import attention as attention
from pore.plotting.bias import figure1 as figure1
from pore.plotting.bias import figure2 as figure2
from pore.plotting.bias import maps as maps
from pore.plotting.corrections import corrections as corrections
from pore.plotting.coverage import Seen as Seen
from pore.plotting.coverage import layout as layout
from pore.plotting.coverage import layouts as layouts
from pore.plotting.differences import differences as differences
from pore.plotting.frames import ANIMATIONS as ANIMATIONS
from pore.plotting.frames import Frame as Frame
from pore.plotting.frames import animated as animated
from pore.plotting.frames import frames_kept as frames_kept
from pore.plotting.frames import strip as strip
from pore.plotting.kept import Panel as Panel
from pore.plotting.kept import kept_tokens as kept_tokens
from pore.plotting.pixels import kept_picture as kept_picture
from pore.plotting.pixels import to_web as to_web
from pore.plotting.stability import stability as stability
from pore.plotting.style import save as save
from pore.plotting.style import to_png as to_png

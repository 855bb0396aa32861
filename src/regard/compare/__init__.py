"""Which attention should I use? Train several on the same images, measure them, and report.

``Study(data, mixers, recipe).run(folder)`` compares; ``regard compare`` and ``regard demo`` do so from the command line.
"""

from .contenders import Contender, parse_mixers
from .running import compare_on
from .study import Outcome, Study

__all__ = ["Contender", "Outcome", "Study", "compare_on", "parse_mixers"]

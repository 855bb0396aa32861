"""Which attention should I use? Train several on the same images, measure them, and report.

``compare(settings)`` runs a study, ``regard compare`` and ``regard demo`` do so from the command line.
"""

from .contenders import Contender, parse_mixers
from .demo import compare_on
from .study import Outcome, Settings, compare

__all__ = ["Contender", "Outcome", "Settings", "compare", "compare_on", "parse_mixers"]

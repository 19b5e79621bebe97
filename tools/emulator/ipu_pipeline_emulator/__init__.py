"""A strict stand-in for Graphcore's ``poptorch`` front end that runs on the CPU.

Written from the documented contract of SDK 3.4. It refuses what the real front end and its back
end refuse, records the program (blocks, stages, IPUs, variables), and computes what the device
would compute: order of samples, output modes, accumulation, reductions and PopART's optimizers.
It predicts no speed and no memory. Python 3.8 and torch 2.0 are enough, and imports are relative,
so the folder also works when it is copied elsewhere.

    with standin.install():
        import poptorch
"""

from .install import StandInError, install, is_stand_in
from .version import __version__

__all__ = ["StandInError", "__version__", "install", "is_stand_in"]

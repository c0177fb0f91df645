"""What ``import tinker`` finds where the folder above is on the path: `loops_tinker`, under the old names."""

import sys

from loops_tinker import *  # noqa: F403 - all of its names
from loops_tinker import __all__ as __all__
from loops_tinker import __version__ as __version__
from loops_tinker.old_names import modules, tell_of_other

sys.modules.update(modules())
tell_of_other()

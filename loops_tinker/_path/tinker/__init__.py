"""What ``import tinker`` finds where the folder above is on the path: `loops_tinker`, under the old names."""

import sys

from loops_tinker.old_names import modules, names, tell_of_other

globals().update(names())
sys.modules.update(modules())
tell_of_other()

"""What ``import tinker`` finds where the folder above is on the path: `loops_tinker`, under the old names."""

import sys

from loops_tinker.old_names import modules, names, tell_of_other

sys.modules.update(modules())
lib = sys.modules["tinker.lib"]
globals().update(names())
tell_of_other()

"""Values that cross the API: immutable `msgspec` structs without behaviour that needs the network."""

from .control import *  # noqa: F403 - each module lists its public names in `__all__`
from .control import __all__ as _control
from .inputs import *  # noqa: F403
from .inputs import __all__ as _inputs
from .sampling import *  # noqa: F403
from .sampling import __all__ as _sampling
from .tensors import *  # noqa: F403
from .tensors import __all__ as _tensors
from .training import *  # noqa: F403
from .training import __all__ as _training

__all__ = [*_control, *_inputs, *_sampling, *_tensors, *_training]

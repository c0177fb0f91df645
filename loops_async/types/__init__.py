"""Arguments and results of the API: immutable `msgspec` structs that make no requests."""

from . import control, deployments, inputs, sampling, tensors, training, work
from .control import *  # noqa: F403 - each module lists its public names in `__all__`
from .deployments import *  # noqa: F403
from .inputs import *  # noqa: F403
from .sampling import *  # noqa: F403
from .tensors import *  # noqa: F403
from .training import *  # noqa: F403
from .work import *  # noqa: F403

__all__: list[str] = []
__all__ += control.__all__
__all__ += deployments.__all__
__all__ += inputs.__all__
__all__ += sampling.__all__
__all__ += tensors.__all__
__all__ += training.__all__
__all__ += work.__all__

"""Async-first client for Baseten Loops: LoRA training and sampling of language models.

Start with `ServiceClient`.
"""

from . import errors, types
from ._operations.future import OperationFuture
from ._version import __version__
from .client import ServiceClient
from .control_plane import ControlPlane
from .dpo import attach_reference_logprobs
from .drift import loops_compute_kl_sample_train, loops_log_kl_sample_train, top_divergent_tokens
from .errors import *  # noqa: F403 - each module lists its public names in `__all__`
from .sampling import SamplingClient
from .training import ForwardBackwardFuture, TrainingClient

# One by one, since mypy sees no name whose `__all__` is put together from others.
from .types.control import *  # noqa: F403
from .types.deployments import *  # noqa: F403
from .types.inputs import *  # noqa: F403
from .types.sampling import *  # noqa: F403
from .types.tensors import *  # noqa: F403
from .types.training import *  # noqa: F403

__all__ = [
    "ControlPlane",
    "ForwardBackwardFuture",
    "OperationFuture",
    "SamplingClient",
    "ServiceClient",
    "TrainingClient",
    "__version__",
    "attach_reference_logprobs",
    "loops_compute_kl_sample_train",
    "loops_log_kl_sample_train",
    "top_divergent_tokens",
]
__all__ += errors.__all__
__all__ += types.__all__

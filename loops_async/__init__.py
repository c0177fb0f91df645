"""Async-first client for Baseten Loops: LoRA training and sampling of language models.

The main classes:

- `ServiceClient`: a session on the service. It creates the other clients, and lists and downloads checkpoints.
- `TrainingClient`: trains one run: `forward_backward`, `optim_step`, saving and loading. Each call submits an
  operation, in order, and returns an `OperationFuture`, whose result is awaited separately.
- `CallFuture`: the result of a call that `start` begins from any thread, for any thread and event loop to wait for.
- `SamplingClient`: samples one sampler: `sample`, `sample_many`, `compute_logprobs`.
- `ControlPlane`: the REST API, one method for each route, as `ServiceClient.control_plane`.
- `AgentGateway`: makes any program that speaks OpenAI's or Anthropic's API a rollout.

Example:
    ::

        async with loops.ServiceClient() as service:
            trainer = await service.create_lora_training_client("Qwen/Qwen3-0.6B", rank=16)
            step = await trainer.forward_backward(data, "cross_entropy")
            await trainer.optim_step(loops.AdamParams(learning_rate=4e-5))
            sampler = await trainer.save_weights_and_get_sampling_client("step-1")
            print((await step).loss, (await sampler.sample(prompt)).sequences[0].text)

The API key is read from ``BASETEN_API_KEY``. `ServiceClient` describes the other settings.

Elsewhere:

- `loops_async.errors`: every error, with `LoopsError` as the root; `LoopsError.retryable` says whether to try again.
- `loops_async.types`: the values that calls take and return, e.g. `Datum`, `AdamParams`, `SamplingParams`.
- `attach_reference_logprobs` prepares data for the loss ``dpo``; `loops_compute_kl_sample_train` and
  `top_divergent_tokens` measure how far the sampler and the trainer differ.
- `testing`: records what a program asks and is answered, and replays it in tests.
- `loops_sync`: the same classes and methods as blocking calls.
- `loops_local`: the whole service on this machine, for use without an account (the ``local`` extra). Run
  ``loops-local serve``, or enter `loops_local.LocalService`.
- `loops_async.executors`: where graders and whole rollouts run: in processes, or on a cluster (`loops_async.ray`).
- ``loops``: the command line (the ``cli`` extra).
"""

from importlib import import_module
from typing import TYPE_CHECKING

from . import errors, types
from ._futures import CallFuture, start
from ._logs import log_as_the_environment_says, log_to_stderr
from ._operations.future import OperationFuture
from ._progress import print_progress
from ._sampling.adaptive import Adaptive
from ._sampling.limiter import Limiter
from ._telemetry.setup import instrument, instrument_as_the_environment_says
from ._training.loss_sum import loss_sum
from ._version import __version__
from ._work.budget import Budget
from ._work.dump import dump_all
from .client import ServiceClient
from .control_plane import ControlPlane
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
from .types.work import *  # noqa: F403

if TYPE_CHECKING:
    from . import agents, batch, executors, rollouts
    from . import testing as testing
    from .agents import *  # noqa: F403
    from .batch import *  # noqa: F403
    from .dpo import attach_reference_logprobs
    from .drift import loops_compute_kl_sample_train, loops_log_kl_sample_train, top_divergent_tokens
    from .executors import *  # noqa: F403
    from .rollouts import *  # noqa: F403

__all__ = [
    "Adaptive",
    "Budget",
    "CallFuture",
    "ControlPlane",
    "ForwardBackwardFuture",
    "Limiter",
    "OperationFuture",
    "SamplingClient",
    "ServiceClient",
    "TrainingClient",
    "__version__",
    "attach_reference_logprobs",
    "dump_all",
    "instrument",
    "log_to_stderr",
    "loops_compute_kl_sample_train",
    "loops_log_kl_sample_train",
    "loss_sum",
    "print_progress",
    "start",
    "top_divergent_tokens",
]
__all__ += errors.__all__
__all__ += types.__all__

if TYPE_CHECKING:
    __all__ += agents.__all__
    __all__ += batch.__all__
    __all__ += [name for name in executors.__all__ if name not in errors.__all__]
    __all__ += rollouts.__all__
else:  # a type checker would believe that every name exists
    _ON_FIRST_USE = {
        "agents": ["AgentCall", "AgentGateway", "AgentRollout", "ParsedReply", "ToolParser", "Trajectory"],
        "batch": ["BatchClient", "BatchReport", "BatchSettings", "row_key", "sample_file", "sample_rows"],
        "dpo": ["attach_reference_logprobs"],
        "drift": ["loops_compute_kl_sample_train", "loops_log_kl_sample_train", "top_divergent_tokens"],
        "executors": ["InLoopExecutor", "Policy", "ProcessExecutor"],
        "rollouts": [
            "AdvantageMethod",
            "Advantages",
            "Episode",
            "EvaluationResult",
            "Executor",
            "FailurePolicy",
            "GateState",
            "Rollout",
            "RolloutBatch",
            "RolloutContext",
            "RolloutGroup",
            "RolloutState",
            "RolloutStream",
            "RunningGroup",
            "StalenessGate",
            "Ticket",
            "group_advantages",
        ],
        "testing": [],
    }
    """Modules that only some programs need, and their names here: whichever is used first imports its module."""
    _MODULES = {name: module for module, names in _ON_FIRST_USE.items() for name in names}
    __all__ += [name for name in _MODULES if name not in __all__]

    def __getattr__(name):
        if name in _ON_FIRST_USE:
            return import_module(f".{name}", __name__)
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(f".{_MODULES[name]}", __name__), name)
        return value

    def __dir__():
        return sorted({*globals(), *_ON_FIRST_USE, *_MODULES})


log_as_the_environment_says()
instrument_as_the_environment_says()

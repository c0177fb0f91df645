"""The sampler of a run: there from the start, or created when it is first needed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from .._http.endpoint import Endpoint
from .._tasks import SingleFlight
from ..errors import UnsupportedError
from ..types import Run, Sampler
from .runtime import Runtime

MakeSampler = Callable[[], Awaitable[Sampler]]


class PairedSampler:
    """The sampler of `run`, created by `make` if the run has none and is allowed to get one."""

    def __init__(self, runtime: Runtime, run: Run, make: MakeSampler | None, *, ready_timeout: float) -> None:
        self._runtime = runtime
        self._run = run
        self._make = make
        self._ready_timeout = ready_timeout
        self._made: SingleFlight[str, Endpoint] = SingleFlight(runtime.tasks)
        self.known: Endpoint | None = None if run.sampler is None else self._endpoint(run.sampler)
        """Where it is, if it exists."""

    def check(self) -> None:
        """Raise `UnsupportedError` if there is none, and will be none."""
        if self.known is None and self._make is None:
            raise self._missing()

    async def get(self) -> Endpoint:
        """Return where it is; the first call creates it. It may not be ready yet."""
        if self.known is None:
            self.known = await self._made.get(f"the sampler of run {self._run.id}", self._create)
        return self.known

    async def _create(self) -> Endpoint:
        if self._make is None:
            raise self._missing()
        return self._endpoint(await self._make())

    def _missing(self) -> UnsupportedError:
        return UnsupportedError(
            f"run {self._run.id} has no paired sampler; sample its checkpoints with "
            "ServiceClient.create_sampling_client_from_checkpoint"
        )

    def _endpoint(self, sampler: Sampler) -> Endpoint:
        url = self._runtime.settings.base_url
        return Endpoint.of_sampler(sampler, service_url=url, run_id=self._run.id, ready_timeout=self._ready_timeout)

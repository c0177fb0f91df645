"""The address of a trainer or a sampler, and how to make requests to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, TypeAlias

from msgspec import UNSET, Struct, UnsetType

from .. import protocol
from ..errors import ProtocolError
from ..types import BasetenDeployment, LocalDeployment, Run, Sampler, ServerlessDeployment
from .body import Body
from .messages import MOST_BYTES, Request
from .settings import Settings, resolve_settings

SAMPLE_SECONDS: Final = 300.0
"""The time limit of a sample unless another is given."""

Deployment: TypeAlias = BasetenDeployment | ServerlessDeployment | LocalDeployment


class Endpoint(Struct, frozen=True, kw_only=True):
    """A trainer or a sampler: its address, and the headers and time limits of requests to it.

    The type of `deployment` determines how the endpoint becomes ready, whether it has a queue, and whether it receives
    the API key. A plain value without the key, which can be pickled. Create one with `of_run` or `of_sampler` only.
    """

    deployment: Deployment
    base_model: str
    headers: Mapping[str, str]
    run_id: str | None = None
    """The run that is trained here, or that the sampler is paired with."""
    sampler_id: str | None = None
    timeout: float | None = None
    """Time limit of one request, at a sampler of one sample with its retries, in seconds; None for no limit."""
    ready_timeout: float = 3600.0
    """Time limit for becoming ready, in seconds."""

    @classmethod
    def of_run(cls, run: Run, *, timeout: float | None = None, ready_timeout: float = 3600.0) -> Endpoint:
        """Return the endpoint of a run's trainer."""
        if not run.base_url:
            raise ProtocolError(f"run {run.id} was created without the URL of its trainer; check it with get_run")
        deployment: Deployment
        if run.session_id == protocol.LOCAL_ID:
            deployment = LocalDeployment(base_url=run.base_url)
        else:
            deployment = BasetenDeployment(base_url=run.base_url, deployment_id=run.deployment_id)
        return cls(
            deployment=deployment,
            base_model=run.base_model,
            headers={protocol.RUN_ID: run.id},
            run_id=run.id,
            timeout=timeout,
            ready_timeout=ready_timeout,
        )

    @classmethod
    def of_sampler(
        cls,
        sampler: Sampler,
        *,
        service_url: str,
        run_id: str | None = None,
        timeout: float | None = SAMPLE_SECONDS,
        ready_timeout: float = 3600.0,
    ) -> Endpoint:
        """Return the endpoint of a sampler; `run_id` is the run that it is paired with, if any.

        `service_url` is the URL of the control plane, which reports the state of a dedicated sampler.
        """
        if not sampler.base_url:
            raise ProtocolError(f"sampler {sampler.id} was created without its URL; check it with get_sampler")
        deployment: Deployment
        if sampler.id == protocol.LOCAL_ID:
            deployment = LocalDeployment(base_url=sampler.base_url)
        elif sampler.deployment_id is None:
            deployment = ServerlessDeployment(base_url=sampler.base_url)
        else:
            deployment = BasetenDeployment(
                base_url=sampler.base_url,
                model_id=sampler.model_id,
                deployment_id=sampler.deployment_id,
                api_base_url=service_url,
            )
        headers: dict[str, str] = {}
        sampler_id = None if sampler.id == protocol.LOCAL_ID else sampler.id
        # A gateway expects the run or the sampler, never both.
        if run_id is not None:
            headers[protocol.RUN_ID] = run_id
        elif sampler_id is not None:
            headers[protocol.SAMPLER_ID] = sampler_id
        return cls(
            deployment=deployment,
            base_model=sampler.base_model,
            headers=headers,
            run_id=run_id,
            sampler_id=sampler_id,
            timeout=timeout,
            ready_timeout=ready_timeout,
        )

    @property
    def url(self) -> str:
        """The address to which routes are appended."""
        return self.deployment.base_url

    def request(
        self,
        method: str,
        route: str,
        what: str,
        *,
        body: bytes | Body | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float | None | UnsetType = UNSET,
        most_bytes: int = MOST_BYTES,
    ) -> Request:
        """Make a request to this endpoint; `headers`, if given, replace the headers of the endpoint."""
        return Request(
            method=method,
            url=self.deployment.base_url + route,
            what=what,
            body=body,
            headers=self.headers if headers is None else headers,
            timeout=self.timeout if timeout is UNSET else timeout,
            most_bytes=most_bytes,
        )

    def settings(self) -> Settings:
        """Return the settings of a client that knows only this endpoint; the key is read from the environment.

        A local trainer or sampler receives no key.
        """
        match self.deployment:
            case LocalDeployment(base_url=url):
                return Settings(base_url=url, api_key=None)
            case ServerlessDeployment(base_url=url):
                return resolve_settings(base_url=url)
            case BasetenDeployment(api_base_url=url):
                return resolve_settings(base_url=url)

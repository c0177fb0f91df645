"""Where a sampler runs, to describe one that was created elsewhere."""

from __future__ import annotations

from typing import TypeAlias

from msgspec import Struct

__all__ = ["BasetenDeployment", "LocalDeployment", "SamplerDeployment", "ServerlessDeployment"]


class BasetenDeployment(Struct, frozen=True, kw_only=True):
    """A dedicated trainer or sampler.

    The control plane tells its state by `deployment_id`, with `model_id` if it is a sampler; None where the service
    does not name them. `api_base_url` is the control plane's, by default ``LOOPS_BASE_URL``, else the hosted one.
    """

    base_url: str
    model_id: str | None = None
    deployment_id: str | None = None
    api_base_url: str | None = None


class LocalDeployment(Struct, frozen=True, kw_only=True):
    """A trainer or sampler without a control plane, which gets no API key."""

    base_url: str


class ServerlessDeployment(Struct, frozen=True, kw_only=True):
    """A serverless sampler, whose requests go through a queue."""

    base_url: str


SamplerDeployment: TypeAlias = BasetenDeployment | LocalDeployment | ServerlessDeployment

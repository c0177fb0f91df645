"""Where a sampler runs, to describe one that was created elsewhere."""

from __future__ import annotations

from typing import TypeAlias

from msgspec import Struct

__all__ = ["BasetenDeployment", "LocalDeployment", "SamplerDeployment", "ServerlessDeployment"]


class BasetenDeployment(Struct, frozen=True, kw_only=True):
    """A dedicated sampler. `api_base_url` is its control plane's; default ``LOOPS_BASE_URL``, else the hosted one."""

    base_url: str
    model_id: str
    deployment_id: str
    api_base_url: str | None = None


class LocalDeployment(Struct, frozen=True, kw_only=True):
    """A sampler without a control plane."""

    base_url: str


class ServerlessDeployment(Struct, frozen=True, kw_only=True):
    """A serverless sampler, whose requests go through a queue."""

    base_url: str


SamplerDeployment: TypeAlias = BasetenDeployment | LocalDeployment | ServerlessDeployment

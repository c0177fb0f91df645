"""Where a sampler runs, for those who know it from elsewhere."""

from __future__ import annotations

from typing import TypeAlias

from msgspec import Struct

__all__ = ["BasetenDeployment", "LocalDeployment", "SamplerDeployment", "ServerlessDeployment"]


class BasetenDeployment(Struct, frozen=True, kw_only=True):
    """A dedicated sampler; `api_base_url` is the control plane's, by default ``LOOPS_BASE_URL`` or the hosted one."""

    base_url: str
    model_id: str
    deployment_id: str
    api_base_url: str | None = None


class LocalDeployment(Struct, frozen=True, kw_only=True):
    """A sampler without a control plane."""

    base_url: str


class ServerlessDeployment(Struct, frozen=True, kw_only=True):
    """A sampler behind a queue."""

    base_url: str


SamplerDeployment: TypeAlias = BasetenDeployment | LocalDeployment | ServerlessDeployment

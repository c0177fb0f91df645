"""Descriptions of where a sampler runs, to use one that was created elsewhere."""

from __future__ import annotations

from typing import TypeAlias

from msgspec import Struct

from .._values import Value

__all__ = ["BasetenDeployment", "LocalDeployment", "SamplerDeployment", "ServerlessDeployment"]


class BasetenDeployment(Value, Struct, frozen=True, kw_only=True):
    """A dedicated trainer or sampler.

    The control plane identifies its state by `deployment_id`, for a sampler together with `model_id`; they are None if
    the service does not report them. `api_base_url` is the URL of the control plane, by default ``LOOPS_BASE_URL``,
    else the hosted service.
    """

    base_url: str
    model_id: str | None = None
    deployment_id: str | None = None
    api_base_url: str | None = None


class LocalDeployment(Value, Struct, frozen=True, kw_only=True):
    """A trainer or sampler without a control plane; it is not sent the API key."""

    base_url: str


class ServerlessDeployment(Value, Struct, frozen=True, kw_only=True):
    """A serverless sampler, whose requests go through a queue."""

    base_url: str


SamplerDeployment: TypeAlias = BasetenDeployment | LocalDeployment | ServerlessDeployment

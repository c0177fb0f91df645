"""The requests that create runs and samplers, from the arguments of one call and the settings of the client."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .._http.settings import Settings
from ..types import CreateRunRequest, CreateSamplerRequest, CreateTrainerRequest


def run_request(settings: Settings, session_id: str, **fields: Any) -> CreateRunRequest:
    """Return the request for a run; a field that is None keeps its default."""
    defaults = {
        "reuse_from_run_id": settings.reuse_from_run_id,
        # A run to reuse takes precedence over a session.
        "reuse_from_session_id": None if settings.reuse_from_run_id else settings.reuse_from_session_id,
        "availability_model": settings.availability_model,
    }
    return CreateRunRequest(session_id=session_id, **_given(defaults) | _given(fields))


def trainer_request(request: CreateRunRequest) -> CreateTrainerRequest:
    """Return the request for the same run without a sampler."""
    fields = {name: getattr(request, name) for name in CreateTrainerRequest.__struct_fields__ if hasattr(request, name)}
    return CreateTrainerRequest(**fields)


def sampler_request(settings: Settings, session_id: str, **fields: Any) -> CreateSamplerRequest:
    """Return the request for a sampler; a field that is None keeps its default."""
    defaults = {
        "reuse_from_session_id": settings.reuse_from_session_id,
        "availability_model": settings.availability_model,
    }
    return CreateSamplerRequest(session_id=session_id, **_given(defaults) | _given(fields))


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    # None is not the default of every field: newer fields are omitted unless they are given.
    return {name: value for name, value in fields.items() if value is not None}

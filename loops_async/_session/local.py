"""A trainer and a sampler that are already running, without a control plane."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from uuid import uuid4

from msgspec import Struct

from .._http.endpoint import Endpoint
from ..errors import UnsupportedError
from ..protocol import LOCAL_ID
from ..types import CreateRunRequest, CreateSamplerRequest, Run, Sampler
from .provisioning import ProgressReporter, ProvisioningOptions, wait_until_ready
from .runtime import Runtime
from .served_models import base_model_of, fetch_served_models


class LocalUrls(Struct, frozen=True):
    """The URLs of the trainer and the sampler."""

    trainer: str
    sampler: str


class LocalProvisioner:
    """Provides a trainer and a sampler that are already running as if a control plane had created them."""

    def __init__(self, runtime: Runtime, urls: LocalUrls) -> None:
        self._runtime = runtime
        self._urls = urls

    @asynccontextmanager
    async def run(self, request: CreateRunRequest, options: ProvisioningOptions) -> AsyncGenerator[Run]:
        yield await self._ready(f"local-{uuid4().hex[:8]}", request.base_model, options)

    async def existing_run(self, run_id: str, options: ProvisioningOptions) -> Run:
        return await self._ready(run_id, await self._base_model(run_id), options)

    async def sampler(self, request: CreateSamplerRequest, options: ProvisioningOptions) -> Sampler:
        return self._sampler(str(request.base_model))

    async def existing_sampler(
        self, options: ProvisioningOptions, *, sampler_id: str | None, run_id: str | None
    ) -> Sampler:
        if run_id is None:
            raise UnsupportedError("without a control plane, samplers have no ids: give the `run_id` instead")
        return self._sampler(await self._base_model(run_id))

    async def paired_sampler(self, run: Run) -> Sampler:
        return self._sampler(run.base_model)

    async def _ready(self, run_id: str, base_model: str, options: ProvisioningOptions) -> Run:
        run = Run(
            id=run_id,
            session_id=LOCAL_ID,
            base_model=base_model,
            base_url=self._urls.trainer,
            created_at=datetime.now(UTC),
            sampler=self._sampler(base_model),
        )
        await wait_until_ready(self._runtime, run, options, ProgressReporter("run", options))
        return run

    async def _base_model(self, run_id: str) -> str:
        """Return the base model of a run, which only the sampler reports."""
        service_url = self._runtime.settings.base_url
        sampler = Endpoint.of_sampler(self._sampler(""), service_url=service_url, run_id=run_id)
        return base_model_of(await fetch_served_models(sampler, self._runtime.transport), sampler)

    def _sampler(self, base_model: str) -> Sampler:
        return Sampler(id=LOCAL_ID, base_url=self._urls.sampler, base_model=base_model, created_at=datetime.now(UTC))

"""The models that a sampler serves."""

from __future__ import annotations

from .._http.endpoint import Endpoint
from .._http.retry import READ, retry
from .._http.transport import Transport
from ..errors import ProtocolError
from ..protocol import ServedModels

LIST_SECONDS = 60.0


async def fetch_served_models(sampler: Endpoint, transport: Transport) -> ServedModels:
    """List the models of a sampler; a serverless one may not have the route."""
    request = sampler.request("GET", "/v1/models", "list served models", timeout=LIST_SECONDS)
    ids = {"run_id": sampler.run_id, "sampler_id": sampler.sampler_id}
    with transport.work.within("request", request.what, **ids):
        return await retry(
            lambda: transport.fetch(request, ServedModels),
            READ,
            what="could not list the sampler's models",
            budget=transport.retry_budget,
        )


def base_model_of(models: ServedModels, sampler: Endpoint) -> str:
    """Return the name of the base model in a sampler's list."""
    name = next((model.id for model in models.data if model.parent is None), None)
    if name is None:
        raise ProtocolError(f"the sampler at {sampler.url} lists no base model")
    return name

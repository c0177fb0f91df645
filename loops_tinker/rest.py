"""What the service keeps: runs and their checkpoints."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import loops_async as loops
import loops_sync
from loops_async._copies import SameWhenCopied

from . import convert, endings, types
from .errors import UnsupportedError, no_checkpoint
from .futures import APIFuture, failed, in_thread
from .paths import parts, to_loops
from .settings import ignore, service_settings

__all__ = ["AdminClient", "RestClient", "capabilities"]

AccessScope: TypeAlias = Literal["owned", "accessible"]

NOT_OFFERED: Final[Mapping[str, str]] = {
    **dict.fromkeys(
        (
            *("get_session", "list_sessions", "search_sessions", "assign_session_project", "export_session_trace"),
            "get_sampler",
        ),
        "sessions of scripts; `loops ps` and `loops runs list` say what runs",
    ),
    "copy_weights": "copies of a checkpoint",
    "whoami": "a way to ask whose the API key is",
    **dict.fromkeys(
        ("get_audit_log", "get_billing_usage", "get_current_checkpoint_storage_usage"),
        "a route for what an account has done and used; see its web site",
    ),
}
"""Methods of `tinker` that are refused, and what Loops does not have."""


class RestClient(SameWhenCopied):
    """Lists runs and checkpoints. What Loops has no route for is refused, in the future, also what is not listed here:
    sessions, copies of weights, and what an account has used.

    Args:
        base_url: as in `ServiceClient`.
        api_key: as there.
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        _core: Callable[[], loops_sync.ServiceClient] | None = None,
    ) -> None:
        self._given = _core
        self._settings = {} if _core else service_settings(api_key, base_url)
        self._opening = threading.Lock()
        self._opened: loops_sync.ServiceClient | None = None

    def _core(self) -> loops_sync.ServiceClient:
        if self._given is not None:
            return self._given()
        with self._opening:
            if self._opened is None:
                self._opened = endings.open_service(self._settings)
            return self._opened

    # --- runs ---

    def list_training_runs(
        self, limit: int = 20, offset: int = 0, access_scope: AccessScope = "owned", project_id: str | None = None
    ) -> APIFuture[types.TrainingRunsResponse]:
        """List runs, the newest first."""
        ignore(project_id=project_id)

        def find() -> types.TrainingRunsResponse:
            runs = self._runs()
            page = [convert.training_run(run, self._of_run(run.id)) for run in runs[offset : offset + limit]]
            cursor = types.Cursor(offset=offset, limit=limit, total_count=len(runs))
            return types.TrainingRunsResponse(training_runs=page, cursor=cursor)

        return in_thread(find)

    def get_training_run(
        self, training_run_id: types.ModelID, access_scope: AccessScope = "owned"
    ) -> APIFuture[types.TrainingRun]:
        """Return a run."""

        def find() -> types.TrainingRun:
            run = self._core().control_plane.get_run(training_run_id)
            return convert.training_run(run, self._of_run(run.id))

        return in_thread(find)

    def get_training_run_by_tinker_path(
        self, tinker_path: str, access_scope: AccessScope = "owned"
    ) -> APIFuture[types.TrainingRun]:
        """Return the run of a checkpoint."""
        return self.get_training_run(parts(tinker_path)[0], access_scope)

    def get_weights_info_by_tinker_path(self, tinker_path: str) -> APIFuture[types.WeightsInfoResponse]:
        """Return the model and the adapter of a checkpoint."""
        parts(tinker_path)

        def find() -> types.WeightsInfoResponse:
            found = self._at(tinker_path)
            rank = found.lora_adapter_config.rank if found.lora_adapter_config else None
            return types.WeightsInfoResponse(base_model=found.base_model or "", is_lora=True, lora_rank=rank)

        return in_thread(find)

    # --- checkpoints ---

    def list_checkpoints(self, training_run_id: types.ModelID) -> APIFuture[types.CheckpointsListResponse]:
        """List the checkpoints of a run."""

        def find() -> types.CheckpointsListResponse:
            return types.CheckpointsListResponse(checkpoints=_converted(self._of_run(training_run_id)))

        return in_thread(find)

    def list_user_checkpoints(self, limit: int = 100, offset: int = 0) -> APIFuture[types.CheckpointsListResponse]:
        """List the checkpoints of all runs, the newest first."""

        def find() -> types.CheckpointsListResponse:
            found = _converted(self._core().list_all_checkpoints()[::-1])
            cursor = types.Cursor(offset=offset, limit=limit, total_count=len(found))
            return types.CheckpointsListResponse(checkpoints=found[offset : offset + limit], cursor=cursor)

        return in_thread(find)

    def get_checkpoint_archive_url(self, training_run_id: types.ModelID, checkpoint_id: str) -> APIFuture[Any]:
        """Refused: a checkpoint is not one file."""
        return _refused("one archive of a checkpoint; its files are those of `loops checkpoints download`")

    def get_checkpoint_archive_url_from_tinker_path(self, tinker_path: str) -> APIFuture[Any]:
        """Refused: a checkpoint is not one file."""
        return self.get_checkpoint_archive_url("", "")

    def get_external_weights_urls(self, tinker_path: str) -> APIFuture[types.ExternalWeightsUrlsResponse]:
        """Refused: Loops has no external weights."""
        return _refused("external weights; the files of a checkpoint are those of `loops checkpoints download`")

    def delete_checkpoint(self, training_run_id: types.ModelID, checkpoint_id: str) -> APIFuture[None]:
        """Refused: Loops deletes a checkpoint when its time has passed."""
        return _refused("a way to delete a checkpoint; give ttl_seconds when you save it")

    def delete_checkpoint_from_tinker_path(self, tinker_path: str) -> APIFuture[None]:
        """Refused: Loops deletes a checkpoint when its time has passed."""
        return self.delete_checkpoint("", "")

    def set_checkpoint_ttl_from_tinker_path(self, tinker_path: str, ttl_seconds: int | None) -> APIFuture[None]:
        """Refused: the time of a checkpoint is given when it is saved."""
        return _refused("a way to change how long a checkpoint is kept; give ttl_seconds when you save it")

    def publish_checkpoint_from_tinker_path(self, tinker_path: str) -> APIFuture[None]:
        """Refused: a checkpoint belongs to its team."""
        return _refused("checkpoints that others may read")

    def unpublish_checkpoint_from_tinker_path(self, tinker_path: str) -> APIFuture[None]:
        """Refused: a checkpoint belongs to its team."""
        return _refused("checkpoints that others may read")

    def get_server_capabilities(self) -> APIFuture[types.GetServerCapabilitiesResponse]:
        """Return the models that can be trained and sampled."""
        return in_thread(lambda: capabilities(self._core()))

    def get_telemetry(self) -> None:
        """Return None: nothing is reported to anybody."""

    if not TYPE_CHECKING:  # a type checker would believe that every name exists

        def __getattr__(self, name: str) -> Callable[..., Any]:
            """Return a method that refuses what `tinker` has, and Loops does not."""
            what = NOT_OFFERED.get(name.removesuffix("_async"))
            if what is None:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)
            if name.endswith("_async"):
                return lambda *args, **kwargs: _refused(what).coroutine()
            return lambda *args, **kwargs: _refused(what)

    # --- the same for `await`, as scripts of the old generation have it ---

    async def list_training_runs_async(
        self, limit: int = 20, offset: int = 0, access_scope: AccessScope = "owned", project_id: str | None = None
    ) -> types.TrainingRunsResponse:
        """List runs, the newest first."""
        return await self.list_training_runs(limit, offset, access_scope, project_id)

    async def get_training_run_async(
        self, training_run_id: types.ModelID, access_scope: AccessScope = "owned"
    ) -> types.TrainingRun:
        """Return a run."""
        return await self.get_training_run(training_run_id, access_scope)

    async def get_training_run_by_tinker_path_async(
        self, tinker_path: str, access_scope: AccessScope = "owned"
    ) -> types.TrainingRun:
        """Return the run of a checkpoint."""
        return await self.get_training_run_by_tinker_path(tinker_path, access_scope)

    async def get_weights_info_by_tinker_path_async(self, tinker_path: str) -> types.WeightsInfoResponse:
        """Return the model and the adapter of a checkpoint."""
        return await self.get_weights_info_by_tinker_path(tinker_path)

    async def get_server_capabilities_async(self) -> types.GetServerCapabilitiesResponse:
        """Return the models that can be trained and sampled."""
        return await self.get_server_capabilities()

    async def list_checkpoints_async(self, training_run_id: types.ModelID) -> types.CheckpointsListResponse:
        """List the checkpoints of a run."""
        return await self.list_checkpoints(training_run_id)

    async def list_user_checkpoints_async(self, limit: int = 100, offset: int = 0) -> types.CheckpointsListResponse:
        """List the checkpoints of all runs, the newest first."""
        return await self.list_user_checkpoints(limit, offset)

    async def get_checkpoint_archive_url_async(self, training_run_id: types.ModelID, checkpoint_id: str) -> Any:
        """Refused: a checkpoint is not one file."""
        return await self.get_checkpoint_archive_url(training_run_id, checkpoint_id)

    async def get_checkpoint_archive_url_from_tinker_path_async(self, tinker_path: str) -> Any:
        """Refused: a checkpoint is not one file."""
        return await self.get_checkpoint_archive_url_from_tinker_path(tinker_path)

    async def get_external_weights_urls_async(self, tinker_path: str) -> types.ExternalWeightsUrlsResponse:
        """Refused: Loops has no external weights."""
        return await self.get_external_weights_urls(tinker_path)

    async def delete_checkpoint_async(self, training_run_id: types.ModelID, checkpoint_id: str) -> None:
        """Refused: Loops deletes a checkpoint when its time has passed."""
        return await self.delete_checkpoint(training_run_id, checkpoint_id)

    async def delete_checkpoint_from_tinker_path_async(self, tinker_path: str) -> None:
        """Refused: Loops deletes a checkpoint when its time has passed."""
        return await self.delete_checkpoint_from_tinker_path(tinker_path)

    async def set_checkpoint_ttl_from_tinker_path_async(self, tinker_path: str, ttl_seconds: int | None) -> None:
        """Refused: the time of a checkpoint is given when it is saved."""
        return await self.set_checkpoint_ttl_from_tinker_path(tinker_path, ttl_seconds)

    async def publish_checkpoint_from_tinker_path_async(self, tinker_path: str) -> None:
        """Refused: a checkpoint belongs to its team."""
        return await self.publish_checkpoint_from_tinker_path(tinker_path)

    async def unpublish_checkpoint_from_tinker_path_async(self, tinker_path: str) -> None:
        """Refused: a checkpoint belongs to its team."""
        return await self.unpublish_checkpoint_from_tinker_path(tinker_path)

    # --- what the service is asked ---

    def _runs(self) -> list[loops.Run]:
        runs = self._core().control_plane.list_runs()
        return sorted(runs, key=lambda run: run.created_at, reverse=True)

    def _of_run(self, run_id: str) -> list[loops.Checkpoint]:
        return self._core().control_plane.list_checkpoints(run_id=run_id)

    def _at(self, path: str) -> loops.Checkpoint:
        found = self._core().control_plane.list_checkpoints(checkpoint_path=to_loops(path))
        if not found:
            raise no_checkpoint(path)
        return found[0]


class AdminClient(RestClient):
    """For scripts that import it: an account of Loops is administered on its web site."""


def capabilities(core: loops_sync.ServiceClient) -> types.GetServerCapabilitiesResponse:
    """Return the models that the service can train and sample."""
    found = core.get_server_capabilities()
    models = [
        types.SupportedModel(
            model_name=model.model_name,
            max_context_length=model.max_seq_len or model.max_context_length,
            trainable=model.enabled,
            sampleable=model.enabled,
        )
        for model in found.supported_models
    ]
    return types.GetServerCapabilitiesResponse(supported_models=models)


def _converted(found: list[loops.Checkpoint]) -> list[types.Checkpoint]:
    return [convert.checkpoint(each) for each in found]


def _refused(what: str) -> APIFuture[Any]:
    return failed(UnsupportedError(f"Loops does not have {what}"))

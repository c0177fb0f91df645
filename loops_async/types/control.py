"""Objects of the control plane. Newer services add fields and words: fields we do not know are ignored,
and every status or kind is a plain string that may hold a word we do not know.
"""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

__all__ = [
    "AvailabilityModel",
    "Checkpoint",
    "CheckpointDownload",
    "CheckpointFile",
    "CheckpointFilesResponse",
    "CheckpointSource",
    "CheckpointTarget",
    "CreateRunRequest",
    "CreateSamplerRequest",
    "CreateSessionRequest",
    "CreateTrainerRequest",
    "Deactivated",
    "DebugArchiveFilesResponse",
    "DeployCheckpointsRequest",
    "DeployedModel",
    "Deployment",
    "DeploymentMetrics",
    "DownloadProgress",
    "EnablementDetails",
    "InstanceType",
    "LogLevel",
    "LogLine",
    "LoraAdapterConfig",
    "LoraConfig",
    "MetricPoint",
    "NodeMetrics",
    "ProvisioningEvent",
    "ResponseTimes",
    "Run",
    "Sampler",
    "Scope",
    "ServerCapabilities",
    "Session",
    "SortDirection",
    "Status",
    "StatusCounts",
    "StorageMetrics",
    "SupportedModel",
    "Team",
    "UseCase",
    "User",
    "UserConfig",
]


# --- words that requests use -----------------------------------------------------------------------------------------


class CheckpointTarget(StrEnum):
    """What a checkpoint is for: ``trainer`` to resume from, ``sampler`` to serve and deploy."""

    SAMPLER = "sampler"
    TRAINER = "trainer"


class AvailabilityModel(StrEnum):
    """Dedicated machines, or cheaper spot machines that may be taken away."""

    DEDICATED = "dedicated"
    SPOT = "spot"


Scope: TypeAlias = Literal["org"]
"""Whose objects a listing shows: everybody's in the organization. Without it, only your own."""

LogLevel: TypeAlias = Literal["DEBUG", "INFO", "WARNING", "ERROR"]

SortDirection: TypeAlias = Literal["asc", "desc"]

UseCase: TypeAlias = Literal["rl", "sft"]

_Id = Annotated[str, Meta(min_length=1)]
_Positive = Annotated[int, Meta(ge=1)]
_Name = Annotated[str, Meta(min_length=1, max_length=255)]

# --- requests --------------------------------------------------------------------------------------------------------


class CreateSessionRequest(Struct, frozen=True, kw_only=True):
    """Body of ``POST sessions``; the project is only sent when one was given."""

    training_project_id: str | None | UnsetType = UNSET


class _NewRun(Struct, frozen=True, kw_only=True):
    session_id: _Id
    base_model: _Id
    max_seq_len: _Positive | None = None
    lora_rank: _Positive = 64
    seed: int | None = None
    scale_down_delay_seconds: Annotated[int, Meta(gt=0)] = 3600
    replicas: _Positive = 1
    path: str | None = None
    reuse_from_session_id: str | None = None
    name: _Name | None | UnsetType = UNSET
    reuse_from_run_id: str | None | UnsetType = UNSET
    availability_model: AvailabilityModel | UnsetType = UNSET


class CreateRunRequest(_NewRun, frozen=True, kw_only=True):
    """Body of ``POST /v1/loops/runs``, which makes a trainer and its paired sampler.

    `max_seq_len` None is the model's maximum. `lora_rank` defaults to 64 here, as on the wire;
    `ServiceClient.create_lora_training_client` sends 32. `scale_down_delay_seconds` is how long the trainer
    stays up unused. `path` is a ``bt://loops:<run>/weights/<name>`` to start from.
    Source: control-plane reference 3.2; the fields after `reuse_from_session_id` are newer and are only sent
    when given.
    """

    sampler_num_replicas: _Positive | None | UnsetType = UNSET


class CreateTrainerRequest(_NewRun, frozen=True, kw_only=True):
    """Body of ``POST trainers``, which makes a trainer without a sampler; newer than `CreateRunRequest`.

    The fields are those of `CreateRunRequest`; `base_checkpoint` is ``hf://<org>/<repo>[@<revision>]``, to train other
    weights of the base model's architecture.
    """

    base_checkpoint: str | None | UnsetType = UNSET


class CreateSamplerRequest(Struct, frozen=True, kw_only=True):
    """Body of ``POST samplers``. `model_path` is a ``bt://loops:<run>/sampler_weights/<name>``.

    `run_id` pairs the sampler with a run, of which it then serves the weights; doing it twice gives the same sampler.
    """

    session_id: _Id
    base_model: _Id | None | UnsetType = UNSET
    max_seq_length: _Positive | None = None
    model_path: str | None = None
    reuse_from_session_id: str | None | UnsetType = UNSET
    run_id: _Id | None | UnsetType = UNSET
    availability_model: AvailabilityModel | None | UnsetType = UNSET
    num_replicas: _Positive | None | UnsetType = UNSET


class DeployCheckpointsRequest(Struct, frozen=True, kw_only=True):
    """Body of ``POST checkpoints/deploy``: which sampler checkpoints (`Checkpoint.id`) to serve, as what, on what.

    `hf_secret_name` names the workspace's secret with a Hugging Face token.
    """

    checkpoint_ids: Annotated[list[_Id], Meta(min_length=1)]
    model_name: _Id
    instance_type_id: _Id
    hf_secret_name: _Id


# --- objects ---------------------------------------------------------------------------------------------------------


class Status(Struct, frozen=True):
    """The state of a run, sampler or deployment, as one word; None where the service says none."""

    name: str | None = None


class User(Struct, frozen=True):
    """Whoever made an object."""

    email: str | None = None


class Team(Struct, frozen=True, kw_only=True):
    """A team of the organization; `default` is the one that calls without a team belong to."""

    id: str
    name: str
    default: bool = False
    created_at: datetime | None = None


class InstanceType(Struct, frozen=True, kw_only=True):
    """What one node is: memory in MiB, processors in thousandths, GPUs."""

    id: str
    name: str | None = None
    memory_limit_mib: int | None = None
    millicpu_limit: int | None = None
    gpu_count: int | None = None
    gpu_type: str | None = None
    gpu_memory_limit_mib: int | None = None


class Session(Struct, frozen=True, kw_only=True):
    """A session: what runs and samplers belong to."""

    id: str


class Sampler(Struct, frozen=True, kw_only=True):
    """A sampler. `model_id` and `deployment_id` are None for a serverless one."""

    id: str
    base_url: str
    base_model: str
    created_at: datetime
    model_id: str | None = None
    deployment_id: str | None = None
    status: Status = Status()
    user: User | None = None
    instance_type: InstanceType | None = None
    node_count: int | None = None
    base_checkpoint: str | None = None


class Run(Struct, frozen=True, kw_only=True):
    """A run: a trainer at `base_url`, with its paired sampler where it has one."""

    id: str
    session_id: str
    base_model: str
    base_url: str | None
    created_at: datetime
    sampler: Sampler | None = None
    name: str | None = None
    deployment_id: str | None = None
    lora_config_version: str | None = None
    status: Status = Status()
    user: User | None = None
    base_checkpoint: str | None = None


class Deployment(Struct, frozen=True, kw_only=True):
    """What a trainer runs on; `status` is such as RUNNING, SCALED_TO_ZERO or FAILED."""

    id: str
    base_model: str
    base_url: str | None = None
    status: Status = Status()
    sampler: Sampler | None = None
    user: User | None = None
    active_run_id: str | None = None
    latest_run_id: str | None = None
    created_at: datetime | None = None
    availability_model: str | None = None
    instance_type: InstanceType | None = None
    node_count: int | None = None


class Deactivated(Struct, frozen=True, kw_only=True):
    """What was switched off."""

    id: str
    base_model: str | None = None
    user: User | None = None


class LoraAdapterConfig(Struct, frozen=True):
    """The shape of a saved adapter."""

    rank: int | None = msgspec.field(default=None, name="r")


class LoraConfig(Struct, frozen=True, kw_only=True):
    """Which modules an adapter changes; `targets` names them."""

    config_version: str | None = None
    targets: list[str] = []
    expert_layout: str | None = None


class Checkpoint(Struct, frozen=True, kw_only=True):
    """A saved checkpoint. `id` is its key everywhere; `checkpoint_id` is the name it was saved under."""

    id: str = ""
    run_id: str
    checkpoint_id: str
    checkpoint_type: str | None = None
    created_at: datetime
    base_model: str | None = None
    lora_adapter_config: LoraAdapterConfig | None = None
    size_bytes: int = 0
    sync_status: str | None = None
    target: str | None = None
    lora_config: LoraConfig | None = None


class CheckpointFile(Struct, frozen=True, kw_only=True):
    """One file of a checkpoint. `url` is short-lived and carries its own authorization."""

    url: str
    relative_file_name: str
    node_rank: int = 0
    size_bytes: int = 0
    last_modified: datetime | None = None

    def __repr__(self) -> str:
        shown = self.url.split("?", 1)[0]
        return (
            f"CheckpointFile(url={shown + '?…' if '?' in self.url else shown!r}, "
            f"relative_file_name={self.relative_file_name!r}, "
            f"node_rank={self.node_rank}, size_bytes={self.size_bytes}, last_modified={self.last_modified!r})"
        )

    def __rich_repr__(self) -> list[tuple[str, object]]:
        # rich reads fields by itself; it must not see more than `repr` shows.
        shown = self.url.split("?", 1)[0]
        return [("url", shown), ("relative_file_name", self.relative_file_name), ("size_bytes", self.size_bytes)]


class CheckpointFilesResponse(Struct, frozen=True, kw_only=True):
    """One page of a checkpoint's files; `next_page_token` is the offset of the next, None on the last."""

    presigned_urls: list[CheckpointFile]
    next_page_token: int | None = None
    total_count: int = 0


class DebugArchiveFilesResponse(Struct, frozen=True, kw_only=True):
    """One page of a deployment's debug archive; `next_page_token` asks for the next, None on the last."""

    presigned_urls: list[CheckpointFile]
    next_page_token: str | None = None


class CheckpointSource(Struct, frozen=True, kw_only=True):
    """Where a checkpoint's files are: ``s3``, which has file URLs, or a ``volume`` that must be mounted."""

    kind: str
    volume_ref: str | None = None
    path: str | None = None


class CheckpointDownload(Struct, frozen=True, kw_only=True):
    """A downloaded checkpoint: `bytes_written` is its size on disk, `bytes_fetched` what this call had to fetch."""

    dest_dir: Path
    file_count: int
    bytes_written: int
    bytes_fetched: int = 0


class DownloadProgress(Struct, frozen=True, kw_only=True):
    """How far a download is. What an earlier one left counts as done."""

    bytes_done: int
    bytes_total: int
    files_done: int
    files_total: int


class ProvisioningEvent(Struct, frozen=True, kw_only=True):
    """A change on the way of a run or sampler.

    `stage` is ``created``, ``waiting``, ``ready``, ``failed`` or ``deactivated``; `status` is the state of its
    deployment where the service tells it; `seconds` have passed since it was asked for.
    """

    kind: Literal["run", "sampler"]
    id: str
    stage: Literal["created", "waiting", "ready", "failed", "deactivated"]
    status: str | None = None
    seconds: float = 0.0


class DeployedModel(Struct, frozen=True, kw_only=True):
    """A model that was made of checkpoints, and its first deployment."""

    model_id: str
    deployment_id: str


class EnablementDetails(Struct, frozen=True, kw_only=True):
    """Why a model cannot be used, and what can be done about it."""

    reason: str | None = None
    reason_detail: str | None = None
    remediation: str | None = None


class SupportedModel(Struct, frozen=True, kw_only=True):
    """A base model that the service can train and serve.

    `max_context_length` is the older name of `max_seq_len`; `max_enabled_seq_len` is how much of it you may use.
    """

    model_name: str
    max_context_length: int | None = None
    max_seq_len: int | None = None
    max_enabled_seq_len: int | None = None
    supports_vision_language: bool | None = None
    enabled: bool = True
    serverless: bool | None = None
    enablement_details: EnablementDetails | None = None


class ServerCapabilities(Struct, frozen=True, kw_only=True):
    """The base models that the service supports."""

    supported_models: list[SupportedModel] = []


class UserConfig(Struct, frozen=True, kw_only=True):
    """Which GPUs to prefer, best first; None is the service's own choice."""

    trainer_accelerator_priority: list[str] | None = None
    sampler_accelerator_priority: list[str] | None = None


# --- what a deployment does ------------------------------------------------------------------------------------------


class LogLine(Struct, frozen=True, kw_only=True):
    """A line of a deployment's log; `timestamp` is in nanoseconds since 1970, as a string."""

    timestamp: str
    message: str
    replica: str | None = None
    request_id: str | None = None
    level: str | None = None

    @property
    def time(self) -> datetime:
        """The timestamp as a time, exact to the microsecond."""
        seconds, nanoseconds = divmod(int(self.timestamp), 1_000_000_000)
        return datetime.fromtimestamp(seconds, UTC).replace(microsecond=nanoseconds // 1000)


class MetricPoint(Struct, frozen=True, kw_only=True):
    """One measurement."""

    value: float | None
    timestamp: datetime


class ResponseTimes(Struct, frozen=True, kw_only=True):
    """Percentiles of the response time, in milliseconds."""

    timestamp: datetime
    p50: float | None = None
    p95: float | None = None
    p99: float | None = None


class StatusCounts(Struct, frozen=True, kw_only=True):
    """How many requests were answered with which class of status."""

    timestamp: datetime
    status_2xx: float = 0.0
    status_4xx: float = 0.0
    status_5xx: float = 0.0


class StorageMetrics(Struct, frozen=True, kw_only=True):
    """Local storage in use: in bytes, and as a share of what there is."""

    usage_bytes: list[MetricPoint] = []
    utilization: list[MetricPoint] = []


class NodeMetrics(Struct, frozen=True, kw_only=True):
    """Measurements of one node; those of GPUs are by rank."""

    node_id: str
    gpu_memory_usage_bytes: dict[str, list[MetricPoint]] = {}
    gpu_utilization: dict[str, list[MetricPoint]] = {}
    cpu_usage: list[MetricPoint] = []
    cpu_memory_usage_bytes: list[MetricPoint] = []
    ephemeral_storage: StorageMetrics = StorageMetrics()


class DeploymentMetrics(Struct, frozen=True, kw_only=True):
    """Measurements of a deployment over time; those of GPUs are by rank."""

    inference_volume: list[MetricPoint] = []
    concurrent_requests: list[MetricPoint] = []
    response_time_stats: list[ResponseTimes] = []
    inference_volume_by_status: list[StatusCounts] = []
    gpu_memory_usage_bytes: dict[str, list[MetricPoint]] = {}
    gpu_utilization: dict[str, list[MetricPoint]] = {}
    cpu_usage: list[MetricPoint] = []
    cpu_memory_usage_bytes: list[MetricPoint] = []
    ephemeral_storage: StorageMetrics = StorageMetrics()
    per_node_metrics: list[NodeMetrics] = []

"""Requests and objects of the control plane.

Newer services add fields and enum values. In an answer, unknown fields are ignored, and every status or kind is a plain
string, so that unknown values are kept. A request uses the `Literal` types below.
"""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from .._values import Value
from .identifiers import GivenId, check_service_url

__all__ = [
    "AuthScheme",
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


# --- enumerations ----------------------------------------------------------------------------------------------------


# The published contract names these two as enumerations; all others are `Literal` types. Plain strings fit everywhere.
class CheckpointTarget(StrEnum):
    """The values of `Checkpoint.target`: ``trainer`` to resume training from, ``sampler`` to serve and deploy."""

    SAMPLER = "sampler"
    TRAINER = "trainer"


class AvailabilityModel(StrEnum):
    """``dedicated`` machines, or cheaper ``spot`` machines that may be preempted."""

    DEDICATED = "dedicated"
    SPOT = "spot"


AuthScheme: TypeAlias = Literal["Bearer", "Api-Key"]
"""How the API key stands in the ``Authorization`` header; the service accepts both."""

Scope: TypeAlias = Literal["org"]
"""Whose objects a listing shows: those of the whole organization. Without a scope, only your own."""

LogLevel: TypeAlias = Literal["DEBUG", "INFO", "WARNING", "ERROR"]
"""The severity of a log line, lowest first."""

SortDirection: TypeAlias = Literal["asc", "desc"]
"""The order of log lines by time: oldest first, or newest first."""

UseCase: TypeAlias = Literal["rl", "sft"]
"""What a base model is to be trained for: reinforcement learning, or supervised fine-tuning."""

_Id = Annotated[str, Meta(min_length=1)]
_Positive = Annotated[int, Meta(ge=1)]
_Name = Annotated[str, Meta(min_length=1, max_length=255)]

_Time = Annotated[datetime, Meta(tz=True)]

# --- requests --------------------------------------------------------------------------------------------------------


class CreateSessionRequest(Value, Struct, frozen=True, kw_only=True):
    """Body of ``POST sessions``; `training_project_id` is only sent if it is given."""

    training_project_id: str | None | UnsetType = UNSET


class _NewRun(Value, Struct, frozen=True, kw_only=True):
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
    """Body of ``POST /v1/loops/runs``, which creates a trainer and its paired sampler.

    `max_seq_len` is the longest training example in tokens, None for the model's maximum; the same limit is called
    `max_seq_length` when a sampler is created. `lora_rank` defaults to 64 here, as on the wire;
    `ServiceClient.create_lora_training_client` sends 32. The trainer is scaled to zero after
    `scale_down_delay_seconds` without requests. `path` is a ``bt://loops:<run>/weights/<name>`` to start from.
    The fields after `reuse_from_session_id` are for newer services and are only sent if they are given.
    """

    sampler_num_replicas: _Positive | None | UnsetType = UNSET


class CreateTrainerRequest(_NewRun, frozen=True, kw_only=True):
    """Body of ``POST trainers``, which creates a trainer without a sampler; for newer services only.

    The fields are those of `CreateRunRequest`. `base_checkpoint` is ``hf://<org>/<repo>[@<revision>]``: other weights
    of the base model's architecture to train.
    """

    base_checkpoint: str | None | UnsetType = UNSET


class CreateSamplerRequest(Value, Struct, frozen=True, kw_only=True):
    """Body of ``POST samplers``. `model_path` is a ``bt://loops:<run>/sampler_weights/<name>``.

    `max_seq_length` is the longest prompt plus completion in tokens, None for the model's maximum; `CreateRunRequest`
    calls the limit `max_seq_len`. `run_id` pairs the sampler with a run, whose weights it then serves; a second
    request for the same run returns the same sampler.
    """

    session_id: _Id
    base_model: _Id | None | UnsetType = UNSET
    max_seq_length: _Positive | None = None
    model_path: str | None = None
    reuse_from_session_id: str | None | UnsetType = UNSET
    run_id: _Id | None | UnsetType = UNSET
    availability_model: AvailabilityModel | None | UnsetType = UNSET
    num_replicas: _Positive | None | UnsetType = UNSET


class DeployCheckpointsRequest(Value, Struct, frozen=True, kw_only=True):
    """Body of ``POST checkpoints/deploy``.

    `checkpoint_ids` are the `Checkpoint.id` of sampler checkpoints. `model_name` is the name of the new model,
    `instance_type_id` the machine to run it on, and `hf_secret_name` the workspace's secret that holds a Hugging Face
    token.
    """

    checkpoint_ids: Annotated[list[_Id], Meta(min_length=1)]
    model_name: _Id
    instance_type_id: _Id
    hf_secret_name: _Id


# --- objects ---------------------------------------------------------------------------------------------------------


class Status(Value, Struct, frozen=True):
    """The state of a run, sampler or deployment, e.g. ``ACTIVE``; None where the service sends none."""

    name: str | None = None


class User(Value, Struct, frozen=True):
    """The user who created an object."""

    email: str | None = None


class Team(Value, Struct, frozen=True, kw_only=True):
    """A team of the organization; `default` is True for the team of calls that name none."""

    id: GivenId
    name: str
    default: bool = False
    created_at: _Time | None = None


class InstanceType(Value, Struct, frozen=True, kw_only=True):
    """The hardware of one node: memory in MiB, CPU in thousandths of a core, GPUs."""

    id: str
    name: str | None = None
    memory_limit_mib: int | None = None
    millicpu_limit: int | None = None
    gpu_count: int | None = None
    gpu_type: str | None = None
    gpu_memory_limit_mib: int | None = None


class Session(Value, Struct, frozen=True, kw_only=True):
    """A session, which groups runs and samplers."""

    id: GivenId


class Sampler(Value, Struct, frozen=True, kw_only=True):
    """A sampler at `base_url`. `model_id` and `deployment_id` are None for a serverless sampler."""

    id: GivenId
    base_url: str
    base_model: str
    created_at: _Time
    model_id: GivenId | None = None
    deployment_id: GivenId | None = None
    status: Status = Status()
    user: User | None = None
    instance_type: InstanceType | None = None
    node_count: int | None = None
    base_checkpoint: str | None = None

    def __post_init__(self) -> None:
        check_service_url(self.base_url)


class Run(Value, Struct, frozen=True, kw_only=True):
    """A run: a trainer at `base_url`, with its paired sampler if it has one."""

    id: GivenId
    session_id: GivenId
    base_model: str
    base_url: str | None
    created_at: _Time
    sampler: Sampler | None = None
    name: str | None = None
    deployment_id: GivenId | None = None
    lora_config_version: str | None = None
    status: Status = Status()
    user: User | None = None
    base_checkpoint: str | None = None

    def __post_init__(self) -> None:
        check_service_url(self.base_url)


class Deployment(Value, Struct, frozen=True, kw_only=True):
    """The deployment of a trainer; `status` is e.g. ``RUNNING``, ``SCALED_TO_ZERO`` or ``FAILED``."""

    id: GivenId
    base_model: str
    base_url: str | None = None
    status: Status = Status()
    sampler: Sampler | None = None
    user: User | None = None
    active_run_id: GivenId | None = None
    latest_run_id: GivenId | None = None
    created_at: _Time | None = None
    availability_model: str | None = None
    instance_type: InstanceType | None = None
    node_count: int | None = None


class Deactivated(Value, Struct, frozen=True, kw_only=True):
    """The run, sampler or deployment that was deactivated."""

    id: GivenId
    base_model: str | None = None
    user: User | None = None


class LoraAdapterConfig(Value, Struct, frozen=True):
    """The LoRA rank of a saved adapter."""

    rank: int | None = msgspec.field(default=None, name="r")


class LoraConfig(Value, Struct, frozen=True, kw_only=True):
    """The LoRA settings of an adapter; `targets` are the names of the modules that it changes."""

    config_version: str | None = None
    targets: list[str] = []
    expert_layout: str | None = None


class Checkpoint(Value, Struct, frozen=True, kw_only=True):
    """A saved checkpoint.

    `id` identifies it in every call; `checkpoint_id` is the name under which it was saved. `target` is one of
    `CheckpointTarget`, or a value that this version does not know.
    """

    id: Annotated[str, Meta(pattern=r"^[!-~]{0,256}\Z")] = ""
    run_id: GivenId
    checkpoint_id: str
    checkpoint_type: str | None = None
    created_at: _Time
    base_model: str | None = None
    lora_adapter_config: LoraAdapterConfig | None = None
    size_bytes: int = 0
    sync_status: str | None = None
    target: str | None = None
    lora_config: LoraConfig | None = None


class CheckpointFile(Value, Struct, frozen=True, kw_only=True):
    """One file of a checkpoint. `url` is short-lived and needs no API key."""

    url: str
    relative_file_name: str
    node_rank: int = 0
    size_bytes: int = 0
    last_modified: _Time | None = None

    def __post_init__(self) -> None:
        check_service_url(self.url)


class CheckpointFilesResponse(Value, Struct, frozen=True, kw_only=True):
    """One page of a checkpoint's files; `next_page_token` is the offset of the next page, None on the last."""

    presigned_urls: list[CheckpointFile]
    next_page_token: int | None = None
    total_count: int = 0


class DebugArchiveFilesResponse(Value, Struct, frozen=True, kw_only=True):
    """One page of a deployment's debug archive; `next_page_token` names the next page, None on the last."""

    presigned_urls: list[CheckpointFile]
    next_page_token: str | None = None


class CheckpointSource(Value, Struct, frozen=True, kw_only=True):
    """Where a checkpoint's files are stored: `kind` is ``s3``, with file URLs, or ``volume``, which must be mounted."""

    kind: str
    volume_ref: str | None = None
    path: str | None = None


class CheckpointDownload(Value, Struct, frozen=True, kw_only=True):
    """A downloaded checkpoint: `bytes_written` is its size on disk, `bytes_fetched` the part that this call fetched."""

    dest_dir: Path
    file_count: int
    bytes_written: int
    bytes_fetched: int = 0


class DownloadProgress(Value, Struct, frozen=True, kw_only=True):
    """The progress of a download. Bytes that an earlier, interrupted download wrote count as done."""

    bytes_done: int
    bytes_total: int
    files_done: int
    files_total: int


class ProvisioningEvent(Value, Struct, frozen=True, kw_only=True):
    """A change of state while a run or sampler is provisioned.

    `status` is the state of its deployment, if the service reports one; `seconds` is the time since the request.
    """

    kind: Literal["run", "sampler"]
    id: GivenId
    stage: Literal["created", "waiting", "ready", "failed", "deactivated"]
    status: str | None = None
    seconds: float = 0.0


class DeployedModel(Value, Struct, frozen=True, kw_only=True):
    """A model that was created from checkpoints, and its first deployment."""

    model_id: GivenId
    deployment_id: GivenId


class EnablementDetails(Value, Struct, frozen=True, kw_only=True):
    """Why a model cannot be used, and how to enable it."""

    reason: str | None = None
    reason_detail: str | None = None
    remediation: str | None = None


class SupportedModel(Value, Struct, frozen=True, kw_only=True):
    """A base model that the service can train and serve.

    `max_seq_len` is the longest sequence of the model in tokens; older services call it `max_context_length`, so each
    of the two may be None. `max_enabled_seq_len` is the longest that your organization may use.
    """

    model_name: str
    max_context_length: int | None = None
    max_seq_len: int | None = None
    max_enabled_seq_len: int | None = None
    supports_vision_language: bool | None = None
    enabled: bool = True
    serverless: bool | None = None
    enablement_details: EnablementDetails | None = None


class ServerCapabilities(Value, Struct, frozen=True, kw_only=True):
    """The base models that the service supports, and whether it shows the metrics of `TrainingClient.log`."""

    supported_models: list[SupportedModel] = []
    metrics: bool = False


class UserConfig(Value, Struct, frozen=True, kw_only=True):
    """The GPUs to prefer, best first; None leaves the choice to the service."""

    trainer_accelerator_priority: list[str] | None = None
    sampler_accelerator_priority: list[str] | None = None


# --- logs and metrics of deployments ---------------------------------------------------------------------------------


class LogLine(Value, Struct, frozen=True, kw_only=True):
    """A line of a deployment's log; `timestamp` is the Unix time in nanoseconds, as a string."""

    timestamp: str
    message: str
    replica: str | None = None
    request_id: str | None = None
    level: str | None = None

    @property
    def time(self) -> datetime:
        """The timestamp as a `datetime` in UTC, with microseconds; the beginning of 1970 where it cannot be read."""
        with suppress(ValueError, OverflowError, OSError):
            seconds, nanoseconds = divmod(int(self.timestamp), 1_000_000_000)
            return datetime.fromtimestamp(seconds, UTC).replace(microsecond=nanoseconds // 1000)
        with suppress(ValueError, OverflowError):
            found = datetime.fromisoformat(self.timestamp)
            return found.astimezone(UTC) if found.tzinfo else found.replace(tzinfo=UTC)
        return datetime.fromtimestamp(0, UTC)


class MetricPoint(Value, Struct, frozen=True, kw_only=True):
    """One measurement."""

    value: float | None
    timestamp: _Time


class ResponseTimes(Value, Struct, frozen=True, kw_only=True):
    """Percentiles of the response time in milliseconds."""

    timestamp: _Time
    p50: float | None = None
    p95: float | None = None
    p99: float | None = None


class StatusCounts(Value, Struct, frozen=True, kw_only=True):
    """The number of answers by class of HTTP status."""

    timestamp: _Time
    status_2xx: float = 0.0
    status_4xx: float = 0.0
    status_5xx: float = 0.0


class StorageMetrics(Value, Struct, frozen=True, kw_only=True):
    """Local storage in use: in bytes, and as a fraction of the total."""

    usage_bytes: list[MetricPoint] = []
    utilization: list[MetricPoint] = []


class NodeMetrics(Value, Struct, frozen=True, kw_only=True):
    """Metrics of one node; those of GPUs are by rank."""

    node_id: str
    gpu_memory_usage_bytes: dict[str, list[MetricPoint]] = {}
    gpu_utilization: dict[str, list[MetricPoint]] = {}
    cpu_usage: list[MetricPoint] = []
    cpu_memory_usage_bytes: list[MetricPoint] = []
    ephemeral_storage: StorageMetrics = StorageMetrics()


class DeploymentMetrics(Value, Struct, frozen=True, kw_only=True):
    """Metrics of a deployment over time; those of GPUs are by rank."""

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

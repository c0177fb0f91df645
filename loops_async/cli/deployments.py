"""``loops deployments``."""

from __future__ import annotations

from typing import Final

import typer

from ..control_plane import ControlPlane
from ..types import Deployment
from . import _logs, _metrics
from ._connection import on_control_plane
from ._deactivate import deactivate_all
from ._help import App
from ._options import AsJson, DeploymentId, DeploymentIds, Everyone, Quiet
from ._show import Columns, emit_fields, emit_rows

app: App = App("Deployments of trainers.")

COLUMNS: Final[Columns[Deployment]] = {
    "deployment": lambda deployment: deployment.id,
    "status": lambda deployment: deployment.status.name,
    "run": lambda deployment: deployment.active_run_id or deployment.latest_run_id,
    "model": lambda deployment: deployment.base_model,
    "created": lambda deployment: deployment.created_at,
    "sampler status": lambda deployment: deployment.sampler and deployment.sampler.status.name,
}
FIELDS: Final[Columns[Deployment]] = {
    "id": lambda deployment: deployment.id,
    "status": lambda deployment: deployment.status.name,
    "base model": lambda deployment: deployment.base_model,
    "active run": lambda deployment: deployment.active_run_id,
    "latest run": lambda deployment: deployment.latest_run_id,
    "machines": lambda deployment: deployment.instance_type and deployment.instance_type.name,
    "nodes": lambda deployment: deployment.node_count,
    "availability": lambda deployment: deployment.availability_model,
    "url": lambda deployment: deployment.base_url,
    "created": lambda deployment: deployment.created_at,
    "by": lambda deployment: deployment.user and deployment.user.email,
}


@app.command("list")
def list_(context: typer.Context, everyone: Everyone = False, quiet: Quiet = False, as_json: AsJson = False) -> None:
    """List the deployments of trainers, in every state."""
    found = on_control_plane(context, lambda plane: plane.list_deployments(scope="org" if everyone else None))
    emit_rows(COLUMNS, found, as_json=as_json, quiet=quiet)


@app.command()
def show(context: typer.Context, deployment_id: DeploymentId, quiet: Quiet = False, as_json: AsJson = False) -> None:
    """Show a deployment."""
    found = on_control_plane(context, lambda plane: plane.get_deployment(deployment_id))
    emit_fields(FIELDS, found, as_json=as_json, quiet=quiet)


@app.command()
def deactivate(
    context: typer.Context, deployment_ids: DeploymentIds, quiet: Quiet = False, as_json: AsJson = False
) -> None:
    """Deactivate deployments. Unsaved training state is lost."""
    deactivate_all(context, deployment_ids, ControlPlane.deactivate_deployment, as_json=as_json, quiet=quiet)


@app.command()
def logs(
    context: typer.Context,
    deployment_id: DeploymentId,
    follow: _logs.Follow = False,
    since: _logs.Since = "30m",
    level: _logs.Level = None,
    limit: _logs.Limit = 500,
    as_json: AsJson = False,
) -> None:
    """Show the log of a deployment; --json prints one object a line."""
    wanted = _logs.Selection(since=since, level=level, limit=limit, follow=follow)
    on_control_plane(context, lambda plane: _logs.show(plane, deployment_id, wanted, as_json=as_json))


@app.command()
def metrics(
    context: typer.Context, deployment_id: DeploymentId, since: _metrics.Since = "1h", as_json: AsJson = False
) -> None:
    """Plot the metrics of a deployment."""
    on_control_plane(context, lambda plane: _metrics.show(plane, deployment_id, since, as_json=as_json))

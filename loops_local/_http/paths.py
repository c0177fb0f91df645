"""The roots of all URLs, each once."""

from __future__ import annotations

from typing import Final

CONTROL_PLANE: Final = "/v1/loops"
TEAMS: Final = "/v1/teams"
TRAINERS: Final = "/trainers"
SAMPLERS: Final = "/samplers"
LOCAL: Final = "/local"
LOCAL_TRAINER: Final = f"{LOCAL}/trainer"
LOCAL_SAMPLER: Final = f"{LOCAL}/sampler"
FILES: Final = "/files"
ARCHIVES: Final = "/archives"
METRICS: Final = "/metrics"
DASHBOARD: Final = "/dashboard"
DASHBOARD_DATA: Final = f"{DASHBOARD}/data"
OPENAPI: Final = "/openapi.json"

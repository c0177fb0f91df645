"""Teams and the user's configuration. Source: control-plane reference 2, rows 24 and 25."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec
from aiohttp import web
from msgspec import UNSET, Meta, Struct, UnsetType

from loops_async import types

from .._errors import not_found
from .._http.openapi import described, object_with
from .._http.parsing import decode_body
from .._http.paths import CONTROL_PLANE, TEAMS
from .._http.responses import json_response
from .._storage.records import TeamRecord, UserConfigRecord
from .._storage.store import Store

__all__ = ["AccountRoutes"]

_USER_CONFIG = f"{CONTROL_PLANE}/user_config"

_Priority = Annotated[list[str], Meta(min_length=1)]


class _PatchUserConfig(Struct, forbid_unknown_fields=True):
    """A merge patch: a missing field is kept, null clears it."""

    trainer_accelerator_priority: _Priority | None | UnsetType = UNSET
    sampler_accelerator_priority: _Priority | None | UnsetType = UNSET


_Teams = object_with("ListTeamsResponse", teams=list[types.Team])
_Config = object_with("UserConfigResponse", user_config=types.UserConfig)
_PATCH = msgspec.json.Decoder(_PatchUserConfig)


class AccountRoutes:
    """The handlers of these routes, for the service's one team and one user."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._team = TeamRecord()
        self._config = UserConfigRecord()

    async def open(self) -> None:
        """Read the team and the user; the first start creates them."""
        teams, configs = await self._store.load(TeamRecord), await self._store.load(UserConfigRecord)
        self._team = teams[0] if teams else self._team
        self._config = configs[0] if configs else self._config
        await self._store.put(self._team, self._config)

    def routes(self) -> Sequence[web.RouteDef]:
        """Return the routes."""
        return [
            web.get(TEAMS, self.list_teams),
            web.get(_USER_CONFIG, self.get_config),
            web.patch(_USER_CONFIG, self.patch_config),
        ]

    def check_team(self, team_id: str) -> None:
        """Refuse an unknown team."""
        if team_id != self._team.id:
            raise not_found("team", team_id)

    @described("List teams", _Teams)
    async def list_teams(self, _request: web.Request) -> web.Response:
        team = types.Team(id=self._team.id, name=self._team.name, default=True, created_at=self._team.created_at)
        return json_response({"teams": [team]})

    @described("Get the user's configuration", _Config)
    async def get_config(self, _request: web.Request) -> web.Response:
        config = types.UserConfig(
            trainer_accelerator_priority=self._config.trainer_accelerator_priority,
            sampler_accelerator_priority=self._config.sampler_accelerator_priority,
        )
        return json_response({"user_config": config})

    @described("Change the user's configuration", _Config, body=_PatchUserConfig)
    async def patch_config(self, request: web.Request) -> web.Response:
        patch = await decode_body(request, _PATCH)
        for name in patch.__struct_fields__:
            if (value := getattr(patch, name)) is not UNSET:
                setattr(self._config, name, value)
        await self._store.put(self._config)
        return await self.get_config(request)

"""Teams and the user's configuration. Source: control-plane reference 2, rows 24 and 25."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec
from aiohttp import web
from msgspec import UNSET, Meta, Struct, UnsetType

from loops_async import types

from .records import TeamRecord, UserConfigRecord
from .store import Store
from .web import decode, json_answer, not_found

__all__ = ["Account"]

_CONFIG_PATH = "/v1/loops/user_config"

_Priority = Annotated[list[str], Meta(min_length=1)]


class _PatchUserConfig(Struct, forbid_unknown_fields=True):
    """A merge patch: what is left out stays, null clears."""

    trainer_accelerator_priority: _Priority | None | UnsetType = UNSET
    sampler_accelerator_priority: _Priority | None | UnsetType = UNSET


_PATCH = msgspec.json.Decoder(_PatchUserConfig)


class Account:
    """The one team and the one user that there are, and the handlers of their routes."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._team = TeamRecord()
        self._config = UserConfigRecord()

    async def open(self) -> None:
        """Read both; they are made at the first start."""
        teams, configs = await self._store.load(TeamRecord), await self._store.load(UserConfigRecord)
        self._team = teams[0] if teams else self._team
        self._config = configs[0] if configs else self._config
        await self._store.put(self._team, self._config)

    def routes(self) -> Sequence[web.RouteDef]:
        """Return the routes."""
        return [
            web.get("/v1/teams", self.list_teams),
            web.get(_CONFIG_PATH, self.get_config),
            web.patch(_CONFIG_PATH, self.patch_config),
        ]

    def check_team(self, team_id: str) -> None:
        """Refuse a team that there is not."""
        if team_id != self._team.id:
            raise not_found("team", team_id)

    async def list_teams(self, _request: web.Request) -> web.Response:
        team = self._team
        shown = types.Team(id=team.id, name=team.name, default=True, created_at=team.created_at)
        return json_answer({"teams": [shown]})

    async def get_config(self, _request: web.Request) -> web.Response:
        config = types.UserConfig(
            trainer_accelerator_priority=self._config.trainer_accelerator_priority,
            sampler_accelerator_priority=self._config.sampler_accelerator_priority,
        )
        return json_answer({"user_config": config})

    async def patch_config(self, request: web.Request) -> web.Response:
        patch = decode(await request.read(), _PATCH)
        for name in patch.__struct_fields__:
            if (value := getattr(patch, name)) is not UNSET:
                setattr(self._config, name, value)
        await self._store.put(self._config)
        return await self.get_config(request)

"""What samples the blocks of a dataset, in each worker."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator
from typing import Any

from .._batch.records import Record
from .._batch.rows import Row
from .._batch.sampling import RowSampler
from .._batch.settings import BatchSettings
from .._sampling.adaptive import Adaptive
from .._sampling.limiter import Limiter
from ..errors import ConfigError
from ..sampling import SamplingClient
from ..types import LocalDeployment
from .limit import Follower, SharedLimit
from .tables import records_table, rows_of

__all__ = ["Sampler"]


class Sampler:
    """Samples the rows of blocks, for ``map_batches`` of a Ray dataset: Arrow tables in and out, one for one.

    A block has the columns of its rows: ``prompt`` or ``messages``, and optionally ``id``; the result has those and the
    columns of records, which always have the same types. Use `sample`, which applies it so that no row is lost or
    doubled when a process dies.

    Args:
        client: what samples. It is pickled without the API key: each node needs ``BASETEN_API_KEY``.
        settings: `BatchSettings.of` the client.
        limit: the most completions in flight: of all workers for a `SharedLimit`, else of this one.
        raises: raise an error that all further rows would have, too, e.g. that of a refused key. With False, the result
            has only the rows that were answered before, and `SharedLimit.stopped` says why.
    """

    def __init__(
        self,
        client: SamplingClient,
        *,
        settings: BatchSettings,
        limit: int | Adaptive | SharedLimit = 256,
        raises: bool = True,
    ) -> None:
        self._client = client
        self._settings = settings
        self._limit = limit
        self._raises = raises
        self._limit_here: int | Adaptive | Limiter = 1 if isinstance(limit, SharedLimit) else limit
        self._follower: Follower | None = None
        self._sampler: RowSampler | None = None

    async def __call__(self, block: Any) -> Any:
        """Return the records of a block; after the job has stopped, only of what was already asked for.

        Raises:
            LoopsError: no further row can be answered, unless `raises` is False.
        """
        rows = rows_of(block, self._settings)
        records: list[Record] = []
        sampler = await self._ready()

        async def each() -> AsyncGenerator[Row]:
            for row in rows:
                if self._follower is not None and self._follower.stopped is not None:
                    sampler.stop(self._follower.stopped)
                yield row

        async def emit(record: Record) -> None:
            records.append(record)
            if self._follower is not None:
                self._follower.sampled(is_answer="error" not in record)

        if rows and sampler.stopped is None:
            await sampler.run(each(), emit)
        if self._follower is not None:
            if sampler.stopped is not None:
                await self._follower.stop(sampler.stopped)
            await self._follower.report()
        if self._raises and sampler.stopped is not None:
            raise sampler.stopped
        return records_table(block, self._settings, records)

    async def _ready(self) -> RowSampler:
        if self._sampler is None:
            if isinstance(self._limit, SharedLimit):
                self._follower = Follower(self._limit)
                self._limit_here = self._follower.limiter
            self._sampler = RowSampler(self._client, self._settings, self._limit_here)
            try:
                self._check_node(self._sampler)
            except ConfigError as problem:
                self._sampler.stop(ConfigError(f"on node {socket.gethostname()}: {problem}"))
        if self._follower is not None:
            await self._follower.ready()
        await asyncio.sleep(0)
        return self._sampler

    def _check_node(self, sampler: RowSampler) -> None:
        """Warn if there are too few connections here.

        Raises:
            ConfigError: there is no API key here, or a setting of the environment is wrong.
        """
        endpoint = self._client._endpoint  # noqa: SLF001 - private to users
        if endpoint.settings().api_key is None and not isinstance(endpoint.deployment, LocalDeployment):
            raise ConfigError("BASETEN_API_KEY is not set; each node needs it, since a key is never pickled")
        sampler.warn_of_connections(self._limit.even_share if isinstance(self._limit, SharedLimit) else None)

"""A trainer and a sampler without a control plane."""

from __future__ import annotations

from datetime import UTC, datetime
from uuid import uuid4

from ..types import Run, Sampler


class LocalUrls:
    """A trainer and a sampler that run already, described as the control plane would."""

    def __init__(self, trainer_url: str, sampler_url: str) -> None:
        self._trainer_url = trainer_url
        self._sampler_url = sampler_url

    def run(self, base_model: str, run_id: str | None = None) -> Run:
        """Return a run of the trainer, with an id of its own unless one is given."""
        return Run(
            id=run_id or f"local-{uuid4().hex[:8]}",
            session_id="local",
            base_model=base_model,
            base_url=self._trainer_url,
            created_at=datetime.now(UTC),
            sampler=self.sampler(base_model),
        )

    def sampler(self, base_model: str) -> Sampler:
        """Return the sampler, which serves each run of the trainer."""
        return Sampler(id="local", base_url=self._sampler_url, base_model=base_model, created_at=datetime.now(UTC))

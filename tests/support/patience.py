"""How long tests wait."""

from __future__ import annotations

from typing import Final

PATIENCE_SECONDS: Final = 60.0
"""How long a test waits for what must happen. It only ends what hangs: a busy machine may need long for anything."""

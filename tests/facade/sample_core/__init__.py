"""A small core package with one of everything that the facade has a rule for."""

from . import values
from ._version import __version__
from .service import Service
from .values import *  # noqa: F403 - it lists its public names in `__all__`
from .workers import Job, Tool, Worker, greet

__all__ = ["Job", "Service", "Tool", "Worker", "__version__", "greet"]
__all__ += values.__all__

"""The version of the distribution, also sent as the user agent."""

__version__ = "0.1.0"

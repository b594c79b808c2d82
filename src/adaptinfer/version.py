"""The version, for what is written into documents."""

__version__ = "0.1.0"

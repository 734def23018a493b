"""Starts, proves, supervises and rolls back a local MLX server behind Claude Code."""

__version__ = "0.1.0"

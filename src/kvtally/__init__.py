"""kvtally: what a million tokens really cost, and what KV reuse really saved."""

from __future__ import annotations

__version__ = "0.1.0"

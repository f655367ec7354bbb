"""Types of settings that the configuration and the workers share. No torch: reading a configuration stays quick."""

from __future__ import annotations

from typing import Literal

Auto = bool | Literal["auto"]
"""A switch, or "auto": decided from what is measured."""

"""Configurations brought from ROLL: its YAML files, translated key by key (docs/roll.md)."""

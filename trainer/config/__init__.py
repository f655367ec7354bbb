"""Configuration: the typed schema, loading and overrides, older spellings, and the checks before anything starts."""

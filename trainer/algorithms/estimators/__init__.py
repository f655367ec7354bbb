"""Advantage estimators: how much better a token was than expected."""

"""Rotary positions in a Hugging Face config: what overrides of them come to, and how many positions there are.

transformers 5 keeps kind, base and scaling in one field, `rope_parameters`; transformers 4 kept kind and scaling in
`rope_scaling`, and the base beside it in `rope_theta`. Either spelling is accepted with both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SPELLINGS = ("rope_scaling", "rope_parameters")
BESIDE = ("rope_theta", "partial_rotary_factor")
"""What another kind of scaling leaves as it is."""
_POSITIONS, ORIGINAL = "max_position_embeddings", "original_max_position_embeddings"
_EXTENDED = ("yarn", "longrope", "llama3")
"""Kinds that also need the number of positions before they extended it."""
_LEGACY = {"su": "longrope", "mrope": "default"}
KINDS = ("default", "linear", "dynamic", *_EXTENDED, "proportional")


@dataclass(frozen=True, slots=True)
class Positions:
    """number: that the model and vLLM have. base: before they were extended. why: how the config says so,
    `name=value`s; kind: of scaling."""

    number: int
    base: int
    why: str
    kind: str


def completed(config: PreTrainedConfig, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides of the checkpoint's config that mean the same to transformers and to every vLLM.

    Positions are told in full: a base that is not given is the checkpoint's, as are the positions before they were
    extended. vLLM takes max_position_embeddings for what yarn has extended from 0.30 on, and works it out before that:
    it is raised to that here, as many a checkpoint, and who gives `rope_scaling` alone, leave it as it was.
    """
    now, rest = _rope(config), {name: value for name, value in overrides.items() if name not in (*SPELLINGS, *BESIDE)}
    given = _given(overrides)
    kept = {name: overrides[name] for name in BESIDE if name in overrides}
    if _is_nested(now) or _is_nested(given or {}):  # of each kind of layer: as it was given
        return dict(overrides)
    base = now if given is None or not _kind(given) else {name: now[name] for name in BESIDE if name in now}
    rope = _legible(base | (given or {}) | kept)
    fields = config.to_dict()
    positions = fields.get(_POSITIONS)
    if rope.get("rope_type") in _EXTENDED and positions is not None:
        rope.setdefault(ORIGINAL, fields.get(ORIGINAL) or positions)
    extended = _extended(rope)
    if extended is not None and (rest.get(_POSITIONS) or positions or 0) < extended:
        rest[_POSITIONS] = extended
    return rest if rope == _legible(now) else rest | _spelled(config, rope)


def positions_of(fields: Mapping[str, Any]) -> Positions | None:
    """Of a config's fields; None where they do not say, or in a way of their own."""
    number = fields.get(_POSITIONS)
    rope = _legible(fields.get("rope_parameters") or fields.get("rope_scaling") or {})
    kind, factor = rope.get("rope_type", "default"), rope.get("factor")
    if not isinstance(number, int) or _is_nested(rope) or kind not in KINDS:
        return None
    why = f"{_POSITIONS}={number}"
    original = rope.get(ORIGINAL) or fields.get(ORIGINAL) or number
    if kind == "yarn" and factor is not None:
        return Positions(
            int(original * factor), original, f"{ORIGINAL}={original} x factor={factor} (rope_type=yarn)", kind
        )
    if kind == "linear" and factor is not None:
        return Positions(int(number * factor), number, f"{why} x factor={factor} (rope_type=linear)", kind)
    if kind == "longrope":  # transformers and vLLM choose between its two scales by different lengths above this
        return Positions(original, original, f"{ORIGINAL}={original} (rope_type=longrope)", kind)
    return Positions(number, number, why, kind)


def scaling_of(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """What overrides say of the kind and its parameters, in either spelling; without the parts of kinds of layers."""
    given = _given(overrides) or {}
    return {} if _is_nested(given) else _legible(given)


def _given(overrides: Mapping[str, Any]) -> dict[str, Any] | None:
    """Both spellings together; None: neither. A spelling that is null asks for no scaling."""
    if not any(name in overrides for name in SPELLINGS):
        return None
    found: dict[str, Any] = {}
    for name in SPELLINGS:
        found |= overrides.get(name) or {}
    return found or {"rope_type": "default"}


def _rope(config: PreTrainedConfig) -> dict[str, Any]:
    """As transformers 5 has it."""
    fields = config.to_dict()
    if fields.get("rope_parameters"):
        return dict(fields["rope_parameters"])
    beside = {name: fields[name] for name in BESIDE if fields.get(name) is not None}
    return beside | (fields.get("rope_scaling") or {})


def _spelled(config: PreTrainedConfig, rope: Mapping[str, Any]) -> dict[str, Any]:
    """As the installed transformers reads it."""
    if "rope_parameters" in config.to_dict():
        return {"rope_parameters": dict(rope)}
    beside = {name: rope[name] for name in BESIDE if name in rope}
    scaling = {name: value for name, value in rope.items() if name not in BESIDE}
    return beside | {"rope_scaling": scaling if scaling.get("rope_type", "default") != "default" else None}


def _legible(rope: Mapping[str, Any]) -> dict[str, Any]:
    """With `rope_type` for `type`, and older names of kinds as they are called today."""
    kind = _kind(rope)
    rest = {name: value for name, value in rope.items() if name not in ("type", "rope_type")}
    return ({"rope_type": _LEGACY.get(kind, kind)} if kind else {}) | rest


def _kind(rope: Mapping[str, Any]) -> str | None:
    return rope.get("rope_type") or rope.get("type")


def _extended(rope: Mapping[str, Any]) -> int | None:
    """Positions that yarn makes."""
    factor, original = rope.get("factor"), rope.get(ORIGINAL)
    if rope.get("rope_type") != "yarn" or not isinstance(factor, int | float) or not isinstance(original, int):
        return None
    return int(original * factor)


def _is_nested(rope: Mapping[str, Any]) -> bool:
    return any(isinstance(value, Mapping) for value in rope.values())

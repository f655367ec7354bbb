"""What scripts/convert_roll.py runs: ROLL's YAML in, a recipe of ours out, each key with where it came from."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from trainer.config.errors import UserError, complain
from trainer.config.keys import known_keys
from trainer.config.overrides import prepare_overrides
from trainer.config.roll.command_line import expand_roll

_USAGE = "usage: convert_roll.py ROLL.yaml [roll.KEY=value ...] [our overrides] > mine.yaml"


def main(argv: Sequence[str] | None = None) -> int:
    """Convert the file named first and print the result; notices and errors go to standard error."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or "=" in arguments[0] or arguments[0].startswith("-"):
        print(_USAGE, file=sys.stderr)
        return 0 if "--help" in arguments or "-h" in arguments else 2
    try:
        text, notices = convert(arguments[0], arguments[1:])
    except UserError as error:
        complain(str(error))
        return 2
    for notice in notices:
        print(f"note: {notice}", file=sys.stderr)
    print(text, end="")
    return 0


def convert(path: str, overrides: Sequence[str] = ()) -> tuple[str, list[str]]:
    """Return our YAML for ROLL's file at `path`, and the notices. Raises UserError as `expand_roll` does."""
    roll = expand_roll([f"roll.config={path}", *overrides])
    prepared, changed = prepare_overrides(roll.overrides)
    parser, values = OverridesParser.create(), {}
    for override in prepared:
        parsed = parser.parse_override(override)
        values[parsed.key_or_group] = parsed.value()
    return write_recipe(values, roll.sources, path), [*roll.notices, *changed]


def write_recipe(values: Mapping[str, object], sources: Mapping[str, str], path: str) -> str:
    """A recipe that starts from `ppo_trainer`, sections nested, with a comment beside each key that has a source."""
    lines = [f"# From ROLL's {path}.", "defaults: [ppo_trainer, _self_]"]
    section: list[str] = []
    for key in sorted(values, key=_order):
        *parents, name = key.split(".")
        shared = 0
        while shared < min(len(parents), len(section)) and parents[shared] == section[shared]:
            shared += 1
        lines += [f"{'  ' * depth}{parents[depth]}:" for depth in range(shared, len(parents))]
        section = parents
        comment = f"  # ROLL: {sources[key]}" if key in sources else ""
        lines.append(f"{'  ' * len(parents)}{name}: {_yaml(values[key])}{comment}")
    return "\n".join(lines) + "\n"


def _order(key: str) -> tuple[object, ...]:
    """Sections stay together and in the order of ours; keys of a section come before its sections."""
    sections = list(dict.fromkeys(leaf.partition(".")[0] for leaf in sorted(known_keys().leaves)))
    first, _, rest = key.partition(".")
    parts = rest.split(".")
    return (sections.index(first), *[(number < len(parts) - 1, part) for number, part in enumerate(parts)])


def _yaml(value: object) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10_000).strip()
    return text.removesuffix("...").strip()

"""Write docs/configuration.md from the comments of configs/ppo_trainer.yaml and the types of the schema.

python scripts/configuration_docs.py           # writes it
python scripts/configuration_docs.py --check   # exit status 1 if it is not what would be written
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from trainer.config.describe import Entry, SectionText, describe  # noqa: E402

PAGE = ROOT / "docs" / "configuration.md"
RECIPES = ROOT / "configs" / "recipe"
_HEAD = """\
# Configuration

Every key, from `configs/ppo_trainer.yaml`, the one place where defaults stand. Names and defaults are verl's wherever a
key means the same thing.

- Set a key on the command line: `python -m trainer.main data.train_batch_size=256`. A mistyped key is an error that
  names the nearest one; so is a key that contradicts another.
- `--help` prints this, `--help clip lr` only the keys with `clip` or `lr` in their names; `--cfg job` prints what a
  command line resolves to, `trainer.dry_run=true` what would run where.
- Start from a recipe with `--config-name`; each holds only what differs from the defaults. A file of your own that
  begins with `defaults: [ppo_trainer, _self_]` is one too: `--config-dir DIR --config-name NAME`.
- A default "as <key>" is whatever that key is. `???` has no default. What goes below a dictionary is up to you.
"""
_TAIL = "\n<!-- made by scripts/configuration_docs.py; change the comments in configs/ppo_trainer.yaml instead -->\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page, or check that it is up to date; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; say whether the page is up to date")
    options = parser.parse_args(arguments)
    text = page()
    if not options.check:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text:
        return 0
    print(f"{PAGE.relative_to(ROOT)} is out of date: python scripts/configuration_docs.py", file=sys.stderr)
    return 1


def page() -> str:
    """The whole page."""
    sections = describe()
    number = sum(len(section.entries) for section in sections)
    contents = " · ".join(f"[{section.key}](#{_anchor(section.key)})" for section in sections)
    parts = [_HEAD, "\n## Recipes\n\n", *_recipes(), f"\n## Sections\n\n{number} keys: {contents}\n"]
    parts += [_section(section) for section in sections]
    return "".join([*parts, _TAIL])


def _recipes() -> Iterator[str]:
    """One line per recipe: its first comment."""
    yield "| recipe | what it is |\n|---|---|\n"
    for path in sorted(RECIPES.glob("*.yaml")):
        lines = path.read_text(encoding="utf-8").splitlines()
        about = next(line for line in lines if line.startswith("#") and "@package" not in line).lstrip("# ")
        yield f"| `--config-name {path.stem}` | {_cell(about)} |\n"


def _section(section: SectionText) -> str:
    about = section.about[:1].upper() + section.about[1:]
    lines = [f"\n### {section.key}\n\n{about}."]
    lines += [f" {section.note}"] if section.note else []
    lines += ["\n\n| key | values | default | |\n|---|---|---|---|\n"]
    return "".join([*lines, *(_row(entry) for entry in section.entries)])


def _row(entry: Entry) -> str:
    return f"| `{entry.name}` | {_cell(entry.values)} | {_default(entry.default)} | {_cell(entry.about)} |\n"


def _default(text: str) -> str:
    followed = text.removeprefix("as ")
    return f"as `{followed}`" if followed != text else f"`{text}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")


def _anchor(heading: str) -> str:
    """GitHub's: lower case, without dots."""
    return heading.lower().replace(".", "")


if __name__ == "__main__":
    sys.exit(main())

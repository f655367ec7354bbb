"""One YAML file as a tree and the lines of its keys; whatever is no configuration is told with its line."""

from __future__ import annotations

from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer.config.errors import UserError
from trainer.config.roll.places import places_of

_GIVE = "give ROLL's YAML file"


def parse(path: Path) -> tuple[DictConfig, dict[str, str]]:
    """The content of a file, interpolations unresolved, and each key's place. Raises UserError for what has no keys."""
    text = _text(path)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        tree = OmegaConf.create(text) if isinstance(node, yaml.MappingNode) else None
        places = places_of(node, path.name) if isinstance(node, yaml.MappingNode) else {}
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        raise UserError(f"{_named(path)}: not readable as YAML: {_reason(error)}; mend the file") from error
    if not isinstance(node, yaml.MappingNode) or not isinstance(tree, DictConfig):
        kinds = {type(None): "nothing", yaml.ScalarNode: "one value", yaml.SequenceNode: "a list"}
        raise UserError(f"{_named(path)}: holds {kinds[type(node)]}, no keys; {_GIVE}")
    return tree, places


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        looked = f"{error.strerror or error} (looked from {Path.cwd()})"
        raise UserError(f"{_named(path)}: {looked}; give the path of ROLL's YAML file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{_named(path)}: not text in UTF-8; {_GIVE}") from error


def _reason(error: Exception) -> str:
    """What the parser minds, and in which line if it says so."""
    if isinstance(error, RecursionError):
        return "nested too deeply, or an alias (*name) within what it stands for"
    if not isinstance(error, yaml.MarkedYAMLError):
        return str(error).partition("\n")[0].rstrip(".")
    mark = error.problem_mark or error.context_mark
    reason = error.problem or error.context or "something"
    return f"line {mark.line + 1}: {reason}" if mark is not None else str(reason)


def _named(path: Path) -> str:
    return f"roll.config={path}"

"""Settings in a YAML file: with their lines, for errors, and those of its ``BASE`` files; other trainers' files too."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from utils.errors import UserError
from utils.moving import Leaf, is_of_swin, is_of_timm, moved
from utils.settings import Given, Section, Setting
from utils.surroundings import expanded


def read_yaml(root: type[Section], path: Path, notes: list[str], being_read: tuple[Path, ...] = ()) -> Iterator[Given]:
    """Yield the settings of a YAML file, those of its ``BASE`` files first.

    Args:
        root: the settings that there are.
        path: of the file.
        notes: gets a line about each thing that is otherwise than a file of another trainer says.
        being_read: the files that have this one as their ``BASE``.

    Raises:
        UserError: it cannot be read, or has a setting that there is not.
    """
    path_shown, path = path, path.resolve()
    if path in being_read:
        raise UserError(f"{path_shown} is its own BASE: {' -> '.join(p.name for p in (*being_read, path))}")
    try:
        document = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not a text file"
        raise UserError(f"config file {path_shown} cannot be read: {reason}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path_shown}{where} is not YAML: {getattr(error, 'problem', None) or error}") from error
    given = list(_settings_in(root, document, path_shown, notes)) if document else []
    for key, value, source in given:
        if key == "BASE":
            bases = [value] if isinstance(value, str) else value
            if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
                raise UserError(f"BASE ({source}) must be a file name or a list of them")
            for base in filter(None, bases):
                yield from read_yaml(root, path_shown.parent / expanded(base), notes, (*being_read, path))
    yield from (one for one in given if one[0] != "BASE")


def _settings_in(root: type[Section], document: yaml.Node, path: Path, notes: list[str]) -> Iterator[Given]:
    leaves = list(_leaves(document, path))
    if not (is_of_swin(leaves) or is_of_timm(leaves)):
        return _settings_of(root, document, path)
    translated, said = moved(leaves, root.settings(), str(path))
    notes += [f"{path}: {line}" for line in said]
    return iter([(key, value, f"{path}, line {line}") for key, value, line in translated])


def _entries(node: yaml.Node, path: Path, prefix: str) -> Iterator[tuple[str, yaml.Node, int]]:
    """Yield each key of a section, the node of its value, and its line."""
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path}, line {node.start_mark.line + 1}: expected settings as 'KEY: value'")
    seen: set[str] = set()
    for key_node, value_node in node.value:
        key, line = f"{prefix}{key_node.value}", key_node.start_mark.line + 1
        if key in seen:
            raise UserError(f"setting {key} stands twice ({path}, line {line}); keep one")
        seen.add(key)
        yield key, value_node, line


def _value(node: yaml.Node, key: str, source: str) -> Any:
    try:
        return yaml.SafeLoader("").construct_document(node)
    except yaml.YAMLError as error:
        raise UserError(f"{key} ({source}): {getattr(error, 'problem', error)}") from error


def _settings_of(root: type[Section], node: yaml.Node, path: Path, prefix: str = "") -> Iterator[Given]:
    for key, value_node, line in _entries(node, path, prefix):
        source = f"{path}, line {line}"
        if isinstance(root.find(key, source), Setting):
            yield key, _value(value_node, key, source), source
        else:
            yield from _settings_of(root, value_node, path, f"{key}.")


def _leaves(node: yaml.Node, path: Path, prefix: str = "") -> Iterator[Leaf]:
    """Yield every line of a file, whoever's it is; sections have names in capitals."""
    for key, value_node, line in _entries(node, path, prefix):
        if isinstance(value_node, yaml.MappingNode) and key.isupper():
            yield from _leaves(value_node, path, f"{key}.")
        else:
            yield Leaf(key, _value(value_node, key, f"{path}, line {line}"), line)

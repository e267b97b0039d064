"""Settings that are declared once: read from YAML and the command line, checked, listed, and compared between runs.

This module knows no setting. A config is made of sections, and a section declares its settings as attributes::

    class Train(Section):
        '''How the weights are trained.'''

        EPOCHS: int = setting(300, "Passes over the training images", at_least=1)
"""

import inspect
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from enum import Enum
from math import isfinite
from operator import ge, gt, le, lt
from textwrap import TextWrapper
from types import UnionType
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Self, TypeVar, cast, get_args, get_origin

import yaml

from utils.errors import UserError, did_you_mean
from utils.surroundings import expanded

if TYPE_CHECKING:

    class CfgNode(dict[str, Any]):
        """What is used of yacs, which has no types: with its own class every attribute would be known."""

        def dump(self) -> str: ...
        def clone(self) -> Self: ...
        def freeze(self) -> None: ...
        def defrost(self) -> None: ...
else:
    from yacs.config import CfgNode

T = TypeVar("T")

Given = tuple[str, Any, str]
"""A key, the value that it is given, and where, for errors."""

LONGEST_DUMP, LONGEST_NUMBER, DEEPEST_DUMP = 2**20, 3500, 10
"""Of a config that comes in a file of others: letters, letters of a number, levels."""

KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a text", list: "a list"}
"""Types of a value, for errors."""

WIDEST_LISTING = 100


class Resume(Enum):
    """What may become of a setting when a run is carried on."""

    FORCED = "kept on resume unless forced"
    FREE = "free on resume"
    RAISED = "may rise on resume"
    OMITTED = "may be left out on resume"
    KEPT = "kept on resume"


@dataclass(frozen=True)
class Setting:
    """One setting: all that is known of it.

    Attributes:
        default: its value unless another is given; its type is that of all values.
        meaning: in words.
        kind: the annotation, which says more than the default where it is ``list[int]`` or ``int | list[int]``.
        at_least, above, at_most, below: limits of a number, or of each number in a list.
        choices: the texts that it may be; with ``or_with`` it may also be any that has this in it.
        length: how many numbers a list has, unless it is empty as the default.
        wanted: how errors call a list that is right, where the rest says too little.
        path: whether it names a file or a folder, so that ``~`` in it is the home folder.
        tasks: those that read it; empty for all.
        on_resume: what may become of it when a run is carried on.
        stands_for: what the default counts as when runs are compared, where the default leaves the value open.
        reads: turns another way to write a value into the usual one.
    """

    default: Any
    meaning: str
    kind: Any = None
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    or_with: str = ""
    length: int = 0
    wanted: str = ""
    path: bool = False
    tasks: tuple[str, ...] = ()
    on_resume: Resume = Resume.FORCED
    stands_for: Any = None
    reads: Callable[[Any], Any] | None = None

    @property
    def is_dict(self) -> bool:
        """Whether its value is a dict, with names that are not ours."""
        return isinstance(self.default, dict)

    def limits(self) -> str:
        """Say which values it may have; empty when its type says all."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.at_least is not None and self.at_most is not None:
            return f"between {self.at_least} and {self.at_most}"
        bounds = {"at least": self.at_least, "above": self.above, "at most": self.at_most, "below": self.below}
        return " and ".join(f"{words} {bound}" for words, bound in bounds.items() if bound is not None)

    def coerce(self, key: str, value: Any, source: str) -> Any:
        """Return ``value`` as the type of the default, where nothing is lost by it.

        Raises:
            UserError: something would be.
        """
        default, value = self.default, self.reads(value) if self.reads else value
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if self.is_dict and isinstance(value, dict | None):
            return _as_node(key, value or {}, source)
        if value is None and isinstance(default, str | list):
            return "none" if "none" in self.choices else type(default)()
        if isinstance(default, float) and (is_number or isinstance(value, str)):
            with suppress(ValueError, OverflowError):
                number = float(value)  # also from 5e-4, which YAML takes for a text
                if isfinite(number):
                    return number
        if isinstance(default, str) and is_number:
            return str(value)
        kinds = (self.kind, *get_args(self.kind))
        if isinstance(value, tuple | list) and any(get_origin(kind) is list for kind in kinds):
            return list(value)
        if type(value) is type(default) and not isinstance(value, float):
            return value
        choices = f" ({' | '.join(self.choices)})" if self.choices else ""
        example = f", for example {default}" if default not in ("", [], False, {}) and not choices else ""
        wanted = KINDS.get(type(default), "a dict")
        raise UserError(f"{key} must be {wanted}{choices}{example}, not {value!r:.100} ({source})")

    def problem(self, value: Any) -> str:
        """Say what is wrong with a value of the right type; empty when nothing is."""
        if self.choices:
            is_known = value in self.choices or (self.or_with and self.or_with in value)
            return "" if is_known else f"choose {self.limits()}{did_you_mean(value, self.choices)}"
        if value == self.default:
            return ""
        if not isinstance(value, list):
            between = self.at_least is not None and self.at_most is not None
            return "" if self._allows(value) else f"must {'lie' if between else 'be'} {self.limits()}"
        numbers = [number for one in value for number in (one if isinstance(one, list) else [one])]
        is_whole = _fits(value, self.kind) and [] not in value and len(value) == (self.length or len(value))
        if is_whole and all(map(self._allows, numbers)):
            return ""
        of = f"{self.length or ''} {'numbers' if _fits([0.5], self.kind) else 'whole numbers'}".strip()
        each = f", each {self.limits()}" if self.limits() else ""
        example = f", for example {self.default}" if self.default else ""
        return f"must be {self.wanted or f'a list of {of}{each}{example}'}"

    def _allows(self, number: float) -> bool:
        bounds = ((ge, self.at_least), (gt, self.above), (le, self.at_most), (lt, self.below))
        return all(fits(number, bound) for fits, bound in bounds if bound is not None)

    def compared(self, value: Any) -> Any:
        """What ``value`` counts as when runs are compared."""
        return self.stands_for if self.stands_for is not None and value == self.default else value


def setting(default: T, meaning: str, task: str | tuple[str, ...] = (), **rest: Any) -> T:
    """Declare a setting of a :class:`Section`, read by one ``task`` or several; for the ``rest`` see :class:`Setting`.

    For a type checker it is its value, as it is in a config.
    """
    return cast(T, Setting(default, meaning, tasks=(task,) if isinstance(task, str) else task, **rest))


class Section(CfgNode):
    """A config or a part of one: an instance holds the values, the class knows the settings.

    Attributes:
        declared: its settings and sections by their names, in the order of the class.
    """

    declared: ClassVar[dict[str, "Setting | type[Section]"]] = {}

    def __init_subclass__(cls) -> None:
        cls.declared = {}
        for name, kind in inspect.get_annotations(cls).items():
            if isinstance(kind, type) and issubclass(kind, Section):
                cls.declared[name] = kind
            elif isinstance(vars(cls).get(name), Setting):
                cls.declared[name] = replace(vars(cls)[name], kind=kind)
                delattr(cls, name)  # it would hide the value

    def __init__(self) -> None:
        """Every setting at its default."""
        super().__init__()
        for name, what in self.declared.items():
            self[name] = deepcopy(what.default) if isinstance(what, Setting) else what()

    @classmethod
    def settings(cls, prefix: str = "") -> dict[str, Setting]:
        """Every setting by its key, ``SECTION.NAME``."""
        found: dict[str, Setting] = {}
        for name, what in cls.declared.items():
            key = f"{prefix}{name}"
            found |= {key: what} if isinstance(what, Setting) else what.settings(f"{key}.")
        return found

    @classmethod
    def find(cls, key: str, source: str) -> "Setting | type[Section]":
        """The setting or section with a key.

        Raises:
            UserError: there is none.
        """
        what: Setting | type[Section] = cls
        for name in key.split("."):
            if isinstance(what, Setting) or name not in what.declared:
                known = cls.settings()
                sections = {one.rpartition(".")[0] for one in known} - {""}
                raise UserError(f"unknown setting {key} ({source}){did_you_mean(key, [*known, *sections])}")
            what = what.declared[name]
        return what


def flatten(node: Section, prefix: str = "") -> dict[str, Any]:
    """Every setting of a config by its key, and its value."""
    flat: dict[str, Any] = {}
    for name, value in node.items():
        inner = isinstance(value, Section)
        flat |= flatten(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": _plain(value)}
    return flat


def _plain(value: Any) -> Any:
    """Dicts in place of config nodes."""
    return {key: _plain(inner) for key, inner in value.items()} if isinstance(value, CfgNode) else value


def get(config: Section, key: str) -> Any:
    """The value of ``SECTION.NAME``."""
    value: Any = config
    for name in key.split("."):
        value = value[name]
    return value


def assign(config: Section, key: str, value: Any, source: str) -> None:
    """Give the setting ``key`` a value.

    Raises:
        UserError: the key is unknown, or the value is of the wrong type.
    """
    what = config.find(key, source)
    if not isinstance(what, Setting):
        keys = ", ".join(f"{key}.{name}" for name in what.declared)
        raise UserError(f"{key} ({source}) is a section, not a setting; it has {keys}")
    section, _, name = key.rpartition(".")
    value = _unshared(what.coerce(key, value, source))
    (get(config, section) if section else config)[name] = expanded(value) if what.path else value


def _unshared(value: Any) -> Any:
    """The same of lists and dicts of its own: what stands twice would be dumped with an alias, and not read again."""
    if isinstance(value, list):
        return [_unshared(one) for one in value]
    if isinstance(value, dict):
        return type(value)({key: _unshared(one) for key, one in value.items()})
    return value


def _as_node(key: str, values: dict, source: str) -> CfgNode:
    """``values`` as what yacs can write and read again."""
    for name, value in values.items():
        if not isinstance(name, str):
            raise UserError(f"{key} ({source}): {name!r} is not the name of an argument")
        if isinstance(value, dict):
            values = values | {name: _as_node(f"{key}.{name}", value, source)}
        elif not isinstance(value, str | bool | int | float | list | None):
            raise UserError(f"{key}.{name} ({source}) must be a number, a text, a list or a dict, not {value!r}")
    return CfgNode(values)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is what an annotation says."""
    if get_origin(kind) is UnionType:
        return any(_fits(value, one) for one in get_args(kind))
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(one, get_args(kind)[0]) for one in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
    return type(value) is kind


def refuse(config: Section, origin: dict[str, str], key: str, problem: str) -> NoReturn:
    """Raise the error for a setting whose value is wrong; ``origin`` says where each was set."""
    raise UserError(f"{key} {get(config, key)} ({origin.get(key, 'the default')}): {problem}")


def check_values(config: Section, origin: dict[str, str]) -> None:
    """Check each setting by itself.

    Raises:
        UserError: a value is out of range.
    """
    for key, one in config.settings().items():
        if problem := one.problem(get(config, key)):
            refuse(config, origin, key, problem)


def file_of(source: str) -> str:
    """The file of a line in one, else the source itself."""
    return source.rpartition(", line ")[0] or source


def pairs(root: type[Section], opts: list[str]) -> Iterator[Given]:
    """The settings that ``--opts KEY VALUE ...`` gives."""
    if len(opts) % 2:
        raise UserError(f"--opts takes pairs of KEY VALUE; {opts[-1]} has no partner")
    for key, text in zip(opts[::2], opts[1::2], strict=True):
        what = root.find(key, "--opts")
        is_text = isinstance(what, Setting) and isinstance(what.default, str)
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            if not is_text:  # a name may hold anything
                raise UserError(f"--opts {key}: {text!r} is not a YAML value") from error
            value = text
        if key == "BASE":
            raise UserError("BASE belongs in a YAML file; on the command line give the file with --cfg")
        keep = value is None or (is_text and not isinstance(value, bool))  # a TAG 010 is not 8
        yield key, text if keep else value, "--opts"


def settings_in(root: type[Section], dumped: Any, source: str) -> dict[str, Any]:
    """The settings in a config that was dumped into a file, by their keys; those that are not known are left out.

    Raises:
        UserError: it is no such text. One that would unfold to more than it says, by YAML's aliases, is not read.
    """
    try:
        if not isinstance(dumped, str) or len(dumped) > LONGEST_DUMP:
            raise ValueError("is not a text of settings")
        depth = 0
        for event in yaml.parse(dumped, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if getattr(event, "anchor", None) is not None or depth > DEEPEST_DUMP:
                raise ValueError("has YAML aliases or is nested without end")
            if isinstance(event, yaml.ScalarEvent) and not event.style and len(event.value) > LONGEST_NUMBER:
                raise ValueError("has a number without end")
        content = yaml.load(dumped, Loader=yaml.SafeLoader)
        if not isinstance(content, dict):
            raise ValueError("is not a text of settings")
        known = root.settings()
        found = dict(_leaves(content, known))
        misplaced = {key.rpartition(".")[0] for key in known} & found.keys()
        misplaced |= {key.rpartition(".")[0] for key in found} & known.keys()
        if misplaced:
            raise ValueError(f"has {min(misplaced)} in a form that it cannot have")
        return {key: _plain(one.coerce(key, found[key], source)) for key, one in known.items() if key in found}
    except yaml.YAMLError as error:
        raise UserError(f"{source}: its config is not YAML: {getattr(error, 'problem', None)}") from error
    except (ValueError, TypeError, OverflowError) as error:  # a number, date or key that there is not
        raise UserError(f"{source}: its config {next(iter(str(error).splitlines()), 'is wrong')}") from error


def _leaves(node: dict, known: dict[str, Setting], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value and not (key in known and known[key].is_dict):
            yield from _leaves(value, known, f"{key}.")
        else:
            yield key, value


def differences(before: dict[str, Any], config: Section) -> list[tuple[str, Any, Any]]:
    """The settings that may not change freely on resume and differ from those before: key, value there, value here."""
    found = []
    for key, one in config.settings().items():
        there, here = one.compared(before[key]), one.compared(_plain(get(config, key)))
        omitted = one.on_resume is Resume.OMITTED and not here
        if there != here and one.on_resume is not Resume.FREE and not omitted:
            found.append((key, there, here))
    return found


def listing(root: type[Section], word: str = "") -> str:
    """The settings as a list to read; with a ``word``, those that have it in their name, meaning or choices.

    Raises:
        UserError: there are none.
    """
    width = min(shutil.get_terminal_size().columns, WIDEST_LISTING)
    paragraph = TextWrapper(width, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)
    texts = []
    for key, one in root.settings().items():
        if word.lower() in " ".join((key, one.meaning, *one.choices)).lower():
            default = '""' if one.default == "" else dict(one.default) if one.is_dict else one.default
            other = f", or a name with {one.or_with} in it" if one.or_with else ""
            task = f"of {' and '.join(one.tasks)} only" if one.tasks else ""
            facts = "; ".join(filter(None, (one.limits() + other, task, one.on_resume.value)))
            texts.append(f"{key} = {default}\n{paragraph.fill(one.meaning)}\n{paragraph.fill(facts)}\n")
    if not texts:
        names = {name for key in root.settings() for name in (key, key.rpartition(".")[2])}
        raise UserError(
            f"--settings {word}: no setting has it in its name or meaning{did_you_mean(word, sorted(names))}"
        )
    return "\n".join(texts)

"""Configuration files and ``key=value`` overrides become a `Config`, and a `Config` a file.

Every mistake is a `ValueError` of one line: the place (dotted key), the value, what is expected.
Relative paths stay as written: they are relative to the working directory.
"""

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import yaml
from msgspec import inspect as types

from rlhfuse.config import Config

# YAML 1.1 reads `1e-6` (no dot) as text. This is the float of YAML 1.2.
_FLOAT = re.compile(
    r"^(?:[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)[eE][-+]?[0-9]+|[-+]?[0-9][0-9_]*\.[0-9]*)$"
)
_ERROR_PLACE = re.compile(r"^(?P<what>.*) - at `\$\.?(?P<place>.*)`$", re.DOTALL)


class _Loader(yaml.SafeLoader):
    """YAML in which `1e-6` is a number and a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen and key.value != "<<":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice", key.start_mark
                )
            seen.add(str(key.value))
        return dict(super().construct_mapping(node, deep))


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would read as a number."""


for _base in (_Loader, _Dumper):
    _base.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Dumper.add_representer(
    tuple, lambda dumper, items: dumper.represent_sequence("tag:yaml.org,2002:seq", items, True)
)


def _text_node(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    """Text as a scalar; line ends like NEL survive in double quotes only."""
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text_node)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in the file `path`, changed by `overrides`, in their order.

    An override is ``key=value``, ``+key=value``, ``--key=value``, or the two items ``--key`` and
    ``value``; `key` is dotted (``actor.optim.lr``, ``data.validation.0.n``) and `value` is YAML.
    Cross-field rules are `rlhfuse.config_check.check`'s, which is not called here.
    """
    tree = read_yaml(path)
    _refuse_unknown_keys(tree, f"{path}: ")
    for key, text in split_overrides(overrides):
        _override(tree, key, text)
    return _convert(tree)


def from_tree(tree: dict[str, object]) -> Config:
    """The configuration that nested mappings hold, as `load` reads it from a file."""
    _refuse_unknown_keys(tree, "")
    return _convert(tree)


def dump(config: Config) -> str:
    """The whole configuration as YAML; `load` of it gives an equal `Config`."""
    tree = msgspec.to_builtins(config)
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def read_yaml(path: str | Path) -> dict[str, object]:
    """The mapping in the YAML (or JSON) file `path`; an empty file is an empty mapping."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ValueError(f"{path}: cannot read the configuration: {reason}") from error
    tree = parse_yaml(text, str(path))
    if tree is None:
        return {}
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise ValueError(f"{path}: expected keys and values at the top, got {_shown(tree)}")
    return tree


def parse_yaml(text: str, place: str) -> object:
    """The value that `text` holds; a syntax error names `place` and the line."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{place}{line}: not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{place}: not valid YAML: {error}") from error


def split_overrides(items: Sequence[str]) -> list[tuple[str, str]]:
    """(key, text of the value) of each override, whichever way it is spelled."""
    pairs = []
    rest = iter(items)
    for item in rest:
        key, equals, text = item.partition("=")
        if not equals and item.startswith("--"):
            text = next(rest, "")
            if not text:
                raise ValueError(f"override {item!r}: the value is missing, write {item}=VALUE")
        elif not equals:
            raise ValueError(f"override {item!r}: expected key=value")
        if key.startswith("~"):
            raise ValueError(f"override {item!r}: keys cannot be deleted, set a value instead")
        key = key[2:] if key.startswith("--") else key.lstrip("+")
        if not all(key.split(".")):
            raise ValueError(f"override {item!r}: expected a dotted key, such as actor.optim.lr")
        pairs.append((key, text))
    return pairs


# --- keys ----------------------------------------------------------------------------------


def _root() -> types.StructType:
    root = types.type_info(Config)
    assert isinstance(root, types.StructType)
    return root


def known_keys(root: types.StructType | None = None, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the configuration, sections included."""
    for field in (root or _root()).fields:
        yield prefix + field.name
        section = _plain(field.type)
        if isinstance(section, types.StructType):
            yield from known_keys(section, f"{prefix}{field.name}.")


def unknown_key(place: str) -> str:
    """Says that `place` is no key, and names the nearest one: by spelling, then by last name."""
    known = list(known_keys())
    section, _, name = place.rpartition(".")
    siblings = [key for key in known if key.rpartition(".")[0] == section]
    near = difflib.get_close_matches(place, siblings, n=1, cutoff=0.75)
    if not near:
        last = [key.rpartition(".")[2] for key in known]
        like = difflib.get_close_matches(name, last, n=1, cutoff=0.8)
        near = [key for key, end in zip(known, last, strict=True) if end in like][:2]
    near = near or difflib.get_close_matches(place, siblings or known, n=1, cutoff=0.0)
    return f"{place}: unknown key, the nearest is {' or '.join(near)}"


def _refuse_unknown_keys(tree: dict[str, object], source: str) -> None:
    unknown = list(_unknown_keys(tree, _root(), ""))
    if unknown:
        raise ValueError(source + "; ".join(unknown))


def _unknown_keys(value: object, kind: types.Type, place: str) -> Iterator[str]:
    kind = _plain(kind)
    if isinstance(kind, types.StructType) and isinstance(value, dict):
        fields = {field.name: field.type for field in kind.fields}
        for key, item in value.items():
            inner = f"{place}.{key}" if place else str(key)
            if key in fields:
                yield from _unknown_keys(item, fields[key], inner)
            else:
                yield _unknown_in(inner, kind)
    elif isinstance(kind, types.VarTupleType) and isinstance(value, list):
        for index, item in enumerate(value):
            yield from _unknown_keys(item, kind.item_type, f"{place}.{index}")


def _unknown_in(place: str, section: types.StructType) -> str:
    """As `unknown_key`; inside a list, whose items `known_keys` does not reach, by `section`."""
    if not re.search(r"\.\d+\.", place):
        return unknown_key(place)
    name = place.rpartition(".")[2]
    names = [field.name for field in section.fields]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
    return f"{place}: unknown key, the nearest is {near[0]}"


def _plain(kind: types.Type) -> types.Type:
    """`kind` without None and without what only documents it."""
    if isinstance(kind, types.UnionType):
        return next(item for item in kind.types if not isinstance(item, types.NoneType))
    return kind


# --- overrides -----------------------------------------------------------------------------


def _override(tree: dict[str, object], key: str, text: str) -> None:
    """Set `key` in `tree`, making the sections on the way."""
    here: object = tree
    kind: types.Type = _root()
    parts = key.split(".")
    for depth, part in enumerate(parts):
        place = ".".join(parts[: depth + 1])
        kind = _inner(kind, part, place)
        last = depth == len(parts) - 1
        index = _index(here, part, place) if isinstance(here, list) else part
        if last:
            here[index] = _value(text, kind, place)  # type: ignore[index]
            return
        inner = here[index] if isinstance(here, list) else here.get(part)  # type: ignore
        if not isinstance(inner, dict | list):
            inner = [] if isinstance(kind, types.VarTupleType) else {}
            here[index] = inner  # type: ignore[index]
        here = inner


def _inner(kind: types.Type, part: str, place: str) -> types.Type:
    if isinstance(kind, types.StructType):
        found = [field.type for field in kind.fields if field.name == part]
        if not found:
            raise ValueError(f"override: {_unknown_in(place, kind)}")
        return _plain(found[0])
    if isinstance(kind, types.VarTupleType) and part.isdecimal():
        return _plain(kind.item_type)
    raise ValueError(f"override: {place}: there are no keys below this one")


def _index(items: list[object], part: str, place: str) -> int:
    index = int(part)
    if index >= len(items):
        raise ValueError(f"override: {place}: there are only {len(items)} items, counted from 0")
    return index


def _value(text: str, kind: types.Type, place: str) -> object:
    """`text` as YAML; where text is wanted, as it stands."""
    if not isinstance(kind, types.StrType):
        return parse_yaml(text, f"override {place}={text}")
    try:
        value = parse_yaml(text, place)
    except ValueError:
        return text
    return value if isinstance(value, str) else text


# --- values --------------------------------------------------------------------------------


def _convert(tree: dict[str, object]) -> Config:
    tree = {field.name: _tidy(tree.get(field.name, {}), field.type) for field in _root().fields}
    try:
        config = msgspec.convert(tree, Config)
    except msgspec.ValidationError as error:
        raise ValueError(_explain(str(error), tree)) from error
    return config


def _tidy(value: object, kind: types.Type) -> object:
    """`value` with the spellings that we accept made the one that the type wants."""
    if value is None and isinstance(kind, types.UnionType):
        return None
    kind = _plain(kind)
    if isinstance(kind, types.StructType):
        # An empty section (`reward:` with nothing below) reads as None.
        inner = {} if value is None else value
        if not isinstance(inner, dict):
            return value
        kinds = {field.name: field.type for field in kind.fields}
        return {key: _tidy(item, kinds[key]) for key, item in inner.items()}
    if isinstance(kind, types.VarTupleType):
        items = [value] if isinstance(value, str) else value
        return [_tidy(item, kind.item_type) for item in items] if isinstance(items, list) else items
    if isinstance(kind, types.LiteralType) and isinstance(value, bool):
        word = "on" if value else "off"  # YAML reads these words as booleans
        return word if word in kind.values else value
    return value


def _explain(message: str, tree: dict[str, object]) -> str:
    """msgspec's message with the place in our spelling, the value, and what is expected."""
    match = _ERROR_PLACE.match(message)
    if match is None:
        return message
    place = re.sub(r"\[(\d+)\]", r".\1", match["place"]).strip(".")
    value: object = tree
    kind: types.Type = _root()
    for part in place.split("."):
        kind = _inner(kind, part, place)
        value = value[int(part)] if isinstance(value, list) else value[part]  # type: ignore[index]
    missing = re.search(r"missing required field `(\w+)`", match["what"])
    if missing:
        return f"{place}.{missing[1]}: is missing and has no default"
    return f"{place}: got {_shown(value)}, expected {_expected(kind)}"


def _shown(value: object) -> str:
    names = {bool: "true or false", str: "text", int: "number", float: "number", dict: "section"}
    text = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
    return f"{text} ({names.get(type(value), 'list' if isinstance(value, list) else 'value')})"


def _expected(kind: types.Type) -> str:
    """What a value of `kind` is, in words."""
    if isinstance(kind, types.LiteralType):
        return "one of " + ", ".join(str(value) for value in kind.values)
    if isinstance(kind, types.IntType | types.FloatType):
        bounds = {">": kind.gt, ">=": kind.ge, "<": kind.lt, "<=": kind.le}
        limits = [f"{sign} {bound:g}" for sign, bound in bounds.items() if bound is not None]
        name = "a whole number" if isinstance(kind, types.IntType) else "a number"
        return " ".join([name, " and ".join(limits)]).strip()
    if isinstance(kind, types.TupleType):
        return f"a list of {len(kind.item_types)} numbers"
    if isinstance(kind, types.VarTupleType):
        return f"a list, each item {_expected(_plain(kind.item_type))}"
    if isinstance(kind, types.StructType):
        return "keys: " + ", ".join(field.name for field in kind.fields)
    return {types.BoolType: "true or false", types.StrType: "text (in quotes)"}[type(kind)]

"""Values as they are recorded: JSON text, and back by the types that the code declares.

No class is ever looked up by a name in the data. What is decoded is what the annotation says: a step's result has the type of its return
annotation, an argument that of its parameter. Without an annotation (or with `Any`) a value is plain JSON. Encoded as JSON: dataclasses,
named tuples, enums, dates and durations, UUIDs, paths, pydantic models (anything with `model_dump` and `model_validate`), and `Artifact`s,
which stand as a reference to bytes that are stored by their SHA-256.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import importlib
import inspect
import json
import re
import sys
import types
import typing
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

from workflow.errors import MissingObject, NotJSON

__all__ = ["Artifact", "ObjectReader", "Signature", "decode", "digest", "encode", "is_same", "iso", "loads"]

try:  # Python's own: for a few bytes OpenSSL takes twice its time, most of it to find the algorithm
    _sha256: Callable[[bytes], Any] = getattr(importlib.import_module("_sha2" if sys.version_info >= (3, 12) else "_sha256"), "sha256")  # noqa: B009
except (ImportError, AttributeError):  # a Python that was built without
    _sha256 = hashlib.sha256

MARK = "$artifact"
_SHA256 = re.compile(r"[0-9a-f]{64}")
CHUNK = 1 << 20


class ObjectReader(Protocol):
    """Where the bytes of recorded artifacts are."""

    def read(self, home: str, sha256: str) -> bytes:
        """Return the bytes that a run has under a digest. Raises `MissingObject`."""


@dataclasses.dataclass(frozen=True, slots=True)
class Artifact:
    """Bytes that travel by reference. Make one with `of`, return it from a step, give it to others; `read` where the bytes are needed.

    They belong to the run that made them (`home`) and live as long as it does.
    """

    sha256: str
    size: int
    media_type: str
    home: str = ""
    source: bytes | Path | ObjectReader | None = dataclasses.field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, data: bytes | Path, *, media_type: str = "application/octet-stream") -> Artifact:
        """Describe bytes, or a file that stays as it is until the step has ended."""
        if isinstance(data, Path):
            found, size = hashlib.sha256(), 0
            with data.open("rb") as file:
                while chunk := file.read(CHUNK):
                    found.update(chunk)
                    size += len(chunk)
            return cls(found.hexdigest(), size, media_type, source=data)
        return cls(hashlib.sha256(data).hexdigest(), len(data), media_type, source=bytes(data))

    def read(self) -> bytes:
        """Return the bytes; verified. Raises `MissingObject`."""
        if self.source is None:
            raise MissingObject(self.sha256, "not bound to a run")
        if isinstance(self.source, bytes):
            return self.source
        data = self.source.read_bytes() if isinstance(self.source, Path) else self.source.read(self.home, self.sha256)
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise MissingObject(self.sha256, "other bytes are stored there")
        return data


_found: ContextVar[tuple[str, list[Artifact]] | None] = ContextVar("artifacts of a value that is being encoded", default=None)
_reader: ContextVar[ObjectReader | None] = ContextVar("reader of a value that is being decoded", default=None)


def encode(value: object, what: str, home: str = "") -> tuple[str, list[Artifact]]:
    """Return JSON text, and the new artifacts in it.

    Args:
        what: the value's name for the error, such as "result of make_plan".
        home: the run that new artifacts belong to.

    Raises:
        NotJSON: it has no JSON form.
    """
    artifacts: list[Artifact] = []
    try:
        if type(value) in _PLAIN:
            return _PLAIN[type(value)](value), artifacts
        token = _found.set((home, artifacts))
        try:
            return _encoder.encode(value), artifacts
        finally:
            _found.reset(token)
    except (TypeError, ValueError, RecursionError) as error:
        raise NotJSON(what, str(error)) from error


def _json(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        if isinstance(value, Artifact):
            home, found = _found.get() or ("", [])
            if not value.home:
                if not home:
                    raise TypeError("an artifact that no step has returned yet")
                found.append(value)
            return {MARK: value.sha256, "size": value.size, "media_type": value.media_type, "home": value.home or home}
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, datetime):
        if value.tzinfo is None:
            raise TypeError("a datetime without a time zone")
        return value.isoformat()
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, (uuid.UUID, Path)):
        return str(value)
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    raise TypeError(f"{type(value).__name__} has no JSON form")


_encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_json)
_decode: Callable[[str], Any] = json.JSONDecoder().decode  # `json.loads`, but for what texts do not need

_PLAIN: dict[type, Callable[[Any], str]] = {
    types.NoneType: lambda _: "null",
    bool: lambda value: "true" if value else "false",
    int: int.__repr__,
    str: _encoder.encode,
}
"""How values are encoded that have nothing in them, and come back from JSON as they were."""


def is_same(kind: Any, value: object) -> bool:
    """Say whether `decode` would return this very value, so that it need not be asked: that is most results, and half of what a step would cost in JSON."""
    return type(value) in _PLAIN and (kind is type(value) or kind is Any)


def loads(text: str) -> Any:
    """Read recorded JSON text."""
    return _decode(text)


def digest(text: str) -> str:
    """Return the SHA-256 of a recorded text, in hex."""
    data = text.encode()
    return (_sha256(data) if len(data) < 256 else hashlib.sha256(data)).hexdigest()


def decode(kind: Any, text: str, what: str, reader: ObjectReader | None = None) -> Any:
    """Return the value of a JSON text, as the annotation `kind` has it.

    Raises:
        NotJSON: the text is not of that type.
    """
    return _convert(kind, _decode(text), what, reader)


def _convert(kind: Any, data: Any, what: str, reader: ObjectReader | None) -> Any:
    convert = _converter(kind)
    if convert is None:
        return data
    token = _reader.set(reader)
    try:
        return convert(data)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise NotJSON(what, f"not of type {getattr(kind, '__name__', kind)}: {error}") from error
    finally:
        _reader.reset(token)


def _artifact(data: Any) -> Artifact:
    if not _SHA256.fullmatch(str(data[MARK])):
        raise ValueError("not a SHA-256")
    return Artifact(str(data[MARK]), int(data["size"]), str(data["media_type"]), str(data["home"]), _reader.get())


def _checked(kind: type | tuple[type, ...]) -> Callable[[Any], Any]:
    def check(data: Any) -> Any:
        if not isinstance(data, kind) or (isinstance(data, bool) and kind is int):
            raise TypeError(f"{data!r:.80} is not {kind}")
        return data

    return check


_SIMPLE: dict[Any, Callable[[Any], Any] | None] = {
    Any: None,
    object: None,
    inspect.Parameter.empty: None,
    dict: _checked(dict),
    list: _checked(list),
    str: _checked(str),
    bool: _checked(bool),
    int: _checked(int),
    float: lambda data: float(_checked((int, float))(data)),
    None: _checked(type(None)),
    type(None): _checked(type(None)),
    Artifact: _artifact,
    datetime: datetime.fromisoformat,
    date: date.fromisoformat,
    timedelta: lambda data: timedelta(seconds=data),
    uuid.UUID: uuid.UUID,
    Path: Path,
    tuple: tuple,
}


@functools.lru_cache(maxsize=4096)
def _converter(kind: Any) -> Callable[[Any], Any] | None:
    """Return what turns plain JSON into a type; None when there is nothing to do."""
    if kind in _SIMPLE:
        return _SIMPLE[kind]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Annotated, typing.Required, typing.NotRequired):
        return _converter(arguments[0])
    if origin is typing.Literal:
        return _one_of(arguments)
    if origin in (typing.Union, types.UnionType):
        return _union([_converter(item) for item in arguments])
    if origin in (list, Sequence, Iterable) or (origin is tuple and arguments[-1:] == (Ellipsis,)):
        return _many(list if origin in (Sequence, Iterable) else origin, _converter(arguments[0]))
    if origin is tuple:
        return _tuple([_converter(item) for item in arguments])
    if origin in (dict, Mapping):
        return _dict(_converter(arguments[0]) if arguments[0] is not str else None, _converter(arguments[1]))
    if isinstance(kind, typing.NewType):
        return _converter(kind.__supertype__)
    if isinstance(kind, type):
        if issubclass(kind, enum.Enum):
            return kind
        if hasattr(kind, "model_validate"):
            return typing.cast(Callable[[Any], Any], kind.model_validate)
        if dataclasses.is_dataclass(kind):
            return _fields(kind, typing.get_type_hints(kind))
        if issubclass(kind, tuple) and hasattr(kind, "_fields"):
            return _named(kind, typing.get_type_hints(kind))
        if typing.is_typeddict(kind):
            return _typed_dict(typing.get_type_hints(kind))
    return None


def _one_of(allowed: tuple[Any, ...]) -> Callable[[Any], Any]:
    def convert(data: Any) -> Any:
        if data not in allowed:
            raise ValueError(f"{data!r:.80} is not one of {allowed}")
        return data

    return convert


def _union(options: list[Callable[[Any], Any] | None]) -> Callable[[Any], Any]:
    def convert(data: Any) -> Any:
        for option in options:
            if option is None:
                return data
            try:
                return option(data)
            except (TypeError, ValueError, KeyError, AttributeError):
                continue
        raise ValueError(f"{data!r:.80} fits no member of the union")

    return convert


def _many(make: Any, item: Callable[[Any], Any] | None) -> Callable[[Any], Any]:
    def convert(data: Any) -> Any:
        values = _checked(list)(data)
        return make(values if item is None else [item(value) for value in values])

    return convert


def _tuple(items: list[Callable[[Any], Any] | None]) -> Callable[[Any], Any]:
    def convert(data: Any) -> Any:
        return tuple(value if item is None else item(value) for item, value in zip(items, data, strict=True))

    return convert


def _dict(key: Callable[[Any], Any] | None, value: Callable[[Any], Any] | None) -> Callable[[Any], Any]:
    def name(text: str) -> Any:
        if key is None:
            return text
        try:
            return key(text)
        except (TypeError, ValueError):
            return key(json.loads(text))  # numbers are texts as keys of JSON

    def convert(data: Any) -> Any:
        return {name(k): v if value is None else value(v) for k, v in _checked(dict)(data).items()}

    return convert


def _fields(kind: Any, hints: dict[str, Any]) -> Callable[[Any], Any]:
    settable = [field for field in dataclasses.fields(kind) if field.init]

    def convert(data: Any) -> Any:
        if isinstance(data, kind):
            return data
        unknown = _checked(dict)(data).keys() - {field.name for field in dataclasses.fields(kind)}
        if unknown:
            raise ValueError(f"unknown fields {sorted(unknown)}")
        found = {}
        for field in settable:
            if field.name in data:
                item = _converter(hints[field.name])
                found[field.name] = data[field.name] if item is None else item(data[field.name])
        return kind(**found)

    return convert


def _named(kind: Any, hints: dict[str, Any]) -> Callable[[Any], Any]:
    items = _tuple([_converter(hints.get(name, Any)) for name in kind._fields])
    return lambda data: kind(*items(data))


def _typed_dict(hints: dict[str, Any]) -> Callable[[Any], Any]:
    def convert(data: Any) -> Any:
        found = {}
        for name, value in _checked(dict)(data).items():
            item = _converter(hints.get(name, Any))
            found[name] = value if item is None else item(value)
        return found

    return convert


def _anything(*args: Any, **kwargs: Any) -> Any: ...


class Signature:
    """How the arguments and the result of a function are recorded."""

    def __init__(self, function: Callable[..., Any], name: str, *, skip: int = 0) -> None:
        """Read the annotations. `skip`: so many first parameters are not the caller's (a transaction's connection)."""
        self.name = name
        self._what = f"arguments of {name}"
        self._function = function
        try:
            signature = inspect.signature(function)
        except ValueError:  # a builtin that tells nothing
            signature = inspect.signature(_anything)
        parameters = list(signature.parameters.values())[skip:]
        self._signature = signature.replace(parameters=parameters)
        ordinary = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self._plain = [parameter.name for parameter in parameters] if all(item.kind in ordinary for item in parameters) else []
        """The names, when arguments that are given by position need nothing else to be bound."""
        self._heads = [f"{',' if index else ''}{_encoder.encode(name)}:" for index, name in enumerate(self._plain)]
        self._required = sum(parameter.default is inspect.Parameter.empty for parameter in parameters)

    @functools.cached_property
    def hints(self) -> dict[str, Any]:
        """The annotations, evaluated when they are first needed: they may name what is defined later."""
        try:
            return typing.get_type_hints(self._function, include_extras=True)
        except NameError:  # a name that only type checkers know, or a local one: plain JSON then
            return {}

    @functools.cached_property
    def result(self) -> Any:
        """The return annotation."""
        return self.hints.get("return", Any)

    @functools.cached_property
    def _kinds(self) -> list[Any]:
        return [self.hints.get(name, Any) for name in self._plain]

    def is_same(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Say whether `decode` would return these very arguments."""
        return not kwargs and len(args) <= len(self._kinds) and all(map(is_same, self._kinds, args))

    def encode(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, list[Artifact]]:
        """Return a call's arguments as a JSON object by name; `*args` and `**kwargs` under their names.

        Raises:
            TypeError: they do not fit the signature.
            NotJSON: one has no JSON form.
        """
        what = self._what
        if kwargs or not self._required <= len(args) <= len(self._plain):
            return encode(self._signature.bind(*args, **kwargs).arguments, what)
        text = "{"
        try:  # the same text as below, at a fifth of the time
            for head, value in zip(self._heads, args):  # noqa: B905 - the rest has defaults
                text += head + _PLAIN[type(value)](value)
            return text + "}", []
        except KeyError:
            return encode(dict(zip(self._plain, args, strict=False)), what)  # what `bind` gives
        except ValueError as error:  # an integer of thousands of digits
            raise NotJSON(what, str(error)) from error

    def decode(self, text: str, reader: ObjectReader | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments as the function takes them. Raises `NotJSON`."""
        data = _decode(text)
        names = self._plain[: len(data)]
        if len(names) == len(data) and all(name in data for name in names):
            return tuple(_convert(self.hints.get(name, Any), data[name], f"argument {name} of {self.name}", reader) for name in names), {}
        bound = inspect.BoundArguments(self._signature, OrderedDict())
        for name, parameter in self._signature.parameters.items():
            if name not in data:
                continue
            kind = self.hints.get(name, Any)
            match parameter.kind:
                case inspect.Parameter.VAR_POSITIONAL:
                    kind = tuple[kind, ...]  # type: ignore[valid-type]
                case inspect.Parameter.VAR_KEYWORD:
                    kind = dict[str, kind]  # type: ignore[valid-type]
            bound.arguments[name] = _convert(kind, data[name], f"argument {name} of {self.name}", reader)
        return bound.args, bound.kwargs


def iso(when: datetime) -> str:
    """Return a time as it is recorded: ISO 8601 in UTC with milliseconds, so that text order is time order."""
    utc = when if when.tzinfo is UTC else when.astimezone(UTC)
    return utc.isoformat("T", "milliseconds")[:-6] + "Z"

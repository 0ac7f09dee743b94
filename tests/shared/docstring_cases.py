"""What a docstring in Google style says, section by section, and what of a signature it omits."""

from __future__ import annotations

import builtins
import dataclasses
import enum
import inspect
import re
from typing import Any

import deqfuse

SECTIONS = ("Args", "Attributes", "Returns", "Raises", "Example")
# (B, d), (...), (N + 1, B), () of a scalar: dimensions, neither a call nor a remark in brackets.
SHAPE = re.compile(r"(?<!\w)\((?:(?:\.\.\.|\w+)(?: [*+] \w+)*(?:,[^)]*)?)?\)")


def sections(text: str) -> dict[str, str]:
    """The text below each section's header, without its indentation; "" is what precedes all."""
    found, name = {"": ""}, ""
    for line in inspect.cleandoc(text).splitlines():
        if line.removesuffix(":") in SECTIONS and line.endswith(":"):
            name = line.removesuffix(":")
            found[name] = ""
        elif line.startswith("    ") or not line:
            found[name] += line[4:] + "\n" if name else line + "\n"
        else:  # prose, also behind a section
            name = ""
            found[""] += line + "\n"
    return found


def entries(section: str) -> dict[str, str]:
    """Name and text of each ``name: text`` of a section."""
    found: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        if line and not line.startswith(" "):
            name, colon, text = line.partition(":")
            found[name] = text.strip() if colon else ""
        elif name and line:
            found[name] += " " + line.strip()
    return found


def holds_tensor(annotation: Any) -> bool:
    return bool(re.search(r"\b(Tensor|Values)\b", str(annotation)))


def omissions(what: Any) -> list[str]:
    """What the docstring of a function, a class or a property leaves out; [] where it is whole."""
    text = vars(what).get("__doc__") if inspect.isclass(what) else what.__doc__
    if not text or len(text.split()) < 4:
        return ["a docstring"]
    said = sections(text)
    missing = []
    if isinstance(what, property):
        if holds_tensor(inspect.signature(what.fget).return_annotation):
            missing += [] if SHAPE.search(text) else ["the shape"]
        return missing
    documented = {**entries(said.get("Args", "")), **entries(said.get("Attributes", ""))}
    for name, annotation in wanted(what).items():
        entry = documented.pop(name, None)
        if not entry:
            missing.append(f"the entry of {name}")
        elif holds_tensor(annotation) and not SHAPE.search(entry):
            missing.append(f"the shape of {name}")
    extra = set(documented) & set(entries(said.get("Args", "")))
    missing += [f"no entry of {name}, which is not there" for name in sorted(extra)]
    if not inspect.isclass(what):
        given = inspect.signature(what).return_annotation
        parameters = wanted(what)
        if given not in (None, "None") and parameters and not said.get("Returns", "").strip():
            missing.append("a section Returns")
        elif holds_tensor(given) and not SHAPE.search(said.get("Returns", text)):
            missing.append("the shape of what it returns")
    for name in entries(said.get("Raises", "")):
        if not hasattr(builtins, name) and not hasattr(deqfuse, name):
            missing.append(f"one error as an entry of Raises instead of {name!r}")
    return missing


def wanted(what: Any) -> dict[str, Any]:
    """Names that have to be explained, with their annotations: parameters, fields, members."""
    if not inspect.isclass(what):
        named = inspect.signature(what).parameters.values()
        stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
        found = {stars.get(p.kind, "") + p.name: p.annotation for p in named}
        return {name: note for name, note in found.items() if name not in ("self", "cls")}
    if issubclass(what, enum.Enum):
        return dict.fromkeys(what.__members__)
    if dataclasses.is_dataclass(what):
        return {f.name: f.type for f in dataclasses.fields(what)}
    if hasattr(what, "_fields"):
        return dict(what.__annotations__)
    if issubclass(what, BaseException) or "__init__" not in vars(what):
        return {}
    return wanted(what.__init__)


def members(owner: type) -> dict[str, Any]:
    """Public functions and properties of a class's own; what it overrides needs no text again."""
    found = {}
    for name, member in vars(owner).items():
        inherited = any(name in vars(base) for base in owner.__mro__[1:])
        if isinstance(member, (staticmethod, classmethod)):
            member = member.__func__
        if name.startswith("_") or (inherited and not getattr(member, "__doc__", None)):
            continue
        if isinstance(member, property) or inspect.isfunction(member):
            found[f"{owner.__name__}.{name}"] = member
    return found

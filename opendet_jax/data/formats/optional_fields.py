"""Optional fields of a json's entries: null is absent; a value that cannot be used counts as absent, and is counted."""

from collections.abc import Mapping
from typing import Any

from opendet_jax.data.formats.objects import clean_text
from opendet_jax.data.formats.records import Problems

FREQUENCIES = ("r", "c", "f", "u")  # rare, common, frequent; unseen in training
_WRITTEN = {"": False, "0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}


def flag(entry: Mapping[str, Any], name: str, problems: Problems, where: str) -> bool:
    """0 or 1, false or true, also as text: "0" is false. Anything else is counted, and false."""
    value = entry.get(name)
    if value is None or value in (0, 1):
        return bool(value)
    written = _WRITTEN.get(value.strip().lower()) if isinstance(value, str) else None
    if written is None:
        problems.add(f"{name} is neither 0 nor 1, taken as 0, box kept", f"{where}: {value!r:.40}")
    return bool(written)


def frequency(entry: Mapping[str, Any], problems: Problems, where: str) -> str:
    """The group of a category, or "" where there is none; one that is not of FREQUENCIES is counted."""
    value = entry.get("frequency")
    written = clean_text(value) if isinstance(value, str) else value
    if written is None or written == "":
        return ""
    if written in FREQUENCIES:
        return written
    problems.add("frequency is not r, c, f or u, category kept without", f"{where}: {value!r:.40}")
    return ""


def written_names(value: Any) -> list[str] | None:
    """The names in an annotation's field: comma-separated, a list, or one whole number. None where it is no text.

    Nulls in a list are left out.
    """
    if isinstance(value, str):
        return value.split(",")
    listed = value if isinstance(value, list) else [value]
    if all(part is None or isinstance(part, str) or type(part) is int for part in listed):
        return [str(part) for part in listed if part is not None]
    return None

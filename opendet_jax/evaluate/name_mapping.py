"""From a generated name to a class of the data set (method section 13). Every result says which mapping it used."""

from collections.abc import Iterable, Mapping
from typing import Any

UNMAPPED = -1  # the category_id of a detection whose name is no class


def normalise(name: str) -> str:
    """Lower case, underscores as spaces, no space more than needed: "Bus_(vehicle) " → "bus (vehicle)"."""
    return " ".join(name.replace("_", " ").lower().split())


class ExactMapping:
    """The mapping "exact": a name is the class whose name or synonym it equals, otherwise it is unnamed.

    Where a synonym of one class is the name of another, the name wins; of equal synonyms, the smaller id does.
    """

    title = "exact"

    def __init__(self, categories: Iterable[Mapping[str, Any]]):
        """`categories` have "id", "name" and, where known, "synonyms", as in LVIS's files."""
        ordered = sorted(categories, key=lambda category: category["id"])
        self._class: dict[str, int] = {}
        for category in ordered:
            self._class.setdefault(normalise(category["name"]), category["id"])
        for category in ordered:
            for synonym in category.get("synonyms", ()):
                self._class.setdefault(normalise(synonym), category["id"])

    def __call__(self, name: str) -> int:
        """The class's id, or UNMAPPED."""
        return self._class.get(normalise(name), UNMAPPED)

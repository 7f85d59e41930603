"""What a user gets of one image: boxes, names, scores; to read, to draw, to write down, to hand to other libraries."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from html import escape
from operator import index
from threading import Lock
from typing import Any, SupportsIndex

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from PIL import Image

from opendet_jax.data.images import ImageLike, load_image
from opendet_jax.drawing import colour_of, draw
from opendet_jax.errors import InputError
from opendet_jax.inference import Found

SHOWN = 8  # lines of a repr
NO_CATEGORY = -1  # of a name that is none, as in the files of `opendet eval`
HASHED_BYTES = 6  # of an id; 48 bits are exact in float64, in which supervision compares ids
_numbering = Lock()  # of a list of classes: supervision's InferenceSlicer may have several threads


@dataclass(frozen=True, eq=False)
class Detections:
    """What a user gets: the objects of one image, best score first.

    `found[3]`, `found[2:5]`, `found[found.scores > 0.5]` and `found[[4, 0]]` are Detections too, in the order asked
    for; iteration gives them one by one. Two of them are equal only where they are the same object.
    """

    boxes: Float[np.ndarray, "n 4"]  # (x0, y0, x1, y1) in pixels
    scores: Float[np.ndarray, " n"]  # how sure the model is that the box holds an object, in [0, 1]
    names: list[str]  # the best name of each object
    alternatives: list[list[str]] = field(repr=False)  # its other names, best first
    # Of name and alternatives: the mean log-probability of a token; of names chosen by alignment log σ(S). −∞: there
    # is no such alternative.
    name_scores: Float[np.ndarray, "n beams"] = field(repr=False)

    @classmethod
    def from_found(cls, found: Found) -> "Detections":
        return cls(
            boxes=found.boxes.astype(np.float32),
            scores=found.scores.astype(np.float32),
            names=[names[0] for names in found.names],
            alternatives=[names[1:] for names in found.names],
            name_scores=found.name_scores.astype(np.float32),
        )

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, chosen: SupportsIndex | slice | Sequence[Any] | ndarray) -> "Detections":
        """Those of a number, a slice, a mask or numbers. Raises IndexError."""
        places = np.arange(len(self))[chosen]
        if places.ndim > 1:
            raise IndexError(f"one object, a slice, a mask of {len(self)} or a list of numbers, not {chosen!r:.80}")
        rows = np.atleast_1d(places)
        names, alternatives = ([column[row] for row in rows.tolist()] for column in (self.names, self.alternatives))
        return Detections(self.boxes[rows], self.scores[rows], names, alternatives, self.name_scores[rows])

    def __iter__(self) -> Iterator["Detections"]:
        return (self[place] for place in range(len(self)))

    def __repr__(self) -> str:
        """One line an object: score, name, box, alternatives."""
        lines = [f"Detections({self._count}"]
        for score, name, box, others in self._shown:
            also = f"  also: {', '.join(map(repr, others))}" if others else ""
            lines.append(f"  {score}  {name!r}  box ({box}){also}")
        if len(self) > SHOWN:
            lines.append(f"  … and {len(self) - SHOWN} more")
        return "\n".join(lines) + ")"

    def _repr_html_(self) -> str:
        """The same as a table, for notebooks; each name has the colour of its box in `draw`."""
        rows = ""
        for score, name, box, others in self._shown:
            mark = f'<span style="color:rgb{colour_of(name)}">■</span>'
            also = escape(", ".join(others))
            rows += f"<tr><td>{mark} {escape(name or '?')}</td><td>{score}</td><td>{also}</td><td>{box}</td></tr>"
        head = "<tr><th>name</th><th>score</th><th>other names</th><th>box: x0, y0, x1, y1</th></tr>"
        more = f", the best {SHOWN} of them" if len(self) > SHOWN else ""
        return f"<table><caption>{self._count}{more}</caption>{head}{rows}</table>"

    @property
    def _count(self) -> str:
        return f"{len(self)} object{'' if len(self) == 1 else 's'}"

    @property
    def _shown(self) -> Iterator[tuple[str, str, str, list[str]]]:
        """Score, name, box and other names as they are shown, of the first few."""
        for place in range(min(len(self), SHOWN)):
            box = ", ".join(f"{number:.0f}" for number in self.boxes[place])
            yield f"{self.scores[place]:.2f}", self.names[place], box, self.alternatives[place]

    def draw(self, image: ImageLike, line_width: int | None = None, font_size: int | None = None) -> Image.Image:
        """The picture with boxes, names and scores; a small one comes back enlarged.

        `line_width` and `font_size` are in pixels of what comes back; None: by its size.
        Raises InputError where they are not whole numbers from 1 on, and what `load_image` raises.
        """
        picture = Image.fromarray(load_image(image))
        return draw(picture, self.boxes, self.names, self.scores, line_width, font_size)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings: boxes to a thousandth of a pixel, scores to five digits."""
        return {
            "boxes": self.boxes.astype(np.float64).round(3).tolist(),
            "scores": self.scores.astype(np.float64).round(5).tolist(),
            "names": list(self.names),
            "alternatives": [list(names) for names in self.alternatives],
            "name_scores": self._written_name_scores,
        }

    @property
    def _written_name_scores(self) -> list[list[float]]:
        """To five digits; as many of each object as it has names."""
        written = self.name_scores.astype(np.float64).round(5).tolist()
        return [scores[: 1 + len(others)] for scores, others in zip(written, self.alternatives, strict=True)]

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False)

    def to_coco(
        self, image_id: SupportsIndex, category_ids: Mapping[str, SupportsIndex] | None = None
    ) -> list[dict[str, Any]]:
        """Entries of a results file in COCO's form, which pycocotools, lvis and `opendet evaluate` read.

        `bbox` is (x, y, width, height) in pixels; `names` and `name_scores` run from the best name on.

        Args:
            image_id: of the image, in the annotations.
            category_ids: of the names that are categories. An object whose best name is none of them has category −1,
                which counts for no class; so have all where no names are given.
        """
        corners = self.boxes.astype(np.float64)
        bboxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1).round(3).tolist()
        return [
            {
                "image_id": index(image_id),
                "category_id": index((category_ids or {}).get(name, NO_CATEGORY)),
                "bbox": bbox,
                "score": score,
                "names": [name, *others],
                "name_scores": beams,
            }
            for name, others, bbox, score, beams in zip(
                self.names, self.alternatives, bboxes, self.scores.tolist(), self._written_name_scores, strict=True
            )
        ]

    def to_supervision(self, classes: list[str] | None = None) -> Any:
        """A `supervision.Detections`, with copies of all arrays; it needs supervision, the extra "supervision".

        Its `data` has what slicing, merging, suppression and tracking keep for each object: `class_name`,
        `alternatives` [n, beams − 1] ("" in the place of one that is not there) and `name_scores` [n, beams].

        Args:
            classes: a name's class_id is its place in this list, and a name that is not in it is appended: one list for
                all images of a data set. None: the class_id is a number of 48 bits that follows from the name alone,
                the same in every image and every run.

        Raises:
            ModuleNotFoundError: supervision is not installed.
            InputError: `classes` has a name twice.
        """
        try:
            import supervision  # pyright: ignore[reportMissingImports]
        except ModuleNotFoundError as error:
            if error.name != "supervision":
                raise
            needs = "to_supervision needs supervision: pip install 'opendet_jax[supervision]'"
            raise ModuleNotFoundError(needs, name=error.name) from error
        ids = [_hashed(name) for name in self.names] if classes is None else _places(self.names, classes)
        others = max(0, self.name_scores.shape[1] - 1, *map(len, self.alternatives))
        padded = [names + [""] * (others - len(names)) for names in self.alternatives]
        return supervision.Detections(
            xyxy=self.boxes.copy(),
            confidence=self.scores.copy(),
            class_id=np.array(ids, np.int64),
            data={
                "class_name": np.array(self.names, np.str_),
                "alternatives": np.array(padded, np.str_).reshape(len(self), others),
                "name_scores": self.name_scores.copy(),
            },
        )


def _hashed(name: str) -> int:
    return int.from_bytes(blake2b(name.encode("utf-8", "surrogatepass"), digest_size=HASHED_BYTES).digest())


def _places(names: Sequence[str], classes: list[str]) -> list[int]:
    """Of each name in `classes`, to which new ones are appended."""
    with _numbering:
        places = {name: place for place, name in enumerate(classes)}
        if len(places) < len(classes):
            twice = next(name for place, name in enumerate(classes) if places[name] != place)
            raise InputError(f"classes: {twice!r} is there twice")
        for name in names:
            if name not in places:
                places[name] = len(classes)
                classes.append(name)
        return [places[name] for name in names]

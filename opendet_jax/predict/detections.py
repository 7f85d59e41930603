"""What a user gets of one image: boxes, names, scores; to read, to draw, to write down."""

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from opendet_jax.data.images import ImageLike, load_image
from opendet_jax.drawing import draw
from opendet_jax.inference import Found

SHOWN = 8  # lines of a repr


@dataclass(frozen=True)
class Detections:
    """What a user gets: the objects of one image, best score first."""

    boxes: Float[np.ndarray, "n 4"]  # (x0, y0, x1, y1) in pixels
    scores: Float[np.ndarray, " n"]  # how sure the model is that the box holds an object, in [0, 1]
    names: list[str]  # the best name of each object
    alternatives: list[list[str]] = field(repr=False)  # its other names, best first
    name_scores: Float[np.ndarray, "n beams"] = field(
        repr=False
    )  # of name and alternatives, the best first: the mean log-
    # probability of a token; of names chosen by alignment log σ(S). −∞: there is no such alternative

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

    def __repr__(self) -> str:
        """One line an object: score, name, box, alternatives."""
        lines = [f"Detections({len(self)} object{'' if len(self) == 1 else 's'}"]
        for place in range(min(len(self), SHOWN)):
            score, name, box, others = (x[place] for x in (self.scores, self.names, self.boxes, self.alternatives))
            corners = ", ".join(f"{number:.0f}" for number in box)
            also = f"  also: {', '.join(map(repr, others))}" if others else ""
            lines.append(f"  {score:.2f}  {name!r}  box ({corners}){also}")
        if len(self) > SHOWN:
            lines.append(f"  … and {len(self) - SHOWN} more")
        return "\n".join(lines) + ")"

    def draw(self, image: ImageLike) -> Image.Image:
        """The picture with boxes, names and scores; a small one comes back enlarged."""
        return draw(Image.fromarray(load_image(image)), self.boxes, self.names, self.scores)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings: boxes to a thousandth of a pixel, scores to five digits."""
        return {
            "boxes": self.boxes.astype(np.float64).round(3).tolist(),
            "scores": self.scores.astype(np.float64).round(5).tolist(),
            "names": list(self.names),
            "alternatives": [list(names) for names in self.alternatives],
            "name_scores": [
                scores[: 1 + len(others)]
                for scores, others in zip(
                    self.name_scores.astype(np.float64).round(5).tolist(), self.alternatives, strict=True
                )
            ],
        }

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False)

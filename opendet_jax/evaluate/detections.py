"""What is found in one image, as the evaluation takes it in."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray


@dataclass(frozen=True)
class Detections:
    """n boxes, each of one class; a box may occur with several classes."""

    category_ids: Int64[ndarray, " n"]  # −1: its name is no class
    boxes: Float64[ndarray, "n 4"]  # x, y, w, h in pixels
    scores: Float64[ndarray, " n"]
    names: list[str] | None = None  # what each was called, where that is known

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, rows: Int64[ndarray, " k"]) -> "Detections":
        names = None if self.names is None else [self.names[row] for row in rows.tolist()]
        return Detections(self.category_ids[rows], self.boxes[rows], self.scores[rows], names)

    def best_first(self) -> Int64[ndarray, " n"]:
        """Of equal scores the earlier is better."""
        return np.argsort(-self.scores, kind="stable")

    def distinct_boxes(self) -> "Detections":
        """Each box once, as its best class."""
        if not len(self):
            return self
        order = self.best_first()
        _, first = np.unique(self.boxes[order], axis=0, return_index=True)
        return self[order[np.sort(first)]]

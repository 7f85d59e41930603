"""Average precision by LVIS's two protocols.

LVIS's own looks at the 300 best detections of an image. "Fixed AP" (Dave et al. 2021, "Evaluating Large-Vocabulary
Object Detectors: The Devil is in the Details") has no limit an image, but one a class: its 10,000 best over the data
set, chosen among all its detections, also those on images where the class is not judged. Matching and averaging are the
same.

A class may be of group "u" (never seen in training), reported apart and not part of AP, or of no group (data without
frequencies), part of AP only.
"""

from opendet_jax.evaluate.curves import Curves, curves
from opendet_jax.evaluate.outcomes import BestOfEachClass, Outcomes, Uncounted
from opendet_jax.evaluate.truth_index import SEEN_GROUPS, Truth

Metrics = dict[str, float | None]

PER_IMAGE = 300  # detections of an image, LVIS's own protocol
PER_CLASS = 10_000  # detections of a class over the data set, fixed AP


class LvisProtocols:
    """Image by image: `add`; at the end: `curves`, `fixed_curves`."""

    def __init__(self, truth: Truth, per_image: int = PER_IMAGE, per_class: int = PER_CLASS):
        self._truth, self._per_image = truth, per_image
        self._lvis: list[Outcomes] = []
        self._fixed = BestOfEachClass(len(truth.categories), per_class)

    def add(self, known: Outcomes, others: Uncounted) -> None:
        """All detections of an image: those that count, best first, and the others."""
        self._lvis.append(known[known.rank < self._per_image])
        self._fixed.add(known, others)

    def curves(self) -> Curves:
        return curves(Outcomes.join(self._lvis), self._truth.wanted)

    def fixed_curves(self) -> Curves:
        return curves(self._fixed.best(), self._truth.wanted)


def lvis_metrics(truth: Truth, found: Curves, prefix: str = "") -> Metrics:
    """AP over IoU 0.5…0.95, at 0.5 and 0.75, of the groups r, c, f, u, by size of object; AR over the same IoU."""
    seen = truth.classes_of(SEEN_GROUPS)
    sizes = {"s": "small", "m": "medium", "l": "large"}
    metrics = {
        "AP": found.ap(seen),
        "AP50": found.ap(seen, iou=0.5),
        "AP75": found.ap(seen, iou=0.75),
        **{f"AP{group}": found.ap(truth.classes_of([group])) for group in "rcfu"},
        **{f"AP{letter}": found.ap(seen, area=area) for letter, area in sizes.items()},
        "AR": found.ar(seen),
        **{f"AR{letter}": found.ar(seen, area=area) for letter, area in sizes.items()},
    }
    return {prefix + key: value for key, value in metrics.items()}

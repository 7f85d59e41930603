"""Finding and naming apart: how well objects are found whatever they are called, and how those found are called."""

from collections import Counter

import numpy as np

from opendet_jax.evaluate.average_precision import Outcomes, curves
from opendet_jax.evaluate.greedy_matching import match
from opendet_jax.evaluate.name_mapping import normalise_name
from opendet_jax.evaluate.protocols import PER_IMAGE, Metrics
from opendet_jax.evaluate.results import ScoredBoxes
from opendet_jax.evaluate.truth import ImageTruth, Truth, wanted


class Localisation:
    """All classes are one here, and each of an image's 300 best boxes counts, named or not: what nobody annotated is a
    mistake. Objects are found at IoU ≥ 0.5, by the matching that AP50 is computed from.
    """

    def __init__(self, truth: Truth):
        self._truth = truth
        self._names = [normalise_name(category["name"]) for category in truth.categories]
        self.synonyms = [  # of each class, its own name too
            {name, *map(normalise_name, category.get("synonyms", ()))}
            for name, category in zip(self._names, truth.categories, strict=True)
        ]
        # Classes of one name are one here, the first of them; those without a name are themselves.
        first = {name: place for place, name in reversed([*enumerate(self._names)]) if name}
        self._alike = np.array([first.get(name, place) for place, name in enumerate(self._names)] + [-1])
        self._kept: list[Outcomes] = []
        self._named = True  # whether every box has a name
        self.found, self.of_its_class, self._exact, self._synonymous = np.zeros((4, len(self._names)), np.int64)
        self.called: Counter[tuple[int, str]] = Counter()  # (place of the true class, name or class it was given)

    def add(self, image: ImageTruth, boxes: ScoredBoxes) -> None:
        """One image; `boxes` are distinct, each of its best class."""
        best = boxes[boxes.best_first()[:PER_IMAGE]]
        self._named &= best.names is not None or not len(best)
        one, n = image.as_one_class(), len(best)
        same = np.zeros(n, np.int64)
        outcome = match(same, best.boxes, np.zeros(n, np.bool_), one.objects)
        self._kept.append(Outcomes.of_image(image.place, outcome, same, best.scores, np.arange(n), np.arange(n)))
        places = self._truth.places(best.category_ids)
        for row in np.flatnonzero(outcome.found >= 0).tolist():
            name = best.names[row] if best.names is not None else None
            self._judge(int(image.objects.category[outcome.found[row]]), int(places[row]), name)

    def _judge(self, true: int, place: int, name: str | None) -> None:
        """A found object of class `true`, given the class `place` (−1: none) and `name`."""
        self.found[true] += 1
        self.of_its_class[true] += self._alike[place] == self._alike[true]
        if name is None:
            self.called[true, self._names[place] if place >= 0 else ""] += 1
            return
        called = normalise_name(name)
        self._exact[true] += called == self._names[true]
        self._synonymous[true] += called in self.synonyms[true]
        self.called[true, called] += 1

    def metrics(self) -> Metrics:
        objects = wanted([image.as_one_class().objects for image in self._truth.images.values()], 1)
        agnostic = curves(Outcomes.join(self._kept), objects)
        found, all_objects = int(self.found.sum()), int(objects[0, 0])

        def share(right: np.ndarray) -> float | None:
            return int(right.sum()) / found if found else None

        return {
            "agnostic_AP": agnostic.ap(),
            "agnostic_AP50": agnostic.ap(iou=0.5),
            "agnostic_AP75": agnostic.ap(iou=0.75),
            "agnostic_AR": agnostic.ar(),
            "agnostic_ARs": agnostic.ar(area="small"),
            "agnostic_ARm": agnostic.ar(area="medium"),
            "agnostic_ARl": agnostic.ar(area="large"),
            "recall50": found / all_objects if all_objects else None,
            "naming_accuracy": share(self.of_its_class),
            "exact_name_accuracy": share(self._exact) if self._named else None,
            "synonym_accuracy": share(self._synonymous) if self._named else None,
        }

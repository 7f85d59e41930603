"""tensorflow-datasets' view of a prepared data set: its features, its shards, what it notes about itself.

Needs no TensorFlow: records are array_record, pictures stay the files they were.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from opendet_jax.data.formats.records import Record
from opendet_jax.data.images import decode_record, encoded
from opendet_jax.data.pixels import MAX_PIXELS
from opendet_jax.data.prepared.read import PICTURE, SOURCES

Example = Mapping[str, Any]


class DetectionBuilder(tfds.core.ShardBasedBuilder, skip_registration=True):
    """Builds a data set of SOURCES, which its class names, from records in the shards that they are to be in.

    `data/prepared/write.py` builds with it in parallel, and can be interrupted; `download_and_prepare` of tfds works
    too, one shard after the other.
    """

    VERSION = tfds.core.Version("1.0.0")
    url_infos: Mapping[str, Any] = {}  # nothing is downloaded

    def __init__(self, shards: Sequence[Sequence[Record]], split: str, data_dir: Path, max_pixels: int = MAX_PIXELS):
        self.shards, self.split, self.max_pixels = shards, split, max_pixels
        super().__init__(data_dir=data_dir, file_format=tfds.core.FileFormat.ARRAY_RECORD)

    def _info(self) -> tfds.core.DatasetInfo:
        source = SOURCES[self.name]
        return tfds.core.DatasetInfo(
            builder=self,
            description=source.title,
            homepage=source.homepage,
            license=source.licence,
            citation=source.citation,
            features=tfds.features.FeaturesDict(
                {
                    PICTURE: tfds.features.Image(doc="the image file as it was"),
                    "image_id": tfds.features.Scalar(np.int64),
                    "file_name": tfds.features.Text(),
                    "width": tfds.features.Scalar(np.int64),
                    "height": tfds.features.Scalar(np.int64),
                    "boxes": tfds.features.Tensor(
                        shape=(None, 4), dtype=np.float32, doc="x0, y0, x1, y1 in pixels of the upright picture"
                    ),
                    "category_ids": tfds.features.Tensor(shape=(None,), dtype=np.int64),
                    "name_counts": tfds.features.Tensor(shape=(None,), dtype=np.int64, doc="names of each box"),
                    "names": tfds.features.Sequence(tfds.features.Text(), doc="those of all boxes in a row"),
                }
            ),
        )

    def _shard_iterators_per_split(self, dl_manager: Any) -> Mapping[str, Sequence[Any]]:
        return {self.split: [partial(self._examples, shard) for shard in self.shards]}

    def _examples(self, shard: Sequence[Record]) -> Iterator[tuple[int, Example]]:
        for number, record in enumerate(shard):
            yield number, example(record, self.max_pixels)

    @cached_property
    def _serializer(self) -> ExampleSerializer:
        assert self.info.features is not None
        specs: Any = self.info.features.get_serialized_info()
        return ExampleSerializer(specs)

    def serialised(self, made: Example) -> bytes:
        """An array_record record: what tfds makes of it, but always the same bytes."""
        assert self.info.features is not None
        record = self._serializer.get_tf_example(self.info.features.encode_example(made))
        return record.SerializeToString(deterministic=True)


class VisualGenome(DetectionBuilder, skip_registration=True):
    name = "visual_genome"


class LvisV1(DetectionBuilder, skip_registration=True):
    name = "lvis_v1"


class Coco2017(DetectionBuilder, skip_registration=True):
    name = "coco_2017"


class Objects365V2(DetectionBuilder, skip_registration=True):
    name = "objects365_v2"


class CocoJson(DetectionBuilder, skip_registration=True):
    name = "coco_json"


class LabelFolder(DetectionBuilder, skip_registration=True):
    name = "label_folder"


BUILDERS = {builder.name: builder for builder in (VisualGenome, LvisV1, Coco2017, Objects365V2, LabelFolder, CocoJson)}


def example(record: Record, max_pixels: int) -> Example:
    """What is stored of a record. Raises ImageError where its picture is unreadable or not of the annotated size."""
    content = encoded(record)
    decode_record(record, content, max_pixels)
    return {
        PICTURE: content,
        "image_id": record.image_id,
        "file_name": record.path.name,
        "width": record.width,
        "height": record.height,
        "boxes": record.boxes,
        "category_ids": record.category_ids,
        "name_counts": [len(names) for names in record.names],
        "names": [name for names in record.names for name in names],
    }

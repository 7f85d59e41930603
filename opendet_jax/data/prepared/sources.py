"""The data sets that `python -m opendet_jax.data prepare` knows by name."""

from typing import NamedTuple


class Source(NamedTuple):
    """What tfds notes beside the records."""

    title: str
    homepage: str
    licence: str
    citation: str


SOURCES = {
    "visual_genome": Source(
        "Visual Genome: objects.json, or GenerateU's train_from_objects.json",
        "https://homes.cs.washington.edu/~ranjay/visualgenome/",
        "CC BY 4.0",
        "Krishna et al.: Visual Genome: Connecting Language and Vision Using Crowdsourced Dense Annotations, 2017",
    ),
    "lvis_v1": Source(
        "LVIS v1, on the photographs of COCO 2017",
        "https://www.lvisdataset.org/",
        "annotations CC BY 4.0; each photograph its own",
        "Gupta et al.: LVIS: A Dataset for Large Vocabulary Instance Segmentation, 2019",
    ),
    "coco_2017": Source(
        "COCO 2017",
        "https://cocodataset.org/",
        "annotations CC BY 4.0; each photograph its own",
        "Lin et al.: Microsoft COCO: Common Objects in Context, 2014",
    ),
    "objects365_v2": Source(
        "Objects365 v2",
        "https://www.objects365.org/",
        "annotations CC BY 4.0; each photograph its own",
        "Shao et al.: Objects365: A Large-Scale, High-Quality Dataset for Object Detection, 2019",
    ),
    "label_folder": Source("a YOLO folder (data.yaml) or a Pascal VOC folder", "", "", ""),
    "coco_json": Source("any json in the form of COCO or LVIS", "", "", ""),
}

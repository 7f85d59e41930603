"""Small data sets in the files and folders that people have after downloading each of the published ones."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ("tree", "man", "traffic light", "Window", "shirt, striped", "sky", "leaf", "bus (vehicle)")


def write_image(path: Path, width: int, height: int, seed: int) -> None:
    """A smooth JPEG, different for every seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpeg(width, height, seed))


def jpeg(width: int, height: int, seed: int) -> bytes:
    corners = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR).save(file, "JPEG", quality=80)
    return file.getvalue()


def visual_genome(folder: Path, images: int, boxes: int = 5, names: int = len(NAMES), size: int = 32) -> Path:
    """objects.json and image_data.json as of version 1.4, pictures in VG_100K and VG_100K_2; path of the first."""
    rng = np.random.default_rng(0)
    objects, data = [], []
    for i in range(1, images + 1):
        archive = ("VG_100K", "VG_100K_2")[i % 2]
        url = f"https://cs.stanford.edu/people/rak248/{archive}/{i}.jpg"
        width, height = (int(side) for side in rng.integers(size // 2, size + 1, 2))
        write_image(folder / archive / f"{i}.jpg", width, height, i)
        data.append({"width": width, "url": url, "height": height, "image_id": i, "coco_id": None, "flickr_id": None})
        described = []
        for n in range(boxes):
            number = int(rng.zipf(1.5)) % names
            name = NAMES[number] if number < len(NAMES) else f"name {number}"
            x, y = int(rng.integers(width - 3)), int(rng.integers(height - 3))
            w, h = (int(side) for side in rng.integers(3, size, 2))
            described.append(
                {"synsets": [f"{name}.n.01"], "h": h, "object_id": 1000 * i + n, "merged_object_ids": []}
                | {"names": [name], "w": w, "y": y, "x": x}
            )
        objects.append({"image_id": i, "objects": described, "image_url": url})
    (folder / "objects.json").write_text(json.dumps(objects))
    (folder / "image_data.json").write_text(json.dumps(data))
    return folder / "objects.json"


def coco_json(path: Path, images: list[dict], annotations: list[dict], categories: list[dict], order=()) -> Path:
    """A json whose lists come in the given order."""
    parts = {"info": {"version": "1.0"}, "licenses": [{"id": 1, "name": "none"}]}
    parts |= {"images": images, "annotations": annotations, "categories": categories}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({name: parts[name] for name in order} | parts))
    return path


CATEGORIES = [{"id": 1, "name": "person", "supercategory": "person"}, {"id": 3, "name": "traffic light"}]


def lvis(folder: Path) -> Path:
    """lvis_v1_val.json: no file names, images of COCO's train2017 and val2017, annotations before the images."""
    categories = [
        {"id": 1, "name": "bus_(vehicle)", "synonyms": ["bus_(vehicle)", "autobus"], "frequency": "c", "def": "a bus"},
        {"id": 2, "name": "aerosol_can", "synonyms": ["aerosol_can", "spray_can"], "frequency": "r", "def": "a can"},
    ]
    images, annotations = [], []
    for i, part in enumerate(("val2017", "train2017", "val2017"), 1):
        write_image(folder / part / f"{i:012d}.jpg", 40, 30, i)
        url = f"http://images.cocodataset.org/{part}/{i:012d}.jpg"
        images.append({"id": i, "coco_url": url, "width": 40, "height": 30, "license": 1})
        images[-1] |= {"neg_category_ids": [2], "not_exhaustive_category_ids": [1]}
        segmentation = [[1.0, 1.0, 9.0, 1.0, 9.0, 9.0]]
        annotations.append({"id": i, "image_id": i, "category_id": 1 + i % 2, "bbox": [1.5, 2, 10, 12.25]})
        annotations[-1] |= {"segmentation": segmentation, "area": 60.0}
    path = folder / "lvis_v1_val.json"
    return coco_json(path, images, annotations, categories, ("info", "annotations", "images", "licenses"))


def coco(folder: Path) -> Path:
    """instances_val2017.json: bare file names, a crowd region, an image without objects."""
    images, annotations = [], []
    for i in (7, 9):
        write_image(folder / "val2017" / f"{i:012d}.jpg", 40, 30, i)
        images.append({"id": i, "file_name": f"{i:012d}.jpg", "width": 40, "height": 30})
        images[-1]["coco_url"] = f"http://images.cocodataset.org/val2017/{i:012d}.jpg"
    box = {"image_id": 7, "category_id": 3, "area": 90.0, "iscrowd": 0}
    annotations = [
        {"id": 1, **box, "bbox": [3, 4, 10, 9]},
        {"id": 2, **box, "bbox": [0, 0, 40, 30], "iscrowd": 1, "segmentation": {"counts": "", "size": [30, 40]}},
    ]
    return coco_json(folder / "annotations" / "instances_val2017.json", images, annotations, CATEGORIES)


def objects365(folder: Path, unpacked: str) -> Path:
    """zhiyuan_objv2_val.json; `unpacked` says where a picture lies, by {version}, {patch} and {name}."""
    images, annotations = [], []
    for i, patch in enumerate(("patch8", "patch16"), 1):
        name = f"objects365_v{i}_0000000{i}.jpg"
        write_image(folder / unpacked.format(patch=patch, version=f"v{i}", name=name), 40, 30, i)
        images.append({"id": i, "file_name": f"images/v{i}/{patch}/{name}", "width": 40, "height": 30, "license": 5})
        annotations.append({"id": i, "image_id": i, "category_id": 1, "bbox": [4.5, 5, 6.25, 7], "area": 43.75})
        annotations[-1] |= {"iscrowd": 0, "isfake": 0, "isreflected": 0}
    return coco_json(folder / "zhiyuan_objv2_val.json", images, annotations, CATEGORIES)


def generate_u(folder: Path) -> Path:
    """train_from_objects.json: Visual Genome in LVIS's form, names in the annotations, one category."""
    images, annotations = [], []
    for i, archive in enumerate(("VG_100K", "VG_100K_2"), 1):
        write_image(folder / archive / f"{i}.jpg", 40, 30, i)
        images.append({"id": i, "file_name": f"{i}.jpg", "width": 40, "height": 30})
    box = {"category_id": 1, "bbox": [4, 5, 6, 7], "area": 42, "iscrowd": 0}
    annotations = [
        {"id": 1, "image_id": 1, **box, "caption": "third", "object_name": "second", "caption_with_token": "first"},
        {"id": 2, "image_id": 1, **box, "caption": "third", "object_name": "second, also second"},
        {"id": 3, "image_id": 2, **box, "caption": "third"},
        {"id": 4, "image_id": 2, **box},
    ]
    return coco_json(folder / "train_from_objects.json", images, annotations, [{"id": 1, "name": "object"}])


def yolo(folder: Path) -> Path:
    """data.yaml, images and labels as Roboflow has them: a folder for each split, an upper-case ending, an empty label
    file."""
    lines = {
        "train": ("1 0.5 0.5 0.25 0.4\n0 0.25 0.25 0.5 0.5\n", "", "0 0.5 0.5 1 1\n"),
        "valid": ("1 0.3 0.4 0.2 0.2\n",),
    }
    for split, texts in lines.items():
        for number, text in enumerate(texts):
            write_image(folder / split / "images" / f"{number}.{('jpg', 'JPG')[number % 2]}", 40, 30, number)
            label = folder / split / "labels" / f"{number}.txt"
            label.parent.mkdir(parents=True, exist_ok=True)
            label.write_text(text)
    splits = "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n"
    (folder / "data.yaml").write_text(f"{splits}\nnc: 2\nnames: ['person', 'bus_(vehicle)']\n")
    return folder / "data.yaml"


def pascal_voc(folder: Path) -> Path:
    """A year of the devkit: Annotations, ImageSets, JPEGImages; one object is difficult."""
    sets = folder / "ImageSets" / "Main"
    sets.mkdir(parents=True)
    (folder / "Annotations").mkdir()
    for number, split in enumerate(("train", "train", "val"), 1):
        name = f"2007_{number:06d}"
        write_image(folder / "JPEGImages" / f"{name}.jpg", 40, 30, number)
        objects = "".join(
            f"<object><name>{called}</name><pose>Left</pose><truncated>0</truncated><difficult>{difficult}</difficult>"
            f"<bndbox><xmin>{x}</xmin><ymin>1</ymin><xmax>{x + 9}</xmax><ymax>30</ymax></bndbox></object>"
            for called, x, difficult in (("dog", 1, 0), ("pottedplant", 21, number % 2))
        )
        (folder / "Annotations" / f"{name}.xml").write_text(
            f"<annotation><folder>VOC2007</folder><filename>{name}.jpg</filename><size><width>40</width>"
            f"<height>30</height><depth>3</depth></size><segmented>0</segmented>{objects}</annotation>"
        )
        with (sets / f"{split}.txt").open("a") as file:
            file.write(f"{name}\n")
    return folder

"""Which names a table gets: those that training looks up, however they come."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest

from opendet_jax.config import DataConfig, DatasetPaths
from opendet_jax.data.datasets import read_annotations
from opendet_jax.data.formats.json_stream import AnnotationError
from opendet_jax.data.text_embeddings import EmbeddingError, TableEmbedder, TextEmbedder, make_embedder, table_command
from opendet_jax.errors import WeightsError
from opendet_jax.weights import commands, embed_names
from opendet_jax.weights.__main__ import main
from opendet_jax.weights.embed_names import read_annotated, read_names
from tests.data import published

CATEGORIES = [
    {"id": 1, "name": "bus_(vehicle)"},
    {"id": 2, "name": " Cat "},
    {"id": 3, "name": "cat"},
    {"id": 4, "name": "without a box"},
]


def box(number: int, category: int, **fields) -> dict:
    return {"id": number, "image_id": 1, "category_id": category, "bbox": [1, 1, 9, 9], **fields}


@pytest.fixture
def coco(tmp_path) -> Path:
    """Names of categories; no picture is there."""
    return write(tmp_path / "train.json", [box(1, 1), box(2, 2), box(3, 3)])


@pytest.fixture
def captions(tmp_path) -> Path:
    """Names of a field, where underscores are kept."""
    return write(tmp_path / "captions.json", [box(1, 1, label="red_bus, Bus_(Vehicle)"), box(2, 2, label="cat")])


def write(path: Path, annotations: list[dict]) -> Path:
    images = [{"id": 1, "file_name": "1.jpg", "width": 20, "height": 20}]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": CATEGORIES}))
    return path


def test_names_of_annotations_are_those_of_training(coco, captions):
    listed = read_annotated([str(coco), str(captions)], ["", "label"])
    assert listed.names == ["Bus_(Vehicle)", "Cat", "bus (vehicle)", "red_bus"]
    assert listed.notes == (
        f"{coco}: 3 names in 1 images",
        f"{captions}: 3 names in 1 images",
        "1 names are others again (but for capitals and space around them): cat",
    )
    with_fields = read_annotations(captions, "", "label")[0].names()
    assert set(with_fields) <= {*listed.names, "cat"}
    assert read_annotated([str(captions)], ["label"]).names == ["Bus_(Vehicle)", "cat", "red_bus"]
    assert read_annotated([str(captions)], []).names == ["Cat", "bus (vehicle)"]


def test_what_annotations_hold_that_cannot_be_used_is_said(tmp_path):
    path = write(tmp_path / "a.json", [box(1, 1), box(2, 9), box(3, 2, bbox=[1, 1, 0, 0])])
    listed = read_annotated([str(path)], [])
    assert listed.names == ["bus (vehicle)"]
    assert "1 × unknown category id" in listed.notes[1]
    assert "1 × box without area" in listed.notes[1]


def test_visual_genome_and_prepared_folders(tmp_path):
    (tmp_path / "image_data.json").write_text(
        json.dumps([{"image_id": 1, "width": 20, "height": 20, "url": "https://x/VG_100K/1.jpg"}])
    )
    thing = {"object_id": 1, "x": 1, "y": 1, "w": 5, "h": 5, "names": ["stop_sign"]}
    (tmp_path / "objects.json").write_text(json.dumps([{"image_id": 1, "objects": [thing]}]))
    assert read_annotated([str(tmp_path / "objects.json")], []).names == ["stop_sign"]
    with pytest.raises(AnnotationError, match="no field 'label'"):
        read_annotated([str(tmp_path / "objects.json")], ["label"])
    with pytest.raises(AnnotationError):
        read_annotated([str(tmp_path)], [])


def test_annotations_without_names(tmp_path, coco):
    with pytest.raises(WeightsError, match=r"empty\.json: no box has a name"):
        read_annotated([str(write(tmp_path / "empty.json", []))], [])
    with pytest.raises(WeightsError, match="3 fields for 2 annotations; give one, or as many"):
        read_annotated([str(coco), str(coco)], ["a", "b", "c"])
    with pytest.raises(AnnotationError, match="no annotation has the field 'label'"):
        read_annotated([str(coco)], ["label"])


@pytest.mark.parametrize("name", ["names.txt", "names.json"])
def test_lists_are_read_as_categories_are(tmp_path, name):
    names = ["bus_(vehicle)", " cat ", "Cat", "dog", "cat", "bus (vehicle)"]
    text = json.dumps(names) if name.endswith("json") else "\ufeff" + "\r\n".join(["", *names, ""])
    (tmp_path / name).write_bytes(text.encode())
    listed = read_names(tmp_path / name)
    assert listed.names == ["bus (vehicle)", "cat", "dog"]
    assert listed.notes == (
        "1 names have spaces in the place of underscores: bus_(vehicle)",
        "3 names are others again (but for capitals and space around them): Cat, cat, bus (vehicle)",
    )


def config_of(table: Path, *sets: DatasetPaths) -> DataConfig:
    train, *others = sets
    return DataConfig(text_embeddings="table", text_table=str(table), train=train, mixture=tuple(others))


def missing_names(embedder: TextEmbedder, names: list[str]) -> str:
    with pytest.raises(EmbeddingError) as error:
        embedder.rows(names)
    return str(error.value)


def test_trainings_error_names_the_command_that_mends_it(tmp_path, coco, captions, monkeypatch):
    """Its arguments make the table that training then takes."""
    np.save(tmp_path / "my table.npy", np.eye(1, 8))
    (tmp_path / "my table.json").write_text('["dog"]')
    sets = (DatasetPaths(str(coco)), DatasetPaths(str(captions), name_field="label"))
    config = config_of(tmp_path / "my table.npy", *sets)
    names = [name for paths in sets for name in read_annotations(paths.annotations, "", paths.name_field)[0].names()]
    message = missing_names(make_embedder(config, 8, "my clip"), names)
    assert "has no embedding of 5 names: 'Bus_(Vehicle)', 'Cat', " in message
    assert len(message.splitlines()) == 1
    *_, command = message.partition("make one that has them: ")
    program, dash, module, *arguments = shlex.split(command)
    assert (program, dash, module) == ("python", "-m", "opendet_jax.weights")

    class Encoder(embed_names.TextEncoder):
        width = 8

        def __init__(self):
            pass

        def __call__(self, texts):
            return np.eye(len(texts), 8, dtype=np.float32)

        def cut(self, names):
            return []

    monkeypatch.setattr(commands.folders, "read_note", lambda folder: {"folder": str(folder)})
    monkeypatch.setattr(commands, "load_text_encoder", lambda folder, tokenizer: Encoder())
    main(arguments)
    made = Path(arguments[arguments.index("--out") + 1])
    assert made == tmp_path / "my table_2.npy"
    assert arguments[arguments.index("--encoder") + 1] == "my clip"
    assert TableEmbedder(made).rows(names)[np.arange(len(names))].shape == (6, 8)


def test_the_command_for_other_configs(tmp_path, coco):
    table = tmp_path / "names.npy"
    config = config_of(table, DatasetPaths(str(coco)), DatasetPaths(str(coco)))
    expected = f"python -m opendet_jax.weights embed-names --annotations {coco} --encoder weights/clip --out {table}"
    assert table_command(config) == expected
    with pytest.raises(EmbeddingError, match=r"no such file .*; make it: python -m opendet_jax.weights embed-names"):
        make_embedder(config, 8)
    fields = config_of(table, DatasetPaths("a", name_field="x"), DatasetPaths("b", name_field="x"))
    assert "--annotations a b --name_field x --encoder" in table_command(fields)
    scenes = DataConfig(source="scenes", text_embeddings="table", text_table=str(table))
    assert "embed-names --names names.txt --encoder weights/clip" in table_command(scenes)


def test_the_text_of_a_name_is_that_of_the_mapping():
    """Tables and the mapping by a text encoder must agree on what is embedded."""
    from opendet_jax.evaluate.name_mapping import class_text

    for name in ("cat", "bus (vehicle)"):
        assert embed_names.text_of(name) == class_text(name)


def test_names_of_label_folders_are_those_of_the_split_that_is_read(tmp_path):
    yolo, voc = str(published.yolo(tmp_path / "yolo")), str(published.pascal_voc(tmp_path / "voc"))
    assert read_annotated([yolo], []).names == ["bus (vehicle)", "person"]
    assert read_annotated([f"{yolo}:val"], []).names == ["bus (vehicle)"]
    sets = (DatasetPaths(yolo), DatasetPaths(voc))
    command = shlex.split(table_command(DataConfig(train=sets[0], mixture=(sets[1],), eval=sets[0])))
    assert command[4:8] == ["--annotations", yolo, voc, f"{yolo}:val"]
    command = shlex.split(table_command(DataConfig(train=sets[1], eval=DatasetPaths(f"{voc}:trainval"))))
    assert command[4:7] == ["--annotations", voc, f"{voc}:trainval"]

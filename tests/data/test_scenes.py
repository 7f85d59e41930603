"""The generated scenes: reproducible, complete, with the frequency groups and unseen names they promise."""

import json
from collections import Counter

import numpy as np
import pytest
from lvis import LVIS
from PIL import Image

from opendet_jax.data import scene_drawing, scenes
from opendet_jax.data.scene_drawing import (
    COLOURS,
    KINDS,
    MIN_SIDE,
    PATTERNS,
    SHAPES,
    UNSEEN,
    draw_scene,
    kind_probabilities,
)
from opendet_jax.data.scenes import frequency, generate, main


@pytest.fixture(scope="module")
def train_json(tmp_path_factory):
    return generate(tmp_path_factory.mktemp("scenes"), 60, seed=3, split="train", progress=False)


@pytest.fixture(scope="module")
def val_json(tmp_path_factory, train_json):
    folder = tmp_path_factory.mktemp("scenes")
    return generate(folder, 40, seed=3, split="val", frequencies_from=train_json, progress=False)


def test_image_depends_on_seed_split_and_index_only(train_json, tmp_path):
    fewer = generate(tmp_path, 5, seed=3, split="train", progress=False)
    for i in range(5):
        name = f"images/{i:06d}.jpg"
        assert (fewer.parent / name).read_bytes() == (train_json.parent / name).read_bytes()
    many, few = json.loads(train_json.read_text()), json.loads(fewer.read_text())
    assert few["annotations"] == many["annotations"][: len(few["annotations"])]
    pictures = [
        draw_scene(*key, size=64)[0] for key in ((0, "train", 0), (1, "train", 0), (0, "val", 0), (0, "train", 1))
    ]
    assert len({p.tobytes() for p in pictures}) == 4


def test_lvis_package_reads_the_json(train_json):
    lvis = LVIS(str(train_json))
    assert len(lvis.get_img_ids()) == 60
    assert len(lvis.get_cat_ids()) == len(KINDS) == 96
    for image in lvis.dataset["images"]:
        present = {a["category_id"] for a in lvis.img_ann_map[image["id"]]}
        assert 1 <= len(lvis.img_ann_map[image["id"]]) <= 8
        assert present.isdisjoint(image["neg_category_ids"])
        assert len(present) + len(image["neg_category_ids"]) == 96


def test_boxes_lie_in_the_image_and_are_not_tiny(train_json):
    boxes = np.array([a["bbox"] for a in json.loads(train_json.read_text())["annotations"]])
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= 128).all()
    assert boxes[:, 2:].max(1).min() >= MIN_SIDE * 128 - 1


def test_boxes_are_tight_around_what_is_drawn(monkeypatch):
    """Single objects on black: their pixels span their box."""
    monkeypatch.setattr(scene_drawing, "MAX_OBJECTS", 1)
    monkeypatch.setattr(scene_drawing, "_background", lambda rng, size: np.zeros((size, size, 3), np.float32))
    for i in range(100):
        pixels, [drawn] = draw_scene(0, "val", i, 128)
        rows, columns = (np.flatnonzero(pixels.any((axis, 2))) for axis in (1, 0))
        x, y, w, h = drawn.box
        found = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        np.testing.assert_allclose(found, (x, y, x + w, y + h), atol=1)
        assert 0.2 * w * h < drawn.area <= w * h


def test_every_object_stays_visible(monkeypatch):
    """What is drawn later leaves 70 % of every object."""
    layers = []
    place = scene_drawing._place

    def recording(rng, alpha, coverage, spare, size):
        layers[:] = [coverage]  # the list that draw_scene goes on filling
        return place(rng, alpha, coverage, spare, size)

    monkeypatch.setattr(scene_drawing, "_place", recording)
    for i in range(40):
        _, objects = draw_scene(0, "train", i, 64)
        visible = [float(layer.sum()) / o.area for layer, o in zip(layers[0], objects, strict=True)]
        assert min(visible) >= 0.7 - 1e-4


def test_unseen_names_are_kept_from_training_but_their_parts_are_not():
    assert len(UNSEEN) == 12
    seen = set(KINDS) - UNSEEN
    for part, values in enumerate((COLOURS, PATTERNS, SHAPES)):
        assert {kind[part] for kind in seen} == set(values)
    drawn = {KINDS[o.kind] for i in range(150) for o in draw_scene(1, "train", i, 32)[1]}
    assert drawn.isdisjoint(UNSEEN)
    drawn = {KINDS[o.kind] for i in range(150) for o in draw_scene(1, "val", i, 32)[1]}
    assert len(drawn & UNSEEN) >= 10
    assert len({kind.name for kind in KINDS}) == 96


@pytest.mark.parametrize("images", [2000, 6000])
def test_every_frequency_group_has_categories(images):
    """From the probabilities of the names: the chance to be in a picture of 4.5 objects on average."""
    share = 1 - np.mean([(1 - kind_probabilities("train")) ** n for n in range(1, 9)], axis=0)
    groups = Counter(frequency(round(s * images), images) for s in share)
    assert groups["u"] == 12
    assert min(groups[letter] for letter in "rcf") >= 15


def test_val_carries_the_frequencies_of_training(train_json, val_json):
    train, val = (json.loads(path.read_text()) for path in (train_json, val_json))
    assert train["categories"] == val["categories"]
    images_of = Counter(category for _, category in {(a["image_id"], a["category_id"]) for a in train["annotations"]})
    for category in train["categories"]:
        assert category["image_count"] == images_of[category["id"]]
        assert (category["frequency"] == "u") == (images_of[category["id"]] == 0)


def test_complete_sets_are_reused_and_incomplete_ones_redone(tmp_path):
    path = generate(tmp_path, 3, seed=0, size=32, progress=False)
    stamp = path.stat().st_mtime_ns
    assert generate(tmp_path, 3, seed=0, size=32, progress=False).stat().st_mtime_ns == stamp
    picture = path.parent / "images/000001.jpg"
    before = picture.read_bytes()
    picture.unlink()
    assert generate(tmp_path, 3, seed=0, size=32, progress=False) == path
    assert picture.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.parent.name]  # no temporary folder is left


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path, 3, seed=0, size=32, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_frequencies_are_read_before_anything_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(scenes, "draw_scene", lambda *_: pytest.fail("a scene was drawn"))
    with pytest.raises(scenes.SceneError, match=r"none\.json: cannot be read"):
        scenes.generate(tmp_path / "out", 3, 0, split="val", frequencies_from=tmp_path / "none.json")
    assert not (tmp_path / "out").exists()


def test_command_line(tmp_path, capsys):
    main(["--out", str(tmp_path), "--images", "2", "--size", "40", "--split", "val", "--seed", "5"])
    path = capsys.readouterr().out.strip()
    with Image.open(f"{path.rsplit('/', 1)[0]}/images/000001.jpg") as image:
        assert image.size == (40, 40)


def test_refuses_sizes_that_cannot_hold_a_scene(tmp_path):
    with pytest.raises(ValueError, match="size=8"):
        generate(tmp_path, 1, seed=0, size=8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "-3"], "-3 is less than 1"),
        (["--images", "0"], "0 is less than 1"),
        (["--images", "many"], "'many' is not a whole number"),
        (["--size", "16"], "16 is less than 32"),
        (["--seed", "-1"], "-1 is less than 0"),
        (["--frequencies_from", "none.json"], "error: none.json: cannot be read: No such file or directory"),
        (["--frequencies_from", __file__], "is not the json of a drawn set"),
    ],
)
def test_arguments_that_cannot_work_are_one_line(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        main(["--out", str(tmp_path), "--images", "2", "--size", "40", *arguments])
    assert message in f"{ended.value} {capsys.readouterr().err}"
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"error: --out .*file: cannot be written: File exists"):
        main(["--out", str(tmp_path / "file"), "--images", "2"])

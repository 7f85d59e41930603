"""Preparing: what is in a folder afterwards, and what happens when preparing is disturbed."""

import errno
import hashlib
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from opendet_jax.data import __main__ as command
from opendet_jax.data.datasets import read_annotations
from opendet_jax.data.formats.json_stream import AnnotationError
from opendet_jax.data.images import ImageError, open_record
from opendet_jax.data.prepared import shards as shards_module
from opendet_jax.data.prepared.builders import BUILDERS
from opendet_jax.data.prepared.read import SOURCES
from opendet_jax.data.prepared.shards import PrepareError
from opendet_jax.data.prepared.write import Job, prepare
from opendet_jax.evaluate.truth import Truth, lvis_truth
from tests.data import published


def job(tmp_path, images=10, **changes):
    """Visual Genome in two full shards and one of two images."""
    if not (tmp_path / "vg").exists():
        published.visual_genome(tmp_path / "vg", images)
    values = {"data_set": "visual_genome", "annotations": tmp_path / "vg/objects.json", "images": tmp_path / "vg"}
    return Job(**{**values, "out": tmp_path / "out", "images_per_shard": 4, **changes})


def files(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def shards(folder):
    return sorted(folder.glob("[!.]*.array_record-*"))


def assert_same(prepared, source):
    assert len(prepared) == len(source)
    for ours, theirs in zip(prepared.records, source.records, strict=True):
        assert (ours.image_id, ours.width, ours.height) == (theirs.image_id, theirs.width, theirs.height)
        np.testing.assert_array_equal(ours.boxes, theirs.boxes)
        np.testing.assert_array_equal(ours.category_ids, theirs.category_ids)
        assert (ours.boxes.dtype, ours.category_ids.dtype) == (theirs.boxes.dtype, theirs.category_ids.dtype)
        assert ours.names == theirs.names
        assert ours.stored is not None
        np.testing.assert_array_equal(np.asarray(open_record(ours)), np.asarray(open_record(theirs)))
    assert prepared.categories == source.categories
    assert prepared.names() == source.names()


def test_every_data_set_comes_back_as_it_was(tmp_path):
    sources = {
        "visual_genome": (published.visual_genome(tmp_path / "vg", 10), tmp_path / "vg", False),
        "lvis_v1": (published.lvis(tmp_path / "lvis"), tmp_path / "lvis", True),
        "coco_2017": (published.coco(tmp_path / "coco"), tmp_path / "coco/val2017", False),
        "objects365_v2": (published.objects365(tmp_path / "o365", "{patch}/{name}"), tmp_path / "o365", False),
        "label_folder": (published.yolo(tmp_path / "yolo"), tmp_path / "yolo" / "train" / "images", False),
        "coco_json": (published.generate_u(tmp_path / "any"), tmp_path / "any", False),
    }
    assert set(sources) == set(SOURCES) == set(BUILDERS)
    for data_set, (annotations, images, minival) in sources.items():
        out = tmp_path / "prepared" / data_set
        prepare(Job(data_set, annotations, images, out, minival=minival, images_per_shard=4), progress=False)
        prepared, problems = read_annotations(out, "")
        assert_same(prepared, read_annotations(annotations, images, minival=minival)[0])
        assert problems.counts == {}
        assert prepared.annotations == out / "annotations.json"
        again, problems = read_annotations(out / "annotations.json", images)
        assert [r.names for r in again.records] == [r.names for r in prepared.records]
        assert [r.boxes.tolist() for r in again.records] == [r.boxes.tolist() for r in prepared.records]
        assert set(problems.counts) <= {"crowd region"}


def test_annotations_keep_what_evaluation_needs(tmp_path):
    out = tmp_path / "out"
    prepare(Job("lvis_v1", published.lvis(tmp_path), tmp_path, out, minival=True), progress=False)
    written, original = (
        json.loads(path.read_text()) for path in (out / "annotations.json", tmp_path / "lvis_v1_val.json")
    )
    assert written["categories"] == original["categories"]
    assert written["images"] == [image for image in original["images"] if image["id"] != 2]
    kept = [annotation for annotation in original["annotations"] if annotation["image_id"] != 2]
    assert written["annotations"] == [{k: v for k, v in a.items() if k != "segmentation"} for a in kept]


def test_a_split_of_a_label_folder_with_what_evaluation_ignores(tmp_path):
    """Pictures are found without --images; difficult objects are in the truth, as crowd regions."""
    voc = published.pascal_voc(tmp_path / "VOC2007")
    found = prepare(Job("label_folder", voc, "", tmp_path / "out", split="val"), progress=False)
    assert (found["images"], found["boxes"]) == (1, 1)
    assert found["problems"]["difficult object, as a crowd region"]["count"] == 1
    truth, _ = read_annotations(tmp_path / "out", "")
    assert_same(truth, read_annotations(voc, "", split="val")[0])
    [image] = Truth(lvis_truth(truth)).images.values()
    assert image.objects.crowd.tolist() == [False, True]
    assert image.objects.boxes.tolist() == [[0, 0, 10, 30], [20, 0, 10, 30]]
    named = prepare(Job("label_folder", tmp_path / "VOC2007:train", "", tmp_path / "named"), progress=False)
    assert (named["images"], named["boxes"]) == (2, 3)


def test_what_is_prepared_is_of_the_form_that_is_named(tmp_path):
    label_folder, json_file = published.yolo(tmp_path / "yolo"), published.coco(tmp_path / "coco")
    for data_set, annotations, message in (
        ("coco_json", label_folder, "is in YOLO's form, which --dataset label_folder is for"),
        ("label_folder", json_file, "is neither a YOLO nor a Pascal VOC folder"),
        ("coco_2017", json_file, "is a json, and needs the folder of its images: --images DIR"),
    ):
        with pytest.raises(PrepareError, match=f"{annotations.name}: {message}"):
            prepare(Job(data_set, annotations, "", tmp_path / "out"), progress=False)
    assert not (tmp_path / "out").exists()


def test_tfds_reads_it(tmp_path):
    prepare(job(tmp_path, split="validation"), progress=False)
    builder = tfds.builder_from_directory(tmp_path / "out")
    assert builder.info.name == "visual_genome"
    assert builder.info.splits["validation"].num_examples == 10
    assert builder.info.splits["validation"].shard_lengths == [4, 4, 2]
    source = builder.as_data_source("validation")
    dataset = read_annotations(tmp_path / "vg/objects.json", tmp_path / "vg")[0]
    for example, record in zip(source, dataset.records, strict=True):
        np.testing.assert_array_equal(example["image"], np.asarray(open_record(record)))
        np.testing.assert_array_equal(example["boxes"], record.boxes)
        names = [name.decode() for name in example["names"]]
        assert [[names.pop(0) for _ in range(count)] for count in example["name_counts"]] == list(
            map(list, record.names)
        )
        assert (example["image_id"], example["width"], example["height"]) == (
            record.image_id,
            record.width,
            record.height,
        )


def test_the_builder_alone_makes_the_same_records(tmp_path):
    prepare(job(tmp_path), progress=False)
    records = read_annotations(tmp_path / "vg/objects.json", tmp_path / "vg")[0].records
    groups = [records[i : i + 4] for i in range(0, 10, 4)]
    builder = BUILDERS["visual_genome"](groups, "train", tmp_path / "tfds")
    builder.download_and_prepare()
    made, prepared = Path(builder.data_dir), tmp_path / "out"
    assert [path.name for path in shards(made)] == [path.name for path in shards(prepared)]
    sources = [tfds.builder_from_directory(folder).as_data_source("train") for folder in (made, prepared)]
    for ours, theirs in zip(*sources, strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours:
            np.testing.assert_array_equal(ours[key], theirs[key])


def test_the_same_bytes_whatever_the_number_of_workers(tmp_path):
    prepare(job(tmp_path), workers=1, progress=False)
    prepare(job(tmp_path, out=tmp_path / "again"), workers=3, progress=False)
    assert files(tmp_path / "out") == files(tmp_path / "again")
    assert set(files(tmp_path / "out")) == {
        "LICENSE",
        "annotations.json",
        "dataset_info.json",
        "features.json",
        "index.npz",
        "summary.json",
        "summary.png",
        *(f"visual_genome-train.array_record-{i:05d}-of-00003" for i in range(3)),
    }


def test_a_complete_folder_is_left_alone(tmp_path):
    first = prepare(job(tmp_path), progress=False)
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert prepare(job(tmp_path), progress=False) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == stamps


def test_finished_shards_are_kept(tmp_path, monkeypatch):
    prepare(job(tmp_path, out=tmp_path / "whole"), progress=False)
    write = shards_module._Writer._write

    def failing(self, number):
        if number == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, number)

    monkeypatch.setattr(shards_module._Writer, "_write", failing)
    message = "out: the disk is full; 1 of 3 shards are finished and kept, the same command goes on"
    with pytest.raises(PrepareError, match=message):
        prepare(job(tmp_path), workers=1, progress=False)
    [finished] = shards(tmp_path / "out")
    with pytest.raises(AnnotationError, match="out: is not complete yet: run the command that prepares it again"):
        read_annotations(tmp_path / "out", "")
    monkeypatch.undo()
    stamp = finished.stat().st_mtime_ns
    prepare(job(tmp_path), progress=False)
    assert finished.stat().st_mtime_ns == stamp
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def run(tmp_path, *arguments, before=(), **options):
    folder = tmp_path / "vg"
    paths = ["--annotations", str(folder / "objects.json"), "--images", str(folder), "--out", str(tmp_path / "out")]
    line = [sys.executable, "-m", "opendet_jax.data", "prepare", "--dataset", "visual_genome", *paths, *arguments]
    return subprocess.Popen([*before, *line], stderr=subprocess.PIPE, text=True, **options)


def test_a_full_disk_while_a_shard_is_written(tmp_path):
    """No file may grow beyond 64 kB: the system answers array_record's writer as it would on a full disk."""
    published.visual_genome(tmp_path / "vg", images=12, size=900)
    limited = ("bash", "-c", 'ulimit -f 62; exec "$@"', "bash")  # blocks of 1,024 bytes
    process = run(tmp_path, "--images_per_shard=12", before=limited)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.splitlines()[-1].startswith(f"error: {tmp_path / 'out'}: [Errno 27] File too large; 0 of 1 shards")
    assert shards(tmp_path / "out") == []
    assert list((tmp_path / "out").glob("*.part")) == list((tmp_path / "out").glob(".*.part")) == []
    prepare(job(tmp_path, images_per_shard=12), progress=False)
    assert len(read_annotations(tmp_path / "out", "")[0]) == 12


def test_a_killed_process_is_continued(tmp_path):
    published.visual_genome(tmp_path / "vg", images=40, size=1500)
    prepare(job(tmp_path, out=tmp_path / "whole", images_per_shard=1), progress=False)
    process = run(tmp_path, "--images_per_shard=1", "--workers=1")
    deadline = time.monotonic() + 60
    while len(shards(tmp_path / "out")) < 2 and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    finished = len(shards(tmp_path / "out"))
    assert 2 <= finished < 40
    stamps = {path: path.stat().st_mtime_ns for path in shards(tmp_path / "out")[: finished - 1]}
    prepare(job(tmp_path, images_per_shard=1), progress=False)
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_an_interrupted_process_says_what_is_kept(tmp_path):
    published.visual_genome(tmp_path / "vg", images=40, size=1500)
    process = run(tmp_path, "--images_per_shard=1", "--workers=1")
    deadline = time.monotonic() + 60
    while len(shards(tmp_path / "out")) < 2 and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    finished = len(shards(tmp_path / "out"))
    expected = f"out: stopped; {finished} of 40 shards are finished and kept, the same command goes on"
    assert errors.splitlines()[-1].endswith(expected)
    assert "Traceback" not in errors


def test_unreadable_images_are_left_out_and_listed(tmp_path):
    published.visual_genome(tmp_path / "vg", images=10)
    folder = tmp_path / "vg"
    (folder / "VG_100K_2/1.jpg").unlink()
    damaged = folder / "VG_100K/4.jpg"
    damaged.write_bytes(damaged.read_bytes()[:-40])
    Image.new("RGB", (3, 3)).save(folder / "VG_100K/6.jpg")
    summary = prepare(job(tmp_path), progress=False)
    assert [entry["image_id"] for entry in summary["left_out"]] == [1, 4, 6]
    reasons = " ".join(entry["reason"] for entry in summary["left_out"])
    for reason in ("VG_100K_2/1.jpg: no such image", "VG_100K/4.jpg: cannot be decoded", "VG_100K/6.jpg: is 3×3"):
        assert reason in reasons
    dataset = read_annotations(tmp_path / "out", "")[0]
    assert [record.image_id for record in dataset.records] == [2, 3, 5, 7, 8, 9, 10]
    original = {r.image_id: r for r in read_annotations(folder / "objects.json", folder)[0].records}
    for record in dataset.records:
        np.testing.assert_array_equal(
            np.asarray(open_record(record)), np.asarray(open_record(original[record.image_id]))
        )
    assert {image["id"] for image in json.loads((tmp_path / "out/annotations.json").read_text())["images"]} == {
        record.image_id for record in dataset.records
    }


def test_pictures_above_the_limit_are_left_out(tmp_path):
    published.visual_genome(tmp_path / "vg", images=10)
    sizes = {
        r.image_id: r.width * r.height
        for r in read_annotations(tmp_path / "vg/objects.json", tmp_path / "vg")[0].records
    }
    limit = sorted(sizes.values())[6]
    summary = prepare(job(tmp_path, max_pixels=limit), progress=False)
    assert {entry["image_id"] for entry in summary["left_out"]} == {i for i, size in sizes.items() if size > limit}
    assert all(f"more than data.max_pixels = {limit}" in entry["reason"] for entry in summary["left_out"])
    with pytest.raises(PrepareError, match="holds another prepared data set"):
        prepare(job(tmp_path), progress=False)


def test_a_shard_without_any_readable_image(tmp_path):
    published.visual_genome(tmp_path / "vg", images=10)
    for i in (5, 6, 7, 8):
        next((tmp_path / "vg").glob(f"*/{i}.jpg")).unlink()
    prepare(job(tmp_path), progress=False)
    dataset = read_annotations(tmp_path / "out", "")[0]
    assert [record.image_id for record in dataset.records] == [1, 2, 3, 4, 9, 10]
    for record in dataset.records:
        assert open_record(record).size == (record.width, record.height)


def test_the_wrong_folder_of_images(tmp_path):
    with pytest.raises(PrepareError, match=r"none of the 10 images looked for is there, for example .*1\.jpg"):
        prepare(replace(job(tmp_path), images=tmp_path / "no"), progress=False)
    assert not (tmp_path / "out").exists()


def test_no_image_can_be_read(tmp_path):
    published.visual_genome(tmp_path / "vg", images=3)
    for path in (tmp_path / "vg").glob("*/*.jpg"):
        path.write_bytes(b"nothing")
    with pytest.raises(PrepareError, match=r"none of the 3 images can be read: .*1\.jpg: is not an image"):
        prepare(job(tmp_path), progress=False)
    assert not (tmp_path / "out/dataset_info.json").exists()


def test_another_data_set_in_the_folder(tmp_path):
    prepare(job(tmp_path), progress=False)
    with pytest.raises(PrepareError, match="out: holds another prepared data set"):
        prepare(job(tmp_path, images_per_shard=5), progress=False)
    (tmp_path / "out/dataset_info.json").unlink()
    with pytest.raises(PrepareError, match="out: is not empty; name another folder"):
        prepare(job(tmp_path), progress=False)


def test_another_preparation_in_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module._Writer, "_write", lambda self, number: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(PrepareError, match="out: no; 0 of 3 shards"):
        prepare(job(tmp_path), progress=False)
    monkeypatch.undo()
    with pytest.raises(PrepareError, match=r"out: holds another preparation \(different: split, images_per_shard\)"):
        prepare(job(tmp_path, split="val", images_per_shard=3), progress=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(PrepareError, match="file: is not a folder"):
        prepare(job(tmp_path, out=tmp_path / "file"), progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "all"}, "split 'all': must be letters"),
        ({"split": "train[:5]"}, r"split 'train\[:5\]': must be letters"),
        ({"data_set": "lvis_v1"}, "objects.json: is in Visual Genome's form, and not lvis_v1"),
    ],
)
def test_jobs_that_cannot_be(tmp_path, change, message):
    with pytest.raises(PrepareError, match=message):
        prepare(job(tmp_path, **change), progress=False)
    assert not (tmp_path / "out").exists()


def test_no_image_at_all(tmp_path):
    path = published.coco_json(tmp_path / "a.json", [], [], published.CATEGORIES)
    with pytest.raises(PrepareError, match=r"a\.json: there is no image"):
        prepare(Job("coco_json", path, tmp_path, tmp_path / "out"), progress=False)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PrepareError, match=r"file/out: .*Not a directory.*0 of 3 shards"):
        prepare(job(tmp_path, out=tmp_path / "file/out"), progress=False)


def test_one_process_at_a_time(tmp_path, monkeypatch):
    write = shards_module._Writer._write

    def twice(self, number):
        if number == 0:
            with pytest.raises(PrepareError, match="out: another process is preparing this folder"):
                prepare(job(tmp_path), progress=False)
        return write(self, number)

    monkeypatch.setattr(shards_module._Writer, "_write", twice)
    prepare(job(tmp_path), progress=False)


def test_a_damaged_index_or_shard(tmp_path):
    prepare(job(tmp_path), progress=False)
    [first, *_] = shards(tmp_path / "out")
    first.write_bytes(first.read_bytes()[:100])
    dataset = read_annotations(tmp_path / "out", "")[0]
    with pytest.raises(ImageError, match=r"VG_100K_2/1\.jpg: cannot be read: "):
        open_record(dataset.records[0])
    assert open_record(dataset.records[9]).size == (dataset.records[9].width, dataset.records[9].height)
    index = tmp_path / "out/index.npz"
    index.write_bytes(index.read_bytes()[:200])
    with pytest.raises(AnnotationError, match=r"index\.npz: is damaged: "):
        read_annotations(tmp_path / "out", "")


def test_a_prepared_folder_can_be_prepared_again_in_other_shards(tmp_path):
    prepare(job(tmp_path), progress=False)
    again = Job("visual_genome", tmp_path / "out", Path(), tmp_path / "again", images_per_shard=3)
    prepare(again, progress=False)
    assert_same(read_annotations(tmp_path / "again", "")[0], read_annotations(tmp_path / "out", "")[0])


def test_the_command(tmp_path, capsys):
    published.visual_genome(tmp_path / "vg", images=5)
    paths = ["--annotations", str(tmp_path / "vg/objects.json"), "--images", str(tmp_path / "vg")]
    command.main(["prepare", "--dataset", "visual_genome", *paths, "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "5 images (0 without boxes), 25 boxes (at most 5 an image)" in printed
    assert "box clipped to its image" in printed
    assert "names can be written in 32 tokens of 'byt5'" in printed
    assert f"{tmp_path / 'out'} is complete: name it as data.train.annotations, or data.eval.annotations" in printed
    command.main(
        ["prepare", "--dataset", "visual_genome", *paths, "--out", str(tmp_path / "out"), "--max_name_tokens=2"]
    )
    assert "cannot be learnt: with data.tokenizer = 'byt5' and data.max_name_tokens = 2" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"error: data\.tokenizer: cannot load"):
        command.main(
            ["prepare", "--dataset", "visual_genome", *paths, "--out", str(tmp_path / "no"), f"--tokenizer={tmp_path}"]
        )
    assert not (tmp_path / "no").exists()
    with pytest.raises(SystemExit) as ended:
        command.main(["prepare", "--dataset", "visual_genome", *paths, "--out", str(tmp_path / "vg")])
    assert str(ended.value) == f"error: {tmp_path / 'vg'}: is not empty; name another folder"
    with pytest.raises(SystemExit):
        command.main(["prepare", "--help"])
    printed = capsys.readouterr().out
    assert all(f"\n  {name} " in printed for name in SOURCES)

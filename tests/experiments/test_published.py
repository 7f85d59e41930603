"""From the authors' checkpoint, CLIP and LVIS to a row of docs/results.md by one command; what stops it at once."""

import gc
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import jax
import jaxtyping
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from opendet_jax.checkpoints.folder import read_note
from opendet_jax.config import CLIPTextConfig, Config, SwinConfig, T5Config
from opendet_jax.model.clip_text import clip_text_shapes
from opendet_jax.model.opendet import OpenDet, init_params
from opendet_jax.weights.convert import export
from opendet_jax.weights.open_det import OPENDET_RULES
from opendet_jax.weights.rules import nested, shapes_of
from opendet_jax.weights.text import CLIP_RULES
from tests.data.published import coco_json, write_image
from tests.weights.test_full_size import PARAMETERS, save_authors

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # as ml_collections loads configs
published = import_module("experiments.published.__main__")
ROOT = Path(__file__).parents[2]
GIBIBYTES = 8  # at most, at full size
SIDE = 128  # pixels of the pictures
# A small picture in a small program; what the paper's evaluation is made of stays.
FIELDS = (f"--config.data.eval_short_side={SIDE}", f"--config.data.buckets=(({SIDE},{SIDE}),)")
FIELDS += ("--config.eval.batch_size=1", "--config.eval.pictures=1")
CLASSES = (("bus_(vehicle)", "c"), ("aerosol_can", "r"), ("person", "f"))


def numbers(shapes: dict[str, tuple[int, ...]], rng: np.random.Generator) -> dict:
    """Random matrices, norms of ones, zero biases, and boxes that stay where the proposals are."""
    values = {}
    for path, shape in shapes.items():
        if path.endswith("/scale"):
            values[path] = np.ones(shape, np.float32)
        elif path.endswith("/bias") or re.search(r"box_head\w*/layers_2/", path):
            values[path] = np.zeros(shape, np.float32)
        else:
            values[path] = rng.standard_normal(shape, np.float32) / np.sqrt(max(1, np.prod(shape[:-1])))
    return values


def save_checkpoint(file: Path, swin: SwinConfig) -> None:
    """A training file in the authors' layout: Swin and T5 small, the rest as large as it always is."""
    t5 = T5Config(vocab_size=384, num_layers=1, num_heads=2, head_width=8, ffn_width=16, head_bias=True)
    whole = Config()
    model = replace(whole.model, backbone=swin, t5=replace(t5, activation="gelu_erf"), text_width=16)
    jaxtyping.config.update("jaxtyping_disable", True)  # eval_shape passes shapes through our dataclasses
    shapes = shapes_of(jax.eval_shape(lambda key: init_params(OpenDet(model, whole.ablation), key), jax.random.key(0)))
    jaxtyping.config.update("jaxtyping_disable", False)
    values = numbers(shapes, np.random.default_rng(0))
    values["query_selection/score/bias"] -= 10  # no token passes: the 300 best are taken
    theirs = export(nested(values), "opendet")
    tensors = {}  # one under all names of a shared one, as in a training file
    for name, value in theirs.items():
        tensors.setdefault(OPENDET_RULES.place(name).path, torch.from_numpy(value))
    state = {name: tensors[OPENDET_RULES.place(name).path] for name in theirs}
    state["project_tt.bias"] = torch.zeros(16)  # one of those that the authors never use
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": state, "iteration": 299_999}, file)


def save_clip(folder: Path) -> None:
    """A text tower in Hugging Face's layout with a tokenizer of single letters."""
    folder.mkdir()
    letters = [chr(number) for number in range(33, 127)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    config = CLIPTextConfig(len(tokens), width=16, num_layers=1, num_heads=1, ffn_width=16, text_width=8)
    tower = nested(numbers(shapes_of(clip_text_shapes(config)), np.random.default_rng(1)))
    save_file(CLIP_RULES.to_theirs(tower), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"eos_token_id": len(tokens) - 1}))
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))


def save_lvis(folder: Path) -> None:
    """lvis_v1_val.json and its pictures: three of val2017, two of train2017; true boxes lie as proposals do."""
    images, annotations = [], []
    for number, part in enumerate(("val2017", "train2017", "val2017", "train2017", "val2017"), 1):
        write_image(folder / part / f"{number:012d}.jpg", SIDE, SIDE, number)
        url = f"http://images.cocodataset.org/{part}/{number:012d}.jpg"
        images.append({"id": number, "coco_url": url, "width": SIDE, "height": SIDE})
        images[-1] |= {"neg_category_ids": [1, 2, 3], "not_exhaustive_category_ids": []}
        for category in (1, 2, 3):
            side, left = 0.4 * SIDE, (0.05 if category < 3 else 0.55) * SIDE
            box = [left, (0.55 if category == 2 else 0.05) * SIDE, side, side]
            annotations.append({"id": len(annotations) + 1, "image_id": number, "category_id": category, "bbox": box})
            annotations[-1]["area"] = side * side
    categories = [{"id": i, "name": name, "frequency": group} for i, (name, group) in enumerate(CLASSES, 1)]
    coco_json(folder / published.ANNOTATIONS, images, annotations, categories)


@pytest.fixture(scope="module")
def downloads(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("downloads")
    save_checkpoint(folder / "model_0299999.pth", SwinConfig(depths=(1, 1, 6, 1)))
    save_clip(folder / "clip")
    save_lvis(folder / "coco")
    return folder


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """Where the command starts: a copy of the page lies there."""
    (tmp_path / "docs").mkdir()
    shutil.copyfile(ROOT / published.PAGE, tmp_path / published.PAGE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def arguments(downloads: Path, **changed: Path | str | int) -> list[str]:
    given = {"checkpoint": downloads / "model_0299999.pth", "lvis": downloads / "coco", "coco": downloads / "coco"}
    given |= {"clip": downloads / "clip", "tokenizer": "byt5", **changed}
    return [*(f"--{name}={value}" for name, value in given.items()), *FIELDS]


def error_of(arguments: list[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        published.main(arguments)
    return str(stopped.value)


def never(*arguments, **named):
    raise AssertionError(f"not to be called: {arguments}, {named}")


def stop(*_):
    raise KeyboardInterrupt


def rows(page: str) -> list[str]:
    return page.partition(published.BEGIN)[2].partition(published.END)[0].splitlines()[2:]


def test_from_downloads_to_a_row(downloads, home, monkeypatch, capsys):
    given, page = arguments(downloads), published.PAGE.read_text()
    results = Path("runs/published/model/eval/minival")

    # Ctrl-C in the evaluation keeps what is converted, and nothing else.
    with monkeypatch.context() as patch:
        patch.setattr(published.program, "run", stop)
        assert error_of(given) == "stopped; the same command goes on after what is complete"
    output = capsys.readouterr().out
    assert output.count("wrote runs/published/") == 2
    assert published.PAGE.read_text() == page
    assert {path.name for path in results.iterdir()} == {published.RECORD}
    assert read_note(Path("runs/published/model"))["tensors_left_out"] == {
        "kept by the authors' program, which never uses it": 1
    }

    # The same command evaluates, and converts nothing; of five images those two of train2017 are no part of minival.
    monkeypatch.setattr(published, "convert_command", never)
    published.main(given)
    output = capsys.readouterr().out
    metrics = json.loads((results / "metrics.json").read_text())
    assert (metrics["images"], metrics["name_mapping"], metrics["max_detections"]) == (3, "text_encoder", 0)
    assert metrics["fixed_AP"] > 0.005  # true boxes are proposals
    assert metrics["fixed_AP"] != metrics["AP"]
    percent = {key: f"{100 * metrics[key]:.1f}" for key in ("fixed_AP", "fixed_APr", "fixed_APc", "fixed_APf", "AP")}
    [before, *others], [line, *others_now] = rows(page), rows(published.PAGE.read_text())
    assert before.startswith("| Swin-T | 31 | published 27.0 · here ")
    assert line.startswith(
        f"| Swin-T | 31 | published 27.0 · here {percent['fixed_AP']} | 21.0 · {percent['fixed_APr']} "
        f"| 24.8 · {percent['fixed_APc']} | 30.1 · {percent['fixed_APf']} | {percent['AP']} | 3 of 4,809 | "
    )
    record = json.loads((results / published.RECORD).read_text())
    assert f"{record['machine']}, {record['date']}, commit {record['commit']}; data.buckets=((128,128),); " in line
    assert "eval.batch_size=1; eval.pictures=1 |" in line
    assert others_now == others
    assert published.PAGE.read_text() == page.replace(before, line)
    assert output.splitlines()[-1] == (
        "In runs/published/clip: the text tower; in runs/published/model: the converted weights; in "
        f"{results}: metrics.json, pictures.png, predictions.json, published.json; the row is in docs/results.md"
    )

    # Once more: nothing is done again, not even where the pictures are gone.
    monkeypatch.setattr(published.program, "run", never)
    monkeypatch.setattr(published, "check_pictures", never)
    shutil.copyfile(ROOT / published.PAGE, published.PAGE)
    published.main(given)
    assert f"evaluated already: {results}/metrics.json" in capsys.readouterr().out
    assert rows(published.PAGE.read_text())[0] == line

    # What is there is of this checkpoint, this text encoder and these fields.
    assert error_of(given[:-1]) == f"error: {results}: holds results of other fields; give another --out"
    other = home / "model_0299999.pth"
    other.write_bytes(b"another")
    assert error_of(arguments(downloads, checkpoint=other)) == (
        f"error: runs/published/model: was converted from {downloads}/model_0299999.pth, not from {other}; "
        "give another --out"
    )
    assert "runs/published/clip: was converted from " in error_of(arguments(downloads, clip=downloads / "coco"))
    assert "was converted with byt5; give another --out" in error_of(arguments(downloads, tokenizer=downloads))
    (results / published.RECORD).write_text("[")
    assert f"error: {results}/published.json: is damaged: " in error_of(given)
    (results / published.RECORD).unlink()
    assert "holds results of other checkpoint, text encoder, annotations, images, fields" in error_of(given)

    # A first look at one image, with the converted text tower: its row stays out of the page.
    monkeypatch.undo()
    monkeypatch.chdir(home)
    published.PAGE.write_text("no place for a row")
    published.main(arguments(downloads, clip="runs/published/clip", limit=1))
    output = capsys.readouterr().out
    assert "the row is of the first 1 images, and not written into docs/results.md" in output
    assert " | the first 1 of 4,809 | " in output
    assert published.PAGE.read_text() == "no place for a row"
    assert json.loads((results.parent / "minival_first_1" / "metrics.json").read_text())["images"] == 1


def test_what_is_wrong_is_said_before_anything_is_converted(downloads, home, monkeypatch):
    page = published.PAGE.read_text()
    monkeypatch.setattr(published, "convert_command", never)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    nowhere = home / "nowhere"
    for changed, message in (
        ({"checkpoint": nowhere}, f"--checkpoint: there is no file {nowhere}"),
        ({"lvis": home}, f"--lvis: there is no file {home}/lvis_v1_val.json"),
        ({"coco": nowhere}, f"--coco: there is no folder {nowhere}"),
        ({"checkpoint": downloads / "clip" / "model.safetensors"}, "model.safetensors: not a checkpoint of Open-Det: "),
        ({"checkpoint": downloads / "clip" / "vocab.json"}, "vocab.json: not a file of weights"),
        ({"epochs": 12}, "--epochs 12: of Swin-T the paper has the AP after 31 or 50 epochs"),
        ({"tokenizer": nowhere}, f"--tokenizer {nowhere}: "),
        ({"clip": nowhere}, f"--clip {nowhere}: cannot load the tokenizer"),
        ({"clip": downloads / "coco"}, f"--clip {downloads}/coco: cannot load the tokenizer"),
    ):
        assert message in error_of(arguments(downloads, **changed)), changed
    for field, message in (
        ("--config.data.eval.minival=False", "this command sets the field itself"),
        ("--config.eval.limit=3", "this command sets the field itself"),
        ("--config.train.steps=3", "has no part in an evaluation"),
        ("--config.model.width=64", "the checkpoint alone decides it"),
        ("--config.eval.batch_size=2", "the field is given twice"),
        ("--config.eval.batch_sizes=2", "batch_sizes"),
        ("--config.eval.nms_iou=2", "config.eval.nms_iou = 2.0: must be positive and at most 1"),
        ("--config.eval.nms_iou", "is no argument"),
        ("--epoch=31", "is no argument"),
    ):
        assert message in error_of([*arguments(downloads), field]), field
    published.PAGE.write_text(page.replace("| Swin-T | 31 |", "| Swin-T | 32 |"))
    assert "docs/results.md: has no row | Swin-T | 31 | between <!-- published -->" in error_of(arguments(downloads))
    published.PAGE.unlink()
    assert "docs/results.md: cannot be read, start the command where it lies" in error_of(arguments(downloads))
    assert not (home / "runs").exists()


def test_pictures_that_are_missing_are_counted(downloads, home, monkeypatch):
    monkeypatch.setattr(published, "convert_command", never)
    coco = home / "coco"
    shutil.copytree(downloads / "coco", coco)
    shutil.rmtree(coco / "train2017")  # which minival does without
    for number in (3, 5):
        (coco / "val2017" / f"{number:012d}.jpg").unlink()
    said = error_of(arguments(downloads, coco=coco))
    assert said.startswith(f"error: --coco: 2 of the 3 pictures of {downloads}/coco/lvis_v1_val.json are not there; ")
    assert "are missing: 000000000003.jpg, 000000000005.jpg" in said
    shutil.rmtree(coco / "val2017")
    assert "3 of the 3 pictures" in error_of(arguments(downloads, coco=coco))
    annotations = coco / published.ANNOTATIONS
    annotations.write_text(annotations.read_text().replace("/val2017/", "/train2017/"))
    said = error_of(arguments(downloads, lvis=coco, coco=coco))
    assert said == f"error: {annotations}: by its coco_urls no image is of COCO's val2017"
    assert not (home / "runs").exists()


def test_a_backbone_that_the_paper_does_not_evaluate(downloads, home):
    state = torch.load(downloads / "model_0299999.pth", mmap=True)["model"]
    blocks = re.compile(r"detr\.detr\.backbone\.0\.layers\.2\.blocks\.[1-5]\.")
    file = home / "small.pth"
    torch.save({name: value for name, value in state.items() if not blocks.match(name)}, file)
    assert error_of(arguments(downloads, checkpoint=file)) == (
        f"error: {file}: has a backbone of other sizes than those that the paper evaluates: Swin-T, Swin-S, Swin-L"
    )


def test_published_numbers_are_those_of_the_method():
    method = (ROOT / "docs" / "method.md").read_text().partition("### Published numbers")[2]
    for one in published.PUBLISHED:
        numbers = (one.title, one.epochs, one.rare, one.common, one.frequent, one.every)
        assert f"| {' | '.join(map(str, numbers))} |" in method
    page = (ROOT / published.PAGE).read_text()
    assert published.HEADER in page
    starts = [published.start_of_row(one) + f"published {one.every} · here " for one in published.PUBLISHED]
    assert [line.startswith(start) for line, start in zip(rows(page), starts, strict=True)] == [True] * len(starts)


def test_what_cannot_be_measured_is_an_empty_cell():
    [first, *_] = published.PUBLISHED
    metrics = {"fixed_AP": 0.2704, "fixed_APr": None, "fixed_APc": 0.25, "fixed_APf": 0.3, "AP": 0.26, "images": 4809}
    record = {"asked": {"images": "all", "fields": ["--config.data.name=a|b"]}}
    record |= {"machine": "a machine", "date": "today", "commit": "abc"}
    assert published.row(first, metrics, record) == (
        "| Swin-T | 31 | published 27.0 · here 27.0 | 21.0 · – | 24.8 · 25.0 | 30.1 · 30.0 | 26.0 | 4,809 "
        r"| a machine, today, commit abc; data.name=a\|b |"
    )


@pytest.mark.slow
def test_the_full_size_on_two_pictures(tmp_path, home, vectors_folder, data_folder):
    """Of the authors' 2,314 names, at the paper's picture size; the text tower alone is small. In its own process."""
    source = save_authors(vectors_folder, tmp_path / "model_0299999.pth")
    gc.collect()
    save_clip(tmp_path / "clip")
    save_lvis(tmp_path / "coco")
    annotations = tmp_path / "coco" / published.ANNOTATIONS
    content = json.loads(annotations.read_text())
    content["images"][4]["coco_url"] = content["images"][4]["coco_url"].replace("val2017", "train2017")
    annotations.write_text(json.dumps(content))
    # Random weights find 900 boxes an image, and their names do not end.
    fields = ("--config.eval.batch_size=1", "--config.eval.max_detections=20")
    given = {"checkpoint": source, "lvis": tmp_path / "coco", "coco": tmp_path / "coco", "clip": tmp_path / "clip"}
    given |= {"tokenizer": data_folder / "tokenizers" / "t5"}
    script = "import resource; from experiments.published.__main__ import main; main();"
    script += "print('KiB', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    command = [sys.executable, "-c", script, *(f"--{name}={value}" for name, value in given.items()), *fields]
    done = subprocess.run(
        command, cwd=home, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    peak = int(done.stdout.split("KiB")[-1]) / 2**20
    print(f"peak memory {peak:.1f} GiB")
    assert peak < GIBIBYTES
    assert read_note(home / "runs/published/model")["parameters"] == PARAMETERS["opendet"]
    [line, *_] = rows(published.PAGE.read_text())
    assert line.startswith("| Swin-T | 31 | published 27.0 · here 0.")
    assert " | 2 of 4,809 | " in line
    assert "; eval.batch_size=1; eval.max_detections=20 |" in line

"""Training batches are a pure function of (seed, step), whoever makes them; evaluation sees every image once."""

import itertools
import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from absl import logging
from PIL import Image

from opendet_jax.config import DataConfig
from opendet_jax.data.formats.json_source import AnnotationError, read_json
from opendet_jax.data.images import ImageError
from opendet_jax.data.pipeline import evaluation_batches, training_stream
from opendet_jax.data.plan import Mixture, steps_per_epoch
from opendet_jax.data.text_embeddings import EmbeddingError, HashedEmbedder, TableEmbedder
from opendet_jax.data.tokenizer import load_tokenizer
from tests.data.names import decode_names

CONFIG = DataConfig(
    batch_size=3,
    buckets=((64, 96), (96, 64)),
    train_short_sides=(40, 48, 56),
    eval_short_side=48,
    max_long_side=96,
    crop_short_sides=(44, 52),
    crop_range=(30, 50),
    max_objects=4,
    max_name_tokens=16,
    threads=0,
    prefetch=0,
)
IMAGES = 11
TOKENIZER = load_tokenizer("byt5", 384)
EMBEDDER = HashedEmbedder(16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eleven pictures, seven of them wide; picture i has i % 3 + 1 objects, only picture 10 has none."""
    root = tmp_path_factory.mktemp("set")
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for i in range(IMAGES):
        width, height = (80, 60) if i < 7 else (50, 90)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(root / f"{i}.png")
        images.append({"id": 100 + i, "file_name": f"{i}.png", "width": width, "height": height})
        for j in range(0 if i == 10 else i % 3 + 1):
            box = [5.0 * j, 4.0 * j, 30, 25]
            annotations.append({"id": len(annotations), "image_id": 100 + i, "category_id": j + 1, "bbox": box})
    categories = [{"id": j, "name": name} for j, name in enumerate(("cat", "hot_dog", "owl"), 1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "set.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module")
def dataset(folder):
    return read_json(folder / "set.json", folder)[0]


def stream(dataset, config=CONFIG, seed=0):
    """Of one process, over one data set."""
    return iter(training_stream(Mixture.of((dataset, 1.0)), config, TOKENIZER, EMBEDDER, seed))


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def assert_same(a, b):
    """Batches bit by bit: training batches, or evaluation batches."""
    assert len(a) == len(b)
    for left, right in zip(a, b, strict=True):
        parts = [jax.tree.leaves(list(vars(example).values())) for example in (left, right)]
        for x, y in zip(*parts, strict=True):
            x, y = np.asarray(x), np.asarray(y)
            assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())


def test_shapes_and_masks(dataset):
    for example in take(stream(dataset), 6):
        images, objects = example.batch.images, example.batch.objects
        _, height, width, _ = images.pixels.shape
        assert (height, width) in CONFIG.buckets
        assert images.pixels.shape == (3, height, width, 3)
        assert images.mask.shape == (3, height, width)
        assert (images.pixels[~images.mask] == 0).all()
        assert objects.boxes.shape == (3, 4, 4)
        assert objects.texts.shape == (3, 4, 16)
        assert objects.tokens.shape == (3, 4, 16)
        assert objects.valid.any(1).all()
        for part in (objects.boxes, objects.texts, objects.tokens):
            assert (part[~objects.valid] == 0).all()
        centre, size = np.split(objects.boxes[objects.valid], 2, axis=-1)
        assert (size > 0).all()
        assert (centre - size / 2 >= -1e-6).all()
        assert (centre + size / 2 <= 1 + 1e-6).all()
        names = decode_names(TOKENIZER, objects.tokens[objects.valid])
        assert set(names) <= {"cat", "hot dog", "owl"}
        np.testing.assert_array_equal(objects.texts[objects.valid], EMBEDDER.embed(names))


WORKERS = (0, 1, 4)


@pytest.mark.parametrize("threads", WORKERS)
def test_same_stream_with_any_number_of_workers(dataset, threads):
    many = stream(dataset, replace(CONFIG, threads=threads, prefetch=4))
    assert_same(take(many, 9), take(stream(dataset), 9))  # three epochs


@pytest.mark.parametrize("threads", WORKERS)
def test_goes_on_where_its_state_was_taken(dataset, threads):
    """Whatever the number of workers before and after."""
    first = stream(dataset, replace(CONFIG, threads=2, prefetch=4))
    take(first, 5)
    state = json.loads(json.dumps(first.get_state()))
    later = take(first, 5)  # into the next epoch
    again = stream(dataset, replace(CONFIG, threads=threads, prefetch=3))
    again.set_state(state)
    assert_same(take(again, 5), later)


@pytest.mark.parametrize("rows", [([0, 1, 2], [3, 4, 5]), ([0, 5], [1, 4], [2, 3])])
def test_processes_share_each_batch(dataset, rows):
    """Put together their rows are the batch of one process, also after a restart with another number of them."""
    config = replace(CONFIG, batch_size=6)
    whole = stream(dataset, config)
    wanted = take(whole, 4)
    mixture = Mixture.of((dataset, 1.0))
    shares = [iter(training_stream(mixture, config, TOKENIZER, EMBEDDER, 0, own)) for own in rows]
    state = stream(dataset, config)
    take(state, 1)
    for share in shares:
        share.set_state(state.get_state())
    for batch in wanted[1:]:
        for share, own in zip(shares, rows, strict=True):
            part = next(share)
            assert part.rows.tolist() == own
            pairs = zip(*(jax.tree.leaves(list(vars(one).values())) for one in (part, batch)), strict=True)
            for piece, array in pairs:
                np.testing.assert_array_equal(piece, array[own])


def test_seeds_differ(dataset):
    a, b = (take(stream(dataset, seed=seed), 3) for seed in (0, 1))
    assert any(x.image_ids.tolist() != y.image_ids.tolist() for x, y in zip(a, b, strict=True))


def test_an_epoch_shows_every_image_with_objects_once(dataset):
    config = replace(CONFIG, batch_size=5)
    steps = steps_per_epoch(10, 5)
    examples = take(stream(dataset, config), 2 * steps)
    for epoch in (examples[:steps], examples[steps:]):
        assert sorted(np.concatenate([e.image_ids for e in epoch]).tolist()) == list(range(100, 110))


def test_fewer_images_than_a_batch(dataset):
    tiny = dataset.first(2)
    [example] = take(stream(tiny, replace(CONFIG, batch_size=5)), 1)
    assert set(example.image_ids.tolist()) == {100, 101}
    pixels = example.batch.images.pixels
    assert len({pixels[i].tobytes() for i in range(5)}) > 2  # augmented differently


def test_too_many_objects(dataset, caplog):
    logging.use_absl_handler()
    with caplog.at_level("WARNING"):
        examples = take(stream(dataset, replace(CONFIG, max_objects=1)), 12)
    assert "6 images have more than data.max_objects = 1" in caplog.text
    kept = [example.batch.objects for example in examples]
    assert all(objects.valid.shape == (3, 1) and objects.valid.all() for objects in kept)
    names = {name for objects in kept for name in decode_names(TOKENIZER, objects.tokens[:, 0])}
    assert names == {"cat", "hot dog", "owl"}  # not always the first


def test_one_of_several_names_is_drawn(folder, tmp_path):
    content = json.loads((folder / "set.json").read_text())
    for annotation in content["annotations"]:
        annotation["caption"] = "tabby, grey cat"
    (tmp_path / "set.json").write_text(json.dumps(content))
    dataset, _ = read_json(tmp_path / "set.json", folder)
    names = [
        name
        for example in take(stream(dataset), 4)
        for name in decode_names(TOKENIZER, example.batch.objects.tokens[example.batch.objects.valid])
    ]
    assert set(names) == {"tabby", "grey cat"}


@pytest.fixture
def damaged(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "3.png").write_bytes(b"no picture")
    (tmp_path / "8.png").unlink()
    return tmp_path


def test_unreadable_images_are_replaced_in_training(damaged, caplog):
    logging.use_absl_handler()
    dataset = read_json(damaged / "set.json", damaged)[0]
    config = replace(CONFIG, max_unreadable=0.2)
    with caplog.at_level("WARNING"):
        examples = take(stream(dataset, config), 9)
    ids = set(np.concatenate([e.image_ids for e in examples]).tolist())
    assert ids.isdisjoint({103, 108})
    for name in ("3.png", "8.png"):
        assert caplog.text.count(name) == 1  # though three epochs met it
    assert "unreadable image 2 of" in caplog.text
    assert_same(take(stream(dataset, replace(config, threads=2, prefetch=3)), 9), examples)


@pytest.mark.parametrize("threads", [0, 3])
def test_too_many_unreadable_images_end_training(damaged, threads):
    dataset = read_json(damaged / "set.json", damaged)[0]
    config = replace(CONFIG, max_unreadable=0.1, threads=threads, prefetch=threads)
    message = r"2 of the \d+ training images seen so far \(10 in all\) cannot be read, data\.max_unreadable is 0\.1"
    with pytest.raises(ImageError, match=message) as error:
        take(stream(dataset, config), 9)
    assert {"3.png", "8.png"} <= {part.rpartition("/")[2] for part in str(error.value).replace(",", "").split()}


def test_unreadable_images_are_errors_in_evaluation(damaged):
    dataset = read_json(damaged / "set.json", damaged)[0]
    with pytest.raises(ImageError, match=r"3\.png"):
        list(evaluation_batches(dataset, CONFIG, 2))


def test_no_readable_image_at_all(folder, tmp_path):
    dataset = read_json(folder / "set.json", tmp_path)[0]
    with pytest.raises(ImageError, match=r"10 of the 10 training images seen so far .* cannot be read"):
        take(stream(dataset, replace(CONFIG, max_unreadable=1.0)), 1)


def test_no_objects_at_all(dataset):
    empty = replace(dataset, records=dataset.records[10:])
    with pytest.raises(AnnotationError, match=r"set\.json: no image has an object to train on"):
        stream(empty)


def test_names_without_an_embedding_are_an_error_at_once(dataset, tmp_path):
    np.save(tmp_path / "table.npy", np.eye(2, 16, dtype=np.float32))
    (tmp_path / "table.json").write_text('["cat", "dog"]')
    with pytest.raises(EmbeddingError, match="'hot dog', 'owl'"):
        training_stream(Mixture.of((dataset, 1.0)), CONFIG, TOKENIZER, TableEmbedder(tmp_path / "table.npy"), 0)


@pytest.mark.parametrize("threads", [0, 2])
def test_evaluation_sees_every_image_once_in_order(dataset, threads):
    batches = evaluation_batches(dataset, replace(CONFIG, threads=threads, prefetch=threads), 3)
    assert len(batches) == 5
    seen = list(batches)
    ids = [e.image_ids.tolist() for e in seen]
    assert ids == [[100, 101, 102], [103, 104, 105], [106, -1, -1], [107, 108, 109], [110, -1, -1]]
    assert_same(list(batches), seen)
    for example in seen:
        for i, image_id in enumerate(example.image_ids):
            height, width = example.resized_sizes[i]
            assert example.images.mask[i, :height, :width].all()
            assert example.images.mask[i].sum() == height * width
            if image_id >= 0:
                record = dataset.records[image_id - 100]
                assert example.original_sizes[i].tolist() == [record.height, record.width]
                assert (height, width) == ((48, 64) if record.width == 80 else (86, 48))


def test_evaluation_of_nothing(dataset):
    assert list(evaluation_batches(dataset, CONFIG, 2)) != []
    assert list(evaluation_batches(replace(dataset, records=()), CONFIG, 2)) == []


def test_pictures_above_the_limit_are_not_opened(dataset):
    """The smallest has 50 × 90 pixels."""
    config = replace(CONFIG, max_pixels=4499, max_unreadable=1.0)
    with pytest.raises(ImageError, match=r"more than data\.max_pixels = 4,499"):
        list(evaluation_batches(dataset, config, 2))
    with pytest.raises(ImageError, match=r"10 of the 10 training images seen so far .* cannot be read"):
        take(stream(dataset, config), 1)

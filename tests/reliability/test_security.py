"""Foreign files hold data, never code; the images of a json lie in its folder of images."""

import ast
import json
import pickle
from pathlib import Path

import numpy as np
import pytest

import opendet_jax
from opendet_jax.checkpoints.intact import DamagedError, verify
from opendet_jax.config import Config, ConfigError
from opendet_jax.config_files import parse_config
from opendet_jax.data.datasets import read_annotations
from opendet_jax.data.formats.json_stream import AnnotationError
from opendet_jax.data.text_embeddings import EmbeddingError, TableEmbedder
from opendet_jax.errors import WeightsError
from opendet_jax.train.replay import ReplayError, load_batch
from opendet_jax.weights.source import read_source
from tests.reliability.programs import run_well

CODE = "__import__('pathlib').Path({!r}).write_text('ran')"


class Bomb:
    """A pickle that writes a file when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "ran")


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_the_source_has_nothing_that_runs_foreign_code():
    """No eval, exec, shell or yaml; pickles only between the processes of one run, and of compiled programs, which are
    code themselves, that processes of the same user have stored (tests/test_compilation.py)."""
    never = {"eval", "exec", "compile", "__import__", "os.system", "yaml.load", "pickle.load", "runpy.run_path"}
    found = 0
    for path in sorted(Path(opendet_jax.__file__).parent.rglob("*.py")):
        for name, call in calls(ast.parse(path.read_text())):
            where, given = f"{path.name}:{call.lineno}: {name}", {word.arg: word.value for word in call.keywords}
            assert name not in never, where
            assert not name.startswith("subprocess."), where
            assert name != "pickle.loads" or path.name in ("processes.py", "compilation.py"), where
            assert "trust_remote_code" not in given or ast.unparse(given["trust_remote_code"]) == "False", where
            if name == "torch.load":
                assert ast.unparse(given["weights_only"]) == "True", where
            if name == "np.load":
                assert "allow_pickle" not in given or ast.unparse(given["allow_pickle"]) == "False", where
            found += name in ("torch.load", "np.load")
    assert found >= 4, "the search sees what there is"


def test_no_file_that_is_given_is_unpickled(tmp_path):
    """Each in the place of a file of another kind: refused, and not run."""
    bomb, mark = Bomb(tmp_path / "ran"), tmp_path / "ran"
    array = np.array([bomb], dtype=object)
    np.save(tmp_path / "table.npy", array, allow_pickle=True)
    (tmp_path / "table.json").write_text('["cat"]')
    with pytest.raises(EmbeddingError, match=r"table\.npy: is not a table of numbers"):
        TableEmbedder(tmp_path / "table.npy")
    np.savez(tmp_path / "batch.npz", **{"images.pixels": array})
    with pytest.raises(ReplayError, match="is not the file of a batch"):
        load_batch(tmp_path / "batch.npz")
    (tmp_path / "weights.pth").write_bytes(pickle.dumps({"model": bomb}, protocol=2))
    with pytest.raises(WeightsError, match="holds code, which is never run"):
        read_source(str(tmp_path / "weights.pth"))
    (tmp_path / "train.json").write_bytes(pickle.dumps(bomb))
    with pytest.raises(AnnotationError):
        read_annotations(tmp_path / "train.json", tmp_path)
    assert not mark.exists()


def test_a_run_executes_no_code_but_its_own(tmp_path):
    """Files of Python in the workdir, and code in the config it was left with, are data to all of the program."""
    mark = tmp_path / "ran"
    run_well(tmp_path / "run", "train.steps=2", module="tests.reliability.audited")
    for name in ("config.py", "sitecustomize.py", "conftest.py", "checkpoints/config.py", "checkpoints/2/run.py"):
        (tmp_path / "run" / name).write_text(CODE.format(str(mark)))
    (tmp_path / "run" / "config.json").write_text(json.dumps({"name": CODE.format(str(mark))}))
    out = run_well(tmp_path / "run", "train.steps=4", module="tests.reliability.audited")
    assert "continuing from step 2" in out
    assert "restored step 4 of tiny" in out
    assert not mark.exists()


@pytest.mark.parametrize(("section", "field"), [("train", "steps"), ("model", "dtype"), ("data", "buckets")])
def test_code_in_the_config_of_a_checkpoint_is_a_wrong_value(tmp_path, section, field):
    values = Config().to_dict()
    values[section][field] = CODE.format(str(tmp_path / "ran"))
    with pytest.raises(ConfigError, match=rf"config\.{section}\.{field} = "):
        parse_config(values)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "image",
    [
        {"file_name": "../secret.jpg"},
        {"file_name": "a/../../secret.jpg"},
        {"file_name": "/etc/passwd"},
        {"file_name": ".."},
        {"file_name": ""},
        {"file_name": "a\0b.jpg"},
        {"coco_url": "http://images/.."},
        {"coco_url": "http://images/../"},
    ],
)
def test_images_lie_in_their_folder(tmp_path, image):
    (tmp_path / "secret.jpg").write_bytes(b"")
    (tmp_path / "images" / "a").mkdir(parents=True)
    content = {
        "images": [{"id": 1, "width": 8, "height": 8, **image}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 4, 4]}],
        "categories": [{"id": 1, "name": "cat"}],
    }
    (tmp_path / "train.json").write_text(json.dumps(content))
    with pytest.raises(AnnotationError, match="is not a path inside the image folder"):
        read_annotations(tmp_path / "train.json", tmp_path / "images")


@pytest.mark.parametrize("url", ["http://x/../../secret.jpg", "http://x/%2e%2e/secret.jpg", "file:///etc/secret.jpg"])
def test_a_url_leads_nowhere_outside(tmp_path, url):
    (tmp_path / "images").mkdir()
    content = {
        "images": [{"id": 1, "width": 8, "height": 8, "coco_url": url}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 4, 4]}],
        "categories": [{"id": 1, "name": "cat"}],
    }
    (tmp_path / "train.json").write_text(json.dumps(content))
    dataset, _ = read_annotations(tmp_path / "train.json", tmp_path / "images")
    path = dataset.records[0].path
    assert path.name == "secret.jpg"
    assert ".." not in path.parts
    assert path.resolve().is_relative_to((tmp_path / "images").resolve())


def test_checksums_name_only_files_of_their_checkpoint(tmp_path):
    (tmp_path / "secret").write_text("")
    (tmp_path / "4").mkdir()
    (tmp_path / "4" / "manifest.json").write_text(json.dumps({"../secret": "0" * 64}))
    with pytest.raises(DamagedError, match=r"4: \.\./secret is missing"):
        verify(tmp_path / "4")

"""A whole model to the Hugging Face hub and back, by a small hub on this machine (`hub_server.py`)."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from huggingface_hub import ModelCard, close_session, constants
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import opendet_jax
from configs import coco_json
from opendet_jax import main as program
from opendet_jax.checkpoints import intact
from opendet_jax.checkpoints.folder import read_portable
from opendet_jax.checkpoints.hub import Name, card, fetch, parse
from opendet_jax.checkpoints.restore import find_model, restore, workdir_of
from opendet_jax.checkpoints.same_config import CheckpointError
from opendet_jax.config import Config, DataConfig, DatasetPaths, InitConfig
from opendet_jax.config_files import parse_config
from opendet_jax.data.tokenizer import load_tokenizer
from opendet_jax.errors import InputError, WeightsError
from opendet_jax.evaluate.loop import evaluate_checkpoint
from opendet_jax.files import write_json
from opendet_jax.weights.__main__ import main
from opendet_jax.weights.init import check_start
from tests.checkpoints.hub_server import TOKEN, Hub, serving

# huggingface_hub 2.4.0 uploads large files in a way that its own httpx2 warns of.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")
PORTABLE = {"config.json", "model.safetensors", "manifest.json"}
PUSH = ("--licence", "apache-2.0")


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Hub]:
    """A hub, a cache and somebody who is logged in. What huggingface_hub reads when it is imported is set here."""
    with serving() as served:
        speaks_to(served.address, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
        monkeypatch.chdir(tmp_path)
        close_session()
        yield served
        close_session()


def speaks_to(address: str, monkeypatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def offline(monkeypatch) -> Callable[[], None]:
    return lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def portable(run_written_before, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("models") / "portable"
    main(["export", str(run_written_before), "--to", "portable", "--out", str(out)])
    return out


@pytest.fixture(scope="module")
def files(portable) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in portable.iterdir()}


def refused(*arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    said = str(stopped.value)
    assert said.startswith("error: ")
    assert "\n" not in said
    assert TOKEN not in said
    return said


def test_what_comes_back_is_what_was_pushed(hub, offline, run_written_before, tmp_path, capfd):
    run = shutil.copytree(run_written_before, tmp_path / "run")
    write_json(run / "weights.json", {"kind": "opendet", "licence": "Apache-2.0"})
    assert "weights.json says 'Apache-2.0'" in refused("push", str(run), "me/tiny", "--licence", "mit")
    assert hub.requests == []
    main(["push", str(run), "me/tiny", *PUSH])
    said = capfd.readouterr()
    assert f"pushing {run}, steps: 4 of 4; " in said.out
    assert f"{hub.address}/me/tiny is public\n" in said.out
    assert "opendet_jax.load('hf://me/tiny') loads it" in said.out
    repository = hub.repositories["me/tiny"]
    assert (repository.private, repository.messages) == (False, ["", "tiny, step 4"])  # made, and one commit
    assert repository.at("main")[1].keys() == PORTABLE | {"README.md", ".gitattributes"}
    assert [with_token for method, path, with_token in hub.requests if path.startswith("/large/")] == [False]

    detectors = [opendet_jax.load(name) for name in (run, "hf://me/tiny")]
    config, params, step = restore(run)
    theirs, found, at = restore("hf://me/tiny")
    assert (theirs, at) == (config, step)
    jax.tree.map(np.testing.assert_array_equal, found, jax.device_get(params))
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    first, second = (detector.detect(image, min_score=0.0).to_json() for detector in detectors)
    assert first == second
    assert json.loads(first)["names"]
    assert [with_token for method, path, with_token in hub.requests if path.startswith("/large/")] == [False, False]

    main(["pull", "me/tiny", str(tmp_path / "pulled")])
    assert {path.name for path in (tmp_path / "pulled").iterdir()} == PORTABLE | {"README.md"}
    offline()
    hub.requests.clear()
    main(["inspect", "hf://me/tiny"])
    assert "113,730 numbers" in capfd.readouterr().out
    main(["export", "hf://me/tiny", "--to", "portable", "--out", str(tmp_path / "again")])
    again, pulled = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("again", "pulled"))
    assert again == pulled
    for name in ("hf://me/tiny", Path("hf://me/tiny"), tmp_path / "pulled"):
        jax.tree.map(np.testing.assert_array_equal, restore(name)[1], found)
    assert hub.requests == []
    assert TOKEN not in "".join((*said, *capfd.readouterr()))


def test_evaluation_and_training_take_its_name(hub, files):
    hub.add("me/tiny", files)
    assert workdir_of("hf://me/tiny@v1") == Path("runs/me/tiny@v1")
    config = restore("hf://me/tiny")[0]
    evaluate_checkpoint(replace(config, data=replace(config.data, max_unwritable=1.0)), "hf://me/tiny")
    measured = json.loads(Path("runs/me/tiny/eval/scenes/metrics.json").read_text())
    assert (measured["step"], measured["images"]) == (4, 2)
    config = parse_config(coco_json.get_config("hf://me/tiny"))
    assert config.init.model == "hf://me/tiny"
    check_start(jax.eval_shape(lambda: restore("hf://me/tiny")[1]), config)
    for mode in ("train", "replay"):
        with pytest.raises(InputError, match=r"--workdir=hf://me/tiny: a run has its own folder"):
            program.run(mode, config, "hf://me/tiny")


def test_the_program_in_a_process_of_its_own(hub, files, tmp_path):
    """By the variables of huggingface_hub, as anybody sets them."""
    hub.add("me/tiny", files)
    picture = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(picture)
    command = [sys.executable, "-c", "from opendet_jax.main import opendet; opendet()", "predict", str(picture)]
    done = subprocess.run(
        [*command, "--workdir=hf://me/tiny", "--config.predict.min_score=0"],
        env={**os.environ, "HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "predicting with tiny in hf://me/tiny" in done.stdout
    assert json.loads((tmp_path / "runs/me/tiny/predict/predictions.json").read_text())[0]["names"]
    assert not (tmp_path / "hf:").exists()
    assert TOKEN not in done.stdout + done.stderr


def test_what_the_hub_does_not_give(hub, files, monkeypatch, tmp_path, caplog):
    hub.add("me/tiny", files)
    hub.add("me/gated", files, gated=True)
    hub.add("me/private", files, private=True)
    hub.add("me/other", {"config.json": b"{}", "pytorch_model.bin": b"x"})

    def said(name: str) -> str:
        return refused("pull", name, str(tmp_path / "out")).removeprefix("error: ")

    login = "`hf auth login`, or the variable HF_TOKEN, says who you are"
    assert said("me/none") == f"hf://me/none: there is no such repository, or it is private: {login}"
    assert said("me/tiny@v2") == "hf://me/tiny@v2: there is no revision 'v2' of it"
    assert said("me/gated") == f"hf://me/gated: is gated: ask for it at {hub.address}/me/gated; then {login}"
    hub.requests.clear()
    lacking = "it lacks model.safetensors, manifest.json"
    assert said("me/other") == f"hf://me/other: holds no model of opendet_jax: {lacking}"
    assert [path for _, path, _ in hub.requests] == ["/api/models/me/other"]  # nothing was fetched
    for name in ("me/tiny/config.json", "datasets/me/tiny", "tiny", "me/tiny@", "me/tiny@../x", "a b/c", ""):
        assert "is no name of a model on the hub, as hf://user/model or hf://user/model@revision" in said(name)

    monkeypatch.setenv("HF_TOKEN", "hf_another")
    assert said("me/private") == (
        f"hf://me/private: the hub answers 401: Invalid credentials in Authorization header; {login}"
    )
    monkeypatch.delenv("HF_TOKEN")
    assert "me/private: there is no such repository, or it is private" in said("me/private")
    monkeypatch.setenv("HF_TOKEN", TOKEN)

    hub.answer = 503
    assert said("me/tiny") == "hf://me/tiny: the hub answers 503, and the cache does not hold it"
    hub.answer, hub.said = 418, f"I do not know {TOKEN}"
    assert said("me/tiny") == "hf://me/tiny: the hub answers 418: I do not know …"
    hub.answer = 0
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert said("me/tiny") == "hf://me/tiny: HF_HUB_OFFLINE is set, and the cache does not hold it"
    assert not (tmp_path / "out").exists()
    assert TOKEN not in caplog.text


def test_without_a_network_the_cache_is_read_and_that_is_said(hub, files, monkeypatch, caplog):
    hub.add("me/tiny", files)
    first = find_model("hf://me/tiny")
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        closed = f"http://127.0.0.1:{nobody.getsockname()[1]}"
    speaks_to(closed, monkeypatch)
    assert find_model("hf://me/tiny") == first
    assert "hf://me/tiny: the hub cannot be reached (" in caplog.text
    assert "what the cache has of it may not be the newest" in caplog.text
    with pytest.raises(
        WeightsError, match=r"hf://me/none: the hub cannot be reached \(.*, and the cache does not hold"
    ):
        find_model("hf://me/none")


def test_a_revision_is_the_one_that_is_meant(hub, files):
    repository = hub.add("me/tiny", files)
    old = repository.branches["main"]
    repository.branches["v/1"] = old
    repository.commit({**files, "README.md": b"another"})
    assert (find_model("hf://me/tiny") / "README.md").read_bytes() == b"another"
    for name in (f"hf://me/tiny@{old}", "hf://me/tiny@v%2F1"):
        assert not (find_model(name) / "README.md").exists()
    assert str(parse("hf:/me/tiny@v%2F1")) == "hf://me/tiny@v%2F1"


def test_nothing_else_of_a_repository_is_fetched(hub, files, tmp_path):
    more = (
        "../evil.json",
        "tokenizer/../../evil.json",
        "tokenizer/evil.py",
        "model.pkl",
        "a/config.json",
        "/evil.json",
    )
    hub.add("me/tiny", {**files, **dict.fromkeys(more, b"evil")})
    folder = find_model("hf://me/tiny")
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*")} == PORTABLE
    asked = {path.rpartition("/")[2] for _, path, _ in hub.requests if "/resolve/" in path}
    assert asked == PORTABLE
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.read_bytes() == b"evil"] == []


def test_damage_and_checksums_that_are_missing_are_found(hub, files, tmp_path):
    content = bytearray(files["model.safetensors"])
    content[-100] ^= 1
    sums = json.loads(files["manifest.json"])
    out_of_it = {**sums, "tokenizer/../../../secret": "0" * 64}
    for number, changed in enumerate(
        (
            {"model.safetensors": bytes(content)},
            {"manifest.json": b"{}"},
            {"manifest.json": json.dumps({"config.json": sums["config.json"]}).encode()},
            {"manifest.json": json.dumps(out_of_it).encode()},
            {"manifest.json": b"[]"},
            {"manifest.json": b"[" * 100_000},
            {"tokenizer/tokenizer.json": b"{}"},
        )
    ):
        hub.add(f"me/bad{number}", {**files, **changed})
        with pytest.raises(CheckpointError, match="damaged"):
            opendet_jax.load(f"hf://me/bad{number}")
        assert "damaged" in refused("pull", f"me/bad{number}", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.fixture
def foreign(files, tmp_path) -> Callable[[object], Path]:
    """A model with another config, and checksums that are right."""

    def write(config: object) -> Path:
        write_json(tmp_path / "foreign" / "config.json", config)
        (tmp_path / "foreign" / "model.safetensors").write_bytes(files["model.safetensors"])
        intact.write_manifest(tmp_path / "foreign")
        return tmp_path / "foreign"

    return write


def test_a_foreign_config_chooses_no_folders_and_no_machines(foreign, files):
    """To write to, and to work with."""
    config = json.loads(files["config.json"])
    config["predict"]["output"] = config["data"]["scenes_dir"] = "/etc"
    config["mesh"] |= {"processes": 2, "coordinator": "evil.example:1"}
    found = parse_config(read_portable(foreign(config))[0])
    assert (found.predict.output, found.data.scenes_dir, found.mesh) == ("", "", Config().mesh)


@pytest.mark.parametrize("config", [[], {"data": []}, {"predict": "x"}, {"data": {}, "model": 3}, {"tricks": {}}])
def test_a_config_that_is_none_is_one_line(foreign, config):
    with pytest.raises(InputError, match=r"config") as refused:
        opendet_jax.load(foreign(config))
    assert "\n" not in str(refused.value)


def test_pull_writes_into_a_new_folder_alone(hub, files, tmp_path):
    hub.add("me/tiny", files)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert "mine: already holds files; give another folder" in refused("pull", "me/tiny", str(tmp_path / "mine"))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    main(["pull", "hf://me/tiny", str(tmp_path / "empty")])
    assert {name: (tmp_path / "empty" / name).read_bytes() for name in files} == files
    hub.requests.clear()
    assert "already holds weights" in refused("pull", "me/tiny", str(tmp_path / "empty"))
    assert hub.requests == []


def test_pushing_again(hub, portable, monkeypatch, capsys):
    run = str(portable)
    main(["push", run, "me/tiny", *PUSH, "--private"])
    repository = hub.repositories["me/tiny"]
    assert repository.private
    assert "me/tiny is private\n" in capsys.readouterr().out
    repository.commit({**repository.at("main")[1], "tokenizer/spiece.model": b"of another", "notes.txt": b"kept"})
    main(["push", run, "me/tiny", "--licence", "mit", "--revision", "more/steps"])
    assert "opendet_jax.load('hf://me/tiny@more%2Fsteps') loads it" in capsys.readouterr().out
    _, there = repository.at("more/steps")
    assert there.keys() == PORTABLE | {"README.md", ".gitattributes", "notes.txt"}
    assert ModelCard(there["README.md"].decode()).data.license == "mit"
    assert restore("hf://me/tiny@more%2Fsteps")[2] == 4
    assert "tokenizer/spiece.model" in repository.at("main")[1]

    commits = len(repository.commits)
    repository.private = False
    said = refused("push", run, "me/tiny", *PUSH, "--private")
    assert said == "error: hf://me/tiny: --private cannot act: the repository is there already, and public"
    assert "--revision b: me/tiny@a names one already" in refused("push", run, "me/tiny@a", *PUSH, "--revision", "b")
    assert '"license" must be one of' in refused("push", run, "me/tiny", "--licence", "nobody-knows")
    assert "the hub answers 403: You don't have the rights" in refused("push", run, "you/tiny", *PUSH)
    assert "no checkpoint in" in refused("push", "nowhere", "me/tiny", *PUSH)
    monkeypatch.delenv("HF_TOKEN")
    assert "me/tiny: the hub takes nothing from somebody it does not know: `hf" in refused(
        "push", run, "me/tiny", *PUSH
    )
    with pytest.raises(SystemExit):
        main(["push", run, "me/tiny"])
    assert "required: --licence" in capsys.readouterr().err
    assert len(repository.commits) == commits


def test_by_the_upload_that_knows_xet(hub, portable, monkeypatch):
    """The other of upload_folder's two ways, as far as it goes without Xet's storage: of small files."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.large = ()
    main(["push", str(portable), "me/tiny", *PUSH])
    assert hub.repositories["me/tiny"].messages == ["", "tiny, step 4"]
    jax.tree.map(np.testing.assert_array_equal, restore("hf://me/tiny")[1], restore(portable)[1])


def test_two_bytes_a_number_stay_two_and_no_folder_is_told(hub, portable, tmp_path, monkeypatch):
    run, half = portable, tmp_path / "half"
    config, params, step = restore(run)
    paths = DatasetPaths(annotations="/home/somebody/sets/mine.json", images="~/photographs")
    told = replace(config, data=replace(config.data, train=paths, mixture=(paths,)))
    monkeypatch.setattr("opendet_jax.weights.commands.restore", lambda _: (told, params, step))
    main(["export", str(run), "--to", "portable", "--out", str(half), "--dtype", "bfloat16"])
    assert "/home/somebody" in (half / "config.json").read_text()
    main(["push", str(half), "me/half", *PUSH])
    _, there = hub.repositories["me/half"].at("main")
    assert there["model.safetensors"] == (half / "model.safetensors").read_bytes()
    data = json.loads(there["config.json"])["data"]
    assert [(paths["annotations"], paths["images"]) for paths in (data["train"], *data["mixture"])] == [
        ("mine.json", "photographs"),
        ("mine.json", "photographs"),
    ]
    assert not any(b"somebody" in content for content in there.values())
    assert "in bfloat16" in there["README.md"].decode()


def test_the_card_has_what_was_measured_of_its_step(hub, portable, tmp_path, capsys):
    run = shutil.copytree(portable, tmp_path / "run")
    measured = {"images": 1200, "AP": 0.25678, "AP50": 0.5, "APr": None, "exact_name_accuracy": 0.4}
    write_json(run / "eval" / "lvis" / "metrics.json", {"dataset": "lvis", "step": 4, **measured})
    write_json(run / "eval" / "old" / "metrics.json", {"dataset": "old", "step": 2, **measured})
    write_json(run / "eval" / "scored" / "metrics.json", measured)
    given = {"dataset": "lvis", "step": 4, "names": "given, chosen by language"}
    write_json(run / "eval" / "lvis_given_by_language" / "metrics.json", given | measured)
    main(["push", str(run), "me/tiny", *PUSH])
    said = capsys.readouterr().out
    assert f"{run / 'eval/lvis_given_by_language/metrics.json'} names are given, chosen by language" in said
    assert f"left out of the card: {run / 'eval/old/metrics.json'} is of step 2, the model of step 4" in said
    assert f"left out of the card: {run / 'eval/scored/metrics.json'} does not say of which step" in said
    found = ModelCard(hub.repositories["me/tiny"].at("main")[1]["README.md"].decode())
    assert (found.data.license, found.data.library_name) == ("apache-2.0", "opendet_jax")
    results = [(result.dataset_name, result.metric_type, result.metric_value) for result in found.data.eval_results]
    assert results == [("lvis", "AP", 25.68), ("lvis", "AP50", 50.0), ("lvis", "exact_name_accuracy", 40.0)]
    assert "| lvis | 1,200 | 25.7 | 50.0 | – | – | – | 40.0 |" in found.text
    (run / "eval" / "old" / "metrics.json").write_text("[")
    assert "old/metrics.json: is damaged" in refused("push", str(run), "me/tiny", *PUSH)


def test_the_card_says_what_the_model_knows():
    scenes = Config(data=DataConfig(source="scenes"))

    def text(config: Config, step: int = 7) -> str:
        return ModelCard(card(Name("me/it", "v1"), config, step, 1234, "float32", "mit", [])).text

    assert "**It knows drawn scenes alone**" in text(scenes)
    assert 'opendet_jax.load("hf://me/it@v1")' in text(scenes)
    assert f"opendet_jax {opendet_jax.__version__}" in text(scenes)
    assert "4,000 drawn scenes of 128 × 128 pixels" in text(scenes)
    begun = replace(scenes, init=InitConfig(model="/home/somebody/weights/photographs"))
    assert "knows drawn scenes" not in text(begun)
    assert "| began with | model: photographs |" in text(begun)
    one, two = DatasetPaths(annotations="/home/somebody/a|b.json"), DatasetPaths(annotations="vg.json")
    of_json = Config(data=DataConfig(name="mine", train=one, mixture=(two,), train_limit=9))
    assert "| trained on | mine: a\\|b.json, vg.json, the first 9 images of each |" in text(of_json)
    assert "| steps | 7 of 300,000 |" in text(of_json)
    assert "| steps | none: converted from weights of another program |" in text(Config(), step=0)
    assert "| trained on | not stated |" in text(Config(), step=0)


def test_files_that_may_be_missing_are_no_error(hub):
    hub.add("me/tokens", {"tokenizer.json": b"{}"})
    folder = fetch(Name("me/tokens"), (), ("tokenizer.json", "spiece.model"))
    assert [path.name for path in folder.iterdir()] == ["tokenizer.json"]


def test_a_tokenizer_travels_with_its_model(hub, offline, files, tmp_path):
    """The model's, which its files belong to, and not one that is left there of a model before."""
    described = {"tokenizer_class": "T5Tokenizer", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    words = {word: place for place, word in enumerate(["<pad>", "</s>", "<unk>", "red", "circle"])}
    inner = Tokenizer(WordLevel(words, unk_token="<unk>"))
    model = tmp_path / "model"
    config = json.loads(files["config.json"])
    config["data"]["tokenizer"] = "tokenizer"
    (model / "tokenizer").mkdir(parents=True)
    inner.save(str(model / "tokenizer" / "tokenizer.json"))
    write_json(model / "tokenizer" / "tokenizer_config.json", described)
    write_json(model / "config.json", config)
    (model / "model.safetensors").write_bytes(files["model.safetensors"])
    intact.write_manifest(model)
    hub.add("me/words", {"tokenizer/spiece.model": b"of another"})
    main(["push", str(model), "me/words", *PUSH])
    there = hub.repositories["me/words"].at("main")[1]
    names = {"tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"}
    assert there.keys() == PORTABLE | names | {"README.md"}
    loaded = opendet_jax.load("hf://me/words")
    assert loaded.config.data.tokenizer == str(find_model("hf://me/words") / "tokenizer")
    assert load_tokenizer(loaded.config.data.tokenizer, 384).encode("circle") == [4]
    main(["pull", "me/words", "pulled"])
    assert all((tmp_path / "pulled" / name).read_bytes() == there[name] for name in names)
    offline()
    assert opendet_jax.load("pulled").config.data.tokenizer == str(tmp_path / "pulled" / "tokenizer")

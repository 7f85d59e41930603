"""Models on the Hugging Face hub: hf://user/model, or hf://user/model@revision.

Of a repository only files that are asked for by their whole names are fetched, so that none can lie outside of its
folder. What is fetched stays in the cache of huggingface_hub, which alone is read where the hub cannot be reached.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from absl import logging

from opendet_jax import __version__
from opendet_jax.config import Config, DatasetPaths
from opendet_jax.errors import InputError, WeightsError

FORM = "hf://user/model or hf://user/model@revision"
LOGIN = "`hf auth login`, or the variable HF_TOKEN, says who you are"
METRICS = {  # of the card, by the keys of metrics.json: docs/evaluate.md
    **{name: name for name in ("AP", "AP50", "APr", "APc", "APf")},
    "exact_name_accuracy": "names right, of objects found",
}


@dataclass(frozen=True)
class Name:
    """Of a repository, and of a branch, tag or commit in it (None: its main branch)."""

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"hf://{self.repository}" + (f"@{quote(self.revision, safe='')}" if self.revision else "")

    @property
    def results(self) -> Path:
        """The folder of what is done with the model on this machine."""
        return Path("runs") / str(self).removeprefix("hf://")


def is_name(text: Path | str) -> bool:
    """Whether a model's folder is meant to be one on the hub. Of hf:// a Path keeps one slash."""
    return str(text).startswith("hf:/")


def parse(text: Path | str) -> Name:
    """Raises WeightsError where it is no name of a model on the hub."""
    from huggingface_hub import parse_hf_uri
    from huggingface_hub.errors import HfUriError

    given = re.sub("^hf:/+", "hf://", str(text))
    try:
        found = parse_hf_uri(given)
    except HfUriError as error:
        raise WeightsError(f"{given}: is no name of a model on the hub, as {FORM}: {_one_line(error.msg)}") from error
    if found.type != "model" or found.path_in_repo or ".." in (found.revision or ""):
        raise WeightsError(f"{given}: is no name of a model on the hub, as {FORM} (a / of a revision is written %2F)")
    return Name(found.id, found.revision)


def fetch(name: Name, needed: Collection[str], more: Collection[str] = ()) -> Path:
    """The folder, in the cache, of the files of a repository that are called so; those of `more` may be missing.

    Where the hub cannot be reached, they are what the cache has of it, and that is said, unless HF_HUB_OFFLINE is set.

    Raises:
        WeightsError: there is no such repository or revision, it may not be read, it lacks a file of `needed` (nothing
            is fetched then), or the hub cannot be reached and the cache does not have it.
    """
    from huggingface_hub import snapshot_download

    with _explained(name):
        there, why_not = _listed(name)
        _require(name, needed, there if there is not None else needed)
        try:
            folder = snapshot_download(
                name.repository,
                revision=name.revision,
                allow_patterns=[*needed, *more],
                local_files_only=there is None,
            )
        except FileNotFoundError as error:
            reason = why_not or _one_line(error.__cause__ or error)
            raise WeightsError(f"{name}: {reason}, and the cache does not hold it") from None
        _require(name, needed, [file for file in needed if (Path(folder) / file).is_file()])
    return Path(folder)


def _listed(name: Name) -> tuple[Collection[str] | None, str]:
    """The files of a repository; None where the hub cannot be asked, and why."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        found = HfApi().model_info(name.repository, revision=name.revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except OfflineModeIsEnabled:
        return None, "HF_HUB_OFFLINE is set"
    except HfHubHTTPError as error:
        if error.response.status_code < 500:
            raise
        why_not = f"the hub answers {error.response.status_code}"
    except Exception as error:  # of the network, in many kinds
        why_not = f"the hub cannot be reached ({_one_line(error)})"
    else:
        return [file.rfilename for file in found.siblings or ()], ""
    logging.warning("%s: %s; what the cache has of it may not be the newest", name, why_not)
    return None, why_not


def _require(name: Name, needed: Collection[str], there: Collection[str]) -> None:
    if missing := [file for file in needed if file not in there]:
        raise WeightsError(f"{name}: holds no model of opendet_jax: it lacks {', '.join(missing)}")


def push(folder: Path, name: Name, private: bool, message: str, replaced: str) -> str:
    """Puts all files of a folder into a repository, in one commit; both it and its branch are made where missing.

    `replaced`: a pattern; files of that name that are there, and not in the folder, go. It is said whether the
    repository is public. Returns the commit's address.

    Raises WeightsError where that may not be, or it is to be private and is there as a public one.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import RevisionNotFoundError

    if not get_token():
        raise WeightsError(f"{name}: the hub takes nothing from somebody it does not know: {LOGIN}")
    api, where = HfApi(), name.repository
    with _explained(name):
        api.create_repo(where, private=private or None, exist_ok=True)
        is_private = api.model_info(where, timeout=constants.HF_HUB_ETAG_TIMEOUT).private
        if private and not is_private:
            raise WeightsError(f"{name}: --private cannot act: the repository is there already, and public")
        print(f"{constants.ENDPOINT}/{where} is {'private' if is_private else 'public'}", flush=True)
        if name.revision is not None:
            try:
                api.model_info(where, revision=name.revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
            except RevisionNotFoundError:
                api.create_branch(where, branch=name.revision)
        return api.upload_folder(
            repo_id=where,
            folder_path=folder,
            revision=name.revision,
            commit_message=message,
            delete_patterns=[replaced],
        ).commit_url


@contextmanager
def _explained(name: Name) -> Iterator[None]:
    """Raises WeightsError of one line for what huggingface_hub raises in this context."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # of many kinds: its own, of the network, of the disk
        # Without its cause, the message of which may quote a token.
        raise WeightsError(f"{name}: {_reason(name, error)}") from None


def _reason(name: Name, error: Exception) -> str:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return f"is gated: ask for it at {constants.ENDPOINT}/{name.repository}; then {LOGIN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"there is no revision {name.revision or constants.DEFAULT_REVISION!r} of it"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"there is no such repository, or it is private: {LOGIN}"
    if isinstance(error, errors.HfHubHTTPError):
        status, said = error.response.status_code, _one_line(error.server_message or error)
        return f"the hub answers {status}: {said}" + (f"; {LOGIN}" if status in (401, 403) else "")
    return _one_line(error) + (f" ({_one_line(error.__cause__)})" if error.__cause__ else "")


def _one_line(error: object) -> str:
    """Without the token, should the message quote it."""
    from huggingface_hub import get_token

    text, token = " ".join(str(error).split()) or type(error).__name__, get_token()
    return text.replace(token, "…") if token else text


def find_metrics(workdir: Path, step: int) -> list[dict[str, Any]]:
    """What the evaluations of a step have measured, a data set each (`eval/<data set>/metrics.json`); others are said
    to be left out."""
    found = []
    for path in sorted(workdir.glob("eval/*/metrics.json")):
        try:
            metrics = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise WeightsError(f"{path}: is damaged: {_one_line(error)}") from error
        if not isinstance(metrics, dict) or not {"step", "dataset", "images"} <= metrics.keys():
            print(f"left out of the card: {path} does not say of which step it is")
        elif metrics["step"] != step:
            print(f"left out of the card: {path} is of step {metrics['step']}, the model of step {step}")
        elif metrics.get("names", "generated") != "generated":
            print(f"left out of the card: in {path} names are {metrics['names']}")
        else:
            found.append(metrics)
    return found


def card(
    name: Name, config: Config, step: int, parameters: int, dtype: str, licence: str, evaluations: Sequence[dict]
) -> str:
    """The README.md of a model on the hub: its licence, what it is, how it is used, what it was measured to do."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    title = name.repository.partition("/")[2]
    results = [
        EvalResult(
            task_type="object-detection",
            dataset_type=str(metrics["dataset"]),
            dataset_name=str(metrics["dataset"]),
            metric_type=key,
            metric_name=METRICS[key],
            metric_value=value,
        )
        for metrics in evaluations
        for key, value in _measured(metrics).items()
    ]
    data = ModelCardData(
        license=licence,
        library_name="opendet_jax",
        pipeline_tag="object-detection",
        tags=["open-ended-detection", "jax"],
        model_name=title,
        eval_results=results or None,
    )
    text = "\n".join(_text(name, title, config, step, parameters, dtype, evaluations))
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}"))


def steps(config: Config, step: int) -> str:
    """How far a model is trained."""
    return f"{step:,} of {config.train.steps:,}" if step else "none: converted from weights of another program"


def _text(
    name: Name, title: str, config: Config, step: int, parameters: int, dtype: str, evaluations: Sequence[dict]
) -> Iterator[str]:
    yield f"# {title}\n"
    yield "It finds the objects in a picture and names them itself, without a list of names to choose from.\n"
    if config.data.source == "scenes" and not config.init.model:
        yield "**It knows drawn scenes alone**: coloured shapes. Of a photograph it says nothing of use.\n"
    begun = {part: folder for part, folder in vars(config.init).items() if folder}
    rows = {
        "model": f"`{config.name}`, {parameters:,} parameters in {dtype}",
        "steps": steps(config, step),
        "trained on": _trained_on(config),
        "began with": ", ".join(f"{part}: {_last(folder)}" for part, folder in begun.items()) or "random numbers",
        "made by": f"opendet_jax {__version__}",
    }
    yield "| | |\n|---|---|"
    yield from (f"| {key} | {_cell(value)} |" for key, value in rows.items() if step or key != "began with")
    yield f'\n## Use\n\n```python\nimport opendet_jax\n\ndetector = opendet_jax.load("{name}")'
    yield 'print(detector.detect("photo.jpg"))\n```\n\n## Evaluation\n'
    if not evaluations:
        yield "None is known.\n"
        return
    yield f"| data set | images | {' | '.join(METRICS.values())} |\n|{'---|' * (2 + len(METRICS))}"
    for metrics in evaluations:
        measured = _measured(metrics)
        values = [f"{measured[key]:.1f}" if key in measured else "–" for key in METRICS]
        yield f"| {_cell(str(metrics['dataset']))} | {metrics['images']:,} | {' | '.join(values)} |"
    yield "\nIn percent, of the step above; r, c and f are LVIS's rare, common and frequent classes.\n"


def _measured(metrics: Mapping[str, Any]) -> dict[str, float]:
    """In percent; what there was nothing to measure of is left out."""
    return {key: round(100 * metrics[key], 2) for key in METRICS if isinstance(metrics.get(key), int | float)}


def _trained_on(config: Config) -> str:
    data = config.data
    if data.source == "scenes":
        return f"{data.scenes_train:,} drawn scenes of {data.scenes_size} × {data.scenes_size} pixels"
    sets: list[DatasetPaths] = [paths for paths in (data.train, *data.mixture) if paths.annotations]
    first = f", the first {data.train_limit:,} images of each" if data.train_limit else ""
    return f"{data.name}: {', '.join(_last(paths.annotations) for paths in sets)}{first}" if sets else "not stated"


def _last(place: str) -> str:
    """The name of a folder or file without where it lies; of the hub the whole."""
    return str(parse(place)) if is_name(place) else Path(place).name


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")

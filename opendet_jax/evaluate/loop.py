"""Evaluation of a model on a data set: detections, metrics and a few pictures in <workdir>/eval/<data set>/.

Method: docs/method.md#13-evaluation.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from PIL import Image

from opendet_jax.checkpoints.restore import restore, workdir_of
from opendet_jax.checkpoints.same_config import check_same, in_evaluation
from opendet_jax.compilation import CompilingFirst
from opendet_jax.config import Config
from opendet_jax.data.datasets import load_evaluation, with_own_hold_out
from opendet_jax.data.formats.records import Dataset, Problems, Record
from opendet_jax.data.images import check_present, open_record
from opendet_jax.data.pipeline import EvaluationBatch, evaluation_batches
from opendet_jax.data.tokenizer import Tokenizer, check_names, load_tokenizer, warn_of_long_names
from opendet_jax.drawing import contact_sheet, draw, side_by_side
from opendet_jax.errors import InputError, Interrupted
from opendet_jax.evaluate.alignment import analyse
from opendet_jax.evaluate.evaluator import EdgeEvaluator
from opendet_jax.evaluate.name_mapping import ExactMapping, NameMapping, TextEncoderMapping, shared_names, shared_said
from opendet_jax.evaluate.name_similarity import NameTexts, RememberingEncoder, load_encoder, name_texts
from opendet_jax.evaluate.pictures import draw_alignment
from opendet_jax.evaluate.protocols import PER_IMAGE
from opendet_jax.evaluate.report import summary
from opendet_jax.evaluate.results import ImageResults, results_file, so_far
from opendet_jax.evaluate.truth import lvis_truth
from opendet_jax.files import replacing, write_json
from opendet_jax.given_names import GivenNames, given_names
from opendet_jax.inference import Found, Inference, Selection
from opendet_jax.model.opendet import OpenDet
from opendet_jax.parallel.mesh import local_mesh
from opendet_jax.parallel.processes import exchange, is_first

NMS_ABOVE = 300  # queries (docs/method.md#13-evaluation)
PREDICTIONS, METRICS, PICTURES = "predictions.json", "metrics.json", "pictures.png"
ALIGNMENT = "alignment.png"


@dataclass(frozen=True)
class Naming:
    mapping: NameMapping
    texts: NameTexts | None  # for the analysis of alignment, where it is asked for
    given: GivenNames | None = None  # what the model chooses from, where it does not make its names up


def load_naming(dataset: Dataset, config: Config) -> Naming:
    """What `config.eval` asks for, on the classes and names of a data set; logs the names that several classes bear.

    Raises:
        WeightsError: `eval.text_encoder` is needed and cannot be loaded.
        EmbeddingError: the analysis is asked for, and a true name has no embedding or one of another width than the
            model's; or names are given, and one has none.
        InputError: names are given, and the language model cannot tell two of them apart.
    """
    needs_encoder = config.eval.name_mapping == "text_encoder" or config.eval.alignment_analysis
    encoder = load_encoder(config.eval.text_encoder) if needs_encoder and config.eval.text_encoder else None
    texts = name_texts(dataset, config, encoder) if config.eval.alignment_analysis else None
    given = None
    if config.eval.names == "given":
        classes = [name for category in dataset.categories if (name := category.name.strip())]
        given = given_names(classes, config.eval.given_by, config)
    return Naming(_mapping(dataset, config, encoder), texts, given)


def _mapping(dataset: Dataset, config: Config, encoder: RememberingEncoder | None) -> NameMapping:
    categories = [{"id": c.id, "name": c.name, "synonyms": c.synonyms} for c in dataset.categories]
    if shared := shared_names(categories):
        logging.warning(
            "%s: %s; a detection counts for the one that has truth in its image, else for the first that has any",
            *(dataset.annotations, shared_said(shared)),
        )
    if config.eval.name_mapping == "exact":
        return ExactMapping(categories)
    assert encoder is not None, "Config.validate asks for eval.text_encoder"
    return TextEncoderMapping(categories, encoder)


def results_folder(config: Config, workdir: Path | str) -> Path:
    """Where `evaluate` writes, and the last results of a data set lie; those of given names beside the others."""
    given = f"_given_by_{config.eval.given_by}" if config.eval.names == "given" else ""
    return Path(workdir) / "eval" / f"{config.data.name}{given}"


def evaluate(
    inference: Inference,
    dataset: Dataset,
    config: Config,
    workdir: Path | str,
    step: int,
    naming: Naming | None = None,
) -> dict[str, Any]:
    """Runs over the data set, prints a table and returns what metrics.json holds; `step` is that of the parameters.

    predictions.json has the 300 best detections of each image, also those whose name is no class (category_id −1), with
    all names; pictures.png shows truth and prediction of the first `config.eval.pictures` images. A metric without a
    class to measure is None (null). `naming` is what `load_naming(dataset, config)` gives; None: called here.

    Raises:
        InputError: the data set has no image.
        ImageError: an image cannot be read.
        Interrupted: Ctrl-C. What has been detected is written.
        WeightsError, EmbeddingError: see `load_naming`.
    """
    _require_images(dataset)
    folder = results_folder(config, workdir)
    naming = naming or load_naming(dataset, config)
    pictured = dataset.records[: config.eval.pictures]
    shown: dict[int, Found] = {}
    evaluator, boxes, done = _evaluator(dataset, config), 0, 0
    try:
        with results_file(folder / PREDICTIONS) if is_first() else nullcontext(lambda _: None) as write:
            for image_id, found in _detect(inference, dataset, config, naming.given):
                image = ImageResults(image_id, found, naming.mapping(found.names, found.scores))
                settled = evaluator.add(image_id, image.detections(), image.boxes())
                write(image.entries(PER_IMAGE, settled.category_ids))
                boxes, done = boxes + len(found.scores), done + 1
                if any(record.image_id == image_id for record in pictured):
                    shown[image_id] = found
    except KeyboardInterrupt:
        raise Interrupted(
            f"stopped after {done} of {len(dataset)} images: what was found in them is in "
            f"{so_far(folder / PREDICTIONS)}; there are no metrics"
        ) from None
    evaluation, edges = evaluator.finish()
    metrics: dict[str, Any] = {
        "name_mapping": naming.mapping.title,
        "names": f"given, chosen by {config.eval.given_by}" if naming.given else "generated",
        "max_detections": config.eval.max_detections,  # 0 = all
        "dataset": config.data.name,
        "step": step,
        "images": len(dataset),
        "detections": boxes,
        **evaluation.metrics,
        **edges,
    }
    analysis = analyse(inference, dataset, config, naming.texts) if naming.texts else None
    if analysis:
        metrics["alignment"] = analysis.summary()
    if not is_first():
        return metrics
    write_json(folder / METRICS, metrics)
    print(table(metrics), flush=True)
    if analysis:
        print(analysis, flush=True)
        draw_alignment(analysis, f"{config.data.name}, step {step}", folder / ALIGNMENT)
    for name, drawn in ((PICTURES, pictured), (ALIGNMENT, analysis)):
        if not drawn:
            (folder / name).unlink(missing_ok=True)  # of an evaluation before this one
    if pictured:
        pairs = [_pair(record, shown[record.image_id], config) for record in pictured]
        with replacing(folder / PICTURES) as part:
            contact_sheet(pairs, columns=2, width=2000).save(part, format="PNG")
    return metrics


def _evaluator(dataset: Dataset, config: Config) -> EdgeEvaluator:
    """On the data set's truth; logs what of it is passed over, or used otherwise than it is written."""
    problems = Problems()
    truth = lvis_truth(dataset, problems=problems)
    if problems.counts:
        logging.warning("%s, the truth of the evaluation: %s", dataset.annotations, problems)
    return EdgeEvaluator(truth, dataset, clipped=config.eval.clip_truth)


def _detect(
    inference: Inference, dataset: Dataset, config: Config, given: GivenNames | None
) -> Iterator[tuple[int, Found]]:
    """(image id, what is found in it) of every image, in every process: they share the work and tell each other."""
    limits = config.eval
    most = limits.max_detections or config.model.max_queries
    selection = Selection(most, limits.min_score, limits.nms_iou, NMS_ABOVE)

    def of_batch(batch: EvaluationBatch) -> list[tuple[int, Found]]:
        sizes = [(height, width) for height, width in np.asarray(batch.original_sizes)[: batch.real].tolist()]
        found = inference(batch.images, sizes, selection, given)
        return list(zip(np.asarray(batch.image_ids)[: batch.real].tolist(), found, strict=True))

    process = (jax.process_index(), jax.process_count())
    batches = evaluation_batches(dataset, config.data, limits.batch_size, *process)
    own = iter(batches)
    with CompilingFirst(
        total=len(dataset), desc=f"evaluate {config.data.name}", unit="image", disable=not is_first()
    ) as progress:
        for number in range(batches.most):
            for found in exchange(of_batch(next(own)) if number < len(batches) else []):
                yield from found
                progress.update(len(found))


def _pair(record: Record, found: Found, config: Config) -> Image.Image:
    """Truth and prediction; of the latter what prediction would show."""
    image, min_score = open_record(record, config.data.max_pixels), config.predict.min_score
    truth = draw(image, record.boxes, [names[0] for names in record.names])
    good = found.scores >= min_score
    best_names = [names[0] for names, is_good in zip(found.names, good, strict=True) if is_good]
    prediction = draw(image, found.boxes[good], best_names, found.scores[good])
    return side_by_side(truth, prediction, ("truth", f"prediction (score ≥ {min_score:g})"))


def table(metrics: dict[str, Any]) -> str:
    """What was evaluated, and a summary of its metrics."""
    title = f"{metrics['dataset']}, step {metrics['step']}: {metrics['images']} images"
    given = "" if metrics["names"] == "generated" else f", {metrics['names']}"
    return f"{title}, names to classes: {metrics['name_mapping']}{given}\n{summary(metrics)}"


def _require_images(dataset: Dataset) -> None:
    if not len(dataset):
        raise InputError(f"{dataset.annotations}: there is no image to evaluate on")


def check_evaluated(dataset: Dataset, tokenizer: Tokenizer, config: Config) -> None:
    """Looks at what is evaluated on before anything is compiled: there are images, their files, and names that can be
    found. Raises InputError, ImageError, TokenizerError."""
    _require_images(dataset)
    where = "data.eval" if config.data.eval.annotations else "data.train"
    check_present(dataset, where, 0.0)
    check_names(dataset.records, tokenizer, config.data, f"evaluation on {dataset.annotations}")
    warn_of_long_names(dataset.records, tokenizer, config.eval.max_new_tokens, str(dataset.annotations))


def evaluate_checkpoint(config: Config, workdir: Path | str) -> None:
    """Restores `eval.checkpoint` (−1: the newest) and writes <workdir>/eval/<data set>/ (`restore.workdir_of`).

    Raises CheckpointError; of a model on the hub WeightsError too.
    """
    saved, params, step = restore(workdir, config.eval.checkpoint)
    check_same(saved.to_dict(), config, workdir, in_evaluation)
    workdir = workdir_of(workdir)
    config = with_own_hold_out(config, saved)
    tokenizer = load_tokenizer(config.data.tokenizer, config.model.t5.vocab_size)
    eval_set = load_evaluation(config, workdir)
    check_evaluated(eval_set, tokenizer, config)
    naming = load_naming(eval_set, config)
    inference = Inference(OpenDet(config.model, config.ablation), params, config, tokenizer.decode, local_mesh())
    evaluate(inference, eval_set, config, workdir, step, naming)
    if is_first():
        written = (METRICS, PREDICTIONS, PICTURES) if config.eval.pictures else (METRICS, PREDICTIONS)
        print(f"In {results_folder(config, workdir)}: {', '.join(written)}")

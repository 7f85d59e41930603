"""--mode=eval: a checkpoint of the workdir on the evaluation set."""

from pathlib import Path

from opendet_jax.config import Config
from opendet_jax.data.pipeline import load_datasets
from opendet_jax.data.tokenizer import load_tokenizer
from opendet_jax.evaluate.loop import evaluate
from opendet_jax.inference import Inference
from opendet_jax.model.opendet import OpenDet
from opendet_jax.train.checkpoint import CHOSEN_IN_EVALUATION, check_same, restore


def evaluate_checkpoint(config: Config, workdir: Path) -> None:
    """Restores `eval.checkpoint` (−1: the newest) and writes <workdir>/eval/<data set>/. Raises CheckpointError."""
    saved, params, step = restore(workdir, config.eval.checkpoint)
    check_same(saved.to_dict(), config, workdir, CHOSEN_IN_EVALUATION)
    _, eval_set = load_datasets(config, workdir)
    decode = load_tokenizer(config.data.tokenizer, config.model.t5.vocab_size).decode
    inference = Inference(OpenDet(config.model, config.ablation), params, config, decode)
    evaluate(inference, eval_set, config, workdir, step)

"""--mode=eval: a checkpoint of the workdir on the evaluation set."""

from pathlib import Path

from opendet_jax.config import Config
from opendet_jax.data.datasets import load_evaluation
from opendet_jax.data.tokenizer import load_tokenizer
from opendet_jax.evaluate.loop import evaluate
from opendet_jax.evaluate.naming import load_naming
from opendet_jax.inference import Inference
from opendet_jax.model.opendet import OpenDet
from opendet_jax.train.checkpoint import restore
from opendet_jax.train.mesh import local_mesh
from opendet_jax.train.same_config import check_same, in_evaluation


def evaluate_checkpoint(config: Config, workdir: Path) -> None:
    """Restores `eval.checkpoint` (−1: the newest) and writes <workdir>/eval/<data set>/. Raises CheckpointError."""
    saved, params, step = restore(workdir, config.eval.checkpoint)
    check_same(saved.to_dict(), config, workdir, in_evaluation)
    eval_set = load_evaluation(config, workdir)
    naming = load_naming(eval_set, config)
    decode = load_tokenizer(config.data.tokenizer, config.model.t5.vocab_size).decode
    inference = Inference(OpenDet(config.model, config.ablation), params, config, decode, local_mesh())
    evaluate(inference, eval_set, config, workdir, step, naming)

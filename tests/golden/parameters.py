"""Every parameter of a config in text: path, shape, learning-rate group, mesh axes. `make golden` writes the files."""

from importlib import import_module
from pathlib import Path

import jax
import jaxtyping
from flax.traverse_util import flatten_dict

from opendet_jax.config import Config
from opendet_jax.config_files import parse_config
from opendet_jax.model.opendet import OpenDet, init_params
from opendet_jax.parallel.sharding import rule_of
from opendet_jax.train.optimizer import group_of

FOLDER = Path(__file__).parent
CONFIGS = ("swin_t", "swin_s", "swin_l", "scenes_tiny", "minilvis", "coco_json", "generateu_t", "generateu_tiny")


def shipped(name: str) -> Config:
    return parse_config(import_module(f"configs.{name}").get_config())


def axes(path: tuple[str, ...]) -> str:
    """The mesh axis that each dimension is split over (· for none), or "whole"."""
    rule = rule_of("/".join(path))
    return "×".join(axis or "·" for axis in rule) or "whole"


def table(config: Config) -> str:
    """One line a parameter, sorted by path, and the number of numbers in each group."""
    model = OpenDet(config.model, config.ablation)
    params = flatten_dict(jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0)))
    lines, sizes = [], {}
    for path, leaf in sorted(params.items()):
        group = group_of(path, config.optimizer, config.ablation)
        sizes[group] = sizes.get(group, 0) + leaf.size
        lines.append(f"{'/'.join(path)}  {'×'.join(map(str, leaf.shape))}  {group}  {axes(path)}")
    totals = [f"# {group}: {size:,}" for group, size in sorted(sizes.items())]
    return "\n".join([*lines, *totals, f"# all: {sum(sizes.values()):,}"]) + "\n"


if __name__ == "__main__":
    jaxtyping.config.update("jaxtyping_disable", True)
    for name in CONFIGS:
        (FOLDER / f"{name}.txt").write_text(table(shipped(name)))

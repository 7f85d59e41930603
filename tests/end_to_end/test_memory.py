"""At full size: what an image that is full of objects takes."""

import subprocess
import sys

import pytest

LIMIT = 6.0  # GiB
PROGRAM = """
import jax
import numpy as np
from configs.swin_t import get_config
from benchmarks.comparison import peak_memory
from opendet_jax.config_files import parse_config
from opendet_jax.batch import Images
from opendet_jax.config import Config
from opendet_jax.inference import Inference, Selection
from opendet_jax.model.opendet import OpenDet, init_params

values = get_config()
values.model.min_queries = values.model.max_queries
config = parse_config(values)
model = OpenDet(config.model)
params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
pixels = np.random.default_rng(0).integers(0, 256, (1, 800, 1344, 3), np.uint8)
images = Images(pixels, np.ones((1, 800, 1344), bool))
[found] = Inference(model, params, config, str)(images, [(800, 1344)], Selection(900, 0.0, 1.0))
print(len(found.names), peak_memory())
"""


@pytest.mark.slow  # minutes: 900 names of 30 tokens
def test_900_queries_of_a_large_photograph_are_detected_and_named():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    named, peak = done.stdout.split()
    print(f"peak {peak} GiB")
    assert int(named) == 900
    assert float(peak) < LIMIT

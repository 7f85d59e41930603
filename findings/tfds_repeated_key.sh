#!/usr/bin/env bash
# Without TensorFlow, TensorFlow Datasets reports two examples of one key as a missing TensorFlow.
#
# Expected: DuplicatedKeysError with the key. Building and reading array_record files works without TensorFlow, as its
#           documentation says, and a key that comes twice is the most common mistake in a builder.
# Seen:     ModuleNotFoundError: No module named 'tensorflow'. With different keys the same builder works, so that
#           TensorFlow is not what is missing.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv" || exit 2
"$folder/venv/bin/pip" install -q tensorflow-datasets==4.9.10 array_record==0.8.6 numpy==2.4.6 || exit 2
cd "$folder"
venv/bin/python - <<'PYTHON'
import logging
from importlib.metadata import version

logging.disable(logging.WARNING)
import numpy as np
import tensorflow_datasets as tfds

tfds.disable_progress_bar()


class Numbers(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    keys = ()

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"number": np.int64}))

    def _split_generators(self, manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for number, key in enumerate(self.keys):
            yield key, {"number": number}


def build(folder, keys):
    builder = Numbers(data_dir=folder, file_format="array_record")
    builder.keys = keys
    try:
        builder.download_and_prepare()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return f"{len(builder.as_data_source('train'))} examples"


distinct, repeated = build("distinct", ("a", "b", "c")), build("repeated", ("a", "b", "a"))
print("tensorflow-datasets", version("tensorflow-datasets"))
print("keys a, b, c:", distinct)
print("expected of the keys a, b, a: DuplicatedKeysError")
print("seen    ", repeated)
if distinct != "3 examples" or not repeated.startswith("ModuleNotFoundError"):
    raise SystemExit("this has changed")
PYTHON

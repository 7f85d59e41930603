#!/usr/bin/env bash
# Grain continues from the state of an iterator over other data, and goes on in the wrong place.
#
# Expected: an error. The DataLoader of the same library writes into its state what it reads and how, and refuses
#           another.
# Seen:     the state of a data set is a count alone. After another batch size or with another seed it is accepted,
#           and elements are left out or repeated.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv" || exit 2
"$folder/venv/bin/pip" install -q grain==0.2.18 numpy==2.4.6 || exit 2
cd "$folder"
venv/bin/python - <<'PYTHON'
from importlib.metadata import version

import grain


def batches(size, seed=None):
    numbers = grain.MapDataset.range(100)
    return iter((numbers if seed is None else numbers.shuffle(seed=seed)).batch(size).to_iter_dataset())


stopped = batches(4)
for _ in range(3):
    next(stopped)  # the numbers 0 to 11
state = stopped.get_state()
other_size = batches(2)
other_size.set_state(state)
first = next(other_size).tolist()
same_seed, other_seed = batches(4, seed=1), batches(4, seed=2)
same_seed.set_state(state)
other_seed.set_state(state)

print("grain", version("grain"))
print("the state", state)
print("expected [12 ...] or an error: a state of batches of 4, given to batches of 2")
print("seen    ", first)
print("expected an error: the same state, given to another order")
print("seen    ", next(other_seed).tolist(), "where", next(same_seed).tolist(), "is next in the order of the first")
if state != {"next_index": 3} or first != [6, 7]:
    raise SystemExit("this has changed")
PYTHON

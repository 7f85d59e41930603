#!/usr/bin/env bash
# transformers' AutoTokenizer.from_pretrained asks at the terminal whether a tokenizer's own code is to be run.
#
# Expected: the documentation has "trust_remote_code (bool, optional, defaults to False)": a call that leaves the
#           argument out does what one with False does, which is to refuse such a tokenizer with a ValueError.
# Seen:     left out, it waits up to 15 seconds for an answer on standard input, and with "y" imports the code. With
#           False it refuses and asks nothing. So a program that loads what its user names has to pass False, or may
#           stand still, and run code that its author never meant to allow.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv" || exit 2
"$folder/venv/bin/pip" install -q transformers==5.24.0 || exit 2
cd "$folder"
export HF_HOME="$folder/home" HF_HUB_OFFLINE=1
mkdir model
cat > model/tokenizer_config.json <<'JSON'
{"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", null]}}
JSON
cat > model/own.py <<'PYTHON'
from pathlib import Path

Path("ran").touch()


class Own:
    @classmethod
    def from_pretrained(cls, *_, **__):
        return cls()

    @classmethod
    def register_for_auto_class(cls, *_):
        pass
PYTHON
venv/bin/python - <<'PYTHON'
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path


def outcome(argument):
    Path("ran").unlink(missing_ok=True)
    call = f"from transformers import AutoTokenizer; AutoTokenizer.from_pretrained('model'{argument})"
    done = subprocess.run([sys.executable, "-c", call], input="y\n", capture_output=True, text=True)
    asked = "Do you wish to run the custom code?" in done.stdout
    if Path("ran").exists():
        return "asked, and ran the code" if asked else "ran the code"
    return "refused" if "ValueError" in done.stderr and not asked else done.stderr[-300:]


seen = {"left out": outcome(""), "False": outcome(", trust_remote_code=False")}
print("transformers", version("transformers"))
print("expected", {"left out": "refused", "False": "refused"})
print("seen    ", seen)
if seen != {"left out": "asked, and ran the code", "False": "refused"}:
    raise SystemExit("this has changed")
PYTHON

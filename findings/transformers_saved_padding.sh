#!/usr/bin/env bash
# A tokenizer that transformers saves after a padded call pads for ever where the tokenizers library reads it.
#
# Expected: tokenizer.json says how text becomes tokens. That one call of a program padded and cut its batch is no part of it:
#           read by `tokenizers`, the library underneath, the file gives the tokens that transformers gives.
# Seen:     `save_pretrained` writes padding and truncation of the last call into the file. transformers sets them anew at
#           each of its own calls, so that it never shows; tokenizers.Tokenizer.from_file pads and cuts every text.
# Upstream: none that we know of.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv" || exit 2
"$folder/venv/bin/pip" install -q transformers==5.24.0 tokenizers==0.23.3 numpy==2.4.6 || exit 2
cd "$folder"
cat > program.py <<'PYTHON'
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

words = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "red": 2, "ring": 3, "green": 4}, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
fast = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")
fast.save_pretrained("before")
fast(["red"], padding="max_length", truncation=True, max_length=3)
fast.save_pretrained("after")
for folder in ("before", "after"):
    alone = Tokenizer.from_file(f"{folder}/tokenizer.json")
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    print([[theirs(text)["input_ids"], alone.encode(text).ids] for text in ("red ring", "red green red ring")])
PYTHON
mapfile -t seen < <(venv/bin/python program.py 2> /dev/null)
echo "expected: [[[2, 3], [2, 3]], [[2, 4, 2, 3], [2, 4, 2, 3]]] twice (transformers, tokenizers)"
echo "seen:     ${seen[0]} before the padded call, ${seen[1]} after it"
if [[ ${seen[0]} != "[[[2, 3], [2, 3]], [[2, 4, 2, 3], [2, 4, 2, 3]]]" || ${seen[1]} != "[[[2, 3], [2, 3, 0]], [[2, 4, 2, 3], [2, 4, 2]]]" ]]; then
    echo "this has changed"
    exit 1
fi

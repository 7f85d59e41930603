#!/usr/bin/env bash
# A compiled JAX program on a CPU takes the memory of its temporaries from the kernel anew at every call.
#
# Expected: that a program that runs again and again with the same shapes keeps its memory, or that malloc does.
# Seen:     every call touches every page of its temporaries for the first time, and the kernel fills each with zeros: 64 MiB
#           of temporaries are 16,384 faults of 4 KiB a call. MALLOC_MMAP_MAX_ and MALLOC_TRIM_THRESHOLD_ change nothing, since
#           the memory is asked for from threads, whose heaps are too small for it. Where the kernel allows large pages on
#           request (/sys/kernel/mm/transparent_hugepage/enabled: madvise), GLIBC_TUNABLES=glibc.malloc.hugetlb=1 makes it
#           faults of 2 MiB; a training step of 190 MiB of temporaries took a fifth less time with it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv" || exit 2
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 || exit 2
cat > "$folder/faults.py" <<'PYTHON'
import resource

import jax
import jax.numpy as jnp

CALLS = 20


@jax.jit
def program(x):
    """Two temporaries of 32 MiB: products, whose operands and results XLA cannot keep to itself."""
    wide = x @ jnp.ones((1024, 8192))
    return (jnp.flip(wide, 0) @ jnp.ones((8192, 1))).sum()


def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


x = jnp.ones((1024, 1024))
for _ in range(3):
    program(x).block_until_ready()
temporaries = program.lower(x).compile().memory_analysis().temp_size_in_bytes
before = faults()
for _ in range(CALLS):
    program(x).block_until_ready()
share = (faults() - before) / CALLS / (temporaries / 4096)
print(f"{share:.2f}")
PYTHON
cd "$folder"
seen() { env "$@" venv/bin/python faults.py; }
plain=$(seen GLIBC_TUNABLES=)
kept=$(seen GLIBC_TUNABLES= MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=4000000000)
large=$(seen GLIBC_TUNABLES=glibc.malloc.hugetlb=1)
echo "jax 0.10.2; $(cat /sys/kernel/mm/transparent_hugepage/enabled); faults a call by the pages of 4 KiB of its temporaries"
echo "expected: near 0"
echo "seen      plain $plain, malloc told to keep it $kept, large pages $large"
venv/bin/python -c "import sys; a, b = map(float, sys.argv[1:]); sys.exit(not (a > 0.5 and b > 0.5) and 'this has changed')" "$plain" "$kept"

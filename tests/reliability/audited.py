"""The small program, which ends at once where Python unpickles anything or runs code that is not its own.

Its own is what lies in this checkout and in the installed packages. Takes the command line of opendet_jax.main; after
training the model is loaded, as for inference.
"""

import os
import sys
import traceback
from pathlib import Path

from absl import app, flags

import opendet_jax
from opendet_jax import main
from opendet_jax.checkpoints.restore import restore
from tests.reliability import toy

OWN = (str(Path(opendet_jax.__file__).parents[1]), sys.prefix, sys.base_prefix, "<")  # "<": made by a library
# tensorboardX imports PyTorch where that is installed, whose build for CUDA asks where libraries lie.
LOOK_UP = ["/sbin/ldconfig", "-p"]
QUEUE = "tensorboardX/event_file_writer.py"  # its own events, from one thread of this process to another


def end(message: str) -> None:
    """At once, whichever thread this is: an exception would end that alone, and others wait for it."""
    traceback.print_stack()
    print(message, file=sys.stderr, flush=True)
    os._exit(3)


def watch(event: str, arguments: tuple) -> None:
    if event == "pickle.find_class" and not any(frame.filename.endswith(QUEUE) for frame in traceback.extract_stack()):
        end(f"unpickles {arguments}")
    if event == "exec" and not arguments[0].co_filename.startswith(OWN):
        end(f"runs code of {arguments[0].co_filename}")
    if event in ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen") and LOOK_UP not in arguments:
        end(f"runs a program: {arguments}")


def run(arguments: list[str]) -> None:
    sys.addaudithook(watch)
    main.main(arguments)
    config, _, step = restore(flags.FLAGS.workdir)
    print(f"restored step {step} of {config.name}")


if __name__ == "__main__":
    toy.install(setattr)
    app.run(run, flags_parser=main.parse_flags)

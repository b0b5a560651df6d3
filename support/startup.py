"""What must be set before the libraries are imported; each script imports this module first.

Ctrl-C while they are imported, which takes seconds, ends the script with one line. A program that
imports a script keeps its own Ctrl-C. On a GPU, PyTorch's allocator lets segments grow: prompts
differ in length, and blocks of fixed sizes would leave gaps between them.
"""

import os
import signal
import sys

if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def stop(*_: object) -> None:
    """End this process. An exception would not do: libraries catch some while they are imported."""
    os.write(2, b"\nstopped by Ctrl-C before the start\n")
    os._exit(130)


importer = sys._getframe(1)
while "importlib" in importer.f_code.co_filename:
    importer = importer.f_back
by_script = importer.f_globals["__name__"] == "__main__"
if by_script and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, stop)  # until `cli.run_script`

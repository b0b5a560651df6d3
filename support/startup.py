"""Ctrl-C while a script imports its libraries, which takes seconds, ends it with one line.

Each script imports this module first. A program that imports a script is not affected.
"""

import os
import signal
import sys


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

"""Which process runs which tests, and in which order; the fixtures are in shared.py."""

import gc

import pytest
from xdist.scheduler import LoadFileScheduling

# These files take longest. pytest-xdist starts with them, so that no worker is left with one alone.
LONG = ("test_ranks", "test_exit", "test_base_model", "test_run_directory", "test_states")
SERVED = LONG  # they share a process that starts scripts, see launch.py, and so a worker
LONG += ("test_gpu", "test_resume", "test_scripts", "test_real", "test_diagnose")
LONG += ("test_distillation", "test_paper", "test_gpu_check", "test_attention", "test_forks")


def pytest_configure(config) -> None:
    # The process that hands the tests out needs no fixtures, and their imports take seconds.
    if config.option.dist == "no" or hasattr(config, "workerinput"):
        gc.disable()  # collecting takes a tenth of the imports
        config.pluginmanager.import_plugin("shared")
        gc.freeze()  # and nothing of them ever becomes garbage
        gc.enable()


def pytest_collection_modifyitems(items) -> None:
    order = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONG)))


class ByFile(LoadFileScheduling):
    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "served" if file.endswith(tuple(f"/{name}.py" for name in SERVED)) else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log) -> ByFile:
    return ByFile(config, log)

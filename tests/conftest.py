"""Set before any test module is imported: Triton's interpreter, and property tests that are the same at every run."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

settings.register_profile("fixed", derandomize=True, deadline=None, database=None, max_examples=60)
settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def _threads_of_the_test() -> Iterator[None]:
    """A command line that is run within a test sets PyTorch's threads, of which the next one must know nothing."""
    import torch  # after the environment is set

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr != "gpu":
        os.environ["TRITON_INTERPRET"] = "1"  # Triton kernels then run on the CPU
    if not _is_built():  # then everything else is tested with what takes their place
        config.addinivalue_line("filterwarnings", "ignore:fastsnap was installed without")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not _is_built():
        for item in items:
            if item.get_closest_marker("needs_library"):
                item.add_marker(pytest.mark.skip(reason="the C++ kernels were not built: no C++ compiler"))


def _is_built() -> bool:
    from fastsnap.kernels.cpu import is_built  # torch comes with it: after the environment is set

    return is_built()

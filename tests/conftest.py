"""How every test runs: on eight simulated CPU devices, strictly, and in a directory of its own."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Generator
from pathlib import Path
from typing import Any

# Read when JAX is imported. With fewer threads than twice the devices, steps that nobody waits for
# deadlock in the CPU backend's collectives.
os.environ["NPROC"] = str(max(16, os.cpu_count() or 1))
os.environ["JAX_PLATFORMS"] = os.environ.get("DISTAFF_TEST_PLATFORM", "cpu")
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parents[1] / ".cache" / "jax")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["DISTAFF_MALLOC"] = "off"  # JAX has started before the first trainer is made

# A shell starts what it runs in the background deaf to Ctrl-C, and a run leaves that as it is.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import jax
import pytest
from hypothesis import settings

settings.register_profile("distaff", deadline=None)  # no test depends on the clock
settings.load_profile("distaff")

# Set here, not in the environment: a process that a test starts sees one device, as a user does.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makeitem(collector: pytest.Collector, name: str) -> Generator[None, Any, Any]:
    """Marks as slow the cases of a test that `slow_but("id", ...)` does not name."""
    made = yield
    functions = made if isinstance(made, list) else []
    cases = [case for case in functions if case.get_closest_marker("slow_but")]
    quick = {case.callspec.id for case in cases if case.callspec.id in _quick(case)}
    for case in cases:
        if unknown := _quick(case) - quick:
            raise collector.CollectError(f"{name} has no case {', '.join(sorted(unknown))}")
        if case.callspec.id not in quick:
            case.add_marker("slow")
    return made


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of `golden/`, which `make test-slow` runs with XLA's optimizations."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent / "golden"):
            item.add_marker("golden")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips a test against a real package, or with a compiler, that is not installed."""
    for kind, command in (("peer", "test-peers"), ("compiler", "test-plan")):
        packages = [name for mark in item.iter_markers(kind) for name in mark.args]
        if missing := [name for name in packages if not _is_installed(name)]:
            pytest.skip(f"needs {', '.join(missing)}: make {command}")


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # not even the package around it
        return False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    """Fails each test that is skipped where all packages must be installed."""
    report = yield
    if (
        os.environ.get("DISTAFF_REQUIRE_PEERS")
        and report.skipped
        and not hasattr(report, "wasxfail")
    ):
        *_, reason = report.longrepr
        report.outcome, report.longrepr = "failed", f"DISTAFF_REQUIRE_PEERS is set, but: {reason}"
    return report


def _quick(case: Any) -> set[str]:
    return set(case.get_closest_marker("slow_but").args)


@pytest.fixture(autouse=True)
def own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps `runs/` and whatever else a test writes out of the checkout, and out of `~/.cache`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path.with_name(f"{tmp_path.name}-cache")))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keeps what a fixture for several tests remembers out of `~/.cache`."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def strict_dtypes():
    """Refuses implicit promotion between dtypes, for code that calls neither Adam nor a pooling.

    Not for every test: Optax's bias correction and Flax's `avg_pool` mix int32 with floats.
    """
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def optimized() -> Generator[None]:
    """Compiles with XLA's optimizations in `make test`, too: for bits of two different programs."""
    name = "jax_disable_most_optimizations"
    before = jax.config.read(name)
    jax.config.update(name, False)
    yield
    jax.config.update(name, before)

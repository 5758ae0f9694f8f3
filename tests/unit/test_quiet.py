"""Logging: the program's own is left alone, and its handlers get the lines of a run once."""

from __future__ import annotations

import io
import logging
import sys
import warnings

import pytest
from absl import logging as absl_logging

from distaff import data, tasks, zoo
from distaff.core.quiet import quiet
from distaff.core.warnings import warn
from distaff.run.directory.run_log import open_log


class Kept(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append((record.name, record.levelname, record.getMessage()))


@pytest.fixture
def root():
    """The root logger, which is afterwards as it was."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    yield root
    root.handlers[:] = before
    root.setLevel(level)


@pytest.fixture
def kept(root):
    handler = Kept()
    root.addHandler(handler)
    return handler


def trained(tmp_path, **options):
    train, val, _ = data.digits(batch_size=512)
    trainer = tasks.Classifier(zoo.MLP((2, 10)), root=tmp_path, resume="never", **options)
    return trainer.train_model(train, val, num_epochs=2, steps_per_epoch=1)


def test_training_leaves_the_root_logger_as_it_is(root, tmp_path, capsys):
    root.handlers.clear()  # those of pytest
    trained(tmp_path, enable_progress_bar=False)
    assert (root.handlers, type(root.handlers), root.level) == ([], list, logging.WARNING)
    logging.basicConfig(level=logging.INFO, format="mine %(message)s")
    logging.getLogger("a").info("later")
    assert "mine later" in capsys.readouterr().err


def test_handlers_of_the_program_get_each_line_once_and_none_of_other_libraries(
    root, kept, tmp_path, capsys
):
    root.setLevel(logging.INFO)
    trained(tmp_path)
    ours = [message for name, _, message in kept.lines if name == "distaff"]
    assert {name for name, _, _ in kept.lines if not name.startswith("jax")} == {"distaff"}
    assert sum(line.startswith("epoch 2/2") for line in ours) == 1
    assert capsys.readouterr().out.count("epoch 2/2") == 1


def test_program_that_asked_for_warnings_gets_them_alone(root, kept, tmp_path):
    with open_log(tmp_path) as logger, open_log(tmp_path):
        logger.info("a")
        logger.warning("b")
        root.setLevel(logging.INFO)
        logger.info("c")
    assert [message for _, _, message in kept.lines] == ["b", "c"]
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line[-1] for line in lines] == [*"aabbcc"]


def test_logs_that_close_in_any_order_leave_the_logger_as_it_was(tmp_path):
    logger = logging.getLogger("distaff")
    before = (logger.level, logger.propagate, logger.handlers[:])
    first, second = open_log(tmp_path), open_log(tmp_path)
    first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    logger.info("still there")
    second.__exit__(None, None, None)
    assert (logger.level, logger.propagate, logger.handlers) == before
    assert (tmp_path / "log.txt").read_text().endswith("still there\n")


def test_handler_on_a_standard_error_that_is_closed_ends_nothing(root, tmp_path, monkeypatch):
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    root.addHandler(handler)
    stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    logger = logging.getLogger("distaff")
    logger.warning("without a run")
    with open_log(tmp_path):
        logger.warning("in a run")
    monkeypatch.setattr(warnings, "warn", lambda *_, **__: stream.write("a warning"))
    warn("shown nowhere")
    root.removeHandler(handler)
    assert "in a run" in (tmp_path / "log.txt").read_text()


def test_quiet_lets_warnings_and_the_programs_own_lines_through(root, kept):
    root.setLevel(logging.INFO)
    record = absl_logging.get_absl_logger().makeRecord
    with quiet(), quiet():
        for path, level in (("orbax", 20), ("orbax", 30), ("mine", 20)):
            line = record("absl", level, f"/lib/{path}/a.py", 1, f"{path} {level}", (), None)
            absl_logging.get_absl_logger().handle(line)
    assert [message for _, _, message in kept.lines] == ["orbax 30", "mine 20"]


def test_quiet_leaves_the_program_free_to_configure_its_logging(root):
    root.handlers.clear()  # those of pytest
    with quiet():
        absl_logging.info("which would add a handler")
        assert len(root.handlers) == 0
        logging.basicConfig(level=logging.INFO)
    assert [type(handler) for handler in root.handlers] == [logging.StreamHandler]
    with quiet():
        root.handlers = mine = [Kept()]
    assert root.handlers is mine

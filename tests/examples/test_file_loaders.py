"""Files of each kind are gone on with within an epoch."""

from __future__ import annotations

import pytest


@pytest.mark.slow
def test_files_go_on_bit_for_bit(example, capsys) -> None:
    example("loaders")  # which the other one imports
    module = example("file_loaders")
    module.LOADERS = {"data.TarExamples": module.LOADERS["data.TarExamples"]}
    assert module.main(num_epochs=3) == {"data.TarExamples": True}
    assert capsys.readouterr().out.splitlines()[-1].split()[-1] == "yes"

"""The command line as tests call it."""

from __future__ import annotations

import pytest

from xlora_core.cli import main


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """Returns stderr of a command that must exit with 2, a hint and no traceback."""
    assert main([str(argument) for argument in argv]) == 2
    out = capsys.readouterr()
    assert out.out == ""
    assert "Traceback" not in out.err
    assert "\nhint: " in out.err
    return out.err

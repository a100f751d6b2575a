"""What a program does as it starts: little, quickly, and only what it needs."""

from __future__ import annotations

import gc
import importlib
import json
import subprocess
import sys

import pytest

from xlora_core.startup import leave_quickly, without_collector

HEAVY = ("torch", "transformers", "pandas", "pyarrow", "peft", "streamlit", "plotly")


def imported_by(statement: str) -> set[str]:
    """Returns which heavy packages a fresh process has after a statement."""
    program = f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout)) & set(HEAVY)


def test_the_collector_rests_and_comes_back() -> None:
    assert gc.isenabled()
    with without_collector():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_the_collector_comes_back_after_a_failure() -> None:
    with pytest.raises(KeyError), without_collector():
        raise KeyError
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with without_collector():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_commands_are_parsed_without_pytorch() -> None:
    assert imported_by("import xlora_core.cli.main, xlora_core.startup") == set()


def test_generating_needs_no_tables() -> None:
    statement = "import xlora_core.demo, xlora_core.engine"
    assert imported_by(statement) == {"torch", "transformers"}


@pytest.fixture
def nothing_frozen() -> None:
    """Gives back to the collector what other tests of this process took from it."""
    gc.unfreeze()


@pytest.mark.usefixtures("nothing_frozen")
def test_what_was_made_meanwhile_is_old() -> None:
    with without_collector():
        made = [[] for _ in range(5000)]
    old = {id(thing) for thing in gc.get_objects(generation=2)}
    assert all(id(thing) in old for thing in made)
    assert gc.get_freeze_count() == 0


@pytest.mark.usefixtures("nothing_frozen")
def test_what_a_program_has_frozen_stays_so() -> None:
    gc.freeze()
    try:
        n_frozen = gc.get_freeze_count()
        with without_collector():
            pass
        # Some of it may have been freed meanwhile, which needs no collector.
        assert gc.get_freeze_count() > n_frozen // 2 > 0
    finally:
        gc.unfreeze()


def test_only_a_process_that_ends_with_a_command_leaves_its_garbage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left: list[bool] = []
    main = importlib.import_module("xlora_core.cli.main")
    monkeypatch.setattr(main, "leave_quickly", lambda: left.append(True))
    monkeypatch.setattr(sys, "argv", ["xlora", "--help"])
    with pytest.raises(SystemExit):
        main.main(["--help"])
    assert not left
    with pytest.raises(SystemExit):
        main.main()
    assert left


@pytest.mark.usefixtures("nothing_frozen")
def test_garbage_is_left_unless_triton_would_list_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", sys)
    leave_quickly()
    assert gc.get_freeze_count() == 0
    monkeypatch.delitem(sys.modules, "triton")
    leave_quickly()
    try:
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()

"""Shell completion: what argcomplete's hook in the shell asks for is answered."""

import os
import subprocess
import sys

import pytest

from vitprobe import cli
from vitprobe.models.names import ALIASES

pytest.importorskip("argcomplete")


def completed(line, tmp_path):
    """What may stand in place of the line's last word."""
    told = tmp_path / "told"
    asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "COMP_LINE": line}
    asked |= {"COMP_POINT": str(len(line)), "_ARGCOMPLETE_STDOUT_FILENAME": str(told)}
    done = subprocess.run(
        [sys.executable, "-m", "vitprobe"], env={**os.environ, **asked}, capture_output=True
    )
    assert (done.returncode, done.stdout) == (0, b""), done.stderr
    return [word.strip() for word in told.read_text().split("\n")]


def test_commands_are_completed(tmp_path):
    assert completed("vitprobe skip", tmp_path) == ["skip_ablation", "skip_ratio"]


def test_options_of_a_command_are_completed_under_either_of_its_names(tmp_path):
    assert completed("vitprobe skip-ratio --num", tmp_path) == ["--num-images"]


def test_models_are_completed_by_the_names_that_they_are_written_by():
    option = cli.parser("cka", "")._option_string_actions["--models"]
    names = option.completer(prefix="vit")
    assert {"vit_small_box", "resnet_box"} <= set(names) and set(ALIASES) <= set(names)


def test_nothing_is_completed_unless_the_shell_asks(monkeypatch):
    monkeypatch.setattr(cli, "complete", lambda parser: pytest.fail("completed"))
    assert cli.parser("cka", "").parse_args([]).models is None

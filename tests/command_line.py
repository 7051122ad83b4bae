# SPDX-License-Identifier: Apache-2.0
from diffusers_hart.cli import main


def fails(capsys, *argv):
    """The one line that an error of the command line is told in."""
    capsys.readouterr()
    assert main([str(argument) for argument in argv]) == 1
    captured = capsys.readouterr()
    line = captured.err.splitlines()[-1]
    assert line.startswith("diffusers-hart: error: ")
    assert captured.out == "" and "Traceback" not in captured.err
    return line

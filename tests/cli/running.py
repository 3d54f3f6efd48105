"""The command line as a user sees it: exit code, standard output and standard error."""

from typing import Any

import pytest

from hf_compressm.cli import main


def run(capsys: Any, *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    seen = capsys.readouterr()
    return ended.value.code, seen.out, seen.err


def complaint(capsys: Any, *arguments: object) -> str:
    """The one line on standard error of a mistake."""
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in err
    return lines[0]

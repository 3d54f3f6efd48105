"""Prints the command with which README.md passes the tests: the one shell block that runs pytest.

Usage: `python readme_test_command.py README.md`. Fails where there is no such block, or more than one, so that a
rewritten README cannot quietly turn the check of its own command into a check of nothing.
"""

import re
import sys
from pathlib import Path


SHELL_BLOCK = re.compile(r"^```(?:sh|bash|shell)[ \t]*\n(.*?)^```[ \t]*$", flags=re.MULTILINE | re.DOTALL)


def find_test_command(text: str) -> str:
    """Returns the body of the one fenced shell block of `text` that runs pytest."""
    blocks = [body.strip() for body in SHELL_BLOCK.findall(text)]
    commands = [body for body in blocks if re.search(r"-m pytest\b", body)]
    if len(commands) != 1:
        raise ValueError(
            f"{len(commands)} of the {len(blocks)} ```sh blocks run `-m pytest`; exactly one must, "
            "as the command that passes the tests on a fresh machine."
        )
    return commands[0]


if __name__ == "__main__":
    try:
        sys.stdout.write(find_test_command(Path(sys.argv[1]).read_text(encoding="utf-8")) + "\n")
    except (OSError, ValueError) as error:
        sys.exit(f"{sys.argv[1]}: {error}")

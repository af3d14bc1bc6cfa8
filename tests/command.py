"""The command `lowbit` within the tests' own process: arguments in, exit code and texts out."""

import logging
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from unittest.mock import patch

from lowbit.cli.main import main


@dataclass(frozen=True)
class Outcome:
    """How a run of the command ended, and what it printed."""

    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """The last line on stderr, where errors are told."""
        return self.err.strip().splitlines()[-1]


def lowbit_command(*arguments: object) -> Outcome:
    """Run `lowbit ARGUMENTS`. A traceback, where there would be one, is the exception that leaves this function."""
    out, err = StringIO(), StringIO()
    argv = ["lowbit", *(str(argument) for argument in arguments)]
    code: object = 0
    with patch.object(sys, "argv", argv), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
        finally:
            logging.captureWarnings(False)
    assert isinstance(code, int)
    return Outcome(code, out.getvalue(), err.getvalue())

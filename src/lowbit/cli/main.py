"""The entry point: registers the verbs, runs one, and turns lowbit's exceptions into a sentence and an exit code.

Exit code 0 when everything asked for holds, 2 for input that cannot work, 3 for a gate that failed, 130 after Ctrl-C,
143 after SIGTERM.
"""

import logging
import signal
import sys
import warnings
from types import FrameType

from transformers.utils import logging as transformers_logging

from lowbit.cli import bench, bench_int8, convert, doctor, finetune, measure, quantize
from lowbit.cli.app import STDERR, app
from lowbit.errors import GateError, LowbitError

_STOPPED = (130, 143)  # what typer makes of Ctrl-C, and _end of SIGTERM
VERBS = (quantize, measure, convert, doctor, finetune, bench, bench_int8)  # imported for the commands they register


def main() -> None:
    """Run the command; turn lowbit's exceptions into a sentence and an exit code."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").setLevel(logging.ERROR)
    warnings.simplefilter("default")
    signal.signal(signal.SIGTERM, _end)
    try:
        app()
    except GateError as error:
        _fail("limit not held", error, 3)
    except LowbitError as error:
        _fail("error", error, 2)
    except SystemExit as ended:
        if ended.code in _STOPPED:
            _fail("stopped", "nothing was written, and what was there before is as it was", int(ended.code))
        raise


def _end(number: int, frame: FrameType | None) -> None:
    """Turn a request to end into an exception, so that half-written folders are removed on the way out."""
    sys.exit(128 + number)


def _fail(kind: str, error: LowbitError | str, code: int) -> None:
    STDERR.print(f"[bold red]{kind}:[/] ", end="")
    STDERR.print(str(error), markup=False, highlight=False, soft_wrap=True)
    sys.exit(code)

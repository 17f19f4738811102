"""An interrupt while the command line is still importing: one line and status 130, as later on.

``python -m dla_fast`` imports the package, and with it torch, before any code of the command line runs; and what is
interrupted in an import may swallow the exception. So the signal itself ends the process until :func:`started`. Where
somebody else imports the package nothing happens here.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType


def _is_command_line() -> bool:
    """Whether this process is ``python -m dla_fast`` or the script ``dla_fast``, and starting."""
    if os.path.basename(sys.argv[0] if sys.argv else "") in ("dla_fast", "dla_fast.exe"):
        return True
    # While a module is searched for, and packages on the way are imported, this is what it is called.
    if sys.argv[:1] != ["-m"]:
        return False
    after = [arguments[1] for arguments in zip(sys.orig_argv, sys.orig_argv[1:], strict=False) if arguments[0] == "-m"]
    return any(name.split(".")[0] == "dla_fast" for name in after[:1]) or "-mdla_fast" in sys.orig_argv


def _interrupted(number: int, frame: FrameType | None) -> None:
    os.write(2, b"\ndla_fast: interrupted\n")
    os._exit(130)


# Where an interrupt is ignored, as of jobs in the background, it stays so.
_waiting = (
    _is_command_line()
    and threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
)
if _waiting:
    signal.signal(signal.SIGINT, _interrupted)


def started() -> None:
    """From here on an interrupt is a KeyboardInterrupt again."""
    global _waiting
    if _waiting:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _waiting = False

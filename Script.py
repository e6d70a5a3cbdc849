"""How a script starts and ends: its command line, errors in one line, signals, the terminal.

if __name__ == "__main__":
    sys.exit(run_script(main))

The training can be understood without reading this file.
"""

import argparse
import contextlib
import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from Common import Stopped, UserError, lacks_memory

REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EACCES: "choose a folder that you may write to",
    errno.EROFS: "choose a folder that you may write to",
}


class Parser(argparse.ArgumentParser):
    """An argument parser that prints the module docstring unchanged and an error as one line."""

    def __init__(self, text: str | None, usage: str = "%(prog)s [options]") -> None:
        plain = argparse.RawDescriptionHelpFormatter
        super().__init__(usage=usage, description=text, formatter_class=plain)

    def error(self, message: str) -> NoReturn:
        """End with status 2."""
        self.exit(2, f"error: {' '.join(message.split())}; see --help\n")


def as_path(text: str) -> Path:
    """Argparse type: a path, where a leading ~ is the home folder."""
    return Path(os.path.expanduser(text))


def run_script(main: Callable[..., int | None], *args: Any) -> int:
    """Run a script's `main` and return the exit status; expected errors become one line on stderr.
    The status is 0 or what `main` returns; 2 for bad input, a full disk or too little memory; 130
    after Ctrl-C and 143 after SIGTERM; 141 if the reader of the output has ended, as in `| head`. A
    second signal ends the process at once. Unexpected errors show their traceback."""
    prepare_output()
    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    excepthook = threading.excepthook
    threading.excepthook = ignore_os_errors
    try:
        return main(*args) or 0
    except UserError as error:
        return complain(str(error))
    except Stopped as stopped:
        say(f"\nstopped by {signal.Signals(stopped.signum).name}{stopped.advice}")
        return 128 + stopped.signum
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that Python's last flush cannot fail
        return 141  # 128 + SIGPIPE, as a shell reports it
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        return complain(f"{error.filename or 'output'}: {error.strerror}; {REMEDIES[error.errno]}")
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        text = str(error).partition("\n")[0] or "out of memory"
        remedy = "close other programs; for training, also try a smaller --batch-size"
        return complain(f"{text}; {remedy}")
    finally:
        threading.excepthook = excepthook
        for number, handler in handlers.items():
            signal.signal(number, handler)


def prepare_output() -> None:
    """Make stdout and stderr usable whatever they are connected to."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # show each line at once, in a file too
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started the process
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif stream.isatty():
            setattr(sys, name, Terminal(stream))


class Terminal:
    """A stream to a terminal. If the terminal is closed, output is dropped and the run goes on."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write and flush; drop the text if the terminal was closed."""
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        return len(text)


def stop(signum: int, _frame: FrameType | None) -> None:
    """Raise `Stopped` at the first signal; a second one ends the process at once."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    raise Stopped(signum)


def ignore_os_errors(args: threading.ExceptHookArgs) -> None:
    """Ignore an OSError in TensorBoard's thread, because the main thread gets the same error."""
    if not issubclass(args.exc_type, OSError):
        threading.__excepthook__(args)


def complain(text: str) -> int:
    """Print an error as one line on stderr; return its exit status."""
    say(f"error: {text}")
    return 2


def say(text: str) -> None:
    """Print a line on stderr, or on the terminal if stderr can no longer be written to."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        with contextlib.suppress(OSError):
            Path("/dev/tty").write_text(text + "\n", encoding="utf-8")

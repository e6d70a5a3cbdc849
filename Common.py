"""What every script needs: errors and signals in one line, the argument parser, atomic files.

if __name__ == "__main__":
    sys.exit(run_script(main))
"""

import argparse
import contextlib
import errno
import io
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

# Names: MedMNIST, medmnist/info.py. Codes: Kather et al. 2018, doi:10.5281/zenodo.1214456.
CLASS_NAMES = (
    "adipose",
    "background",
    "debris",
    "lymphocytes",
    "mucus",
    "smooth muscle",
    "normal colon mucosa",
    "cancer-associated stroma",
    "colorectal adenocarcinoma epithelium",
)
SHORT_NAMES = ("ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM")
CLASSES = range(len(CLASS_NAMES))


class UserError(Exception):
    """One line for the user: which file or flag, what is wrong with it, and the remedy."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))


class Stopped(BaseException):
    """Ctrl-C or SIGTERM arrived. Files are written atomically, so anything may be interrupted."""

    def __init__(self, signum: int) -> None:
        self.signum = signum
        self.advice = ""  # how to go on, where somebody on the way knows


class Parser(argparse.ArgumentParser):
    """An argument parser that shows a module's text as it is, and an error in one line."""

    def __init__(self, text: str, **options: object) -> None:
        plain = argparse.RawDescriptionHelpFormatter
        super().__init__(description=text, formatter_class=plain, **options)

    def error(self, message: str) -> None:
        """End with status 2."""
        self.exit(2, f"error: {' '.join(message.split())}; see --help\n")


def as_path(text: str) -> Path:
    """Argparse type: a path, where a leading ~ is the home folder."""
    return Path(os.path.expanduser(text))


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that readers see the old content or the new; UserError if it fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        remedy = "free some space, or choose a folder that can be written"
        raise UserError(f"{path}: cannot be written ({error.strerror}); {remedy}") from error
    finally:
        with contextlib.suppress(OSError):  # renamed, or never made
            temporary.unlink()


def write_json(path: Path, value: object) -> None:
    """Write JSON that a person can read."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def run_script(main: Callable[..., int | None], *args: object) -> int:
    """Run a script's `main` and return the exit status, an error being one line on stderr. 0, or
    what `main` returns; 2 for bad input, a full disk or too little memory; 130 after Ctrl-C and 143
    after SIGTERM, of which a second one ends the process at once; 141 where nobody reads stdout any
    more, as in `| head`."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # print each line at once, into a file too
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    if "IPython" not in sys.modules:  # figures are saved; matplotlib refuses an unknown backend
        os.environ.pop("MPLBACKEND", None)
    before = {each: signal.signal(each, stop) for each in (signal.SIGINT, signal.SIGTERM)}
    hook, threading.excepthook = threading.excepthook, no_traceback_of_full_disks
    try:
        return main(*args) or 0
    except UserError as error:
        return complain(str(error))
    except Stopped as stopped:
        name = signal.Signals(stopped.signum).name
        print(f"\nstopped by {name}{stopped.advice}", file=sys.stderr)
        return 128 + stopped.signum
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # 128 + SIGPIPE, as shells say it
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space" if full else "choose a folder that can be written"
        return complain(f"{error}; {remedy}")
    except (MemoryError, RuntimeError) as error:  # PyTorch's lack of memory is a RuntimeError
        known = isinstance(error, MemoryError) or re.search(
            "out of memory|allocate memory", str(error)
        )
        if not known:
            raise
        what = str(error).partition("\n")[0] or "out of memory"
        return complain(f"{what}; close other programs, or lower --batch-size, or --device cpu")
    finally:
        threading.excepthook = hook
        for each, handler in before.items():
            signal.signal(each, handler)


def stop(signum: int, _frame: object) -> None:
    """Handle a first signal by an exception, and leave a second one to the system."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_DFL)
    raise Stopped(signum)


def no_traceback_of_full_disks(args: threading.ExceptHookArgs) -> None:
    """Say nothing of an OSError in TensorBoard's thread: whoever uses the thread is told of it."""
    if not issubclass(args.exc_type, OSError):
        threading.__excepthook__(args)


def complain(text: str) -> int:
    """Print an error as one line on stderr; return its exit status."""
    print(f"error: {text}", file=sys.stderr)
    return 2

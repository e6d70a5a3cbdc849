"""What all files share: class names, errors that become one line, folders and files, tables."""

import csv
import errno
import io
import json
import os
import re
import tempfile
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

SYNTHETIC = "SYNTHETIC DATA, not real tissue"  # shown with every result on synthetic data


class UserError(Exception):
    """One line for the user: which file or flag, what is wrong with it, and the remedy."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))


class Stopped(BaseException):
    """Ctrl-C or SIGTERM arrived. Files are written atomically, so anything may be interrupted."""

    def __init__(self, signum: int) -> None:
        self.signum = signum
        self.advice = ""  # how to continue; `PathMNIST.train_seeds` adds it


def make_folder(path: Path, flag: str) -> None:
    """Create the folder that a flag names, with its parents; UserError if that is not possible, or
    if no file can be written there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        what = f"{flag} {path}: cannot create this folder, or write to it ({error.strerror})"
        raise UserError(f"{what}; choose another") from error


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that readers see either the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            flush_to_disk(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)  # errors while writing do not name the file
        raise
    finally:
        temporary.unlink(missing_ok=True)


def refuse_foreign(table: Path, header: list, others: list) -> None:
    """UserError if a result file exists already and this program did not write it: the CSV file
    `table`, which then starts with another header, or one of the `others`, which come with it."""
    first_line = ",".join(header).encode() + b"\n"
    is_ours = table.is_file() and table.read_bytes().startswith(first_line)
    for path in (table, *others):
        if path.exists() and not (is_ours and path.is_file()):
            raise UserError(f"{path}: not written by this program; choose another --out")


def flush_to_disk(descriptor: int) -> None:
    """Wait until the file's content is on the disk, if the file system supports that."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def markdown_table(rows: list) -> str:
    """Return rows of texts, the first of them the header, as a Markdown table."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, "|---" * len(rows[0]) + "|")
    return "\n".join(lines)


def plain_table(rows: list) -> str:
    """Return rows of texts as columns for the terminal, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def write_csv(rows: list, path: Path) -> None:
    """Write rows as CSV. Bytes of a file's name that are not UTF-8 are written as escapes."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    write_atomically(path, buffer.getvalue().encode(errors="backslashreplace"))


def write_json(path: Path, value: object) -> None:
    """Write JSON that a person can read."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def lacks_memory(error: Exception) -> bool:
    """Return whether the error says that memory ran out or that no thread can be started. It can be
    a RuntimeError: PyTorch raises one for memory, Python for threads."""
    full = re.search("out of memory|allocate memory|start new thread", str(error))
    return isinstance(error, MemoryError) or full is not None

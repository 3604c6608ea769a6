"""What is printed is data: names, paths and labels appear as they are, on any stream, and never as commands to it."""

import argparse
import contextlib
import os
import sys
import unicodedata
from typing import Any, NoReturn, TextIO, cast

from rich.console import Console
from rich.text import Text

# Written by the project itself; for streams that cannot show it.
PLAIN_SIGNS = {"±": "+-"}
# Characters that turn the direction of the text around them.
DIRECTIONS = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}


class Output:
    """A text stream whose reader may leave: what can no longer be written is dropped, and `lost` says so.

    A pipe that closes (`| head`) and a terminal that is gone must not end a run before its checkpoint is saved.
    stream  None, as sys.stdout is where a process starts without one, drops everything
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self.lost = False

    def write(self, text: str) -> int:
        """Write `text`, if that is still possible; returns its length."""
        self._attempt("write", text)
        return len(text)

    def flush(self) -> None:
        """Hand everything to the system, if that is still possible."""
        self._attempt("flush")

    def _attempt(self, method: str, *arguments: str) -> None:
        if self._stream is None or self.lost:
            return
        try:
            getattr(self._stream, method)(*arguments)
        except OSError:
            self.lost = True
            # What is buffered goes nowhere, so that the interpreter does not fail at it when it ends.
            with contextlib.suppress(OSError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class OutputLost(Exception):
    """Nobody can read any more what was to be printed."""


class ArgumentParser(argparse.ArgumentParser):
    """Prints what it was given as it is, in its errors too."""

    def error(self, message: str) -> NoReturn:
        """Print usage and `message`, and exit with status 2."""
        super().error(literal(message, getattr(sys.stderr, "encoding", None) or "utf-8"))


def write_output(text: str) -> bool:
    """Write `text`, as it is, to standard output; returns whether it arrived."""
    output = Output(sys.stdout)
    output.write(text)
    output.flush()
    return sys.stdout is not None and not output.lost


def make_console(*, stderr: bool = False, silent: bool = False) -> Console:
    """A console on standard output, or standard error, or nowhere. Colours and live displays are for terminals only.

    FORCE_COLOR and its like would fill log files with the codes that move a cursor.
    """
    stream = None if silent else sys.stderr if stderr else sys.stdout
    terminal = stream is not None and stream.isatty()
    return Console(file=cast(TextIO, Output(stream)), force_terminal=terminal)


def is_lost(console: Console) -> bool:
    """Whether nobody can read `console` any more."""
    return isinstance(console.file, Output) and console.file.lost


def print_line(console: Console, text: str) -> None:
    """Print `text` as it is, in one line however long."""
    # A Text: a str would be searched for names of emoji, and with markup for [red].
    console.print(Text(literal(text, console.encoding)), soft_wrap=True)


def print_error(text: str) -> None:
    """Print `text` in one line on standard error, if anyone can read it."""
    print_line(make_console(stderr=True), text)


def print_failure(error: Exception, whose: str = "") -> None:
    """Print an error on standard error, the first line followed by `whose` it is; one that has several `lines`, in as
    many.
    """
    first, *others = getattr(error, "lines", (str(error),))
    print_error(f"error: {first}{whose}")
    for line in others:
        print_error(line)


def literal(text: str, encoding: str = "utf-8") -> str:
    """`text` with what a terminal would obey, or `encoding` does not have, written as an escape: ESC as \\x1b."""
    return "".join(_literal(character, encoding) for character in text)


def _literal(character: str, encoding: str) -> str:
    if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or ord(character) in DIRECTIONS:
        return escaped(character)
    try:
        character.encode(encoding)
    except UnicodeEncodeError:
        return PLAIN_SIGNS.get(character) or escaped(character)
    return character


def escaped(character: str) -> str:
    """A character in ASCII: "\\n", "\\x1b", "\\u4e00"."""
    return character.encode("unicode_escape").decode()

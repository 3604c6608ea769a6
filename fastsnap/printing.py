"""What is printed is data: names, paths and labels appear as they are, on any stream, and never as commands to it."""

import sys
import unicodedata

from rich.console import Console
from rich.text import Text

# Written by the project itself; for streams that cannot show it.
PLAIN_SIGNS = {"±": "+-"}
# Characters that turn the direction of the text around them.
DIRECTIONS = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}


def make_console(*, stderr: bool = False) -> Console:
    """A console on standard output, or standard error. Colours and live displays are for terminals only.

    FORCE_COLOR and its like would fill log files with the codes that move a cursor.
    """
    return Console(stderr=stderr, force_terminal=(sys.stderr if stderr else sys.stdout).isatty())


def print_line(console: Console, text: str) -> None:
    """Print `text` as it is, in one line however long."""
    # A Text: a str would be searched for names of emoji, and with markup for [red].
    console.print(Text(literal(text, console.encoding)), soft_wrap=True)


def print_error(error: Exception) -> None:
    """Print `error` in one line on standard error."""
    print(f"error: {literal(str(error), sys.stderr.encoding)}", file=sys.stderr)


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

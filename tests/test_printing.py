"""Names, paths and labels are printed as they are: on any stream, without commands to the terminal."""

import io
import os
import subprocess
import sys

import pytest
from rich.console import Console

from fastsnap.printing import literal, print_line

ROOT_NAMES = ["[red]a[/red]", ":smile:", "$x_1$", "a\\b", "100%", "ünï", "\u4e00"]


@pytest.mark.parametrize("name", ROOT_NAMES)
@pytest.mark.parametrize("terminal", [True, False])
def test_what_could_be_markup_is_printed_as_it_is(name: str, terminal: bool) -> None:
    file = io.StringIO()
    print_line(Console(file=file, force_terminal=terminal, width=20), f"run {name}: " + "long " * 50)
    assert file.getvalue() == f"run {name}: " + "long " * 50 + "\n"


@pytest.mark.parametrize(
    ("text", "encoding", "shown"),
    [
        ("a\x1b[2Jb\x07\r\n", "utf-8", r"a\x1b[2Jb\x07\r\n"),
        ("\x9b31m", "utf-8", r"\x9b31m"),
        ("gpj.\u202eexe", "utf-8", r"gpj.\u202eexe"),
        ("\udcff", "utf-8", r"\udcff"),  # a file's name that is not UTF-8
        ("0.1 ± 0.2 é", "ascii", r"0.1 +- 0.2 \xe9"),
        ("0.1 ± 0.2 é \u4e00", "latin-1", r"0.1 ± 0.2 é \u4e00"),
    ],
)
def test_what_a_terminal_would_obey_or_a_stream_cannot_hold_is_escaped(
    text: str, encoding: str, shown: str
) -> None:
    assert literal(text, encoding) == shown


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_process_prints_on_streams_of_every_encoding_and_no_cursor_codes_into_files(encoding: str) -> None:
    code = (
        "from fastsnap.printing import make_console, print_error, print_line\n"
        "console = make_console()\n"
        "with console.status('reading', spinner='line'):\n"
        "    print_line(console, '± [b]\\x1b[1A')\n"
        "print_error('error: two\\nlines \\udcff')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        check=True,
        env=os.environ | {"PYTHONIOENCODING": encoding, "FORCE_COLOR": "1", "TERM": "xterm-256color"},
    )
    sign = "+-" if encoding == "ascii" else "±"
    assert done.stdout.decode(encoding) == f"{sign} [b]\\x1b[1A\n"
    assert done.stderr.decode(encoding) == "error: two\\nlines \\udcff\n"

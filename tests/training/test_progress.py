"""Progress: plain lines in a file, a live bar on a terminal."""

import io
import os
from dataclasses import replace

import pytest
from rich.console import Console

from fastsnap.printing import Output
from fastsnap.training.progress import ProgressDisplay, Status, format_seconds

STATUS = Status(
    step=50,
    steps=200,
    epoch=2,
    epochs=8,
    cycle=1,
    cycles=2,
    learning_rate=0.1234,
    loss=2.5,
    error=61.25,
    images_per_second=1433.4,
    seconds_left=725,
)
LINE = "epoch 2/8  cycle 1/2  lr 0.1234  loss 2.500  error 61.2 %  1,433 images/s  12 min 5 s left"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (3725, "1 h 2 min"), (90000, "1 d 1 h")],
)
def test_durations_have_two_units(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def shown(statuses: list[tuple[Status, bool]], **options) -> str:
    file = io.StringIO()
    with ProgressDisplay(Console(file=file, **options), 0, 200) as display:
        for status, epoch_ended in statuses:
            display.show(status, epoch_ended=epoch_ended)
        display.message("saved snapshot 1 of 2")
    return file.getvalue()


def test_a_file_gets_the_last_line_whole_and_not_one_for_every_short_epoch() -> None:
    last = replace(STATUS, step=200, epoch=8)
    text = shown([(STATUS, False), (STATUS, True), (last, True)], width=40)
    assert text.splitlines() == ["100 %  " + LINE.replace("2/8", "8/8"), "saved snapshot 1 of 2"]


def test_a_terminal_gets_a_bar_with_everything_and_messages_that_stay() -> None:
    text = shown([(STATUS, False)], width=100, force_terminal=True, color_system=None)
    assert LINE in text
    assert "━" * 20 in text
    assert "saved snapshot 1 of 2\n" in text


def test_an_output_whose_reader_leaves_drops_what_comes_and_says_so() -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as pipe, ProgressDisplay(Console(file=Output(pipe)), 0, 200) as display:
        display.message("first")
        assert not display.lost
        assert os.read(reader, 100) == b"first\n"
        os.close(reader)
        display.message("second")
        assert display.lost
        display.message("third")
        display.show(replace(STATUS, step=200), epoch_ended=True)


def test_a_program_without_an_output_has_lost_nothing() -> None:
    output = Output(None)
    Console(file=output).print("nothing")
    assert not output.lost

from __future__ import annotations

import fcntl
import io
import os
import pty
import struct
import termios

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.launch.pump import Pump, plain


@pytest.mark.parametrize(
    ("drawn", "seen"),
    [
        (b"plain", b"plain"),
        (b"10 %\r20 %\r30 %\r", b"30 %"),
        (b"\x1b[2K\x1b[1;32mloss\x1b[0m 2.5", b"loss 2.5"),
        (b"\x1b]0;title\x07text", b"text"),
        (b"", b""),
    ],
)
def test_a_log_line_is_what_a_terminal_shows_in_the_end(drawn, seen):
    assert plain(drawn) == seen


@given(st.text(st.characters(min_codepoint=32, codec="utf-8")))
def test_text_without_codes_is_left_as_it_is(text):
    assert plain(text.encode()) == text.encode()


def pumped(out, chunks):
    """What a pump from a child that writes `chunks` logs."""
    log = io.BytesIO()
    pump = Pump(out, log)
    child = os.dup(pump.child_end)
    pump.started()
    for chunk in chunks:
        os.write(child, chunk)
        assert pump.move()
    os.write(child, b"the end")
    os.close(child)
    pump.close()
    return log.getvalue()


def test_a_pipe_copies_bytes_to_both(tmp_path):
    target = tmp_path / "out"
    with target.open("wb") as out:
        log = pumped(out.fileno(), [b"one\n", b"\x00two\r"])
    assert log == target.read_bytes() == b"one\n\x00two\rthe end"


def test_a_terminal_gives_the_child_one_of_the_same_size_and_the_log_plain_text():
    screen, ours = pty.openpty()
    try:
        fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 77, 0, 0))
        pump = Pump(ours, io.BytesIO())
        assert os.isatty(pump.child_end)
        assert os.get_terminal_size(pump.child_end) == (77, 33)
        pump.started()
        pump.close()
        log = pumped(ours, [b"\r\x1b[2K1 %", b"\r\x1b[2K2 %\r\n", b"done\n"])
        assert log == b"2 %\ndone\nthe end"
        assert b"\x1b[2K1 %" in os.read(screen, 4096)
    finally:
        os.close(screen)
        os.close(ours)


def test_a_reader_that_has_gone_does_not_end_the_run():
    reader, writer = os.pipe()
    os.close(reader)
    try:
        assert pumped(writer, [b"text"]) == b"textthe end"
    finally:
        os.close(writer)

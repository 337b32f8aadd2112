from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from meshwright.launch.signals import STOPPING, listen


@pytest.mark.parametrize("number", STOPPING)
def test_the_first_signal_is_noted_and_handlers_are_put_back(number):
    before = signal.getsignal(number)
    with listen() as stop:
        assert not stop
        assert stop.status == 0
        os.kill(os.getpid(), number)
        assert stop
        assert stop.status == 128 + number
    assert signal.getsignal(number) == before


SCRIPT = """
import os, signal
from meshwright.launch.signals import listen
with listen() as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    print("still here", bool(stop), flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("never", flush=True)
"""


@pytest.mark.mp
def test_the_second_signal_ends_the_process_at_once():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (130, "still here True\n")

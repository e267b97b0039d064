"""The live line of a terminal: it fits, it is one, and it leaves nothing behind."""

import fcntl
import io
import os
import pty
import re
import signal
import struct
import sys
import termios
from types import SimpleNamespace

import pyte
from conftest import ROOT, TINY_RUN

from utils.bar import Bar, Fact, fitted, share_done

COLUMNS = 80
LINE = re.compile(r"[━─]{10}  (\d+) % of 18 steps(  .*)?")


def test_what_matters_most_stays():
    facts = [*share_done(200, 600, "steps"), Fact("epoch 5/15", 4), Fact("loss 1.5", 2), Fact("0:01:00 left", 1)]
    assert fitted(facts, 100) == "━━━───────  33 % of 600 steps  epoch 5/15  loss 1.5  0:01:00 left"
    assert fitted(facts, 60) == "━━━───────  33 % of 600 steps  loss 1.5  0:01:00 left"
    assert fitted(facts, 45) == "33 % of 600 steps  loss 1.5  0:01:00 left"
    assert fitted(facts, 18) == "33 % of 600 steps"
    assert fitted(facts, 4) == "33 %"
    assert fitted([], 10) == ""


def test_the_share_is_not_whole_before_the_end():
    assert [share_done(done, 600, "steps")[1].text[:5] for done in (0, 599, 600)] == ["0 % o", "99 % ", "100 %"]
    assert share_done(599, 600, "steps")[0].text == "━" * 9 + "─"
    assert share_done(0, 0, "images")[1].text == "0 % of 0 images"


def test_a_terminal_that_becomes_narrower():
    """Its own wrapping has made two lines of one; the cursor is in the second."""
    bar, said = Bar(), io.StringIO()
    bar._live = SimpleNamespace(console=SimpleNamespace(width=100, file=said))
    bar.show([Fact("x" * 90, 0)])
    assert str(bar._draw()) == "x" * 90
    bar._live.console.width = 60
    assert str(bar._draw()) == "x" * 56
    assert said.getvalue() == "\x1b[1A\r\x1b[J"
    bar._live.console.width = 90
    bar._draw()
    assert said.getvalue().count("\x1b[J") == 1


def test_nothing_in_a_pipe(capsys):
    bar = Bar()
    bar.start("loading")
    bar.show([Fact("x", 0)])
    bar.say("a line")
    bar.stop()
    assert capsys.readouterr().out == "a line\n"


def test_a_run_in_a_terminal_that_ctrl_c_stops(tmp_path, digits):
    words = [*TINY_RUN, "TRAIN.EPOCHS", "3", "--data-path", digits, "--batch-size", "12", "--output", tmp_path]
    pid, terminal = pty.fork()
    if not pid:
        os.chdir(ROOT)
        os.environ.update(TERM="xterm-256color", OMP_NUM_THREADS="1")
        for name in ("COLUMNS", "LINES"):
            os.environ.pop(name, None)
        os.execv(sys.executable, [sys.executable, "main.py", *map(str, words)])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    screen = pyte.Screen(COLUMNS, 24)
    stream = pyte.ByteStream(screen)
    seen: list[str] = []
    stopped = False
    while True:
        try:
            data = os.read(terminal, 65536)
        except OSError:  # the process has ended
            break
        stream.feed(data)
        bottom = [row.rstrip() for row in screen.display if row.strip()][-1:]
        seen += bottom
        live = [row for row in screen.display if LINE.match(row.rstrip())]
        assert len(live) <= 1
        if live and "loss" in live[0] and not stopped:
            os.write(terminal, b"\x03")
            stopped = True
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + signal.SIGINT
    assert seen[0].startswith("loading PyTorch ...")
    lines = [line for line in seen if LINE.fullmatch(line)]
    assert lines
    assert all(len(line) <= COLUMNS - 4 for line in lines)
    assert {int(LINE.fullmatch(line)[1]) for line in lines} <= {100 * step // 18 for step in range(19)}
    left = [row.rstrip() for row in screen.display if row.strip()]
    assert left[-1].startswith("stopped by Ctrl-C after step ") or "carries on" in left[-1]
    assert not any(LINE.match(row) or row.endswith("...") for row in left)

"""Interleaved turns of processes. Imports no torch, which every one of them would import too."""

import os
import signal
from functools import partial

import pytest

from benchmarks.peers import Peer, take_turns
from xattn.errors import XattnError


def _counter(start):
    count = iter(range(start, 100))
    return lambda: {"turn": float(next(count)), "process": float(os.getpid())}


def test_peers_take_turns_in_processes_of_their_own():
    measured = take_turns({str(s): Peer(partial(_counter, s), s > 0) for s in (0, 10)}, turns=2)
    assert {name: of["turn"] for name, of in measured.items()} == {"0": [1, 2], "10": [11, 12]}
    processes = {process for of in measured.values() for process in of["process"]}
    assert len(processes - {os.getpid()}) == 2


def _be_killed():
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_peer_that_is_killed_may_have_had_too_little_memory():
    with pytest.raises(XattnError, match="peer 'big' ended with exit code -9: killed, mostly for"):
        take_turns({"big": Peer(_be_killed, False)}, turns=1)


def _end():
    os._exit(3)


def test_a_peer_that_ends_is_told():
    with pytest.raises(XattnError, match=r"^peer 'ends' ended with exit code 3$"):
        take_turns({"ends": Peer(_end, False)}, turns=1)

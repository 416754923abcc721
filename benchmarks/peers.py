"""Peers that take interleaved turns, each in a process of its own."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import NamedTuple

from xattn.errors import XattnError
from xattn.memory import keep_freed_memory

Turn = Callable[[], dict[str, float]]
"""Takes a turn and returns what it measured."""


class Peer(NamedTuple):
    """What a process does.

    Args:
        build: makes it ready; called in that process, so it has to be picklable.
        keeps_memory: whether torch keeps freed memory there, as in our trainer, or works as it is.
    """

    build: Callable[[], Turn]
    keeps_memory: bool


def take_turns(peers: Mapping[str, Peer], turns: int) -> dict[str, dict[str, list[float]]]:
    """Let peers take turns one after the other, once more than `turns`: the first one warms up.

    Returns:
        For each peer and each thing that it measured `turns` figures.

    Raises:
        XattnError: a peer ended.
    """
    with ExitStack() as stack:
        running = {name: stack.enter_context(_Process(name, *peer)) for name, peer in peers.items()}
        rounds = [
            {name: process.turn() for name, process in running.items()} for _ in range(turns + 1)
        ][1:]
    return {
        name: {key: [of_round[name][key] for of_round in rounds] for key in rounds[0][name]}
        for name in peers
    }


class _Process:
    def __init__(self, name: str, build: Callable[[], Turn], keeps_memory: bool) -> None:
        context = get_context("spawn")
        self._name = name
        self._ours, self._theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(self._theirs, build, keeps_memory), daemon=True
        )

    def __enter__(self) -> "_Process":
        self._process.start()
        self._theirs.close()  # so that we are told when the process ends
        return self

    def turn(self) -> dict[str, float]:
        try:
            self._ours.send(True)
            measured: dict[str, float] = self._ours.recv()
        except (EOFError, ConnectionError) as error:
            self._process.join()
            code = self._process.exitcode
            hint = ": killed, mostly for want of memory; lower the batch" if code == -9 else ""
            raise XattnError(f"peer '{self._name}' ended with exit code {code}{hint}") from error
        return measured

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.join()


def _serve(driver: Connection, build: Callable[[], Turn], keeps_memory: bool) -> None:
    """Take a turn each time that the driver asks."""
    if keeps_memory:
        keep_freed_memory()
    turn = build()
    while driver.recv():
        driver.send(turn())

"""Contenders taking turns: every round runs each of them once, and each round begins with another one."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Generic, TypeVar

from bench.figures import Timing

Arena = TypeVar("Arena")


@dataclasses.dataclass(frozen=True, slots=True)
class Contender(Generic[Arena]):
    """``run`` does all of its work in the arena and says how many bytes it leaves there, if that says something.

    ``once``: only in the first round. For the slow ones, whose ratio is far from where noise could matter.
    """

    name: str
    run: Callable[[Arena], int | None]
    once: bool = False


def race(
    title: str,
    contenders: Sequence[Contender[Arena]],
    rounds: int,
    arena: Callable[[], AbstractContextManager[Arena]],
    say: Callable[[str], None],
) -> tuple[Timing, ...]:
    """Everybody's timings, in the order given. Making and clearing the arenas is not timed."""
    seconds: dict[str, list[float]] = {each.name: [] for each in contenders}
    size_bytes: dict[str, int | None] = {}
    for number in range(rounds):
        first = number % len(contenders)
        for contender in [*contenders[first:], *contenders[:first]]:
            if contender.once and number > 0:
                continue
            with arena() as place:
                started = time.monotonic()
                size_bytes[contender.name] = contender.run(place)
                seconds[contender.name].append(time.monotonic() - started)
            say(f"{title}, round {number + 1} of {rounds}: {contender.name}: {seconds[contender.name][-1]:.2f} s")
    return tuple(Timing(each.name, tuple(seconds[each.name]), size_bytes[each.name]) for each in contenders)

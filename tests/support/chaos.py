"""Commands that are killed at random moments and given again, until they have ended by themselves.

A plan is drawn from a seed: the same seed gives the same plan. What it meets still depends on the speed of the machine.
A blow counts as landed once its signal has reached a process that had not ended; one that kills, once that process has.
"""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tests.support.processes import descendants

SEED = "DFINE_CHAOS_SEED"
Blow = Literal["kill", "term", "pause", "freeze"]  # SIGKILL; SIGTERM; SIGSTOP, then SIGCONT; SIGSTOP, then SIGKILL
BLOWS: tuple[Blow, ...] = ("kill", "kill", "kill", "term", "term", "pause", "freeze")
FINISHED = "is finished, see"
POLL_SECONDS = 0.003
STARTS_PER_BLOW = 4
BLOWS_LANDED = "blows landed"  # property of a test
PATIENCE_SECONDS = 240.0  # for a moment, or for an end


def chaos_seed() -> int:
    """Seed of this session: from the environment, or a new one. It is printed, so a failed test shows it."""
    seed = int(os.environ.get(SEED) or random.randrange(10**6))
    print(f"to repeat: {SEED}={seed}")
    return seed


@dataclass(frozen=True)
class Disturbance:
    """One blow, some time after a moment."""

    moment: str
    delay_s: float
    blow: Blow
    target: str = "command"
    pause_s: float = 0.0  # between SIGSTOP and the next signal

    def __str__(self) -> str:
        return f"{self.blow} {self.target} {self.delay_s:.2f} s after {self.moment}"


def draw(
    seed: int,
    moments: Sequence[str],
    *,
    longest_delays: Mapping[str, float],
    blows: Sequence[Blow] = BLOWS,
    targets: Sequence[str] = ("command",),
) -> list[Disturbance]:
    """Draw one disturbance for each moment, in this order.

    Args:
        longest_delays: seconds by moment; others have none.
    """
    drawn = random.Random(seed)
    return [
        Disturbance(
            moment=moment,
            delay_s=drawn.uniform(0, longest_delays.get(moment, 0)),
            blow=drawn.choice(blows),
            target=drawn.choice(targets),
            pause_s=drawn.uniform(0.2, 2),
        )
        for moment in moments
    ]


@dataclass
class Attempt:
    """One process of a command."""

    process: subprocess.Popen[bytes]
    log: Path
    log_begins_at: int  # bytes that earlier attempts wrote
    progress_before: int

    @property
    def ended(self) -> bool:
        """Whether it has ended."""
        return self.process.poll() is not None

    @property
    def done(self) -> bool:
        """Whether it has ended well, or found that an earlier attempt had done everything before it was killed."""
        return self.process.poll() == 0 or (self.process.poll() == 1 and FINISHED in self.printed())

    def printed(self) -> str:
        """Its own output so far."""
        with self.log.open("rb") as stream:
            stream.seek(self.log_begins_at)
            return stream.read().decode(errors="replace")


@dataclass
class Command:
    """A command that is given again after each disturbance.

    Args:
        progress: a number that grows while the command works.
        moments: conditions by name; a disturbance waits for one.
        targets: processes by name; the argument is the process id of the command. "command" is the command itself, "machine" it
            and all processes below it.
        acts: targets that take more than signals, such as a server that must be started again.
        may_hang: targets whose loss the command may wait for; after `PATIENCE_SECONDS` it is killed with all that is below it.
    """

    words: Sequence[str]
    folder: Path
    log: Path
    progress: Callable[[], int]
    moments: Mapping[str, Callable[[Attempt], bool]]
    targets: Mapping[str, Callable[[int], Sequence[int]]] = field(default_factory=dict)
    acts: Mapping[str, Callable[[Disturbance], None]] = field(default_factory=dict)
    may_hang: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    starts: int = 0
    landed: list[Disturbance] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)  # processes of all attempts

    def run(self, plan: Sequence[Disturbance]) -> None:
        """Carry out a plan as far as the command lives, then let it end."""
        try:
            attempt = self.start()
            for disturbance in plan:
                attempt = self.land(attempt, disturbance)
                if attempt.done:
                    break
            self.finish(attempt)
        finally:
            self.clean()

    def land(self, attempt: Attempt, disturbance: Disturbance) -> Attempt:
        """Carry out one disturbance; where the blow before it ended the command meanwhile, on the next attempt."""
        for _ in range(STARTS_PER_BLOW):
            if attempt.ended and not attempt.done:
                attempt = self.start()
            self.wait(attempt, disturbance)
            if attempt.done or (not attempt.ended and self.strike(attempt, disturbance)):
                return attempt
        raise AssertionError(f"{disturbance} never landed: {attempt.printed()[-3000:]}")

    def start(self) -> Attempt:
        """Give the command."""
        self.starts += 1
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        begins_at = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as stream:
            process = subprocess.Popen(
                self.words,
                cwd=self.folder,
                env={**environment, "RAY_TMPDIR": "/tmp", **self.environment},
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return Attempt(process, self.log, begins_at, self.progress())

    def wait(self, attempt: Attempt, disturbance: Disturbance) -> None:
        """Wait for the moment of a disturbance, or for the end of the command."""
        moment, until = self.moments[disturbance.moment], time.monotonic() + PATIENCE_SECONDS
        while not attempt.ended and not moment(attempt):
            if time.monotonic() > until:
                assert self.landed, f"{disturbance} never came: {attempt.printed()[-3000:]}"
                assert self.landed[-1].target in self.may_hang, f"hangs after {self.landed[-1]}"
                send([*descendants(attempt.process.pid)], signal.SIGKILL)
                attempt.process.wait()
            time.sleep(POLL_SECONDS)
        until = time.monotonic() + disturbance.delay_s
        while not attempt.ended and time.monotonic() < until:
            time.sleep(POLL_SECONDS)

    def strike(self, attempt: Attempt, disturbance: Disturbance) -> bool:
        """Send the signals of a disturbance once its target lives; where they end the command, wait for that.

        Returns:
            whether they landed: the command may end before its target lives.
        """
        if act := self.acts.get(disturbance.target):
            act(disturbance)
        elif not (hit := self.living(attempt, disturbance.target)):
            return False
        else:
            signals = {"kill": [signal.SIGKILL], "term": [signal.SIGTERM], "pause": [signal.SIGSTOP, signal.SIGCONT]}
            first, *second = signals.get(disturbance.blow, [signal.SIGSTOP, signal.SIGKILL])
            assert send(hit, first)
            for number in second:
                time.sleep(disturbance.pause_s)
                send(hit, number)
            if disturbance.blow in ("kill", "freeze"):
                until = time.monotonic() + PATIENCE_SECONDS
                while any(map(is_alive, hit)):
                    attempt.process.poll()  # a child that has ended is a zombie until then
                    assert time.monotonic() < until, f"{hit} live after {disturbance}"
                    time.sleep(POLL_SECONDS)
            if disturbance.blow != "pause" and attempt.process.pid in hit:
                attempt.process.wait(timeout=PATIENCE_SECONDS)
        self.landed.append(disturbance)
        attempt.progress_before = self.progress()
        return True

    def living(self, attempt: Attempt, target: str) -> Sequence[int]:
        """Wait for processes of a target, and return them; none if the command ended first."""
        until = time.monotonic() + PATIENCE_SECONDS
        while not attempt.ended:
            below = descendants(attempt.process.pid)
            self.seen |= below.keys()
            match target:
                case "command":
                    found: Sequence[int] = [attempt.process.pid]
                case "machine":
                    found = [*below]
                case _:
                    found = self.targets[target](attempt.process.pid)
            if found := [pid for pid in found if is_alive(pid)]:
                return found
            assert time.monotonic() < until, f"no {target} lives: {sorted(below.values())}"
            time.sleep(POLL_SECONDS)
        return []

    def finish(self, attempt: Attempt) -> None:
        """Wait for the end, and give the command again where it did not come to it."""
        while True:
            code = attempt.process.wait(timeout=2 * PATIENCE_SECONDS)
            if attempt.done:
                return
            assert len(self.landed) >= self.starts, f"failed by itself, with {code}: {attempt.printed()[-4000:]}"
            attempt = self.start()

    def clean(self) -> None:
        """Kill what is left of all attempts."""
        send([*self.seen], signal.SIGKILL)


def send(pids: Sequence[int], number: signal.Signals) -> int:
    """Send a signal to processes that may have ended, and count those that had not."""
    reached = 0
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
            reached += 1
    return reached


def is_alive(pid: int) -> bool:
    """Whether a process runs, waits or is stopped, and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except OSError:
        return False


def report_landed(landed: Sequence[Disturbance], record_property: Callable[[str, object], None], *, least: int) -> None:
    """Print the blows of a test, and add them to the sum that ends the session.

    Raises:
        AssertionError: fewer than `least` landed.
    """
    print(f"{len(landed)} blows landed:", *landed, sep="\n  ")
    record_property(BLOWS_LANDED, len(landed))
    assert len(landed) >= least

"""Processes of a run: each with all that it starts in a group of its own, telling what it finds line by line."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
Line = dict[str, Any]
# What a process ends with when its device is of no use to it any more.
LOST_DEVICE = 3


def die_with_parent() -> None:
    """End this process's whole group when the process that started it is gone, killed without a chance to say so."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


class Child:
    """A process, its log, and the lines of JSON that it writes.

    Args:
        name: of its files.
        command: what to run, in the checkout.
        folder: where its files lie.
        environment: variables beside this process's.
        tells: whether it takes ``--lines FILE`` and writes there.
    """

    def __init__(
        self, name: str, command: Sequence[str], folder: Path, environment: Mapping[str, str], tells: bool = True
    ) -> None:
        self.name = name
        self.lines, self.log = folder / f"{name}.lines", folder / f"{name}.log"
        self.lines.touch()
        self._position = 0
        self.begun = time.time()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--lines", str(self.lines)] if tells else list(command),
                cwd=ROOT,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def read(self) -> list[Line]:
        """The lines that were completed since the last call."""
        with self.lines.open("rb") as file:
            file.seek(self._position)
            data = file.read()
        whole = data.rpartition(b"\n")[0]
        if not whole:
            return []
        self._position += len(whole) + 1
        return [json.loads(line) for line in whole.splitlines() if line]

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self.process.poll() is None

    def kill(self) -> None:
        """End it with everything it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def said(self, characters: int = 300) -> str:
        """The end of its log."""
        return self.log.read_text(encoding="utf-8", errors="replace").strip()[-characters:]


class Worker:
    """Works through its share of a block's cases in a child, and starts another behind a case that ended it.

    Args:
        name: of its files.
        block: name of the block, for what is reported.
        command: of the child; ``--skip N`` is added.
        folder: where files lie.
        environment: variables for it.
        until: when no case may begin any more.
        grace: seconds past that which the case at hand may take.
        sink: takes every line.
    """

    def __init__(
        self,
        name: str,
        block: str,
        command: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        until: float,
        grace: float,
        sink: Callable[[Line], None],
    ) -> None:
        self.name, self.block, self.command, self.folder = name, block, list(command), folder
        self.environment, self.until, self.grace, self.sink = environment, until, grace, sink
        self.at: Line | None = None
        self.at_since = 0.0
        self.next = 0
        self.starts = 0
        self.child = self._start(0)

    def _start(self, skip: int) -> Child:
        self.starts += 1
        command = [*self.command, "--skip", str(skip), "--until", str(self.until)]
        return Child(f"{self.name}-{self.starts}", command, self.folder, self.environment)

    def _read(self) -> None:
        for line in self.child.read():
            if "begun" in line:
                self.at, self.at_since, self.next = line, time.time(), line["begun"] + 1
            elif "ended" in line:
                self.at = None
            self.sink(line | {"block": self.block})

    def tick(self) -> bool:
        """Look after it; False when there is nothing left to do."""
        running = self.child.running
        self._read()
        now = time.time()
        if running:
            if now > self.until + self.grace:
                return self._over(f"out of time after {now - self.child.begun:.0f} s", go_on=False)
            if self.at is not None and now > self.at_since + self.at["limit"]:
                return self._over(f"ended after {self.at['limit']:.0f} s, which is many times what it should take")
            return True
        if self.child.process.returncode == 0:
            self.child.kill()  # what it may have left running
            return False
        if self.child.process.returncode == LOST_DEVICE and self.at is None:
            # The case has been told of; those behind it need a process that can use the device.
            self.child.kill()
            self.child = self._start(self.next)
            return True
        return self._over(f"the process ended with {self.child.process.returncode}")

    def _over(self, why: str, go_on: bool = True) -> bool:
        """A child that is lost: say what it was at, and start another behind that."""
        self.child.kill()
        self._read()
        at = self.at
        label = at["label"] if at else "the start"
        detail = f"{why}, in {label}: {self.child.said()}"
        found = {"check": label, "ok": False, "detail": detail}
        self.sink({"record": found, "label": label, "block": self.block, "lost": True})
        self.at = None
        if at is None or not go_on or time.time() > self.until:
            self.sink({"left_out": f"what comes after {label}", "block": self.block})
            return False
        self.child = self._start(self.next)
        return True

    def kill(self) -> None:
        """End it at once."""
        self.child.kill()
        self._read()

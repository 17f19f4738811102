"""What a run writes down: tables in CSV, and the same for TensorBoard."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dla_fast.bench import files

STEPS, EPOCHS = "steps.csv", "epochs.csv"


def rows(path: Path) -> list[dict[str, str]]:
    """A table's rows; what an interruption cut short at the end is left out."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        return [row for row in reader if None not in row and None not in row.values()]


class Table:
    """A table that grows, a row a step; taken up again, it loses what comes after that step.

    Args:
        path: the file.
        after: the step whose row is the last to stay.
    """

    def __init__(self, path: Path, after: int) -> None:
        self._path = path
        kept = [row for row in rows(path) if int(row["step"]) <= after]
        self._columns = list(kept[0]) if kept else []
        self._rewrite(kept)

    def _rewrite(self, kept: list[dict[str, str]]) -> None:
        text = io.StringIO()
        if self._columns:
            writer = csv.DictWriter(text, self._columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(kept)
        files.write(self._path, text.getvalue())

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row, floats so that reading gives them again; columns that it does not have stay empty."""
        if not set(row) <= set(self._columns):
            kept = rows(self._path)
            self._columns += [name for name in row if name not in self._columns]
            self._rewrite([{name: old.get(name, "") for name in self._columns} for old in kept])
        with self._path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns, restval="", lineterminator="\n").writerow(row)


class Log:
    """The tables and TensorBoard's events of a run.

    Args:
        run: its folder.
        after: the step after which it goes on, 0 at the beginning.
    """

    def __init__(self, run: Path, after: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._steps, self._epochs = Table(run / STEPS, after), Table(run / EPOCHS, after)
        self._events = SummaryWriter(str(run / "tensorboard"), purge_step=after + 1 if after else None)

    def step(self, step: int, epoch: int, loss: float, lr: float) -> None:
        """One training step."""
        self._steps.add({"step": step, "epoch": epoch, "loss": loss, "lr": lr})
        self._events.add_scalar("train/loss", loss, step)
        self._events.add_scalar("train/lr", lr, step)

    def epoch(self, step: int, epoch: int, loss: float, seconds: float, metrics: Mapping[str, float]) -> None:
        """The end of an epoch, with what the evaluation gave."""
        self._epochs.add({"step": step, "epoch": epoch, "loss": loss, "seconds": round(seconds, 1), **metrics})
        for name, value in metrics.items():
            self._events.add_scalar(f"evaluation/{name}", value, step)
        self._events.flush()

    def close(self) -> None:
        """Write out what is left."""
        self._events.close()

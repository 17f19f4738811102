"""Training: steps, epochs, evaluation; a run's folder, and how it goes on where it was interrupted."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from dla_fast._timm import import_timm
from dla_fast.bench import files
from dla_fast.tasks import checkpoints, loading, weights
from dla_fast.tasks.errors import DataError, TaskError
from dla_fast.tasks.logs import Log
from dla_fast.tasks.processes import Processes
from dla_fast.tasks.task import Evaluation, Session, Task, autocast, memory_format

CONFIG, CHECKPOINTS = "config.json", "checkpoints"
# What a run may go on with changed: it computes the same.
_FREE = ("device", "backend", "workers", "memory", "save_every", "keep", "broken", "data")
# Of the machine that trained, not of the network.
_MACHINE = ("device", "backend", "workers")
# Losses wait on the device for so many steps, so that no step waits for them.
_FLUSH = 10


def saved_options(run: Path, task: Task) -> dict[str, Any]:
    """The options of a run that was begun.

    Raises:
        TaskError: there is no such run, or it is another task's.
    """
    try:
        found: dict[str, Any] = json.loads((run / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TaskError(f"--resume {run}: no run to go on with: {error}") from error
    if found.pop("task", None) != task.name:
        raise TaskError(f"--resume {run}: it is no run of {task.name}")
    return found


def check_resumed(before: dict[str, Any], now: Any) -> None:
    """Whether a run can go on with these options.

    Raises:
        TaskError: one differs that changes what is computed.
    """
    for name, value in asdict(now).items():
        old = before.get(name, value)
        if name not in _FREE and value != (tuple(old) if isinstance(old, list) else old):
            raise TaskError(f"--{name.replace('_', '-')} {value}: the run was begun with {old}, and goes on with that")


class _Interrupts:
    """An interrupt or a termination asks for an end after the step; a second one is not waited for."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Interrupts:
        with contextlib.suppress(ValueError):  # only a main thread has signals
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Trainer:
    """A run: what it trains, on what, and how far it is.

    The order of the images, what is drawn for each, and what the network draws in a step follow from the seed, the
    epoch and the step alone; so a run that goes on from a checkpoint computes what it would have computed.

    Args:
        task: the task.
        options: of its training.
        run: the run's folder.
        processes: those that share the work.
        resume: go on from its last checkpoint.
        say: where lines about it go.
    """

    def __init__(
        self,
        task: Task,
        options: Any,
        run: Path,
        processes: Processes,
        *,
        resume: bool = False,
        say: Callable[[str], None] = print,
    ) -> None:
        self.task, self.options, self.run_folder, self.processes = task, options, run, processes
        self.say = say if processes.is_first else lambda line: None
        task.check(options)
        self.data = task.read(options, "train")
        self.judged = task.read(options, "val", self.data.classes)
        self._failures = loading.Failures(skip=options.broken == "skip")
        self._batches = loading.Batches(
            len(self.data), options.batch, rank=processes.rank, processes=processes.count, seed=options.seed
        )
        if not len(self._batches):
            whole = f"{options.batch} in each of {processes.count} processes" if processes.count > 1 else options.batch
            raise DataError(f"--batch {whole}: the training split of {options.data} has {len(self.data)} images")
        self._saved = checkpoints.Checkpoints(run / CHECKPOINTS, options.keep)
        self.step, self.best = 0, -math.inf
        # Of the epoch's losses.
        self._total = 0.0
        self._build()
        if resume:
            self._restore()
        elif self._saved.paths():
            raise TaskError(f"--out {run}: there is a run already; --resume {run} goes on with it")

    @property
    def epoch(self) -> int:
        """Passes over the training images that are done."""
        return self.step // len(self._batches)

    def _build(self) -> None:
        import_timm()
        from timm.optim import create_optimizer_v2
        from timm.scheduler import create_scheduler_v2
        from timm.utils.model_ema import ModelEmaV3

        options, device = self.options, self.processes.device
        torch.manual_seed(options.seed)
        model = weights.network(
            options.model,
            len(self.data.classes),
            dense=self.task.dense,
            memory=options.memory,
            down_ratio=getattr(options, "down_ratio", weights.DOWN_RATIO),
        )
        if options.weights:
            self.say(weights.start_from(model, options.weights))
        if options.sync_bn and self.processes.count > 1:
            if device.type == "cpu":
                raise TaskError("--sync-bn: DistributedDataParallel takes SyncBatchNorm on GPUs alone")
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.model: nn.Module = model.to(device).to(memory_format=memory_format(options))  # type: ignore[call-overload]
        self.ema = ModelEmaV3(self.model, decay=options.ema, use_warmup=True) if options.ema else None
        try:
            self._optimizer = create_optimizer_v2(
                self.model,
                opt=options.optimizer,
                lr=options.lr,
                momentum=options.momentum,
                weight_decay=options.weight_decay,
            )
        # An unknown name, or one of a package that is missing.
        except Exception as error:
            raise TaskError(f"--optimizer {options.optimizer}: timm does not make it: {error}") from error
        steps = len(self._batches)
        self._schedule, _ = create_scheduler_v2(
            self._optimizer,
            sched=options.schedule if options.schedule != "constant" else "step",
            num_epochs=options.epochs,
            decay_epochs=options.decay_epochs if options.schedule == "step" else options.epochs + 1,
            decay_rate=0.9 if options.schedule == "poly" else 0.1,
            warmup_epochs=options.warmup_epochs,
            warmup_lr=options.lr / 100,
            warmup_prefix=False,
            min_lr=0,
            step_on_epochs=False,
            updates_per_epoch=steps,
        )
        self._scaler = torch.amp.GradScaler(device.type, enabled=options.amp == "float16")
        self._loss = self.task.loss(self.data, options, device)
        if self.processes.count > 1:
            ids = [device] if device.type == "cuda" else None
            self._called: nn.Module = nn.parallel.DistributedDataParallel(self.model, device_ids=ids)
        else:
            self._called = self.model

    def facts(self, metrics: dict[str, float]) -> weights.Facts:
        """What the run's weights are for."""
        palette = getattr(self.data.layout, "palette", None)
        return weights.Facts(
            self.task.name,
            self.options.model,
            self.data.classes,
            {name: value for name, value in asdict(self.options).items() if name not in _MACHINE},
            metrics,
            self.epoch,
            palette=None if palette is None else palette.tolist(),
        )

    def _save(self) -> None:
        if self.processes.is_first:
            self._saved.save(
                self.step,
                {
                    "step": self.step,
                    "best": self.best,
                    "total": self._total,
                    "model": self.model.state_dict(),
                    "ema": None if self.ema is None else self.ema.module.state_dict(),
                    "optimizer": self._optimizer.state_dict(),
                    "scaler": self._scaler.state_dict(),
                    "processes": self.processes.count,
                    "facts": asdict(self.facts({})),
                },
            )

    def _restore(self) -> None:
        state = self._saved.newest(loading.warn if self.processes.is_first else lambda line: None)
        if state is None:
            self.say("no checkpoint yet: from the beginning")
            return
        if state["processes"] != self.processes.count:
            raise TaskError(f"the run was begun with {state['processes']} processes, here are {self.processes.count}")
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        self.step, self.best, self._total = state["step"], state["best"], state["total"]
        self.say(f"going on from step {self.step}, epoch {self.epoch + 1}")

    def run(self) -> Evaluation | None:
        """Train to the end.

        Returns:
            The last evaluation; None where the run had ended before.

        Raises:
            KeyboardInterrupt: asked to end; what was done is saved.
            TaskError: the loss is no number any more, or an image is broken.
        """
        if self.processes.is_first:
            self.run_folder.mkdir(parents=True, exist_ok=True)
            config = {"task": self.task.name, **asdict(self.options)}
            files.write(self.run_folder / CONFIG, json.dumps(config, indent=2) + "\n")
            self._saved.forget_after(self.step)
        self._log = Log(self.run_folder, self.step) if self.processes.is_first else None
        steps = len(self._batches)
        loader = loading.loader(
            loading.Samples(
                len(self.data),
                self.task.training_sample(self.data, self.options),
                replace=self.options.broken == "skip",
            ),
            self._batches,
            workers=loading.workers_of(self.options.workers),
            pin=self.processes.device.type == "cuda",
            stack=True,
        )
        evaluation = None
        try:
            with _Interrupts() as interrupts:
                while self.epoch < self.options.epochs:
                    self._batches.epoch, self._batches.first = self.epoch, self.step % steps
                    started = time.monotonic()
                    if not self._batches.first:
                        self._total = 0.0
                    self._epoch(loader, self.epoch + 1, interrupts)
                    evaluation = self._end_epoch(started)
        finally:
            if self._log is not None:
                self._log.close()
        return evaluation

    def _epoch(self, loader: Iterable[loading.Loaded], number: int, interrupts: _Interrupts) -> None:
        """The steps of an epoch that are left."""
        self._called.train()
        waiting: list[tuple[int, Tensor, float]] = []
        steps = len(self._batches)
        bar = self.processes.bar(steps, f"epoch {number}/{self.options.epochs}", self._batches.first)

        def flush() -> None:
            for step, value, lr in waiting:
                loss = float(self.processes.mean(value))
                if not math.isfinite(loss):
                    raise TaskError(
                        f"the loss is {loss} at step {step}; a smaller --lr, or --clip-grad, may help; "
                        f"{self.run_folder} has the checkpoint before it"
                    )
                self._total += loss
                if self._log is not None:
                    self._log.step(step, number, loss, lr)
                bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            waiting.clear()

        with bar:
            for loaded in loader:
                self._failures.see(loaded.failures)
                waiting.append(self._step(loaded.items))
                bar.update()
                whole = len(waiting) == _FLUSH or self.step % steps == 0
                # Several processes end after the same step.
                stop = self.processes.any(interrupts.asked) if whole or self.processes.count == 1 else False
                saving = self.step % self.options.save_every == 0 and self.step % steps != 0
                if whole or saving or stop:
                    flush()
                if saving or stop:
                    self._save()
                if stop:
                    self.say(f"interrupted after step {self.step}, which is saved: --resume {self.run_folder} goes on")
                    raise KeyboardInterrupt

    def _step(self, items: tuple[Tensor, Tensor]) -> tuple[int, Tensor, float]:
        """One step; gives its number, its loss and its learning rate."""
        device, options = self.processes.device, self.options
        # What the network draws.
        torch.manual_seed(loading.seeded(options.seed, self.step, self.processes.rank))
        images = items[0].to(device, non_blocking=True).contiguous(memory_format=memory_format(options))
        target = items[1].to(device, non_blocking=True)
        self._schedule.step_update(self.step)
        lr = float(self._optimizer.param_groups[0]["lr"])
        with autocast(options, device):
            output = self._called(images)
            loss = self._loss(output, target)
        self._scaler.scale(loss).backward()
        if options.clip_grad:
            self._scaler.unscale_(self._optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), options.clip_grad)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(self.model, step=self.step)
        self.step += 1
        return self.step, loss.detach(), lr

    def evaluate(self) -> Evaluation:
        """Judge the network as it is, or its moving average where there is one."""
        model = (self.model if self.ema is None else self.ema.module).eval()
        self.processes.share_buffers(model)
        with torch.inference_mode():
            return self.task.evaluate(Session(model, self.processes, self.options, self._failures), self.judged)

    def _end_epoch(self, started: float) -> Evaluation | None:
        loss = self._total / len(self._batches)
        last = self.epoch == self.options.epochs
        found = self.evaluate() if last or self.epoch % self.options.evaluate_every == 0 else None
        metrics = {} if found is None else found.metrics
        line = f"epoch {self.epoch}/{self.options.epochs}: loss {loss:.4f}"
        if found is not None:
            line += "".join(f", {name} {value:.4f}" for name, value in metrics.items())
            if metrics[self.task.headline] > self.best:
                self.best = metrics[self.task.headline]
                if self.processes.is_first:
                    model = self.model if self.ema is None else self.ema.module
                    weights.save(self.run_folder, model, self.facts(metrics))
        seconds = time.monotonic() - started
        if self._log is not None:
            self._log.epoch(self.step, self.epoch, loss, seconds, metrics)
        self._save()
        self.processes.wait()
        self.say(f"{line}, {seconds:.1f} s")
        return found

"""What a task can be told: the options of training, evaluation and prediction, with their defaults and bounds."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dla_fast.tasks.errors import TaskError


@dataclass(frozen=True)
class Option:
    """One option, as a command line or a checker of values wants it.

    Attributes:
        name: of the field.
        kind: int, float, str or bool, of a value or of each of several.
        default: its value where nobody gives one.
        help: what it is.
        many: it takes one value or more.
        optional: None is a value, which ``help`` explains.
        choices: the values it takes, if they are few.
        least: the smallest number.
        above: what a number has to exceed.
    """

    name: str
    kind: type
    default: Any
    help: str
    many: bool
    optional: bool
    choices: tuple[str, ...] | None
    least: float | None
    above: float | None


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] | None = None,
    least: float | None = None,
    above: float | None = None,
) -> Any:
    """A field of an options class."""
    return field(default=default, metadata={"help": help, "choices": choices, "least": least, "above": above})


def of(kind: type) -> list[Option]:
    """The options of a class of them."""
    hints = typing.get_type_hints(kind)
    found = []
    for each in dataclasses.fields(kind):
        hint, optional, many = hints[each.name], False, False
        if isinstance(hint, types.UnionType):
            hint, optional = next(t for t in typing.get_args(hint) if t is not types.NoneType), True
        if typing.get_origin(hint) is tuple:
            hint, many = typing.get_args(hint)[0], True
        facts = each.metadata
        choices = None if facts["choices"] is None else tuple(facts["choices"])
        found.append(
            Option(
                each.name, hint, each.default, facts["help"], many, optional, choices, facts["least"], facts["above"]
            )
        )
    return found


def make(kind: type, *sources: Mapping[str, Any]) -> Any:
    """The options from what was given; of several sources the first that has a value wins.

    Raises:
        TaskError: a value that is none of the choices.
    """
    values = {}
    for each in of(kind):
        given = (source[each.name] for source in sources if source.get(each.name) is not None)
        value = next(given, each.default)
        if each.choices is not None and value not in each.choices:
            raise TaskError(f"--{each.name.replace('_', '-')} {value}: expected one of {', '.join(each.choices)}")
        values[each.name] = tuple(value) if each.many and value is not None else value
    return kind(**values)


@dataclass(frozen=True)
class Running:
    """Where and how it is computed."""

    device: str | None = option(None, "cpu, cuda or cuda:N (default: cuda where there is one, else cpu)")
    backend: str = option("auto", "who computes the fused ops", choices=("auto", "reference", "cpu", "triton", "cuda"))
    amp: str = option("none", "dtype of autocast", choices=("none", "bfloat16", "float16"))
    channels_last: bool = option(True, "keep images channels_last")
    workers: int | None = option(None, "processes that read images (default: half the cores, 8 at most)", least=0)
    broken: str = option(
        "error", "an image that cannot be read is an error, or named and skipped", choices=("error", "skip")
    )


@dataclass(frozen=True)
class Data:
    """What is looked at."""

    data: str = option("", "folder of the data set")
    layout: str = option("", "how the folder is laid out")
    size: int = option(224, "side of the images that the network sees in training, in pixels", least=32)


@dataclass(frozen=True)
class Training(Running, Data):
    """How a network is trained. The batch is that of each process."""

    model: str = option("dla34", "a network of dla_fast.models.list_models()")
    weights: str | None = option(
        None, "a checkpoint to start from, file, URL or published name; a head that does not fit is drawn anew"
    )
    epochs: int = option(120, "passes over the training images", least=1)
    batch: int = option(256, "images in a step", least=1)
    optimizer: str = option("sgd", "an optimizer of timm's")
    lr: float = option(0.1, "learning rate", above=0)
    momentum: float = option(0.9, "of the optimizer", least=0)
    weight_decay: float = option(1e-4, "of the optimizer; norms and biases have none", least=0)
    schedule: str = option("step", "of the learning rate", choices=("cosine", "poly", "step", "constant"))
    decay_epochs: int = option(30, "epochs between the steps of --schedule step, each to a tenth", least=1)
    warmup_epochs: int = option(0, "epochs in which the learning rate rises", least=0)
    ema: float = option(0.0, "decay of the moving average of the weights, which is then evaluated; 0 for none", least=0)
    clip_grad: float = option(0.0, "norm to which gradients are clipped; 0 for none", least=0)
    memory: str = option("default", "low keeps less for the backward pass", choices=("default", "low"))
    sync_bn: bool = option(False, "batch norms share their statistics among processes")
    seed: int = option(0, "of weights, order and augmentation", least=0)
    save_every: int = option(500, "steps between checkpoints; each epoch ends with one as well", least=1)
    keep: int = option(2, "checkpoints that are kept, so that one stays if the last is damaged", least=2)
    evaluate_every: int = option(1, "epochs between evaluations; the last is always evaluated", least=1)

"""What ``test_like_stock_processes.py`` runs on two processes: data and model parallel training, stock and swapped.

Both go through the same steps in the same process; each writes ``FOLDER/RANK.pt``, by scenario what each model showed.
"""

from __future__ import annotations

import datetime
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

WORLD = 2


def shown(parallel, model, outputs):
    """Outputs, gradients, parameters and buffers, of which sharded ones are put together."""
    whole = lambda t: t.full_tensor() if hasattr(t, "full_tensor") else t  # noqa: E731
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    for name, p in model.named_parameters():
        found[name] = whole(p).detach()
        if p.grad is not None:
            found[f"{name}.grad"] = whole(p.grad).detach()
    found.update(model.named_buffers())
    found["keys"] = list(parallel.state_dict())
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in found.items()}


def trained(parallel, model, rank, *, steps=2, dtype=torch.float64, call=None):
    """Training steps on images of this process, with another number of them each."""
    from pairs import image, loss_of

    optimizer = torch.optim.SGD(parallel.parameters(), lr=1e-3, momentum=0.9)
    outputs = []
    for i in range(steps):
        optimizer.zero_grad()
        y = (parallel if call is None else call)(image((2 + rank, 16, 16), dtype=dtype, seed=10 * i + rank))
        loss_of(y).backward()
        optimizer.step()
        outputs.append(y)
    return shown(parallel, model, outputs)


class Unused(nn.Module):
    """A part that no output depends on, and one that does every second time."""

    def __init__(self, model):
        super().__init__()
        from examples.networks import Root

        torch.manual_seed(0)
        self.model, self.never, self.sometimes = model, Root(6, 3).double(), Root(6, 3).double()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        if self.calls % 2:
            x = self.sometimes(x, x)
        return self.model(x)


def ddp(rank, swaps, *, wrap=lambda model: model, sync=False, **options):
    """DistributedDataParallel, with norms of joint batches where ``sync``, which stock cannot do on a CPU."""
    from pairs import pair

    import dla_fast

    model = wrap(pair("adding", verify=False)[swaps])
    if swaps:
        dla_fast.swap_(model, verify=False)
    parallel = nn.parallel.DistributedDataParallel(model, **options)
    if sync:
        nn.SyncBatchNorm.convert_sync_batchnorm(parallel.module)
    return trained(parallel, model, rank, steps=3)


def accumulating(rank, swaps):
    """Gradients that are not reduced but every second time, as large batches are made."""
    from pairs import image, loss_of, pair

    model = pair("concatenating", verify=False)[swaps]
    parallel = nn.parallel.DistributedDataParallel(model)
    outputs = []
    for i in range(4):
        x = image((2, 16, 16), seed=10 * i + rank)
        if i % 2:
            outputs.append(parallel(x))
            loss_of(outputs[-1]).backward()
        else:
            with parallel.no_sync():
                outputs.append(parallel(x))
                loss_of(outputs[-1]).backward()
    return shown(parallel, model, outputs)


def compressed(rank, swaps):
    """A hook that sends gradients as halves, and the gradients of the last steps."""
    from pairs import pair
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    model = pair("node", verify=False)[swaps]
    parallel = nn.parallel.DistributedDataParallel(model)
    calls = []

    def hook(state, bucket):
        calls.append(bucket.buffer().numel())
        return default_hooks.allreduce_hook(state, bucket)

    parallel.register_comm_hook(None, hook)
    return {**trained(parallel, model, rank), "calls": calls}


def sharded(rank, swaps, *, half=False, **options):
    """FSDP2: parameters of each part sharded by itself, gathered for its forward and backward.

    ``half``: gathered in bfloat16. A CPU wants the statistics of norms in it too.
    """
    from pairs import pair
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    dtype = torch.float32 if half else torch.float64
    model = pair("node" if half else "concatenating", verify=False, dtype=dtype)[swaps]
    options["mesh"] = init_device_mesh("cpu", (WORLD,))
    if half:
        # Without a kink, on whose other side rounding could send a gradient.
        model.root.relu = nn.Identity()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean, module.running_var = (
                    b.bfloat16() for b in (module.running_mean, module.running_var)
                )
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32, output_dtype=torch.float32)
    parts = [model.root] if half else [model.level1, model.level2.tree1, model.level2, *model.dla_up.children()]
    for part in [*parts, model]:
        fully_shard(part, **options)
    return trained(model, model, rank, dtype=dtype)


def sharded_units(rank, swaps):
    """Every single convolution and norm a part of its own: the units' children are wrapped where they stand."""
    from pairs import pair
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = pair("blocks", verify=False)[swaps]
    mesh = init_device_mesh("cpu", (WORLD,))
    for module in list(model.modules()):
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.ConvTranspose2d)):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return trained(model, model, rank, steps=2)


def saved_by_parts(rank, swaps):
    """A distributed checkpoint of the stock model loaded into this one."""
    import tempfile

    import torch.distributed.checkpoint as dcp
    from pairs import pair

    stock, swapped = pair("node", verify=False)
    folder = [tempfile.mkdtemp()] if rank == 0 else [None]
    dist.broadcast_object_list(folder)
    with torch.no_grad():
        for p in stock.parameters():
            p.mul_(0.5)
    dcp.save({"model": stock.state_dict()}, checkpoint_id=folder[0])
    model = swapped if swaps else pair("node", verify=False)[0]
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=folder[0])
    model.load_state_dict(state["model"])
    return trained(model, model, rank)


SCENARIOS = {
    "static graph": lambda r, s: ddp(r, s, static_graph=True),
    "unused": lambda r, s: ddp(r, s, wrap=Unused, find_unused_parameters=True),
    "bucket views": lambda r, s: ddp(r, s, gradient_as_bucket_view=True, bucket_cap_mb=1e-3),
    "accumulating": accumulating,
    "compressed": compressed,
    "sharded": sharded,
    "sharded in half": lambda r, s: sharded(r, s, half=True),
    "sharded and kept": lambda r, s: sharded(r, s, half=True, reshard_after_forward=False),
    "sharded units": sharded_units,
    "saved by parts": saved_by_parts,
}
HALVES = ("sharded in half", "sharded and kept")
# Of joint batches, which test_synced.py holds to those of one process: each option beside none.
SYNCED = {
    "none": {},
    "static graph": {"static_graph": True},
    "bucket views": {"gradient_as_bucket_view": True, "bucket_cap_mb": 1e-3},
    "unused alone": {"find_unused_parameters": True},
    "unused": {"find_unused_parameters": True, "gradient_as_bucket_view": True},
}


def main(rank: int, folder: str, paths: list[str]) -> None:
    sys.path[:0] = [path for path in paths if path not in sys.path]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=300),
    )
    found: dict = {}
    for name, scenario in SCENARIOS.items():
        for swaps in (False, True):
            torch.manual_seed(0)
            try:
                found[name, swaps] = scenario(rank, swaps)
            except Exception as error:
                found[name, swaps] = {"raised": f"{type(error).__name__}: {error}\n{traceback.format_exc()}"}
    for name, options in SYNCED.items():
        wrap = Unused if "unused" in name else lambda model: model
        torch.manual_seed(0)
        found["synced", name] = ddp(rank, True, sync=True, wrap=wrap, **options)
    torch.save(found, Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()

"""One model over many processes: the process group, and FSDP2; and over one, without either.

`join_ranks` joins, or makes, the process group and says where this rank stands. `wrap` puts a meta-device
model on its ranks: each block is a group of parameters, the root is another; weights are fp32, computing is
bf16 or fp32, gradients are reduced in fp32. `load_weights` reads a checkpoint tensor by tensor, and each rank
keeps its own part.

One rank has nothing to split, and FSDP would only cost it time. It keeps its fp32 weights as masters, beside
a bf16 copy to compute with that is cast once per step; or computes with them, in fp32. What a run leaves on
disk is the same.

It leaves out: resume points (resume.py); tensor, pipeline and context parallelism, of which an 8B model on
one node needs none.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from gramr2.directories import base_of
from gramr2.files import InputError, need, only_writer
from gramr2.lora import adapted, first_values, merged
from gramr2.loss import Trainee
from gramr2.settings import TrainSettings
from gramr2.weights import NamedTensors, adapter_tensors, checkpoint_tensors, plain_parameters

PATIENCE = datetime.timedelta(minutes=30)  # within a training step
SECONDS_TO_SAVE = 20  # of a run whose launcher has died
# Between steps one rank may sample, or read, for hours while the others wait. A dead one breaks the next
# exchange.
LONG_PATIENCE = datetime.timedelta(days=2)


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among its ranks."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None = None  # None: one process
    object_group: dist.ProcessGroup | None = None  # for numbers and objects, on the host
    # For the thread that saves: two threads must not share a group.
    checkpoint_group: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def bar(self, total: int, least: int = 0, **shown: Any) -> tqdm:
        """A progress bar, on the first rank alone, of `least` items or more; a log gets a line of it every
        ten seconds."""
        often = 0.2 if sys.stderr.isatty() else 10
        return tqdm(total=total, disable=not self.is_first or total < least, mininterval=often, **shown)

    @contextlib.contextmanager
    def only_writer(self, place: Path, is_directory: bool = True) -> Iterator[None]:
        """Holds a directory, or a file, against other runs; the first rank does, for all."""
        with contextlib.ExitStack() as held:
            self.on_rank_0(lambda: held.enter_context(only_writer(place, is_directory)))
            yield

    def all_reduce_sum(self, *numbers: float) -> list[float]:
        """Sums over ranks, in float64."""
        sums = torch.tensor(numbers, dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(sums, group=self.object_group)
        return sums.tolist()

    def all_gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=self.object_group)
        return values

    @contextlib.contextmanager
    def errors_on_all_ranks(self) -> Iterator[None]:
        """An InputError, or one of the disk, on one rank is raised on all, once each is through the block.

        Any other exception ends its rank alone, and the others at their next exchange.
        """
        error = None
        try:
            yield
        except (InputError, OSError) as met:
            error = met
        for each in self.all_gather(error):
            if each is not None:
                raise each

    def on_all_ranks(self, work: Callable[[], Any]) -> list[Any]:
        """What `work` returns on each rank; where it fails on one of them, it fails on all of them alike."""
        result = None
        with self.errors_on_all_ranks():
            result = work()
        return self.all_gather(result)

    def on_rank_0(self, work: Callable[[], Any]) -> Any:
        """What `work` returns on the first rank, which alone does it; the others wait, and are told."""
        return self.on_all_ranks(lambda: work() if self.is_first else None)[0]


@contextlib.contextmanager
def join_ranks(settings: TrainSettings) -> Iterator[Ranks]:
    """Joins the process group there is, or the one that torchrun describes, or stands alone."""
    cuda = settings.device == "cuda" or (settings.device == "auto" and torch.cuda.is_available())
    if cuda and not torch.cuda.is_available():
        raise InputError("device: no CUDA device is visible here; set it to cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    owned = not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", 1)) > 1
    if "TORCHELASTIC_RUN_ID" in os.environ and not dist.is_initialized():
        threading.Thread(target=end_with_launcher, daemon=True).start()
    if owned:
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
        except RuntimeError as error:
            raise InputError(f"the ranks do not reach each other (docs/clusters.md): {error}") from None
    groups = []
    try:
        if dist.is_initialized():
            groups = [dist.new_group(backend="gloo", timeout=LONG_PATIENCE) for _ in range(2)]
            yield Ranks(dist.get_rank(), dist.get_world_size(), device, _mesh(settings, device), *groups)
        else:
            yield Ranks(0, 1, device)
    finally:
        torch.set_num_threads(threads)
        if owned:
            dist.destroy_process_group()
        else:
            for group in groups:
                dist.destroy_process_group(group)


def end_with_launcher() -> None:
    """Ends this process soon after the launcher that started it: nobody is left who would end it."""
    launcher = os.getppid()
    while os.getppid() == launcher:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)  # a training saves, and whatever else stops
    time.sleep(SECONDS_TO_SAVE)
    os._exit(130)  # it waits for another rank


def _mesh(settings: TrainSettings, device: torch.device) -> DeviceMesh | None:
    """All ranks share one copy, or (hybrid FSDP) each `fsdp_size` neighbours share a copy of their own."""
    size = dist.get_world_size()
    if size == 1:
        return None
    split = settings.fsdp_size or size
    if size % split:
        raise InputError(f"fsdp_size: {split} does not divide the {size} ranks")
    if split == size:
        return init_device_mesh(device.type, (size,), mesh_dim_names=("fsdp",))
    return init_device_mesh(device.type, (size // split, split), mesh_dim_names=("replicate", "fsdp"))


# ---------------------------------------------------------------------------------- the model


def compute_dtype(settings: TrainSettings, device: torch.device) -> torch.dtype:
    if settings.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, settings.dtype)


def wrap(trainee: Trainee, settings: TrainSettings, ranks: Ranks) -> None:
    """Wraps a trainee that is on the meta device, and gives it memory: this rank's part, uninitialised."""
    for number, block in enumerate(trainee.decoder.blocks):
        _wrap_forward(block, settings, number < settings.recompute)
    dtype = compute_dtype(settings, ranks.device)
    if ranks.mesh is not None:
        for each in trainee.parameters():  # what is not trained needs no more bits than are computed with
            each.data = each.data if each.requires_grad else each.data.to(dtype)
        # Inputs stay as they are: a batch's coefficients and margins are fp32 whatever the weights are.
        policy = MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for module in (*trainee.decoder.blocks, trainee):
            fully_shard(module, mesh=ranks.mesh, mp_policy=policy)
    else:
        trainee.to(dtype)
    gc.collect()  # FSDP holds its modules in circles: one trained before may still be there
    trainee.to_empty(device=ranks.device)
    if ranks.mesh is None and dtype != torch.float32:
        copies = [each for each in trainee.parameters() if each.requires_grad]
        trainee.masters = {copy: _master(copy) for copy in copies}


def _master(copy: nn.Parameter) -> nn.Parameter:
    """The float32 weight of which this is a copy. It collects the copy's gradients, each at once: no pack's
    is kept in 16 bits for long, and none is added up in them."""
    master = nn.Parameter(torch.empty_like(copy, dtype=torch.float32))

    def collect(copy: Tensor) -> None:
        gradient, copy.grad = copy.grad, None
        assert gradient is not None
        master.grad = gradient.float() if master.grad is None else master.grad.add_(gradient)

    copy.register_post_accumulate_grad_hook(collect)
    return master


def _wrap_forward(block: nn.Module, settings: TrainSettings, recompute: bool) -> None:
    """Recomputing goes inside compiling, so that both are one graph, and FSDP's hooks, which sit on the
    module's call, stay outside."""
    forward = block.forward
    if recompute:
        forward = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
    if settings.compile:
        forward = torch.compile(forward, dynamic=True, fullgraph=True)
    block.forward = forward


def load_weights(trainee: Trainee, directory: Path, fresh_score: bool) -> None:
    """Reads the weights as float32. Each rank maps the files and copies what is its own."""
    fill(weights(trainee), checkpoint_tensors(directory, trainee.decoder, fresh_score, dtype=torch.float32))
    if fresh_score:
        # Zero: the first scores are equal, and no seed is needed.
        fill(weights(trainee), [("score.weight", torch.zeros(1, trainee.decoder.config.hidden_size))])
    trainee.refresh()


def load_adapters(trainee: Trainee, directory: Path, seed: int) -> None:
    """Those of an adapter's directory; beside a whole model, new ones."""
    trained = trainee.trained
    named = adapter_tensors(directory, trainee.decoder) if base_of(directory) else first_values(trained, seed)
    fill(trained, named)
    trainee.refresh()


@torch.no_grad()
def fill(parameters: Mapping[str, nn.Parameter], named: NamedTensors) -> None:
    """Copies whole tensors, which are the same on each rank, to parameters of which a rank holds its part."""
    for name, tensor in named:
        parameter = parameters[name]
        if isinstance(parameter, DTensor):
            mesh, placements = parameter.device_mesh, parameter.placements
            # Without a source rank nothing is sent: it is the same on each, and each cuts its part.
            tensor = distribute_tensor(tensor.to(mesh.device_type), mesh, placements, src_data_rank=None)
        parameter.copy_(tensor)


def weights(trainee: Trainee) -> dict[str, nn.Parameter]:
    """The parameters that a checkpoint holds, by its names: masters where there are such."""
    return {name: trainee.masters.get(each, each) for name, each in plain_parameters(trainee.decoder)}


def whole_tensors(trainee: Trainee, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the decoder, put together one at a time; every rank must take them all."""
    adapters, trained = adapted(trainee.decoder), trainee.trained
    for name, parameter in weights(trainee).items():
        tensor = whole(parameter)
        if name in adapters:
            a, b = (trained[f"{name.removesuffix('weight')}{half}.weight"] for half in "ab")
            tensor = merged(tensor, whole(a), whole(b), adapters[name].scale)
        yield name, finite(name, tensor.to("cpu", dtype))


def trained_tensors(trainee: Trainee) -> Iterator[tuple[str, Tensor]]:
    """As `whole_tensors`, but what a step updates alone, in float32."""
    for name, parameter in trainee.trained.items():
        yield name, finite(name, whole(parameter).to("cpu"))


def whole(parameter: Tensor) -> Tensor:
    tensor = parameter.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def finite(name: str, tensor: Tensor) -> Tensor:
    need(bool(tensor.isfinite().all()), f"{name}: holds numbers that are not finite; nothing is published")
    return tensor

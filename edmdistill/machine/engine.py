"""How a run is spread over processes and devices.

Accelerate makes the process group, finds the device and wraps networks for DDP. Where it does not reach, in FSDP2 for
several networks, torch's own `fully_shard` is called.

Nothing here changes what a run computes beyond rounding: every process takes its rows of the recipe's batch, and the
gradient is the whole batch's. A round's random numbers belong to rows (`Draws`), so they need no care.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, cpu_offload
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from edmdistill.errors import PeerFailed, TrainingError
from edmdistill.machine.devices import pick_device
from edmdistill.networks.flow import FlowNetwork

T = TypeVar("T")


class Machine(NamedTuple):
    """How a run uses the hardware; none of it is in the recipe, and a run may go on under another.

    Attributes:
        device: cpu, cuda, cuda:1 ...; None: cuda where there is one.
        micro_batch: most rows of one forward pass; "auto": the most that fit; None: all of a process's share.
        shard: weights, gradients, optimiser states and averages are shared out over the processes (FSDP2).
        offload: what waits in the host's memory: ema, teacher, optimizer.
        checkpointing: activations inside blocks are computed again for the backward pass.
        workers: processes that read data beside each training process.
        log_with: trackers by accelerate's names.
    """

    device: str | None = None
    micro_batch: int | Literal["auto"] | None = None
    shard: bool = False
    offload: tuple[str, ...] = ()
    checkpointing: bool = False
    workers: int = 0
    log_with: tuple[str, ...] = ()


class RoleModule:
    """A role's network as a method calls it: through DDP's wrapper while it learns, bare in all else."""

    def __init__(self, network: nn.Module, wrapper: nn.Module) -> None:
        self.network = network
        self.wrapper = wrapper

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        learns = self.network.training and torch.is_grad_enabled()
        return (self.wrapper if learns else self.network)(*args, **kwargs)


class Engine:
    """The processes of a run, seen from one of them.

    Attributes:
        device: of this process.
        rank, world_size: number of this process, and how many there are.
    """

    def __init__(self, machine: Machine = Machine()) -> None:
        self.machine = machine
        ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
        alone = pick_device(machine.device)
        place, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if alone.type == "cuda" and place >= count:
            raise TrainingError(
                f"this is process {place + 1} on a machine that has {count} GPU{'s' if count > 1 else ''}: start as "
                "many as there are GPUs, or add --device cpu"
            )
        self.accelerator = Accelerator(cpu=alone.type == "cpu", kwargs_handlers=[ddp])
        self.rank: int = self.accelerator.process_index
        self.world_size: int = self.accelerator.num_processes
        if self.world_size > 1 and ":" in (machine.device or ""):
            raise TrainingError(
                f"--device {machine.device} is one device, but each of {self.world_size} processes has its own"
            )
        self.device = self.accelerator.device if self.world_size > 1 else alone
        self.mesh: DeviceMesh | None = None
        if machine.shard:
            if self.world_size == 1:
                raise TrainingError("--shard shares a run out over processes, but there is one: add --processes N")
            if machine.offload:
                raise TrainingError("--offload is for networks that are whole: leave it out, or --shard")
            self.mesh = init_device_mesh(self.device.type, (self.world_size,))

    @property
    def is_main(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    def close(self) -> None:
        """Leaves the process group; without it, processes can hang at their end."""
        if dist.is_initialized():
            # Gloo's thread lets go of the last work in Python: given no turn before the end, it hangs or aborts there.
            time.sleep(0.1)
            dist.destroy_process_group()

    # Rows of a batch.

    def micro_batches(self, batch: int) -> list[slice]:
        """This process's micro-batches: as many on every process, each of `micro_batch` rows at most.

        Raises: TrainingError: some would be empty.
        """
        first, last = (batch * n // self.world_size for n in (self.rank, self.rank + 1))
        largest = -(-batch // self.world_size)
        size = self.machine.micro_batch or largest
        assert size != "auto", "settled before the first round"
        pieces = -(-largest // size)
        if batch // self.world_size < pieces:
            raise TrainingError(
                f"a batch of {batch} images cannot be split into {pieces} micro-batches on each of {self.world_size} "
                "processes: use fewer processes or a larger --micro-batch"
            )
        cuts = [first + (last - first) * piece // pieces for piece in range(pieces + 1)]
        return [slice(a, b) for a, b in pairwise(cuts)]

    def check_micro_batches(self, batch: int) -> None:
        """Raises: TrainingError: a batch cannot be cut into micro-batches as asked."""
        if self.machine.micro_batch != "auto":
            self.micro_batches(batch)
        elif self.device.type != "cuda":
            raise TrainingError(
                "--micro-batch auto tries what a GPU holds, but this run is on a CPU: give a number of images"
            )

    # Networks.

    def place(self, network: nn.Module) -> None:
        """Brings a network to the device, or this process's shard of it.

        Parameters without dimensions are kept whole on every process: `fully_shard` takes none. So are networks of
        another kind than the teacher's, which are small.
        """
        network.to(self.device)
        if self.mesh is not None and isinstance(network, FlowNetwork):
            scalars = {parameter for parameter in network.parameters() if parameter.ndim == 0}
            for module in (*network.network.blocks(), network.network):
                fully_shard(module, mesh=self.mesh, reshard_after_forward=True, ignored_params=scalars)

    def offload(self, network: FlowNetwork) -> None:
        """Keeps a frozen network's weights in the host's memory; each layer has its own on the device while it works.

        Where gradients flow through to the input, autograd holds on to them until the backward pass, but for
        checkpointed blocks: only with these is the memory small.
        """
        cpu_offload(network.network, execution_device=self.device, offload_buffers=True)

    def wrap(self, network: nn.Module, trained: bool) -> RoleModule:
        """What a method calls for a network that is in its place. A trained one has only its used weights unfrozen."""
        if not trained or self.world_size == 1 or self.mesh is not None:
            return RoleModule(network, network)
        # Buffers are constants: sent before every forward pass, they would only be in autograd's way.
        buffers = [name for name, _ in network.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(network, buffers)  # type: ignore[no-untyped-call]
        return RoleModule(network, self.accelerator.prepare_model(network, device_placement=False))

    @contextmanager
    def accumulate(self, module: RoleModule, last: bool) -> Iterator[None]:
        """Within it, a forward and a backward pass of a micro-batch; DDP sends gradients after the last one alone.

        FSDP2 sends them after each: what it would keep otherwise is a whole gradient on every process.
        """
        quiet = self.accelerator.no_sync(module.wrapper) if self.world_size > 1 and not last else nullcontext()
        with quiet if self.mesh is None else nullcontext():
            yield

    def finish_gradients(self, network: nn.Module) -> None:
        """After the last micro-batch: what `fully_shard` left alone is averaged too."""
        if self.mesh is None:
            return
        for parameter in network.parameters():
            if parameter.grad is not None and not isinstance(parameter.grad, DTensor):
                parameter.grad.copy_(self.all_reduce(parameter.grad) / self.world_size)

    def gradient_norm(self, network: nn.Module) -> Tensor:
        """The norm of a network's whole gradient, the same on every process.  0-dim"""
        gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
        whole = get_total_norm([gradient for gradient in gradients if not isinstance(gradient, DTensor)])
        if self.mesh is None:
            return whole
        parts = get_total_norm([local_shard(gradient) for gradient in gradients if isinstance(gradient, DTensor)])
        return (whole**2 + self.all_reduce(parts**2)).sqrt()

    def full_state(self, network: nn.Module) -> dict[str, Tensor]:
        """A network's weights and buffers, whole and in the host's memory; empty but on the main process."""
        return self.gather(network.state_dict())

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors whole and in the host's memory; empty but on the main process. All processes call it together."""
        whole = {}
        for name, tensor in tensors.items():
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self.is_main:
                whole[name] = full.detach().cpu()
        return whole

    # Processes.

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over processes."""
        if self.world_size == 1:
            return tensor
        tensor = tensor.clone()
        dist.all_reduce(tensor)
        return tensor

    def any_process(self, said: bool) -> bool:
        """Whether any process says so; all call it together."""
        return said if self.world_size == 1 else bool(self.all_reduce(torch.tensor(float(said), device=self.device)))

    def on_main(self, act: Callable[[], T]) -> T | None:
        """Lets the main process act and the others wait.  Returns: what it gives; None on the others.

        Raises: on the main process, what `act` raises; PeerFailed on the others then.
        """
        given: T | None = None
        error: BaseException | None = None
        if self.is_main:
            try:
                given = act()
            except BaseException as raised:  # the others wait, whatever it is
                error = raised
        failed = self.any_process(error is not None)
        if error is not None:
            raise error
        if failed:
            raise PeerFailed("the main process could not go on")
        return given

    def is_peer_loss(self, error: RuntimeError) -> bool:
        """Whether an error is how a process hears that another one has ended."""
        return self.world_size > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error))

    def broadcast(self, number: int) -> int:
        """The main process's number, on every process."""
        if self.world_size == 1:
            return number
        return int(self.all_reduce(torch.tensor(int(number) if self.is_main else 0, device=self.device)))


def local_shard(tensor: Tensor) -> Tensor:
    """This process's part of a tensor: all of it, unless it is sharded.  Shares memory."""
    part: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return part


def shard_like(whole: Tensor, target: Tensor) -> Tensor:
    """A whole tensor in the place and the shards of `target`, if it has its shape."""
    if isinstance(target, DTensor) and whole.shape == target.shape:
        # No process sends: each has the whole.
        return distribute_tensor(whole.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
    return whole


def load_full_state(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Puts whole tensors into a network that may be sharded.  Raises: RuntimeError: names or shapes differ."""
    own = network.state_dict()
    network.load_state_dict({name: shard_like(tensor, own.get(name, tensor)) for name, tensor in tensors.items()})


def scale_gradients(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Multiplies every gradient by a number.  In place."""
    if factor != 1:
        torch._foreach_mul_(
            [local_shard(parameter.grad) for parameter in parameters if parameter.grad is not None], factor
        )

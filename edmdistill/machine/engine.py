"""How a run is spread over processes and devices.

Accelerate makes the process group and picks the device; DDP and FSDP2, which it does not support for several networks,
are torch's own.

Nothing here changes what a run computes beyond rounding: each process takes its rows of the recipe's batch, and
gradients are those of the whole batch. Random numbers belong to rows (`Draws`), so they do not depend on the process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from itertools import pairwise
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import check_cuda_p2p_ib_support
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from edmdistill.errors import PeerFailed, TrainingError, counted
from edmdistill.kernels.linear import allow_tf32, lay_out_weights
from edmdistill.machine.devices import process_device
from edmdistill.machine.gpu_options import require_gpu
from edmdistill.machine.host import cores
from edmdistill.machine.processes import end_process_group
from edmdistill.networks.flow import FlowNetwork
from edmdistill.recipes.schema import CompileMode
from edmdistill.transfer import is_gpu, to_host

T = TypeVar("T")
SecondMoment = Literal["fp32", "bf16"]

PATIENCE = timedelta(hours=2)
"""How long processes wait for the main one, which may be writing to a slow disk; by NCCL's default, 10 minutes."""
MOST_WORKERS = 4


class Machine(NamedTuple):
    """How a run uses the hardware. None of it is in the recipe, and a run can be resumed with other values.

    It changes rounding alone; that of `second_moment` is coarse, and has no bias.

    Attributes:
        device: cpu, cuda, cuda:1 ...; None: cuda if available.
        micro_batch: most rows of one forward pass; "auto": as many as fit; None: the process's whole share.
        shard: weights, gradients, optimizer states and averages are sharded over the processes (FSDP2).
        offload: what is kept in host memory: ema, teacher, optimizer.
        checkpointing: activations inside blocks are recomputed in the backward pass.
        workers: data-loading processes for each training process; None: 0 on a CPU, up to MOST_WORKERS beside a GPU.
        log_with: trackers, by Accelerate's names.
        loss_pieces: the generator's loss goes through teacher and auxiliary score in so many pieces.
        compile: a mode of torch.compile for the blocks of networks, or off; None: the recipe's.
        second_moment: precision of Adam's; bf16 is rounded at random.
        planned: the number of micro_batch is `--fit`'s, by a plan of the memory: a GPU tries it before the training.
    """

    device: str | None = None
    micro_batch: int | Literal["auto"] | None = None
    shard: bool = False
    offload: tuple[str, ...] = ()
    checkpointing: bool = False
    workers: int | None = 0
    log_with: tuple[str, ...] = ()
    loss_pieces: int = 1
    compile: CompileMode | None = None
    second_moment: SecondMoment = "fp32"
    planned: bool = False

    @property
    def shares_weights(self) -> bool:
        """Returns whether EDM2's weights are normalized once a turn, and kept, or in every pass, which holds fewer."""
        return not (self.shard or self.checkpointing)

    def pieces(self, batch: int, world_size: int, micro_batches: int) -> int:
        """Returns how many pieces a loss goes through: none is empty in the smallest of so many micro-batches.

        They are as many on every process, of which one may have an image more than another: sharded networks
        communicate in each.
        """
        return min(self.loss_pieces, max(1, batch // world_size // micro_batches))


class RoleModule:
    """A role's network as methods call it: through DDP's wrapper when gradients are needed, directly otherwise."""

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
        device: this process's.
        rank, world_size: the index of this process, and the number of processes.
        mesh: the processes that networks are sharded over; None without sharding.
    """

    def __init__(self, machine: Machine = Machine()) -> None:
        self.machine = machine
        device = process_device(machine.device)
        if device.type == "cuda" and "RTX 40" in torch.cuda.get_device_name(device) and not check_cuda_p2p_ib_support():
            os.environ.update(NCCL_P2P_DISABLE="1", NCCL_IB_DISABLE="1")  # as accelerate's launcher does
        # Not an Accelerator: of one, a process cannot have a run on a GPU, and then another on the CPU.
        state = PartialState(cpu=device.type == "cpu", timeout=PATIENCE)
        self.rank: int = state.process_index
        self.world_size: int = state.num_processes
        if self.world_size > 1 and ":" in (machine.device or ""):
            raise TrainingError(
                f"--device {machine.device} is a single GPU, but each of {self.world_size} processes uses its own: use "
                "--device cuda"
            )
        self.device: torch.device = state.device if self.world_size > 1 else device
        self.mesh: DeviceMesh | None = None
        if machine.shard:
            if self.world_size == 1:
                raise TrainingError("--shard needs several processes, but this run has one: add --processes N")
            self.mesh = init_device_mesh(self.device.type, (self.world_size,))

    def set_products(self, precision: str) -> None:
        """Sets how CUDA rounds products in a precision of recipes, in the whole process; elsewhere it does nothing.

        As in EDM's and EDM2's training, no sum is rounded to float16, and float32 is exact unless TF32 is asked for.
        """
        if self.device.type == "cuda":
            allow_tf32(precision == "tf32")
            torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False

    @property
    def is_main(self) -> bool:
        """Returns whether this is the process that writes files and messages."""
        return self.rank == 0

    @property
    def workers(self) -> int:
        """Returns the number of data-loading processes: what the machine says, or as many as there are cores for."""
        if self.machine.workers is not None:
            return self.machine.workers
        here = int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))
        return min(MOST_WORKERS, max(cores() // here - 1, 0)) if is_gpu(self.device) else 0

    def close(self) -> None:
        """Destroys the process group."""
        end_process_group()

    # Rows of a batch.

    def micro_batches(self, batch: int, group: int = 1) -> list[slice]:
        """Returns the rows of this process's micro-batches, see `split_rows`.  Raises: TrainingError: as that does."""
        asked = self.machine.micro_batch
        assert asked != "auto", "resolved before the first round"
        return split_rows(batch, self.rank, self.world_size, asked, group)

    def check_micro_batches(self, batch: int, group: int = 1) -> None:
        """Raises: TrainingError: a batch cannot be split into the micro-batches that were asked for."""
        if self.machine.micro_batch != "auto":
            self.micro_batches(batch, group)
        else:
            require_gpu(self.device, "--micro-batch auto")

    # Networks.

    def place(self, network: nn.Module) -> None:
        """Moves a network, or this process's shard of it, to the device.

        0-dimensional parameters are replicated, because `fully_shard` does not take them; so are networks that are not
        FlowNetworks, because they are small.
        """
        network.to(self.device)
        lay_out_weights(network, plain=self.mesh is not None)  # fully_shard takes no other layout
        if self.mesh is not None and isinstance(network, FlowNetwork):
            scalars = {parameter for parameter in network.parameters() if parameter.ndim == 0}
            for module in (*network.network.blocks(), network.network):
                fully_shard(module, mesh=self.mesh, reshard_after_forward=True, ignored_params=scalars)

    def wrap(self, network: nn.Module, trained: bool) -> RoleModule:
        """Returns the module that methods call, for a network on its device; only used weights of a trained one are
        unfrozen."""
        if not trained or self.world_size == 1 or self.mesh is not None:
            return RoleModule(network, network)
        # Buffers are constants: broadcasting them before every forward pass would only get in autograd's way.
        buffers = [name for name, _ in network.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(network, buffers)  # type: ignore[no-untyped-call]
        ids = [self.device] if is_gpu(self.device) else None
        return RoleModule(network, DistributedDataParallel(network, device_ids=ids, gradient_as_bucket_view=True))

    @contextmanager
    def accumulate(self, module: RoleModule, last: bool) -> Iterator[None]:
        """A context for the passes of a micro-batch: DDP reduces gradients only after the last one.

        FSDP2 reduces them after each: otherwise every process would keep an unsharded gradient.
        """
        wrapper = module.wrapper
        with wrapper.no_sync() if isinstance(wrapper, DistributedDataParallel) and not last else nullcontext():
            yield

    def finish_gradients(self, network: nn.Module) -> None:
        """Averages the gradients that `fully_shard` leaves alone.  To be called after the last micro-batch."""
        if self.mesh is None:
            return
        for parameter in network.parameters():
            if parameter.grad is not None and not isinstance(parameter.grad, DTensor):
                parameter.grad.copy_(self.all_reduce(parameter.grad) / self.world_size)

    def gradient_norm(self, network: nn.Module) -> Tensor:
        """Returns the norm of a network's gradient over all processes, the same on each.  0-dim"""
        gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
        whole = get_total_norm([gradient for gradient in gradients if not isinstance(gradient, DTensor)])
        if self.mesh is None:
            return whole
        parts = get_total_norm([local_shard(gradient) for gradient in gradients if isinstance(gradient, DTensor)])
        return (whole**2 + self.all_reduce(parts**2)).sqrt()

    def full_state(self, network: nn.Module) -> dict[str, Tensor]:
        """Returns a network's unsharded weights and buffers in host memory; empty except on the main process."""
        return self.gather(network.state_dict())

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns unsharded tensors in host memory; empty except on the main process.  A collective call.

        In a run on a GPU they are copies, which can be written beside training; on a CPU they are what is trained.
        """
        whole = {}
        for name, tensor in tensors.items():
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self.is_main:  # of a sharded network, one whole tensor at a time is on the GPU
                whole[name] = full.detach() if self.mesh is None else full.detach().to("cpu", copy=True)
        if self.mesh is not None or not is_gpu(self.device):
            return whole
        return dict(zip(whole, to_host(list(whole.values())), strict=True))

    # Processes.

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Returns the sum of a tensor over all processes, on this one's device."""
        if self.world_size == 1:
            return tensor
        tensor = tensor.to(self.device, copy=True)
        dist.all_reduce(tensor)
        return tensor

    def any_process(self, flag: bool) -> bool:
        """Returns whether the flag is set on any process.  A collective call."""
        return flag if self.world_size == 1 else bool(self.all_reduce(torch.tensor(float(flag), device=self.device)))

    def on_main(self, act: Callable[[], T]) -> T | None:
        """Calls `act` on the main process while the others wait.  Returns: its result; None on the others.

        Raises: what `act` raises, on the main process; then PeerFailed on the others.
        """
        result: T | None = None
        error: BaseException | None = None
        if self.is_main:
            try:
                result = act()
            except BaseException as raised:  # whatever it is, the others are waiting
                error = raised
        failed = self.any_process(error is not None)
        if error is not None:
            raise error
        if failed:
            raise PeerFailed("the main process failed")
        return result

    def is_peer_loss(self, error: RuntimeError) -> bool:
        """Returns whether an error means that another process has died."""
        return self.world_size > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error))

    def broadcast(self, number: int) -> int:
        """Returns the main process's number on every process."""
        if self.world_size == 1:
            return number
        return int(self.all_reduce(torch.tensor(int(number) if self.is_main else 0, device=self.device)))


def split_rows(batch: int, rank: int, world_size: int, micro_batch: int | None, group: int = 1) -> list[slice]:
    """Returns the rows of a process's micro-batches: equally many on every process, of at most `micro_batch` rows.

    Args:
        micro_batch: None: the whole share of the process.
        group: rows that stay together; the batch is a multiple of it.
    Raises: TrainingError: some would be empty.
    """
    groups = batch // group
    if groups < world_size:
        several = f", in groups of {group}," if group > 1 else ""
        raise TrainingError(
            f"a batch of {counted(batch, 'image')}{several} is too small for {world_size} processes: use fewer"
        )
    first, last = (groups * n // world_size for n in (rank, rank + 1))
    largest = -(-groups // world_size)
    pieces = -(-largest // whole_groups(micro_batch, group)) if micro_batch else 1
    if groups // world_size < pieces:
        raise TrainingError(
            f"a batch of {batch} images cannot be split into {pieces} micro-batches on each of {world_size} "
            "processes: use fewer processes or a larger --micro-batch"
        )
    cuts = [group * (first + (last - first) * piece // pieces) for piece in range(pieces + 1)]
    return [slice(a, b) for a, b in pairwise(cuts)]


def whole_groups(micro_batch: int, group: int) -> int:
    """Returns how many groups of images a micro-batch holds.  Raises: TrainingError: none."""
    if micro_batch < group:
        raise TrainingError(
            f"--micro-batch {micro_batch} is too small, because the loss takes images in groups of {group}: use at "
            f"least {group}"
        )
    return micro_batch // group


def local_shard(tensor: Tensor) -> Tensor:
    """Returns this process's shard of a tensor, or the tensor itself if it is not sharded.  Shares memory."""
    shard: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return shard


def shard_like(whole: Tensor, target: Tensor) -> Tensor:
    """Returns a tensor with the sharding, or in the memory layout, of `target`, if they have one shape."""
    if whole.shape != target.shape:
        return whole
    if isinstance(target, DTensor):
        # src_data_rank: every process has the whole tensor, so none has to send it.
        return distribute_tensor(whole.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
    return torch.empty_like(target, dtype=whole.dtype, device=whole.device).copy_(whole)


def load_full_state(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Loads unsharded tensors into a network that may be sharded.  Raises: RuntimeError: names or shapes differ."""
    target = network.state_dict()
    network.load_state_dict({name: shard_like(tensor, target.get(name, tensor)) for name, tensor in tensors.items()})


def scale_gradients(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Multiplies every gradient by a number.  In place."""
    if factor != 1:
        torch._foreach_mul_(
            [local_shard(parameter.grad) for parameter in parameters if parameter.grad is not None], factor
        )

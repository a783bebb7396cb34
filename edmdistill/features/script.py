"""Reads TorchScript files: third-party networks that contain their own code.

TorchScript has operators that write files, and code that runs while a file is loaded: default values of arguments,
constants of classes, `__setstate__`. So a file is first read as data, and refused if it has a C++ class or such a value
that is no literal. Then torch loads a copy of the data read, and every operator of every function is checked against
an allowlist before any of them runs. What remains is arithmetic, which may still take time and memory.
"""

from __future__ import annotations

import ast
import io
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from edmdistill.archives import Archive
from edmdistill.atomic import reachable, require_no_pipe
from edmdistill.errors import CheckpointError
from edmdistill.pickles import StandIn, Stateful, Unreadable
from edmdistill.stored_tensors import StoredTensor
from edmdistill.transfer import is_out_of_memory

NEEDLESS = "which no network needs: write the network without it"
WANTED = "give what torch.jit.save wrote"
"""Ends of errors: what to do."""

_CONTROL = """
abs CallFunction CallMethod Constant CreateObject data device DictConstruct dtype Enter EnumName EnumValue Exit
GetAttr If is_cpu is_cuda is_meta is_mkldnn is_mps is_nested is_quantized is_sparse isinstance itemsize layout
ListConstruct ListUnpack Loop max min ModuleContainerIndex NumToTensor RaiseException rangelist requires_grad
SetAttr StringIndex tolist TupleConstruct TupleIndex TupleSlice TupleUnpack type unchecked_cast
unchecked_unwrap_optional Uninitialized
"""
_TENSORS = """
alias arange as_tensor bernoulli clone complex contiguous copy cpu cuda detach empty empty_like expand expand_as eye
full full_like lift lift_fresh linspace multinomial new_empty new_full new_ones new_zeros normal ones ones_like rand
rand_like randint randn randn_like randperm scalar_tensor tensor to type_as uniform zeros zeros_like
"""
_SHAPES = """
as_strided atleast_1d atleast_2d atleast_3d broadcast_shapes broadcast_tensors broadcast_to can_cast cat
channel_shuffle chunk col2im column_stack concat concatenate constant_pad_nd cumprod cumsum diag diag_embed diagonal
dim dsplit dstack element_size flatten flip fliplr flipud gather get_device hsplit hstack im2col index index_add
index_copy index_fill index_put index_select is_complex is_conj is_contiguous is_floating_point is_leaf is_neg
is_nonzero is_pinned is_same_size is_signed masked_fill masked_scatter masked_select meshgrid mH moveaxis movedim mT
narrow nonzero nonzero_numpy numel numpy_T one_hot pad permute pixel_shuffle pixel_unshuffle promote_types
reflection_pad1d reflection_pad2d reflection_pad3d repeat repeat_interleave replication_pad1d replication_pad2d
replication_pad3d reshape reshape_as resolve_conj resolve_neg result_type roll rot90 row_stack scatter scatter_add
scatter_reduce select size slice split split_with_sizes squeeze stack storage_offset stride sum_to_size swapaxes
swapdims t take take_along_dim tensor_split tile transpose tril triu unbind unflatten unfold unsafe_chunk
unsafe_split unsqueeze view view_as view_as_complex view_as_real vsplit where
"""
_ARITHMETIC = """
abs absolute acos acosh add addbmm addcdiv addcmul addmm addmv addr all allclose amax amin aminmax angle any arccos
arcsin arctan argmax argmin argsort argwhere asin asinh atan atan2 atanh baddbmm bitwise_and bitwise_not bitwise_or
bitwise_xor bmm bucketize cdist ceil clamp clamp_max clamp_min clip conj copysign cos cosh count_nonzero cov cross
cummax cummin deg2rad det diff digamma dist div divide dot einsum eq equal erf erfc erfinv exp exp2 expm1 fft_fft
fft_fft2 fft_fftfreq fft_fftn fft_fftshift fft_ifft fft_ifft2 fft_ifftn fft_ifftshift fft_irfft fft_irfft2 fft_rfft
fft_rfft2 fft_rfftfreq fill fix float_power floor floor_divide fmax fmin fmod frac ge ger greater greater_equal gt
heaviside histc hypot imag inner isclose isfinite isinf isnan kron kthvalue le lerp less less_equal lgamma
linalg_cross linalg_inv linalg_matrix_norm linalg_norm linalg_vector_norm log log10 log1p log2 logaddexp
logcumsumexp logical_and logical_not logical_or logical_xor logit logsumexp lt matmul matrix_power max maximum mean
median min minimum mm mode msort mul multiply mv nan_to_num nanmean nansum ne neg negative norm norm_except_dim
not_equal outer pairwise_distance polar positive pow prod quantile rad2deg real reciprocal remainder round rsqrt
rsub searchsorted sgn sigmoid sign sin sinc sinh sort special_erf special_expit sqrt square std std_mean sub
subtract sum tan tanh tensordot topk trace trapezoid true_divide trunc unique_consecutive unique_dim var var_mean
vdot xlogy zero
"""
_LAYERS = """
_adaptive_avg_pool2d _adaptive_avg_pool3d _assert_async _batch_norm_impl_index _cast_Float _convolution
_convolution_mode _log_softmax _native_multi_head_attention _pad_circular _pad_enum _shape_as_tensor _softmax _stack
_to_copy _transformer_encoder_layer_fwd _unique2 _unsafe_view _upsample_bicubic2d_aa _upsample_bilinear2d_aa
_upsample_lanczos2d_aa _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d _weight_norm
adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
adaptive_max_pool3d affine_grid_generator alpha_dropout avg_pool1d avg_pool2d avg_pool3d batch_norm bilinear
binary_cross_entropy binary_cross_entropy_with_logits celu conv1d conv2d conv3d conv_tbc conv_transpose1d
conv_transpose2d conv_transpose3d convolution cosine_similarity cross_entropy_loss dropout elu embedding
embedding_bag feature_alpha_dropout feature_dropout gelu glu grid_sampler grid_sampler_2d group_norm gru gru_cell
hardshrink hardsigmoid hardswish hardtanh huber_loss instance_norm kl_div l1_loss layer_norm leaky_relu linear
log_sigmoid log_softmax lstm lstm_cell max_pool1d max_pool2d max_pool2d_with_indices max_pool3d mish mse_loss
native_batch_norm native_group_norm native_layer_norm nll_loss nll_loss2d nll_loss_nd prelu relu relu6 rms_norm
rrelu scaled_dot_product_attention selu silu smooth_l1_loss softmax softplus softshrink threshold upsample_bicubic2d
upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_trilinear3d
"""
_VALUES = """
__and__ __contains__ __derive_index __getitem__ __interpolate __is__ __isnot__ __lshift__ __not__ __or__
__range_length __round_to_zero_floordiv __rshift__ __xor__ _list_to_tensor _set_item _tensor_to_list append Bool
clear Complex ComplexImplicit count degrees Delete dict divmod endswith extend fabs factorial find Float
FloatImplicit floordiv format gcd get insert Int IntImplicit is_autocast_cpu_enabled is_autocast_enabled
is_grad_enabled is_scripting item items join keys len list lower mathremainder modf ord percentFormat pop radians
replace reverse ScalarImplicit set_grad_enabled setdefault Size sorted startswith str strip update upper values warn
"""
CONTROL = frozenset(_CONTROL.split())
"""Allowed operators of `prim`: control flow, attributes, lists and tuples, properties of tensors."""
OPERATORS = frozenset(" ".join((_TENSORS, _SHAPES, _ARITHMETIC, _LAYERS, _VALUES)).split())
"""Allowed operators of `aten`, also in place (with a trailing underscore): arithmetic and shapes, no files."""


class _Object(Stateful):
    """Stands for an object of a class in the archive."""

    def __init__(self, *_: object) -> None:
        self.attributes: dict[str, object] = {}

    def set_state(self, state: object) -> None:
        self.attributes = state if isinstance(state, dict) else {}


_PICKLED = {
    ("torch.jit._pickle", f"build_{kind}list"): StandIn(list) for kind in ("int", "double", "bool", "tensor")
} | {
    ("torch.jit._pickle", "restore_type_tag"): StandIn(lambda value, *_: value),
    ("torch", "device"): StandIn(lambda *_: None),
}


class ScriptFile(nn.Module):
    """Holds the frozen network of a TorchScript file, in evaluation mode.

    Raises: CheckpointError: it cannot be read, or uses a forbidden class or operator.
    """

    def __init__(self, path: str | Path, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.path, self.script = str(path), load_script(path, device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # torch cannot move a script to the meta device, on which runs are previewed, but can load it there.
        if not fn(torch.empty(0)).is_meta:
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]
        self.script = load_script(self.path, "meta")
        return self

    def run(self, *inputs: Tensor) -> Any:
        """Returns the outputs of the script.  Raises: CheckpointError: it fails."""
        try:
            return self.script(*inputs)
        except RuntimeError as error:  # torch's own, with the script's source in many lines
            tail = [line.strip() for line in str(error).splitlines() if line.strip()]
            if is_out_of_memory(error):  # of which a script makes a RuntimeError
                raise torch.OutOfMemoryError(tail[-1].removeprefix("RuntimeError: ")) from error
            shapes = " and ".join(str(list(x.shape)) for x in inputs)
            raise CheckpointError(
                f"{self.path} fails on images of shape {shapes} ({tail[-1] if tail else type(error).__name__}): use a "
                "script that takes such images"
            ) from error


class Script(ScriptFile):
    """A TorchScript file, called without preparation of its inputs."""

    def forward(self, *inputs: Tensor) -> Any:
        return self.run(*inputs)


def load_script(path: str | Path, device: torch.device | str = "cpu") -> nn.Module:
    """Returns the frozen network of a TorchScript file, in evaluation mode, without running any of its code.

    Raises: CheckpointError: it cannot be read, or uses a forbidden class or operator.
    """
    path = Path(path)
    require_no_pipe(path)
    try:
        if not path.is_file():
            raise Unreadable(f"{'is a folder' if reachable(path).exists() else 'does not exist'}: {WANTED}")
        if not zipfile.is_zipfile(path):
            raise Unreadable(f"is not a zip archive, which such files are: {WANTED}")
        network = _load(_checked(Archive(path)), device)
    except Unreadable as error:
        raise CheckpointError(f"{path} cannot be read as TorchScript: it {error}") from error
    except (OSError, RuntimeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{path} cannot be read as TorchScript ({reason}): write it with torch.jit.save"
        ) from error
    # What a script warns of is a stranger's text, which would reach the terminal as it is. The filter stays, because
    # scripts may run in several threads.
    warnings.filterwarnings("ignore", module="code/")
    for parameter in network.parameters():  # a script has no requires_grad_ of its own
        parameter.requires_grad_(False)
    return network.eval()


def is_script(archive: Archive) -> bool:
    """Returns whether torch.jit.save wrote the archive, and not torch.save."""
    return "constants.pkl" in archive.members


def script_tensors(archive: Archive) -> dict[str, StoredTensor]:
    """Returns a network's parameters and buffers as in its state dict, without loading its code.

    Raises: Unreadable: the archive is damaged, or no TorchScript.
    """
    _, names = _code(archive)
    tensors: dict[str, StoredTensor] = {}
    waiting, seen = [("", archive.load("data.pkl", "data", names))], set()
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, StoredTensor):
            archive.budget.take(value.nbytes)
            tensors[name] = value
        elif isinstance(value, _Object) and id(value) not in seen:
            seen.add(id(value))
            archive.budget.step(len(value.attributes))
            start = f"{name}." if name else ""
            waiting += [(f"{start}{key}", inner) for key, inner in reversed(value.attributes.items())]
    return tensors


def _code(archive: Archive) -> tuple[dict[str, bytes], dict[tuple[str, str], object]]:
    """Returns the code files of an archive, and the stand-ins for what its pickles may ask for.

    Raises: Unreadable: it has none, or code that would run when loaded.
    """
    files = {name: bytes(archive.read(name)) for name in archive.members if re.fullmatch(r"code/.*\.py", name)}
    if not files or not {"data.pkl", "constants.pkl"} <= archive.members.keys():
        raise Unreadable("holds weights without a network's code: write the network by torch.jit.save")
    names: dict[tuple[str, str], object] = dict(_PICKLED)
    for name, source in files.items():
        module = archive.members[name].filename.partition("/code/")[2].removesuffix(".py").replace("/", ".")
        names |= {(module, class_name): StandIn(_Object) for class_name in _classes(source)}
    return files, names


def _checked(archive: Archive) -> io.BytesIO:
    """Returns a copy of the archive with only those members that were checked.

    Raises: Unreadable: a member would run code when loaded, or is not data.
    """
    files, names = _code(archive)
    versions = archive.members.keys() & {"version", ".data/version", "byteorder"}
    copied = files | {name: bytes(archive.read(name)) for name in versions}
    for name, folder in (("data.pkl", "data"), ("constants.pkl", "constants")):
        archive.load(name, folder, names)
        copied[name] = bytes(archive.read(name))
    storages = [name for name in archive.members if re.fullmatch(r"(data|constants)/\d+", name)]
    new = io.BytesIO()
    with zipfile.ZipFile(new, "w") as out:
        for name in (*copied, *storages):
            # Classes are found by their file's name, in the case in which it is written.
            inner = archive.members[name].filename.partition("/")[2]
            out.writestr(f"script/{inner}", copied.get(name) or archive.read(name))
    return new


def _classes(source: bytes) -> Iterator[str]:
    """Yields the names of the classes in a code file of the archive.

    Raises: Unreadable: the file would run code when loaded.
    """
    try:
        text = source.decode("ascii")
        # Syntax that Python and torch might parse differently; torch never writes it.
        if re.search(r"[^\n -~\0]|[#\"']|\\\n|[\w\0]\0", _STRING.sub("\0", text)):
            raise ValueError
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that Python does not know
            tree = ast.parse(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise Unreadable("holds code as torch does not write it: write it with torch.jit.save") from error
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            arguments = node.args
            values = [*arguments.defaults, *filter(None, arguments.kw_defaults), *node.decorator_list]
            if node.name in ("__setstate__", "__getstate__"):
                raise Unreadable(f"runs code when it is loaded ({node.name}), {NEEDLESS}")
        elif isinstance(node, ast.ClassDef):
            yield node.name
            values = []
            for line in node.body:
                if isinstance(line, ast.AnnAssign | ast.Assign) and line.value is not None:
                    typed = isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Subscript)
                    values += [] if typed else [line.value]
                elif not isinstance(line, ast.FunctionDef | ast.Pass | ast.AnnAssign):
                    values.append(line)  # type: ignore[arg-type]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if not node.value.replace("\n", "").replace("\t", "").isprintable():
                raise Unreadable(f"holds a text of control characters, {NEEDLESS}")
            continue
        elif isinstance(node, ast.Attribute) and node.attr == "classes":
            raise Unreadable(f"uses a class of C++ (torch.classes), {NEEDLESS}")
        else:
            continue
        if not all(_is_literal(value) for value in values):
            raise Unreadable(f"runs code when it is loaded (a default value that is no literal), {NEEDLESS}")


_STRING = re.compile(r"\"(?:[^\"\\\n]|\\[^\n])*\"|'(?:[^'\\\n]|\\[^\n])*'")


def _is_literal(value: ast.AST) -> bool:
    """Returns whether a value consists of constants, inf and nan alone."""
    allowed = ast.Constant | ast.List | ast.Tuple | ast.Dict | ast.UnaryOp | ast.USub | ast.Load
    return all(
        isinstance(node, allowed) or (isinstance(node, ast.Name) and node.id in ("inf", "nan", "infj", "nanj"))
        for node in ast.walk(value)
    )


def _load(file: io.BytesIO, device: torch.device | str) -> nn.Module:
    """Returns the network of an archive, after a check of all its functions.

    Raises: Unreadable: one uses an operator that is not allowed.
    """
    core: Any = torch._C
    unit = core.CompilationUnit()  # torch.jit.load does not return it, but only it has all functions
    with warnings.catch_warnings():  # torch deprecates the format, but such networks are still published in it
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            module = core.import_ir_module_from_buffer(unit, file.getvalue(), torch.device(device), {}, False)
        except Exception as error:  # torch raises many types for invalid code
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise Unreadable(
                f"holds code that torch does not understand ({first}): write it with torch.jit.save"
            ) from error
        for function in unit.get_functions():
            blocks: list[Any] = [function.graph]
            while blocks:
                for node in blocks.pop().nodes():
                    _require_allowed(node.kind())
                    blocks += node.blocks()
        network: nn.Module = torch.jit._recursive.wrap_cpp_module(module)  # type: ignore[no-untyped-call]
    return network


def _require_allowed(kind: str) -> None:
    space, _, name = kind.partition("::")
    plain = name if name in OPERATORS or name.endswith("__") else name.removesuffix("_")
    if not (name in CONTROL if space == "prim" else space == "aten" and plain in OPERATORS):
        raise Unreadable(
            f"uses {kind[:80]}, which is not among the operators that a network may use: write the network without it"
        )

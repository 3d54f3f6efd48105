"""A device that is none: its tensors live on the CPU, count what would block on an accelerator, and refuse the rest.

The tensors say that they are on `lazy`, a kind of device that torch knows and no build of it runs on. As on a real
one, an operation on tensors of both sides is an error, but for single numbers, and float64 may be missing.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only


DEVICE = torch.device("lazy")
WIDE = (torch.float64, torch.complex128)
MOVES = ("aten::_to_copy", "aten::copy_")
WAITED_FOR = (
    *("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal"),
    *("aten::nonzero", "aten::masked_select", "aten::bincount", "aten::_unique2", "aten::unique_consecutive"),
)
"""Operations whose result, or its shape, the host waits for."""
MASKS = (torch.bool, torch.uint8)
INDEXED = ("aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_")


class OnDevice(Tensor):
    """A tensor on the device."""

    __slots__ = ("inner", "of")  # not among the marks of a parameter, which a cut copies

    @staticmethod
    def __new__(cls, inner: Tensor, device: "PretendDevice") -> "OnDevice":
        """A tensor around one of the CPU."""
        return Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )

    def __init__(self, inner: Tensor, device: "PretendDevice") -> None:
        self.inner, self.of = inner, device

    def __repr__(self) -> str:
        return f"OnDevice({self.inner})"

    def tolist(self) -> Any:
        """Numbers, moved to the host."""
        return self.cpu().tolist()

    def __deepcopy__(self, memo: Any) -> Any:
        with torch.no_grad():
            copied = self.clone()
        if isinstance(self, nn.Parameter):
            copied = nn.Parameter(copied, self.requires_grad)
        memo[id(self)] = copied
        return copied

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return next(leaf for leaf in _leaves(args, kwargs) if isinstance(leaf, OnDevice)).of.run(
            function, args, kwargs
        )

    __torch_function__ = torch._C._disabled_torch_function_impl


class PretendDevice(TorchDispatchMode):
    """Lets tensors be moved to the device, and made there, meanwhile.

    Args:
        has_float64: whether it has tensors of double precision.

    Attributes:
        blocking: how often the host waited, by the reason.
        bytes_to_host: sizes of the copies to the host.
    """

    def __init__(self, has_float64: bool = True) -> None:
        super().__init__()
        self.has_float64 = has_float64
        self.blocking: Counter[str] = Counter()
        self.bytes_to_host: list[int] = []

    @property
    def count(self) -> int:
        """How often the host waited."""
        return self.blocking.total()

    def __enter__(self) -> Any:
        """Autocast is off on the device; torch does not know that, and makes no tensor from a list there."""
        tensor, self._patches = torch.tensor, ExitStack()
        instead: dict[str, Callable[..., Any]] = {
            "is_autocast_enabled": lambda *kind, **options: False,
            "autocast": lambda *kind, **options: nullcontext(),
            "tensor": lambda data, device, **options: tensor(data, **options).to(DEVICE),
        }
        for name, function in instead.items():
            self._patches.enter_context(patch.object(torch, name, _but_here(getattr(torch, name), function)))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._patches.close()
        super().__exit__(*error)

    def place(self, model: nn.Module) -> nn.Module:
        """Move a model's parameters and buffers to the device, in place."""
        moved: dict[int, Any] = {}
        for module in model.modules():
            for table in (module._parameters, module._buffers):
                for name, value in table.items():
                    if value is None:
                        continue
                    if id(value) not in moved:
                        new = OnDevice(value.detach(), self)
                        is_parameter = isinstance(value, nn.Parameter)
                        moved[id(value)] = nn.Parameter(new, value.requires_grad) if is_parameter else new
                    table[name] = moved[id(value)]
        return model

    def on_device(self, values: Any) -> Any:
        """Nested containers with their tensors on the device."""
        return tree_map_only(Tensor, lambda tensor: OnDevice(tensor.detach(), self), values)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(function, args, kwargs)

    def run(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation on the tensors below, and count it if it blocks."""
        name, kwargs = function._schema.name, dict(kwargs or {})
        leaves = _leaves(args, kwargs)
        here = [leaf for leaf in leaves if isinstance(leaf, OnDevice)]
        others = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, OnDevice)]
        wanted = None if kwargs.get("device") is None else torch.device(kwargs["device"])
        goes_here = bool(here) if wanted is None else wanted.type == DEVICE.type
        if name in MOVES:
            self._move(name, args, goes_here, kwargs)
        else:
            self._look(name, args, here, others)
        if goes_here and wanted is not None:
            kwargs["device"] = torch.device("cpu")
        below = tree_map_only(OnDevice, lambda tensor: tensor.inner, (args, kwargs))
        if name == "aten::histc":  # which takes whole numbers on a GPU alone
            below = ([below[0][0].float(), *below[0][1:]], below[1])
        result = function(*below[0], **below[1])
        if name == "aten::copy_":
            return args[0]
        if not goes_here:
            return result
        wrapped = tree_map_only(Tensor, self._wrapped, result)
        return return_and_correct_aliasing(function, args, kwargs, wrapped)

    def _wrapped(self, tensor: Tensor) -> OnDevice:
        self._refuse(tensor.dtype)
        return OnDevice(tensor, self)

    def _refuse(self, dtype: torch.dtype | None) -> None:
        if dtype in WIDE and not self.has_float64:
            raise TypeError(f"the device has no {dtype}")

    def _move(self, name: str, args: Any, goes_here: bool, kwargs: dict[str, Any]) -> None:
        """Count a copy from one side to the other; on the way to the host it changes its dtype before, if at all."""
        is_copy = name == "aten::copy_"
        source, is_here = (args[1], isinstance(args[0], OnDevice)) if is_copy else (args[0], goes_here)
        if isinstance(source, OnDevice) and not is_here:
            self._refuse(args[0].dtype if is_copy else kwargs.get("dtype"))
            self.blocking["to the host"] += 1
            self.bytes_to_host.append(source.numel() * source.element_size())
        elif is_here and not isinstance(source, OnDevice) and not (args[2:] or kwargs.get("non_blocking")):
            self.blocking["to the device"] += 1

    def _look(self, name: str, args: Any, here: list[Any], others: list[Tensor]) -> None:
        """Count what the host waits for, and refuse what no device does."""
        if not here:
            return
        if name in WAITED_FOR:
            self.blocking[name] += 1
        if name in INDEXED and isinstance(args[0], OnDevice):
            masks = [index for index in args[1] if isinstance(index, OnDevice) and index.dtype in MASKS]
            moved = [index for index in args[1] if isinstance(index, Tensor) and not isinstance(index, OnDevice)]
            if masks:
                self.blocking[f"{name} by a mask"] += 1
            if moved:
                self.blocking[f"{name} by an index of the host"] += 1
        elif any(tensor.dim() for tensor in others):
            raise RuntimeError(f"{name}: some tensors are on {DEVICE}, and some on the CPU")


def _but_here(function: Callable[..., Any], instead: Callable[..., Any]) -> Callable[..., Any]:
    """A function of a kind of device, and another one for this kind."""

    def either(*args: Any, **kwargs: Any) -> Any:
        kinds = {
            str(kind)
            for kind in (*args, kwargs.get("device_type"), kwargs.get("device"))
            if not isinstance(kind, Tensor)
        }
        return (instead if DEVICE.type in kinds else function)(*args, **kwargs)

    return either


def _leaves(args: Any, kwargs: Any) -> list[Any]:
    """All values in nested arguments."""
    return list(tree_leaves((args, kwargs or {})))

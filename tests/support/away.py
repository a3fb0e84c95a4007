"""A device away from the CPU, for tests that have none: tensors without numbers, which can neither be read nor be mixed
with the CPU's.

What a step on an accelerator must not do stops here with an error: read a number (`item`, `tolist`, a branch on a
tensor, `nonzero`, a boolean mask), each of which waits for the device; make a tensor on the CPU and use it; copy from
one device to another.  Torch's meta device is the other one.
"""

import contextlib

import torch
import torch._functorch.config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default, torch.ops.aten._copy_from.default)
FILLED = (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy, torch.Tensor.new_tensor)


class Waits(RuntimeError):
    """What copies between devices, and waits for both."""


class _Copies(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in COPIES:
            other = args[1] if func is not torch.ops.aten._to_copy.default else kwargs.get("device")
            device = getattr(other, "device", other)
            if device is not None and torch.device(device).type != args[0].device.type:
                raise Waits(f"{func} between {args[0].device} and {device}")
        return func(*args, **kwargs)


class Filled(TorchFunctionMode):
    """Raises where numbers of Python become a tensor of this device: they are one of the CPU first, and copied then."""

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_function__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func in FILLED and made.device.type == self.device:
            raise Waits(f"{func.__name__} copies numbers of the CPU to the device")
        return made


@contextlib.contextmanager
def away():
    """Within, tensors of the meta device are those of an accelerator."""
    with (
        torch._functorch.config.patch(fake_tensor_allow_meta=True),
        FakeTensorMode(allow_non_fake_inputs=True),
        _Copies(),
        Filled("meta"),
    ):
        yield

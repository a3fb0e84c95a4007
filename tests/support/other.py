"""A device that is none of torch's, for machines without an accelerator: the CPU under another name (see other.cpp).

Numbers are right, and whatever mixes tensors of two devices stops, as it does on an accelerator.  It is built by g++
when it is asked for, in about half a minute; nothing but UNDULA_DEVICE=other asks for it.
"""

import contextlib
import hashlib
import subprocess
import tempfile
import types
from pathlib import Path

import torch

SOURCE = Path(__file__).with_suffix(".cpp")


def built():
    """The library, made once for each source and torch."""
    home = Path(torch.__file__).parent
    name = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"undula-other-{name}.so"
    if not library.exists():
        part = library.with_suffix(".part")
        includes = [f"-I{home / 'include'}", f"-I{home / 'include/torch/csrc/api/include'}"]
        command = ["g++", "-O0", "-std=c++20", "-shared", "-fPIC", *includes, str(SOURCE), "-o", str(part)]
        subprocess.run([*command, f"-L{home / 'lib'}", "-ltorch_cpu", "-lc10"], check=True)
        part.replace(library)
    return library


class Module(types.ModuleType):
    """What torch asks of a device's module."""

    def is_available(self):
        return True

    is_initialized = is_available

    def device_count(self):
        return 1

    def current_device(self):
        return 0

    def device(self, which):
        return contextlib.nullcontext()

    set_device = manual_seed = manual_seed_all = lambda self, _: None

    def _is_in_bad_fork(self):
        return False

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device=None):
        return torch.get_rng_state()

    def set_rng_state(self, state, device=None):
        torch.set_rng_state(state)


class Hook(torch._C._acc.PrivateUse1Hooks):
    def is_available(self):
        return True

    is_built = is_available

    def has_primary_context(self, device):
        return True


def load():
    """From now on torch knows the device `other`."""
    torch.ops.load_library(str(built()))
    torch.utils.rename_privateuse1_backend("other")
    torch._register_device_module("other", Module("other"))
    torch.utils.generate_methods_for_privateuse1_backend()
    torch._C._acc.register_python_privateuseone_hook(Hook())

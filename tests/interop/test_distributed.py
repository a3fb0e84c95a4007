"""Several processes, each a new one: a process group is for good."""

import os
import subprocess

from ..support.processes import together


def test_an_adapter_that_comes_after_ddp_is_told(tmp_path, python):
    """Attached or selected: what the wrapper found when it was made is all that it knows."""
    code = f"""
import torch, undula, warnings
from torch import nn
torch.distributed.init_process_group("gloo", init_method="file://{tmp_path}/meet", rank=0, world_size=1)
model = nn.Sequential(nn.Linear(4, 4))
undula.attach(model, undula.LoRA(r=2), name="early")
undula.attach(model, undula.LoRA(r=2), name="a")
wrapped = nn.parallel.DistributedDataParallel(model)


def told(verb, *given, **named):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        verb(*given, **named)
    return [w.filename for w in said if "in a DistributedDataParallel already" in str(w.message)]


for given, name in ((model, "b"), (wrapped, "c")):
    assert told(undula.attach, given, undula.LoRA(r=2), name=name) == ["<string>"], name
    assert told(undula.select, given, "early") == ["<string>"]
    assert told(undula.select, given, None) == told(undula.select, given, "a") == []
undula.select(model, "b")
again = nn.parallel.DistributedDataParallel(model)
assert told(undula.select, model, "a") == told(undula.select, model, "b") == []
"""
    subprocess.run([python, "-c", code], check=True, env=os.environ)


SHARDED = """
import sys, torch, undula
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

folder, rank, world = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
mesh = init_device_mesh("cpu", (world,))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.ModuleList(nn.Linear(8, 8) for _ in range(2)), nn.Linear(8, 4)

    def forward(self, x):
        for layer in self.body:
            x = torch.tanh(layer(x))
        return self.head(x)


def made():
    torch.manual_seed(0)
    model = Net()
    adapter = undula.attach(model, undula.LoRA(r=2), ["body.*"], full=["head"])
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model, adapter


def trained(model, adapter):
    optimizer, losses = torch.optim.SGD(adapter.parameters(), 0.1), []
    for step in range(4):
        x = torch.randn(6, 8, generator=torch.Generator().manual_seed(step))
        loss = (model(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


plain, of_plain = made()
wanted = trained(plain, of_plain)
model, adapter = made()
for layer in model.body:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
found = trained(model, adapter)
assert wanted[-1] < 0.9 * wanted[0]
torch.testing.assert_close(found, wanted)
assert undula.selected(model) is adapter
adapter.save(f"{folder}/saved")
torch.distributed.barrier()
saved = undula.Adapter.load(f"{folder}/saved")
for site, f in of_plain.factors.items():
    for name, t in f.items():
        torch.testing.assert_close(saved.factors[site][name], t.detach())
for name, t in of_plain.full.items():
    torch.testing.assert_close(saved.full[name], t.detach())
x = torch.ones(3, 8)
live = model(x).detach()
torch.testing.assert_close(live, plain(x).detach())
assert undula.selected(model) is adapter
for refused in (
    lambda: undula.select(model, None),
    lambda: undula.detach(model),
    lambda: undula.attach(model, undula.LoRA(r=2), name="b"),
    lambda: undula.rows(model, ["default"]).__enter__(),
    lambda: undula.merge(model),
    lambda: undula.ranks.ReLoRA(cycles=2).start(model, torch.optim.AdamW(adapter.parameters()), 4),
    lambda: undula.io.export_lora(adapter, f"{folder}/lora"),
):
    try:
        refused()
        raise AssertionError("not refused")
    except (TypeError, RuntimeError) as error:
        assert "sharded" in str(error), error
"""


EVERY = """
import sys, torch, undula
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

folder, rank, world = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
mesh = init_device_mesh("cpu", (world,))
# factors that are empty, single numbers, or shared
odd = [undula.SHiRA, undula.NOLA, undula.TeRA, undula.DyLoRA, undula.VeRA, undula.UniLoRA]
methods = [m() for m in (undula.LoRA, undula.AuroRA, *odd)]
methods += [undula.LoRAN(r=2, learn=("a", "w")), undula.Dropout(undula.SHiRA(r=1), 0.5), undula.DoRA(undula.SHiRA(r=1))]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = (nn.Linear(8, 8) for _ in range(2))

    def forward(self, x):
        return self.v_proj(torch.tanh(self.q_proj(x)))


def made(method):
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    probe = undula.Probe([torch.ones(2, 8)], loss=lambda model, x: model(x).square().mean())
    return model, undula.attach(model, method, probe=probe)


def losses(model, adapter):
    optimizer, found = torch.optim.SGD(adapter.parameters(), 0.1), []
    for step in range(2):
        torch.manual_seed(step)
        loss = (model(torch.linspace(-1, 1, 24).view(3, 8)) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss))
    return found


for number, method in enumerate(methods):
    plain, of_plain = made(method)
    wanted = losses(plain, of_plain)
    model, adapter = made(method)
    shared = len({id(t) for _, _, t in adapter.tensors()}) < len(list(adapter.tensors()))
    for block in () if shared else model:  # a tensor that layers share is one group's: the root's
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    torch.testing.assert_close(losses(model, adapter), wanted, msg=lambda text: f"{method}: {text}")
    get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    adapter.save(f"{folder}/{number}")
    torch.distributed.barrier()
    saved = undula.Adapter.load(f"{folder}/{number}")
    for site, name, t in of_plain.tensors():
        torch.testing.assert_close(saved.factors[site][name], t.detach(), msg=lambda text: f"{method}: {text}")
"""


def test_what_fsdp2_shards_is_what_trains_and_what_is_saved(tmp_path, python):
    """`fully_shard` replaces every parameter: the adapter's are those of the model, whoever put them there."""
    together(python, tmp_path, SHARDED, 2)


def test_every_kind_of_factor_trains_and_is_saved_under_fsdp2(tmp_path, python):
    """FSDP2 cuts no empty tensor and no single number; a tensor that layers share it cuts at the root alone."""
    together(python, tmp_path, EVERY, 2)


TENSOR_PARALLEL = """
import sys, torch, undula
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/meet", rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))


def made():
    return nn.Sequential(nn.Linear(8, 8), nn.Embedding(4, 8))


def refused(kind, text, verb, *given):
    try:
        verb(*given)
    except kind as error:
        assert text in str(error), error
    else:
        raise AssertionError(text)


for name, how in [(name, how) for name in "01" for how in (ColwiseParallel(), RowwiseParallel())]:
    model = made()
    undula.attach(model, undula.LoRA(r=2), [name])
    weight = model[int(name)].weight
    refused(RuntimeError, f"{name} is adapted, and tensor parallel", parallelize_module, model, mesh, {name: how})
    assert model[int(name)].weight is weight
    undula.detach(model)
    parallelize_module(model, mesh, {name: how})
    ready = undula.attach(made(), undula.LoRA(r=2), [name])
    for given in ((undula.LoRA(r=2), [name]), (undula.DoRA(undula.LoRA(r=2)), [name]), (ready,)):
        refused(TypeError, f"the weight of {name} is one process's shard", undula.attach, model, *given)
"""


def test_tensor_parallel_is_refused_before_anything_is_changed(tmp_path, python):
    """Before `attach` and after it: torch's ways of cutting a layer know its weight and bias, and no method."""
    together(python, tmp_path, TENSOR_PARALLEL, 1)


READ = """
import sys, torch, undula
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

folder, rank, world = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.rnn = nn.MultiheadAttention(8, 2, batch_first=True), nn.LSTM(8, 8, batch_first=True)
        self.stack = nn.Parameter(torch.randn(2, 8, 8))

    def forward(self, x):
        return torch.einsum("nti,eoi->nto", self.rnn(self.attention(x, x, x)[0])[0], self.stack)


def trained(cut):
    torch.manual_seed(0)
    model, losses = Net(), []
    adapter = undula.attach(model, undula.LoRA(r=2), "*")
    assert len(adapter.factors) == 6
    if cut:
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    optimizer = torch.optim.SGD(adapter.parameters(), 0.1)
    for step in range(3):
        loss = (model(torch.linspace(-1, 1, 80).view(2, 5, 8)) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


wanted = trained(False)
assert wanted[2] < wanted[0]
torch.testing.assert_close(trained(True), wanted)
"""


def test_weights_that_are_read_train_under_fsdp2(tmp_path, python):
    """`fully_shard` asks for parameters by their names, where adapted ones stand."""
    together(python, tmp_path, READ, 1)

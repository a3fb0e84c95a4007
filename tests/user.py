"""A module of a user, which mypy checks strictly (`make lint`): right calls, and wrong ones that it has to find."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

import undula
from undula import LoRA, Run, VeRA
from undula.study.read import read
from undula.train import CausalLM, Classification, Prepared, prepare, restored

model = nn.Sequential(nn.Linear(8, 8))
adapter: undula.Adapter = undula.attach(model, LoRA(r=2), where=["0"])
errors: dict[str, float] = undula.merge(model)
run = Run(model="m", data="d", task=CausalLM(), method=VeRA(r=2), out=Path("o"))
report: dict[str, object] = undula.train(run, resume=True)
other = Classification(names=("a", "b"))
ready: Prepared = prepare(run)
opened = restored("o")
done = undula.study("s.toml", out="runs")
study = read("s.toml")
names: list[str] = list(undula.methods())
loss: float = undula.collapse(model, undula.Truncate(2)).error
callback = undula.allocating(undula.ranks.AdaLoRA(target=2))
config = undula.peft_config(LoRA())
centred: undula.Method = undula.Centred(LoRA(), undula.starts.PiSSA())


class Mine(undula.Additive):
    def init(self, site: undula.Site) -> dict[str, Tensor]:
        return {}

    def delta(self, f: Mapping[str, Tensor]) -> Tensor:
        return f["A"]


# Each is an error, without which its comment would be one
undula.train("m")  # type: ignore[arg-type]
undula.study(resume=True)  # type: ignore[call-arg]
undula.LoRa(r=2)  # type: ignore[attr-defined]

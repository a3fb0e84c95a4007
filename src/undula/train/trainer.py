"""The Trainer of a run: its arguments, its optimiser, how its steps are taken.

Imported only when a training begins: it pulls in transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from ..integrations.callback import Allocating
from ..observe.listen import moved
from ..optim.groups import factors_B
from . import processes
from .adapter_trainer import AdapterTrainer
from .begun import bases
from .quality import quality_of
from .rows import LOG
from .run import CHECKPOINTS, Run
from .stop import Finite
from .tasks.lending import still_statistics
from .tasks.step import Step
from .tasks.task import Examples


def trainer(
    run: Run, model: Any, examples: Examples, callbacks: tuple[TrainerCallback, ...], held: Examples | None = None
) -> AdapterTrainer:
    """The Trainer of a run.  An allocator that scores by quality does so on `held`, which no result may come from.
    Raises RuntimeError where several processes were started and each would train by itself."""
    if run.lr is None:
        raise ValueError("lr is auto, which undula.train and undula.tune find: name a rate here (lr=...)")
    beside = _beside(run, model, held)
    arguments = _arguments(run)
    if getattr(model, "is_quantized", False):
        model._hf_peft_config_loaded = True  # so the Trainer asks whether adapters stand on a quantised model
    make: Callable[..., AdapterTrainer] = run.task.fitter() or AdapterTrainer
    made = make(
        model=model,
        args=arguments,
        optimizer_cls_and_kwargs=_optimiser(run, model),
        train_dataset=examples,
        data_collator=examples.task.gatherer(examples.processor, model),
        callbacks=[*([] if beside is None else [beside]), *callbacks, Finite(), NothingBelow()],
    )
    made.remove_callback(PrinterCallback)
    if run.task.has_head or run.task.mean_loss:
        # The loss is a batch's mean: many a head is given the number of all items and ignores it, and the Trainer would
        # multiply by processes, and not divide by batches.
        made.model_accepts_loss_kwargs = False
    made.own_loss = run.task.loss() if run.task.own_loss else None
    made.items_of = run.task.items
    weights = run.task.weights(examples.rows)
    made.weights = None if weights is None else torch.tensor(weights, device=arguments.device)
    made.rates = run.rates()
    made.allocated = beside is not None
    made.beside = beside if any(p.answers and p.active for p in run.penalty) else None
    made.own_rates = tuple(own_rates(run, model))
    if not run.plain and made.beside is None:  # else the answers of every token are asked for
        _take(made, examples.step(model))
    if arguments.world_size > 1:
        made.accelerator.ddp_handler.find_unused_parameters = leaves_out(made, examples)
    return made


def _beside(run: Run, model: Any, held: Examples | None) -> Allocating | None:
    """What has the run's allocator and penalties look at every step; None where it has neither."""
    how = run.procedure
    if how is None:
        return None
    quality = quality_of(model, held) if held is not None and how.needs_quality else None
    clip = None if run.optimiser.clips else run.max_grad_norm
    return Allocating(how, quality, clip=clip, saves_whole_models=False)


def _arguments(run: Run) -> TrainingArguments:
    """The Trainer's own.  Raises RuntimeError where several processes were started and each would train by itself."""
    arguments = run.task.arguments(
        output_dir=str(run.out / CHECKPOINTS),
        learning_rate=run.lr,
        num_train_epochs=run.epochs,
        max_steps=run.max_steps or -1,
        per_device_train_batch_size=run.batch,
        gradient_accumulation_steps=run.accumulate,
        warmup_steps=run.warmup,
        weight_decay=run.weight_decay,
        # an allocator looks first, and an optimiser that changes gradients clips what it makes of them
        max_grad_norm=0.0 if run.procedure is not None or run.optimiser.clips else run.max_grad_norm,
        logging_nan_inf_filter=False,
        seed=run.seed,
        data_seed=run.seed,
        **(checkpointing() if run.gradient_checkpointing else {}),
        save_strategy="steps",
        save_steps=run.save_every or 0.1,
        save_total_limit=2,
        logging_steps=0.01,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=processes.count() > 1 and processes.on_cpu(),
        ddp_timeout=int(processes.PATIENCE.total_seconds()),
    )
    if arguments.world_size != processes.started():
        raise RuntimeError(processes.apart(processes.started(), arguments.world_size))
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # nn.DataParallel cannot copy an adapted model: several devices take several processes
    return arguments


def _optimiser(run: Run, model: Any) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """(class, its options), the learning rate among them."""
    kind, constants = run.optimiser.made()
    if run.optimiser.paired:
        constants |= {"adapted": model} | ({"max_norm": run.max_grad_norm} if run.optimiser.clips else {})
    if run.optimiser.carries:
        constants["bases"] = bases(run)
    return kind, {"lr": run.lr, **constants}


def _take(trainer: AdapterTrainer, step: Step) -> None:
    """Has it take its steps so."""
    trainer.step = step
    if step.note is not None and processes.is_first():
        LOG.warning(step.note)
    if step.gather is not None:
        trainer.data_collator = step.gather  # type: ignore[assignment]
    if step.head is not None:  # whatever the model's own forward takes: the loss is of all labels of an update
        trainer.model_accepts_loss_kwargs = trainer._loss_shifts_labels = True


def checkpointing(on: bool = True) -> dict[str, Any]:
    """The Trainer's options by which activations are computed again, as its version calls them.  Without re-entry: with
    it no gradient would come to an adapter in a layer whose inputs need none."""
    name = "activation" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient"
    return {f"{name}_checkpointing": on} | ({f"{name}_checkpointing_kwargs": {"use_reentrant": False}} if on else {})


def nothing_below(model: Any) -> None:
    """With gradient checkpointing transformers lets the embeddings' outputs want gradients, as re-entry needs, and so
    everything below the lowest adapter runs backward for nothing.  There is no re-entry here, see `checkpointing`."""
    if getattr(model, "_require_grads_hooks", None):
        model.disable_input_require_grads()


class NothingBelow(TrainerCallback):
    """`nothing_below`, when the Trainer has prepared the model."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        nothing_below(model)


def leaves_out(trainer: AdapterTrainer, examples: Examples) -> bool:
    """Whether a step may leave a trained parameter without a gradient, in any process: then DistributedDataParallel has
    to look for such parameters in each step.  Told by one step that is not taken, and by configurations that say that
    parts are left out by chance."""
    model, config = trainer.model, trainer.model.config
    by_chance = any(isinstance(v, float) and v > 0 for k, v in vars(config).items() if k.endswith("layerdrop"))
    trained = [p for p in model.parameters() if p.requires_grad]
    batch = [examples[i] for i in range(min(trainer.args.per_device_train_batch_size, len(examples)))]
    still_statistics(model.train().modules())
    loss = examples.task.loss() if trainer.step == Step() else trainer.compute_loss
    with trainer.step.around(model):
        loss(model, moved(trainer.data_collator(batch), trainer.args.device)).backward()
    found = by_chance or any(p.grad is None for p in trained)
    model.zero_grad()
    return processes.agreed([found], trainer.args.device)[0]


def own_rates(run: Run, model: Any) -> Iterator[tuple[list[torch.nn.Parameter], float]]:
    """(parameters, learning rate) of what does not train at the run's: the head, and by LoRA+ the factors B."""
    if run.head_lr is not None and (run.method is not None or run.full):
        names = set(run.task.head(model))
        yield [p for name, p in model.named_parameters() if name in names], run.head_lr
    if run.b_ratio is not None and run.method is not None and run.lr is not None:
        yield list(factors_B(model).values()), run.lr * run.b_ratio

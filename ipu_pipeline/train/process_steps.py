"""Steps in one process of several: this one runs its own stages, and each is given every batch.

The inherited loop runs in every process on the same batches, so each has the same losses, metrics
and decisions; the first one writes and prints. After a step each process has the gradients of its
own stages: they are clipped by their norm over all processes, and the loop's optimizer then changes
what has a gradient here. Weights and optimizer state of other stages come here when something
reads them: a checkpoint, ``save_model``, callbacks that are not transformers' own, the end of
``train``.

Code around the model runs in every process: up to its call of the model before the step, in the
process of the last stage inside the step, and in the others behind it, on what the model has
returned there. So losses, logs and whatever the code keeps are the same everywhere.
"""

from __future__ import annotations

import atexit
import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _get_default_store
from transformers import Trainer

from ipu_pipeline.backends.cluster.executable import DistributedExecutable
from ipu_pipeline.backends.cluster.inference import refuse
from ipu_pipeline.backends.cluster.joining import MARGIN_S
from ipu_pipeline.backends.cluster.layout import schedule_for
from ipu_pipeline.backends.cluster.prices.parallel_sizes import tensor_parallel_size
from ipu_pipeline.backends.cluster.ranks.consistency import together
from ipu_pipeline.backends.cluster.ranks.rendezvous import gather_over, join_processes
from ipu_pipeline.capture.inputs import NUM_ITEMS
from ipu_pipeline.errors import LoweringError, StageError
from ipu_pipeline.ir.limits import count_of
from ipu_pipeline.ir.plan import Plan, plan_from_json
from ipu_pipeline.planner.backend import find_machine
from ipu_pipeline.stages.batch import split_batch
from ipu_pipeline.stages.executable import ExecutionOptions
from ipu_pipeline.stages.materialize import is_on_meta
from ipu_pipeline.train.arguments import num_processes, process_index
from ipu_pipeline.train.live_loss import HandedIn, LossRun, calls_of
from ipu_pipeline.train.live_steps import LiveSteps
from ipu_pipeline.train.one_process import (
    WholeBatchAccelerator,
    alone_in_accelerate,
    as_one_process,
    random_states,
    set_random_states,
)
from ipu_pipeline.train.share import ShareOfData, mark_of
from ipu_pipeline.train.steps import CollectedSteps, Prediction, as_output

if TYPE_CHECKING:
    from ipu_pipeline.train.mixin import PipelineMixin

T = TypeVar("T")
_writes = Counter[str]()  # of every folder, how often a model was written there


class ProcessSteps(LiveSteps, CollectedSteps):
    """The steps of a trainer whose stages are processes.

    Args:
        trainer: The trainer.
    """

    target = "distributed"
    inside_step = "when each process has the gradients of its own stages only"
    runs_alone = "replicas divide every microbatch"

    def __init__(self, trainer: PipelineMixin) -> None:
        super().__init__(trainer)
        self._is_stale = False
        self._needs_weights, self._has_weights = False, True
        self._owns_group = False
        self._group = _ProcessGroup()
        self._depth = 0
        # Which batches of this optimizer step are another replica's.
        self._others: list[bool] = []
        self._left_out: list[Any] = []
        self._live.keeps = True
        self._num_whole = 0  # weights of the model, if it has slices of them while it runs
        self._read_at = frozenset[str]()

    # ---- what transformers sees ---------------------------------------------------------

    def enter(self) -> None:
        """Join the other processes; the trainer's arguments are then those of one process.

        Raises:
            LoweringError: This process was not started by torchrun, or not all have come.
            ValueError: The model is on ``meta``.
        """
        model = self._trainer.model
        if isinstance(model, nn.Module) and is_on_meta(model):
            raise ValueError(
                "the model is on meta, and PipelineTrainer saves and loads whole models; give it "
                "one with weights, or use ipu_pipeline.train.train, with which each process has "
                "the weights of its own stages"
            )
        if join_processes(torch.device("cpu"), ExecutionOptions.stall_timeout_s + MARGIN_S):
            self._owns_group = True
        atexit.register(self._leave)
        self._trainer.args = as_one_process(self._trainer.args)

    def adapt(self, accelerator: Any) -> Any:
        """Return the accelerator with which every process is given the whole batches."""
        return WholeBatchAccelerator.of(accelerator, self._clip)

    def num_stages(self, replicas: int) -> int:
        """Return how many stages the processes run, one each.

        Raises:
            ValueError: The replicas cannot share the processes.
        """
        processes = num_processes()
        if processes % replicas:
            raise ValueError(
                f"{count_of(replicas, 'replica')} cannot share {count_of(processes, 'process')}; "
                f"start a multiple of {replicas}"
            )
        return processes // replicas

    def plan(self, make: partial[Plan]) -> Plan:
        """Return the plan that the first process makes, as what is measured differs."""
        machine, replicas = make.keywords["machine"], make.keywords["replicas"]

        def of_all_copies() -> Any:
            alike = machine == "local" and replicas > 1  # as many devices like this one
            made = make(machine=find_machine("local", num_processes()) if alike else machine)
            return made.to_json()

        return plan_from_json(self.agreed(of_all_copies), "the plan of the first process")

    def agreed(self, work: Callable[[], T], *, everywhere: bool = False) -> T:
        """Return what ``work`` returns in the first process, to all; what it raises, all raise.

        ``everywhere``: each process does it, and all raise what it raises in any.
        """
        own: Callable[[], Any] = work if everywhere or process_index() == 0 else lambda: None
        found: T = together(self._group, own)[0]
        return found

    # ---- training -----------------------------------------------------------------------

    def check_code(self) -> None:
        """Refuse code of the trainer's class that the processes do not run.

        Raises:
            ValueError: Replicas would divide what the code is given whole.
        """
        if self._replicas == 1:
            return
        super().check_code()
        kind = type(self._trainer)
        if self._reads_shares and kind.get_train_dataloader is not Trainer.get_train_dataloader:
            raise ValueError(
                f"get_train_dataloader of {kind.__name__} reads whole batches, and with "
                "batches='share' a process is given a part; leave batches='share' out"
            )
        if self._trainer.neftune_noise_alpha is not None:
            raise ValueError(
                f"neftune_noise_alpha is drawn for whole microbatches, and {self.runs_alone}; "
                "leave it or replicas out"
            )

    def check_training(self) -> None:
        """Refuse to train what processes do not compute as one does.

        Raises:
            ValueError: A callback acts in a step, or each process would choose its own
                hyperparameters; as ``check_code``.
        """
        super().check_training()
        if self._trainer.hp_search_backend is not None:
            raise ValueError(
                "hyperparameter_search would choose other values in every process; run it in one "
                "process, with target='local'"
            )

    def begin(self) -> None:
        """Begin an optimizer step; nothing is left of an abandoned one."""
        super().begin()
        self._waiting.clear()

    def microbatch(self, inputs: dict[str, Any], num_items: Tensor | int | None) -> Tensor:
        """Take a microbatch whose loss is the model's; the last one of a step runs them all."""
        self._trainer._noise.draw(len(self._waiting), inputs)
        return CollectedSteps.microbatch(self, inputs, num_items)

    def _prepare(self, run: LossRun) -> None:
        """Prepare a run that is about to begin: weights of other stages are not those of now."""
        super()._prepare(run)
        model = self._trainer._whole_model
        if model.training:
            if self._needs_weights:
                self.fetch()
            self._has_weights = not self._is_stale and not self._num_whole
            sliced = bool(self._num_whole)
            run.elsewhere = frozenset(
                id(p) for p in model.parameters() if p.requires_grad or sliced
            )

    @contextlib.contextmanager
    def _further_call(self, run: LossRun) -> Iterator[None]:
        """Have whole weights in a call that needs no gradient.

        All processes are in the same one in an evaluation, and in a step before the code calls the
        model to train it: trainers generate there. Between that call and the backward pass one
        process is ahead; there the weights are those that the step began with, which every
        microbatch fetches from the first such call on. Elsewhere what is used is checked.
        """
        kept = run.elsewhere
        frees = not torch.is_grad_enabled() and not run.rounds
        if not kept or (frees and run.inputs is None and not self._num_whole):
            run.elsewhere = frozenset()
            self.fetch()
        elif frees and self._has_weights:
            run.elsewhere, self._needs_weights = frozenset(), True
        try:
            yield
        finally:
            run.elsewhere = kept

    def _train(self, parts: list[HandedIn], weights: list[float], first: int) -> list[float]:
        """Run microbatches; their code has then seen what the model returns in all processes."""
        losses = super()._train(parts, weights, first)
        assert isinstance(self.executable, DistributedExecutable)
        self.executable.keep_own_optimizer_state(self._optimizer())
        self._is_stale = True
        self.agreed(lambda: self._share_outputs([part.run for part in parts]), everywhere=True)
        return losses

    def _agree(self, reason: str) -> str:
        """Return what all processes say of a run: the first that says something."""
        return next((said for said in self._group.gather(reason, str) if said), "")

    def _share_outputs(self, runs: Sequence[LossRun | None]) -> None:
        """Go on with the runs in the other processes, on what the model has returned in one."""
        made, self._live.made = self._live.made, {}
        source = self._group.gather(bool(made), bool).index(True)
        own = {
            n: (number, [(t.detach(), t.requires_grad) for t in tensors])
            for n, (number, tensors) in made.items()
        }
        message: list[Any] = [own if process_index() == source else None]
        dist.broadcast_object_list(message, src=source)
        for n, run in enumerate(runs):
            if made or run is None:
                continue
            number, tensors = message[0][n]
            found = [t.requires_grad_(trained) for t, trained in tensors]
            run.at_resume()
            with calls_of(self._trainer._whole_model, self._called):
                run.resume(self._live.filled(number, found))
            if run.loss is not None and run.loss.requires_grad:
                run.loss.backward()  # into weights that the code has besides the model's

    def step(self, parts: Sequence[Mapping[str, Any]], num_items: Any) -> float:
        """Run the microbatches of an optimizer step; return the loss of the step.

        Raises:
            LoweringError: The processes cannot run the plan.
            StageError: This process or another one failed.
        """
        trainer = self._trainer
        counted = num_items is not None and trainer.model_accepts_loss_kwargs
        items = {NUM_ITEMS: torch.as_tensor(num_items)} if counted else {}
        made = self._ready(parts[0])
        own = [
            s for n, part in enumerate(parts) for s in self._shares(part, self._others[n : n + 1])
        ]
        inputs = [{**share, **items} for share in own]
        number = int(made.total([len(inputs)])[0])
        weight = 1.0 if trainer._loss_is_whole(num_items) else 1 / number
        made.global_step = trainer.state.global_step
        losses = made.forward_backward_parts(inputs, [weight] * len(inputs))
        made.keep_own_optimizer_state(self._optimizer())
        self._is_stale = True
        return made.total([sum(losses)])[0] * weight

    def _shares(self, part: Mapping[str, Any], others: Sequence[bool]) -> list[Mapping[str, Any]]:
        """Return the microbatch of every replica, of a share its own, of another's none."""
        args = self._trainer.args
        if self._replicas == 1:
            return [part]
        if self._reads_shares:
            return [] if any(others) else [part]
        size = args.per_device_train_batch_size
        return [m.inputs for m in split_batch(part, self._replicas, size)]

    @property
    def _replicas(self) -> int:
        return int(getattr(self._trainer.args, "replicas", 1))

    @property
    def _reads_shares(self) -> bool:
        """Whether a process reads what its replica trains on."""
        return self._replicas > 1 and getattr(self._trainer.args, "batches", "whole") == "share"

    def train_data(self, data: Any, make_sampler: Any) -> tuple[Any, Any]:
        """Return what this process reads of the training data, and what makes their sampler.

        Raises:
            ValueError: They cannot be read by share, or something counts what is read.
        """
        if not self._reads_shares:
            return data, make_sampler
        args = self._trainer.args
        if args.include_num_input_tokens_seen not in (False, "no"):
            raise ValueError(
                "include_num_input_tokens_seen counts what a process reads, which is a share of "
                "the data; leave it or batches='share' out"
            )
        replica = process_index() * self._replicas // num_processes()
        share = ShareOfData(data, replica, self._replicas, args.per_device_train_batch_size)
        return share, (lambda _: make_sampler(data)) if make_sampler else None

    def operations(self, inputs: Any, number: float) -> float:
        """Return how many of the operations of a microbatch are counted here.

        ``number`` is a multiple of the number of weights, which may be slices.
        """
        if any(inputs is batch for batch in self._left_out):
            return 0.0
        here = self._num_weights() if self._num_whole else 0
        return number // here * self._num_whole if here else number

    def _num_weights(self) -> int:
        count = getattr(self._trainer.model, "num_parameters", lambda **_: 0)
        return int(count(exclude_embeddings=True))

    def total(self, number: float) -> float:
        """Return the sum of what every process has counted of its share of the data."""
        if not self._reads_shares:
            return number
        each = num_processes() // self._replicas
        return float(sum(self._group.gather(number, float)[::each]))

    def counted(self, batches: list[Any], num_items: Any) -> tuple[list[Any], Any]:
        """Return the batches of an optimizer step, and the items of all processes.

        Raises:
            ValueError: The replicas have not read shares of the same batches.
        """
        if not self._reads_shares:
            return batches, num_items
        marks = [mark_of(batch) for batch in batches]
        self._others = [others for _, others in marks]
        found = self._group.gather([digest for digest, _ in marks])
        if any(theirs != found[0] for theirs in found):
            raise ValueError(
                "the replicas do not read shares of the same batches: their sampler draws from "
                "torch's random numbers, from which reading or collating a sample draws, too, and "
                "as much as the share asks for; give the sampler or what reads a generator of its "
                "own, or leave batches='share' out"
            )
        self._left_out = [b for b, other in zip(batches, self._others, strict=True) if other]
        if num_items is None:
            return batches, None
        own = [b for b, other in zip(batches, self._others, strict=True) if not other]
        args = self._trainer.args
        items: Any = self._trainer._get_num_items_in_batch(own, args.device) if own else 0
        return batches, torch.tensor(int(self.total(float(items))))

    def _clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        if isinstance(self.executable, DistributedExecutable):
            return self.executable.clip_grad_norm(parameters, max_norm)
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)  # no stage has run

    # ---- evaluation ---------------------------------------------------------------------

    def predict(self, bodies: Sequence[Callable[[], Prediction]]) -> list[Prediction]:
        """Run code that predicts a batch each; their calls of the model run together.

        Code of the user's own runs one batch after another.
        """
        if not self._trainer._prediction_is_inherited() and len(bodies) > 1:
            return [found for body in bodies for found in self.predict([body])]
        runs = [LossRun(body) for body in bodies]
        modes = [module.training for module in self._trainer._whole_model.modules()]
        try:
            with calls_of(self._trainer._whole_model, self._called), self._generating():
                for run in runs:
                    run.modes = modes
                    run.start()
                    run.answer()
                waiting = [(run, run.inputs) for run in runs if not run.finished]
                inputs = [given for _, given in waiting if given is not None]
                results = self._ready(inputs[0]).eval_parts(inputs) if inputs else []
                for (run, _), result in zip(waiting, results, strict=True):
                    run.resume(as_output(result))
                    run.answer()
            return [run.result for run in runs]
        finally:
            for run in runs:
                run.abandon()

    def generates(self) -> bool:
        """Whether ranks generate together, each with its own stages' weights."""
        made = self._ready({})
        try:
            refuse(made.plan, made.options, made.groups.layout, [])
        except LoweringError:
            return False
        return True

    @contextlib.contextmanager
    def _generating(self) -> Iterator[None]:
        """Let ``generate`` of the model run on all ranks where transformers' own code calls it."""
        trainer, model = self._trainer, self._trainer._whole_model
        if not trainer._generates_in_stages():
            yield
            return
        own: Any = model.generate

        def generate(*args: Any, **kwargs: Any) -> Any:
            run = LossRun.current()
            if run is None:  # the executable's call of it
                return own(*args, **kwargs)
            return run.ask(lambda: self._ready({}).generate(*args, **kwargs))

        vars(model)["generate"] = generate
        try:
            yield
        finally:
            del vars(model)["generate"]

    # ---- the run ------------------------------------------------------------------------

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Surround what all processes run; they are told what this one raises."""
        self._depth += 1
        try:
            if self._depth == 1:
                found = self._group.gather([self._events_of_users(), random_states()])
                self._read_at = frozenset(event for events, _ in found for event in events)
                set_random_states(found[0][1])  # a trainer may seed every process otherwise
            with alone_in_accelerate():
                yield
            if self._depth == 1:
                self.fetch()  # whoever reads the model then finds whole weights
        except BaseException as error:
            self._leave_with(error)
            raise
        finally:
            self._depth -= 1

    def decided(self, call: Callable[[], Any]) -> Any:
        """Call the callbacks of an event in all processes; what the first decides holds for all.

        A callback that looks at a clock would stop each at another step.
        """
        if self._depth == 0:  # the script's own call of one process
            return call()
        own: list[Any] = []

        def decisions() -> dict[str, bool]:
            own.append(call())
            return {n: v for n, v in vars(own[0]).items() if n.startswith("should_")}

        for name, value in self.agreed(decisions, everywhere=True).items():
            setattr(own[0], name, value)
        return own[0]

    def is_read_at(self, event: str) -> bool:
        """Whether a callback of any process may read weights at an event."""
        return event in self._read_at

    def fetch(self, *, optimizer: bool = False) -> None:
        """Bring the weights here up to date, and in the first process the optimizer's state."""
        made = self.executable
        if not isinstance(made, DistributedExecutable) or made.model is not self._trainer.model:
            return
        made.make_whole(self._optimizer(), stale=self._is_stale)
        self._is_stale = False
        if optimizer:
            made.collect_optimizer_state(self._optimizer())

    def await_files(self, folder: str) -> None:
        """Return when the first process has written them, which waits for nobody.

        Raises:
            StageError: It has not come here.
        """
        _writes[folder] += 1
        key, store = f"ipu_pipeline/written/{_writes[folder]}/{folder}", _get_default_store()
        with _missing_processes():
            if process_index() == 0:
                store.set(key, "")
            else:
                store.wait([key])

    def _ready(self, part: Mapping[str, Any]) -> DistributedExecutable:
        """Return the executable of the present model (``model_init`` makes new ones)."""
        if not self.has_executable():
            self.close()
            plan = self._trainer.planned(part)
            tp = tensor_parallel_size(plan)
            sliced = tp > 1 or plan.vocabulary is not None
            self._num_whole = self._num_weights() if sliced else 0
            num_ranks = max(1, num_processes() // (plan.replicas * tp))
            sizes = plan.num_stages, num_ranks, plan.num_microbatches
            self.executable = self._trainer.compiled(
                plan,
                precision=self._trainer._precision,
                # few microbatches: another, if need be
                schedule=schedule_for(plan.schedule, *sizes),
                batches="share" if self._reads_shares else "whole",
            )
        assert isinstance(self.executable, DistributedExecutable)
        self.executable.make_ready(self._optimizer())
        return self.executable

    def _leave_with(self, error: BaseException) -> None:
        """Tell the other processes of an error, and forget the executable."""
        made, self.executable = self.executable, None
        if made is not None:
            made.__exit__(type(error), error, error.__traceback__)

    def _leave(self) -> None:
        """Leave when this process ends; the others are told of the error that ends it."""
        error = getattr(sys, "last_value", None)
        if error is not None:
            self._leave_with(error)
            return
        made, self.executable = self.executable, None
        if isinstance(made, DistributedExecutable):
            made.close(wait=False)
        if self._owns_group and dist.is_initialized():
            dist.destroy_process_group()


class _ProcessGroup:
    """All-gathers of plain data over torch's group, before there is an executable."""

    def gather(self, value: Any, kind: Any = Any) -> list[Any]:
        """Return the values of all processes, by rank."""
        with _missing_processes():
            return gather_over(None, value, kind)


@contextlib.contextmanager
def _missing_processes() -> Iterator[None]:
    """Say what it means that torch has waited for other processes in vain."""
    try:
        yield
    except RuntimeError as error:
        raise StageError(
            f"another process has not come to this call, or has ended ({error}); look for its "
            "error, and call train, evaluate and predict in every process, not in the first alone"
        ) from error

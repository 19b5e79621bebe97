"""What a trainer computes around the model runs live, in the last stage, once per microbatch.

``training_step`` and ``compute_loss`` of a trainer are the user's code: they change what the model
is given, read values, log, keep lists, use weights of their own. So they are not captured. Each
microbatch has a run of them in a thread of its own, and only one of the two sides is ever running:

- up to its call of the model it runs when the microbatch is handed in; that call suspends it, and
  what it passes are the inputs of the pipeline;
- in the last stage the call returns the model's real outputs, and the code goes on up to its
  ``backward()``, which suspends it again: the backward pass of the stage starts at that loss;
- behind the backward pass of all stages the rest runs. If it calls the model once more (adversarial
  training does), another round begins.

In the graph the second part is one module, :class:`LiveLoss`, behind the model's outputs. It is
captured, priced and compared with a loss of about the same cost that stands in for the user's.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.loss import _Loss
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ipu_pipeline.capture.captured import capturing
from ipu_pipeline.capture.glue_run import Coroutine
from ipu_pipeline.capture.inputs import NUM_ITEMS
from ipu_pipeline.capture.objects import Snapshot, members
from ipu_pipeline.capture.values import tensors_in
from ipu_pipeline.errors import CaptureError
from ipu_pipeline.ops.autocast import autocast_dtype
from ipu_pipeline.ops.threads import take_threads
from ipu_pipeline.stages.stage import nodes_behind

# The input that names the run of a microbatch, and the module's name inside the model.
RUN = "loss_run"
_MEMBER = "__member__"
Call = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_GRAD: Any = Tensor.grad.__get__  # type: ignore[union-attr]
_DATA: Any = Tensor.data.__get__  # type: ignore[attr-defined]
_BACKWARD = (Tensor.backward, torch.autograd.backward)
# They read no value of a tensor.
_OF_THE_FORM = frozenset({"__set__", "size", "dim", "numel", "stride", "is_floating_point",
                          "__len__", "__hash__", "requires_grad_"})  # fmt: skip
_current = threading.local()
# Which forwards a thread is in. In the model it would count as the user's own, by which all stages
# run in one thread.
_inside = threading.local()


@contextlib.contextmanager
def calls_of(model: nn.Module, call: Call, live: LiveLoss | None = None) -> Iterator[None]:
    """Let ``model(...)`` return ``call(forward, args, kwargs)`` with the model's own ``forward``.

    Calls from inside ``forward`` reach it as always. ``live`` is a part of the model meanwhile, so
    that a capture finds it; nothing else changes, and blocks and parameters keep their names.
    """
    before = vars(model).get("forward")
    hooks = {name: vars(model)[name] for name in HOOKS}
    model.forward = _Forward(model, call)
    if live is not None:
        model._modules[RUN] = live.train(model.training)
        vars(model).update({name: _Hooks(found) for name, found in hooks.items()})
    try:
        yield
    finally:
        model._modules.pop(RUN, None)
        vars(model).update(hooks)
        if before is None:
            del model.forward
        else:
            model.forward = before


def is_replaced(model: nn.Module) -> bool:
    """Whether the user's code has put another ``forward`` in the place of ours."""
    return not isinstance(vars(model).get("forward"), _Forward)


def generates(kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of the model is one of those that generate: it wants keys and values back."""
    kept = kwargs.get("past_key_values") is not None or kwargs.get("use_cache")
    return bool(kept) and not torch.is_grad_enabled()


@contextlib.contextmanager
def unseen(model: nn.Module) -> Iterator[None]:
    """Take our module out of the model, whose ``forward`` may call all of its children."""
    own = model._modules.pop(RUN, None)
    try:
        yield
    finally:
        if own is not None:
            model._modules[RUN] = own


class _Forward:
    """Stands for the ``forward`` of a model, in the model itself."""

    def __init__(self, model: nn.Module, call: Call) -> None:
        functools.update_wrapper(self, model.forward)  # its signature is asked for
        self._model = model
        self._own = model.forward
        self._call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inside = vars(_inside).setdefault("forwards", set())
        if id(self) in inside:
            return self._own(*args, **kwargs)
        inside.add(id(self))
        try:
            return self._call(self._own, args, kwargs)
        finally:
            inside.discard(id(self))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Return the copied model's own: compute_loss may copy the model (averaged weights)."""
        copied = memo[id(self._model)]
        return types.MethodType(type(copied).forward, copied)


class _Hooks(OrderedDict[int, Any]):
    """Hooks around the model's forward: they run around calls by the user's code and no others."""

    def __bool__(self) -> bool:
        return len(self) > 0 and LossRun.current() is not None

    def items(self) -> Any:
        return () if LossRun.current() is None else super().items()


class LossRun(Coroutine):
    """One run of code that calls the model, suspended in its first call and in ``backward()``.

    Args:
        body: The code.

    Attributes:
        inputs: What the model was called with, once it was; tensors that need gradients are cut
            off from what the code computed them with.
        loss: Where the code has begun its backward pass, shape [].
        rounds: How many calls of the model have had their backward pass.
        elsewhere: Ids of parameters whose values are those of an earlier step here.
        further_calls: How often it has called the model besides.
        at_call: Called in its calls of the model, with the inputs.
        at_resume: Called before it is resumed.
        modes: The training flags of the model's modules when it began.
        reads_gradients_of: Parameters whose ``.grad`` it has read.
    """

    def __init__(self, body: Callable[[], Any]) -> None:
        super().__init__(self._guarded(body), "compute-loss")
        self.inputs: dict[str, Any] | None = None
        self.loss: Tensor | None = None
        self.rounds = 0
        self.elsewhere: frozenset[int] = frozenset()
        self.further_calls = 0
        self.at_call: Callable[[dict[str, Any]], object] = lambda _: None
        self.at_resume: Callable[[], object] = lambda: None
        self.modes: list[bool] = []
        self.reads_gradients_of: list[nn.Parameter] = []
        self._asked: Callable[[], Any] | None = None
        self._cut: list[tuple[Tensor, Tensor]] = []
        self._guard = _Guard(self)

    @staticmethod
    def current() -> LossRun | None:
        """Return the run whose thread this is."""
        return getattr(_current, "run", None)

    def may_suspend(self, modes: list[bool], kwargs: Mapping[str, Any]) -> bool:
        """Whether this call of the model is one that stages compute as it would be."""
        return (
            self.inputs is None
            and modes == self.modes
            and torch.is_grad_enabled() == any(modes)
            and not generates(kwargs)
            and autocast_dtype() is None
            and len(_get_current_function_mode_stack()) == 1  # our own
            and not _get_current_dispatch_mode_stack()
            and not torch._C._autograd._top_saved_tensors_default_hooks(True)  # noqa: FBT003
        )

    def call(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        """Suspend the run in this call of the model; return what it is resumed with."""
        inputs = dict(kwargs)
        if args:
            bound = inspect.signature(forward).bind(*args, **kwargs)
            inputs = dict(bound.arguments)
            for parameter in bound.signature.parameters.values():
                if parameter.kind is parameter.VAR_KEYWORD:
                    inputs.update(inputs.pop(parameter.name, {}))
                if parameter.kind is parameter.VAR_POSITIONAL and parameter.name in inputs:
                    raise CaptureError(
                        f"compute_loss passes arguments of the model without a name (*"
                        f"{parameter.name}); stages take inputs by name: pass them by keyword"
                    )
        inputs = _flat(inputs)
        for name, value in inputs.items():
            if isinstance(value, Tensor) and value.requires_grad:
                inputs[name] = value.detach().requires_grad_()
                self._cut.append((value, inputs[name]))
        self.at_call(inputs)
        self.inputs = inputs
        outputs, num_threads = self.suspend()
        self._guard.begin(outputs)
        if num_threads != torch.get_num_threads():
            take_threads(num_threads)
        return outputs

    def resume(self, outputs: Any) -> Any:
        """Let the call of the model return ``outputs``; return or raise what the code does.

        It runs up to its backward pass, if it has one, or to the end.
        """
        return super().resume((outputs, torch.get_num_threads()))

    def ask(self, work: Callable[[], Any]) -> Any:
        """Suspend the run until the thread that runs it has done ``work``; return its result."""
        self._asked = work
        return self.suspend()

    def answer(self) -> None:
        """Do what the run asks for, until it calls the model or ends."""
        while self._asked is not None:
            work, self._asked = self._asked, None
            super().resume(work())

    def backward(self, loss: Tensor) -> None:
        """Suspend the run until the stages have made the backward pass from ``loss`` on."""
        self.loss = loss
        self.suspend()
        self.loss = self.inputs = None

    def go_on(self) -> None:
        """Go on behind the backward pass: up to another call of the model, or to the end."""
        self.rounds += 1
        super().resume(None)

    def backward_into_inputs(self) -> None:
        """Hand the inputs' gradients on to what the code before the call computed them with."""
        pairs = [(value, leaf.grad) for value, leaf in self._cut if leaf.grad is not None]
        if pairs:
            torch.autograd.backward([value for value, _ in pairs], [grad for _, grad in pairs])
        self._cut = []

    def _guarded(self, body: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            _current.run = self
            with self._guard:
                return body()

        return run


@dataclass(frozen=True)
class HandedIn:
    """A microbatch: the model's inputs, and the run of the code that computes its loss."""

    inputs: dict[str, Any]
    run: LossRun | None = None

    @classmethod
    def of(cls, inputs: dict[str, Any], run: LossRun | None = None) -> HandedIn:
        """Make one, with a count of items as a tensor, so that another is no other capture."""
        count = inputs.get(NUM_ITEMS)
        counted = {} if count is None else {NUM_ITEMS: torch.as_tensor(count)}
        return cls(inputs | counted, run)


def abandon(parts: list[HandedIn]) -> None:
    """End the runs of microbatches that are no longer wanted, and forget these."""
    for part in parts:
        if part.run is not None:
            part.run.abandon()
    parts.clear()


class _Guard(TorchFunctionMode):
    """Refuses what the user's code cannot do beside stages that run at other times.

    That is a backward pass of its own into them, and tensors of their graphs that are not among
    the model's outputs.
    """

    def __init__(self, run: LossRun) -> None:
        super().__init__()
        self._run = run
        self._outputs: set[Any] = set()
        self._known: set[Any] = set()
        self._spent: set[Any] = set()  # outputs that had their backward pass

    def begin(self, outputs: Any) -> None:
        """Take what the stages computed."""
        self._outputs = _nodes(members(outputs)[0])
        self._known |= self._outputs

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func == _GRAD and isinstance(args[0], nn.Parameter):
            self._run.reads_gradients_of.append(args[0])
        if self._run.elsewhere:
            self._check_elsewhere(func, args, kwargs)
        if self._outputs:
            self._check_tensors(func, args, kwargs)
        if func in (*_BACKWARD, torch.autograd.grad) and self._is_the_stages(func, *args, **kwargs):
            self._spent, self._outputs = self._spent | self._outputs, set()
            self._run.backward(_added_up(args[0]))
            return None
        result = func(*args, **kwargs)
        self._known |= _nodes((args, kwargs, result))
        return result

    def _check_tensors(self, func: Any, args: Any, kwargs: Any) -> None:
        for tensor in tensors_in((args, kwargs)):
            node = tensor.grad_fn if tensor.requires_grad else None
            # A node that is new stands for one that is known if that lies behind it.
            if node is None or node in self._known or nodes_behind([tensor]) & self._known:
                continue
            raise CaptureError(
                f"compute_loss uses ({getattr(func, '__name__', func)}) a {tuple(tensor.shape)} "
                "tensor that the model computed and did not return, perhaps kept by a hook or as "
                "an attribute of a module; its stage cannot send it: let the model return it "
                "(output_hidden_states=True), or let the hook detach it"
            )

    def _check_elsewhere(self, func: Any, args: Any, kwargs: Any) -> None:
        """Refuse a parameter of which this process has no value of this step."""
        name = getattr(func, "__name__", "")
        if name in _OF_THE_FORM or (name == "__get__" and func not in (_GRAD, _DATA)):
            return
        if any(id(tensor) in self._run.elsewhere for tensor in tensors_in((args, kwargs))):
            again = "a further call of it, " if self._run.further_calls else ""
            raise CaptureError(
                f"the code around the model ({again}{name}) uses a parameter of the model or its "
                "gradient, which is in the process that runs its stage; use what the model "
                "returns, or target='local'"
            )

    def _is_the_stages(
        self,
        func: Any,
        outputs: Any,
        inputs: Any = None,
        retain_graph: bool | None = None,  # noqa: FBT001 - torch's signature
        create_graph: bool = False,  # noqa: FBT001, FBT002 - torch's signature
        **options: Any,
    ) -> bool:
        """Whether a backward pass leads into the stages, which then make it."""
        if not self._outputs and not self._spent:
            return False
        nodes = nodes_behind([outputs] if isinstance(outputs, Tensor) else outputs)
        if not nodes & (self._outputs | self._spent):
            return False
        given = (inputs, options.get("gradient"), options.get("grad_tensors"))
        simple = given == (None, None, None) and not (retain_graph or create_graph)
        if func in _BACKWARD and simple and not nodes & self._spent:
            return True
        wanted = [inputs] if isinstance(inputs, Tensor) else inputs or ()
        if func is torch.autograd.grad and all(
            getattr(t, "grad_fn", None) in nodes for t in wanted
        ):
            return False  # within what follows the model
        raise CaptureError(
            f"compute_loss calls {func.__name__}() through the model itself, whose stages make one "
            "backward pass for each call of the model, from one loss on; leave the gradient to the "
            "trainer or call loss.backward() once, take it with respect to the model's outputs "
            "only, or use transformers' Trainer"
        )


def _added_up(losses: Any) -> Tensor:
    """Return one loss, shape [], whose backward pass is that of all."""
    if isinstance(losses, Tensor):
        return losses.reshape(())
    return torch.stack([loss.reshape(()) for loss in losses]).sum()


def _nodes(value: Any) -> set[Any]:
    """Return the nodes that computed the tensors in ``value``."""
    return {t.grad_fn for t in tensors_in(value) if t.requires_grad} - {None}


class LiveLoss(_Loss):
    """The module that stands for the user's code behind the model's outputs.

    A loss to the capture, so that it and what follows it are the block ``loss``.

    Attributes:
        runs: The runs of the step that is going on, by the number that their microbatch carries.
        keeps: Whether it keeps what the model returns.
        made: What the model has returned to each: the number of its structure, and its tensors.
    """

    # Its code runs once per microbatch, whatever is recomputed, and may use any tensor.
    runs_live = True
    keeps = False

    def __init__(self) -> None:
        super().__init__()
        self.runs: Mapping[int, LossRun] = {}
        self.made: dict[int, tuple[int, tuple[Tensor, ...]]] = {}
        self._outputs: list[Snapshot] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> LiveLoss:
        return LiveLoss()

    def view(self, forward: Callable[..., Any], inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Return what a capture sees of the model: its outputs, and the loss behind them."""
        run = inputs.pop(RUN)
        outputs = _without_caches(forward(**_nested(inputs)))
        try:
            found = Snapshot.of({RUN: outputs})
        except Exception as error:  # whatever a class does when it is copied
            raise CaptureError(
                f"the model returns a {type(outputs).__name__} that cannot be copied ({error}), so "
                "that compute_loss cannot be given one in the last stage; return a ModelOutput, a "
                "dict or a tuple of tensors"
            ) from error
        known = [kept.plain for kept in self._outputs]
        if found.plain not in known:
            self._outputs.append(Snapshot(found.objects, found.slots, (), found.plain))
            known.append(found.plain)
        results = {"loss": self(run, found.tensors, known.index(found.plain))}
        if not self.training:  # so that the self-check compares each of them
            results |= {f"output_{n}": tensor for n, tensor in enumerate(found.tensors)}
        return results

    def filled(self, outputs: int, tensors: Sequence[Tensor]) -> Any:
        """Return what the model returns, of tensors and the number of their structure.

        None is a leaf of its graph, as behind the model: a backward pass is seen by its nodes, and
        code may change it in place.
        """
        inner = [t.clone() if t.requires_grad and t.is_leaf else t for t in tensors]
        return self._outputs[outputs].filled(range(len(inner)), inner)[RUN]

    def forward(self, run: Tensor, tensors: tuple[Tensor, ...], outputs: int) -> Tensor:
        """Return the loss of the run, computed from the model's outputs.

        Args:
            run: The number of the run: shape [], int64.
            tensors: The tensors in the model's outputs.
            outputs: Which of the structures that the model returns they are put into.
        """
        if not self.runs or capturing():
            return _stand_in(tensors)
        made = self.filled(outputs, tensors)
        suspended = self.runs[int(run)]
        suspended.at_resume()
        if self.keeps:
            self.made[int(run)] = outputs, tensors
        suspended.resume(made)
        if not torch.is_grad_enabled():
            return torch.zeros(())
        if suspended.loss is None:
            raise CaptureError(
                "training_step has called the model and made no backward pass through what it "
                "returned; call self.accelerator.backward(loss) for every microbatch, of a loss "
                "of 0 where nothing is to be learned, or use transformers' Trainer"
            )
        return suspended.loss


def _flat(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return inputs of which none is a dict of tensors: its members stand in its place."""
    found: dict[str, Any] = {}
    for name, value in inputs.items():
        if type(value) is dict and tensors_in(value):
            found |= {f"{name}{_MEMBER}{key}": member for key, member in value.items()}
        else:
            found[name] = value
    return found


def _nested(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return inputs with the dicts that ``_flat`` has taken apart."""
    found: dict[str, Any] = {}
    for name, value in inputs.items():
        outer, is_member, key = name.partition(_MEMBER)
        if is_member:
            found.setdefault(outer, {})[key] = value
        else:
            found[name] = value
    return found


def _without_caches(outputs: Any) -> Any:
    """Leave out keys and values kept for generation: a capture has none, its self-check may."""
    if type(outputs) is tuple:
        return tuple(value for value in outputs if not _is_cache(value))
    if isinstance(outputs, MutableMapping):
        for name in [name for name, value in outputs.items() if _is_cache(value)]:
            outputs[name] = None
    return outputs


def _is_cache(value: Any) -> bool:
    return type(value).__name__.endswith("Cache")


def trainable(loss: Any) -> Tensor:
    """Return what compute_loss returned as a loss of shape [].

    Raises:
        ValueError: It is no single number that a backward pass can start at.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        kind = f"tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else None
        raise ValueError(
            f"compute_loss returned a {kind or type(loss).__name__}; return a tensor with one "
            "element"
        )
    if not loss.requires_grad:
        raise ValueError(
            "compute_loss returned a loss that needs no gradient, so that nothing would be "
            "trained; compute it from the model's outputs without detach(), item() or no_grad()"
        )
    return loss.reshape(())


def _stand_in(tensors: Sequence[Tensor]) -> Tensor:
    """Return a loss that depends on every element of every tensor, at a cross entropy's cost."""
    total = torch.zeros((), device=tensors[0].device if tensors else None)
    for place, tensor in enumerate(tensors, start=1):
        if not tensor.numel() or not tensor.is_floating_point():
            continue
        # Masks hold the lowest number there is.
        rows = tensor.reshape(-1, tensor.shape[-1] if tensor.ndim else 1).clamp(-1e3, 1e3).float()
        targets = torch.arange(rows.shape[0], device=rows.device) % rows.shape[1]
        total = total + place * (functional.cross_entropy(rows, targets) + rows.mean())
    return total

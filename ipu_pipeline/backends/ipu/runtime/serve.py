"""The worker: runs a bundle for a process elsewhere that sends batches and reads results.

It is started by ``compile(target="poptorch")`` under the SDK's Python and ends with its socket.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import platform
import shutil
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping

import torch
import transformers
from torch import Tensor

from .checks import BundleError, check_blocks, check_order
from .files import read_files
from .messages import Channel, MessageError, SharedTensors, check_command, paged
from .placement import ModuleNotFound, PlacementError, find_modules
from .sdk_model import ModelError, SdkModel
from .sessions import CompileError, Sessions

# What the user can act on: said as it is, without a traceback.
REFUSALS = (BundleError, CompileError, MessageError, ModelError, ModuleNotFound, PlacementError)


class Server:
    """Answers commands, one after another.

    Args:
        folder: The bundle.
        channel: To the process that sends them.
        poptorch: The front end.
    """

    def __init__(self, folder: Path, channel: Channel, poptorch: Any) -> None:
        self._channel = channel
        self._poptorch = poptorch
        self._plan, self._settings, self._blocks = read_files(folder)
        self._model: SdkModel = None  # type: ignore[assignment]  # the first command makes it
        self.sessions: Sessions = None  # type: ignore[assignment]  # "check" makes it
        self._pages: Iterator[dict[str, Tensor]] = iter(())

    def run(self) -> None:
        """Answer until the command ``close``, or until the other side is gone."""
        versions = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "poptorch": str(getattr(self._poptorch, "__version__", "unknown")),
        }
        self._channel.send("ready", versions)
        kind = ""
        while kind != "close":
            try:
                kind, values = self._channel.receive()
            except EOFError:
                break
            self._answer(kind, values)
        self._channel.close()

    def _answer(self, kind: str, values: Mapping[str, Any]) -> None:
        try:
            check_command(kind, values)
            command: Callable[..., dict[str, Any]] = getattr(self, "do_" + kind)
            result = command(**values)
        except REFUSALS as error:
            self._channel.send("refused", {"message": str(error)})
        except Exception as error:  # everything else is the other side's to raise
            said = f"{type(error).__name__}: {error}"
            trace = "".join(traceback.format_exc().splitlines(keepends=True)[-12:])
            self._channel.send("failed", {"message": said, "trace": trace})
        else:
            self._channel.send("done", result)

    # ---- one method per command ------------------------------------------------------------

    def do_build(self, model: Any, parameters: Any, buffers: Any) -> dict[str, Any]:
        """Build the model from its configuration."""
        self._model = SdkModel(model, parameters, buffers)
        return {}

    def do_write(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Take weights."""
        if self.sessions is not None:
            self.sessions.fetch_weights()
        self._model.write(tensors)
        if self.sessions is not None:
            self.sessions.weights_changed()
        return {}

    def do_check(self, sample: Mapping[str, Tensor]) -> dict[str, Any]:
        """Run the model on the host, check the blocks against what ran, and annotate it.

        Returns:
            What the model computed for ``sample`` in evaluation mode, by name, and whether it
            must be compared (see :class:`SdkModel`).
        """
        planned = {block["name"] for block in self._plan["graph"]["blocks"]}
        listed = [name for name in self._settings["annotated_blocks"] if name in planned]
        check_blocks(self._blocks, listed, self._settings)
        known = self._plan["model"]["parameters"]
        model = self._model.model
        modules = find_modules(model, [b["module"] for b in self._blocks], known)
        model.eval()
        outputs: dict[str, Tensor] = {}
        handle = model.register_forward_hook(
            lambda _model, _args, output: outputs.update(_tensors(output))
        )
        try:
            running = check_order(model, self._blocks, modules, _widened(sample))
        finally:
            handle.remove()
        self._model.finish()
        self.sessions = Sessions(model, running, known, self._settings, self._poptorch)
        return {"outputs": outputs, "has_guesses": self._model.has_guesses}

    def do_train(self, batch: Mapping[str, Any], groups: Any) -> dict[str, Any]:
        """Run one call of the training program."""
        with _said("training", self.sessions.training):
            return {"loss": self.sessions.train(batch, self._named_here(groups))}

    def do_evaluate(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Run one call of the evaluation program."""
        with _said("evaluation", self.sessions.inference):
            return {"outputs": self.sessions.evaluate(batch)}

    def do_read(self, page: int) -> dict[str, Any]:
        """Return the next weights, as many as one answer holds; none after the last page."""
        if page == 0:
            self.sessions.fetch_weights()
            self._pages = paged(self._model.tensors())
        return self._next_page()

    def do_read_optimizer(self, page: int) -> dict[str, Any]:
        """Return optimizer state by the device's names, as ``read`` returns weights."""
        if page == 0:
            names, state = self._model.names(), self.sessions.optimizer_state()
            self._pages = paged({_device_name(key, names): v for key, v in state.items()})
        return self._next_page()

    def do_write_optimizer(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Take optimizer state, for the next program that is made for training."""
        here = self._here()
        taken = {_device_name(key, here): value.clone() for key, value in tensors.items()}
        self.sessions.next_state.update(taken)
        return {}

    def do_read_random(self) -> dict[str, Any]:
        """Return the states of random numbers, of the device and of the host's generators."""
        return {"tensors": self.sessions.random_state()}

    def do_write_random(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Take such states, for the next program that is made for training."""
        self.sessions.next_random = {name: value.clone() for name, value in tensors.items()}
        return {}

    def do_release(self) -> dict[str, Any]:
        """Drop the programs and the optimizer's state; the weights stay."""
        self.sessions.release()
        self.sessions.next_state = {}
        return {}

    def do_save_executable(
        self, path: str, batch: Any, groups: Any, ipu_version: int | None
    ) -> dict[str, Any]:
        """Compile the training program and write it to a file."""
        with _said("training", self.sessions.training):
            self.sessions.save_executable(path, batch, self._named_here(groups), ipu_version)
        return {}

    def do_load_executable(self, path: str, groups: Any) -> dict[str, Any]:
        """Take the training program from a file."""
        self.sessions.load_executable(path, self._named_here(groups))
        return {}

    def do_close(self) -> dict[str, Any]:
        """Free the IPUs."""
        if self.sessions is not None:
            self.sessions.close()
        return {}

    def _here(self) -> dict[str, str]:
        return {name: own for own, name in self._model.names().items()}

    def _named_here(self, groups: Any) -> Any:
        """Return the optimizer's groups with the names that the parameters have here."""
        if groups is None:
            return None
        here = self._here()
        return [{**group, "params": [here[n] for n in group["params"]]} for group in groups]

    def _next_page(self) -> dict[str, Any]:
        return {"tensors": next(self._pages, {})}


def _tensors(output: Any) -> dict[str, Tensor]:
    items = output.items() if hasattr(output, "items") else ()
    return {name: value for name, value in items if isinstance(value, Tensor)}


def _widened(sample: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return float32 in place of float16, which torch 2.0 does not compute on the host."""
    return {
        name: value.float() if value.dtype is torch.float16 else value.clone()
        for name, value in sample.items()
    }


def _device_name(key: str, names: Mapping[str, str]) -> str:
    """Return ``Accl1___NAME`` with the other side's name of the parameter."""
    kind, mark, name = key.partition("___")
    return kind + mark + names.get(name, name)


@contextlib.contextmanager
def _said(program: str, executor: Any) -> Iterator[None]:
    """Print that a program is compiled, which may take an hour, and how long it took."""
    if executor is not None and executor.isCompiled():
        yield
        return
    started = time.monotonic()
    print(f"compiling the {program} program", flush=True)
    yield
    seconds = time.monotonic() - started
    print(f"compiled the {program} program in {seconds:.1f} s, its first call included", flush=True)


@contextlib.contextmanager
def front_end(stand_in: str) -> Iterator[Any]:
    """Give poptorch, or the stand-in in the package folder ``stand_in``.

    Raises:
        BundleError: poptorch cannot be imported.
    """
    if not stand_in:
        try:
            poptorch = importlib.import_module("poptorch")
        except (ImportError, OSError) as error:
            raise BundleError(
                f"{sys.executable} cannot import poptorch: {error}; install the SDK's poptorch "
                "there, and source the SDK's enable script before you start"
            ) from error
        yield poptorch
        return
    name = Path(stand_in).name
    spec = importlib.util.spec_from_file_location(
        name, Path(stand_in) / "__init__.py", submodule_search_locations=[stand_in]
    )
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # oneDNN in torch 2.0 gives made-up gradients of convolutions on newer CPUs (measured).
    with contextlib.ExitStack() as stack:
        if torch.__version__.startswith("2.0."):
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        poptorch = stack.enter_context(module.install())
        print("emulated on the CPU: results as on the device, speed and memory are not", flush=True)
        yield poptorch


def main() -> None:
    """Serve: the bundle's folder, three descriptors, the parent, and the stand-in's folder.

    The bundle was written for this process, which removes it where nobody else can any more.
    """
    folder, stand_in = Path(sys.argv[1]), sys.argv[6]
    channel = Channel(
        socket.socket(fileno=int(sys.argv[2])),
        SharedTensors(int(sys.argv[3])),
        SharedTensors(int(sys.argv[4])),
    )
    threading.Thread(target=_end_with, args=(int(sys.argv[5]), folder), daemon=True).start()
    try:
        with front_end(stand_in) as poptorch:
            Server(folder, channel, poptorch).run()
    except REFUSALS as error:
        channel.send("refused", {"message": str(error)})
    finally:
        shutil.rmtree(str(folder), ignore_errors=True)


def _end_with(parent: int, folder: Path) -> None:
    """End when the parent has, also while a program is compiled."""
    while os.getppid() == parent:
        time.sleep(1.0)
    shutil.rmtree(str(folder), ignore_errors=True)
    os._exit(1)

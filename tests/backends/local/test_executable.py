"""What the loop drives: steps, evaluation, precision, checkpoints, modes."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ipu_pipeline as ipp
from ipu_pipeline.errors import LoweringError, PlanError
from tests.backends.local.helpers import compiled
from tests.later import every_second
from tests.tiny_models import TINY


def test_train_step_reports_what_it_did() -> None:
    executable, batch = compiled()
    with executable:
        result = executable.train_step(batch)
    assert result.loss > 0
    assert result.grad_norm is not None
    assert result.grad_norm > 0
    assert not result.skipped
    assert result.num_samples == 8
    assert len(result.stage_s) == 2
    assert all(seconds > 0 for seconds in result.stage_s)
    assert executable.global_step == 1
    assert all(parameter.grad is None for parameter in executable.model.parameters())


def test_forward_backward_adds_to_existing_gradients() -> None:
    executable, batch = compiled(dropout=False)
    with executable:
        executable.forward_backward(batch)
        parameters = dict(executable.model.named_parameters())
        once = {n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}
        executable.forward_backward(batch)
    for name, gradient in once.items():
        torch.testing.assert_close(parameters[name].grad, 2 * gradient)


def test_clipping_uses_the_norm_over_all_stages() -> None:
    executable, batch = compiled(dropout=False, max_grad_norm=1e-3, learning_rate=None)
    executable.optimizer = torch.optim.SGD(executable.model.parameters(), lr=1.0)
    before = [p.detach().clone() for p in executable.model.parameters()]
    with executable:
        result = executable.train_step(batch)
    moved = torch.stack(
        [(p - b).norm() for p, b in zip(executable.model.parameters(), before, strict=True)]
    ).norm()
    assert result.grad_norm is not None
    assert result.grad_norm > 1e-3
    assert moved.item() == pytest.approx(1e-3, rel=1e-3)


def test_short_batches_weigh_every_sample_equally() -> None:
    executable, batch = compiled(dropout=False)
    short = {name: value[:5] for name, value in batch.items()}
    with executable, torch.no_grad():
        executable.model.train()
        samples = [{n: v[i : i + 1] for n, v in short.items()} for i in range(5)]
        losses = [executable.model(**sample).loss for sample in samples]
    with compiled(dropout=False)[0] as fresh:
        loss = fresh.forward_backward(short)
    assert loss == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


def test_evaluation_equals_the_unsplit_model_with_and_without_labels() -> None:
    executable, batch = compiled()
    unlabelled = {n: v for n, v in batch.items() if not n.endswith("positions")}
    model = executable.model.eval()
    with torch.no_grad():
        expected = model(**unlabelled)
    model.train()
    with executable:
        labelled = executable.eval_step(batch)
        plain = executable.eval_step(unlabelled)
    assert model.training
    assert labelled.loss is not None
    assert plain.loss is None
    for result in (labelled, plain):
        for name in ("start_logits", "end_logits"):
            torch.testing.assert_close(result.outputs[name], expected[name], rtol=1e-5, atol=1e-6)
    assert "start_logits" in plain.outputs


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_bf16_equals_the_unsplit_model_under_autocast(name: str) -> None:
    model, example = TINY[name].build()
    plan = ipp.plan(model, example, num_stages=3, microbatches=1)
    with ipp.compile(model, plan, precision="bf16") as executable:
        loss = executable.forward_backward(example)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert loss == pytest.approx(model(**example).loss.item(), rel=1e-6)


@pytest.mark.parametrize(("before", "after"), every_second([(2, 4), (4, 1)]))
def test_a_checkpoint_continues_under_another_number_of_stages(
    tmp_path: Path, before: int, after: int
) -> None:
    executable, batch = compiled(num_stages=before)
    with executable:
        for _ in range(3):
            executable.train_step(batch)
        executable.save_checkpoint(tmp_path / "saved", extra={"epoch": 1})
        expected = [executable.train_step(batch).loss for _ in range(3)]

    resumed, _ = compiled(num_stages=after)
    with resumed:
        assert resumed.load_checkpoint(tmp_path / "saved") == {"epoch": 1}
        assert resumed.global_step == 3
        found = [resumed.train_step(batch).loss for _ in range(3)]
    exact = (before == after) or found == expected
    assert exact or found == pytest.approx(expected, rel=1e-6)


def test_recomputed_blocks_give_the_same_losses_with_dropout() -> None:
    curves = []
    for recompute in ("never", "always"):
        model, example = TINY["bert-qa"].build(dropout=True)
        batch = TINY["bert-qa"].batch(batch_size=8, seed=3)
        limits = ipp.Constraints(recompute=recompute)
        plan = ipp.plan(model, example, num_stages=2, microbatches=4, constraints=limits)
        assert bool(plan.stages[0].recompute) == (recompute == "always")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        with ipp.compile(model, plan, optimizer=optimizer, self_check=False) as executable:
            curves.append([executable.train_step(batch).loss for _ in range(5)])
    assert curves[0] == pytest.approx(curves[1], rel=1e-6)


def test_a_plan_edited_by_hand_runs(tmp_path: Path) -> None:
    model, example = TINY["bert-qa"].build()
    plan = ipp.plan(model, example, num_stages=2, microbatches=2)
    path = tmp_path / "plan.json"
    plan.save(path)
    moved = plan.stages[0].blocks[-1]
    text = path.read_text()
    first, second = (list(stage.blocks) for stage in plan.stages)
    raw = json.loads(text)
    raw["stages"][0]["blocks"] = first[:-1]
    raw["stages"][1]["blocks"] = [moved, *second]
    path.write_text(json.dumps(raw))

    edited = ipp.Plan.load(path)
    assert edited.edited
    assert "edited by hand" in edited.explain()
    with ipp.compile(model, edited, self_check=False) as executable:
        changed = executable.forward_backward(example)
    with ipp.compile(model, plan, self_check=False) as executable:
        assert executable.forward_backward(example) == pytest.approx(changed, rel=1e-6)


def test_the_model_keeps_its_mode_and_names() -> None:
    executable, batch = compiled()
    names = list(executable.state_dict())
    executable.model.bert.embeddings.eval()
    with executable:
        executable.train_step(batch)
        executable.eval_step(batch)
    assert not executable.model.bert.embeddings.training
    assert executable.model.training
    assert list(executable.state_dict()) == names
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in executable.model.modules())


def test_threads_end_when_it_is_closed() -> None:
    executable, batch = compiled()
    executable.train_step(batch)
    assert any(t.name.startswith("pipeline-device") for t in threading.enumerate())
    executable.close()
    executable.close()
    assert not any(t.name.startswith("pipeline-device") for t in threading.enumerate())
    with pytest.raises(LoweringError, match="cannot run: it was closed; compile the model again"):
        executable.train_step(batch)


def test_threads_end_when_it_is_forgotten() -> None:
    executable, batch = compiled()
    executable.train_step(batch)
    threads = [t for t in threading.enumerate() if t.name.startswith("pipeline-device")]
    assert threads
    del executable
    gc.collect()
    assert not any(thread.is_alive() for thread in threads)


def test_a_forked_copy_is_refused_and_closes_nothing(tmp_path: Path) -> None:
    executable, batch = compiled()
    executable.train_step(batch)
    pid = os.fork()
    if pid == 0:
        told = []
        try:
            with contextlib.suppress(KeyError), executable:
                for name, arguments in {
                    "train_step": (batch,), "forward_backward": (batch,), "eval_step": (batch,),
                    "forward_backward_parts": ([batch], [1.0]), "eval_parts": ([batch],),
                    "state_dict": (), "save_checkpoint": (tmp_path / "c",), "broadcast": (1,),
                    "load_checkpoint": (tmp_path / "c",), "wait_for_checkpoint": (),
                    "trained_optimizer": (),
                }.items():  # fmt: skip
                    with pytest.raises(LoweringError) as refused:
                        getattr(executable, name)(*arguments)
                    told.append(f"{refused.value}")
                raise KeyError
        finally:
            (tmp_path / "told").write_text("\n".join(told))
            os._exit(0)
    assert os.waitpid(pid, 0) == (pid, 0)
    told = (tmp_path / "told").read_text().splitlines()
    assert len(told) == 11
    assert told[0] == (
        f"train_step was called in process {pid}, a forked copy of process {os.getpid()} that "
        "compiled the model: the threads that run it are not copied; use the executable where it "
        "was made, or compile in a process that is started with 'spawn'"
    )
    with executable:  # is not closed
        executable.train_step(batch)
        loader = torch.utils.data.DataLoader(Holds(executable), num_workers=1)
        assert [int(item) for item in loader] == [0, 1]


class Holds(torch.utils.data.Dataset[int]):
    """A data set whose workers have an executable, without using it."""

    def __init__(self, held: object) -> None:
        self.held = held

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        return index


def test_a_step_without_optimizer_is_refused() -> None:
    executable, batch = compiled(learning_rate=None)
    with executable, pytest.raises(LoweringError, match="needs an optimizer"):
        executable.train_step(batch)


def test_batches_with_other_inputs_than_the_plan_are_refused() -> None:
    executable, batch = compiled()
    with executable, pytest.raises(LoweringError, match="input 'start_positions' of size"):
        executable.train_step({**batch, "start_positions": batch["start_positions"][:1]})
    executable, batch = compiled()
    with executable, pytest.raises(LoweringError, match="no tensor with a batch axis"):
        executable.train_step({"start_positions": 1})
    with executable, pytest.raises(LoweringError, match="the batch is empty"):
        executable.train_step({name: value[:0] for name, value in batch.items()})


def test_a_plan_whose_blocks_differ_is_refused_at_the_first_step() -> None:
    model, example = TINY["lxmert-qa"].build()
    plan = ipp.plan(model, example, num_stages=2, microbatches=1)
    first = plan.stages[0]
    renamed = replace(
        plan,
        stages=(replace(first, blocks=("ghost", *first.blocks)), *plan.stages[1:]),
        graph=replace(plan.graph, blocks=(replace(plan.blocks[0], name="ghost"), *plan.blocks)),
    )
    with (
        ipp.compile(model, renamed, self_check=False) as executable,
        pytest.raises(PlanError, match="missing ghost; new none; make the plan with"),
    ):
        executable.forward_backward(example)

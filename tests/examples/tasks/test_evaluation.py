import pytest
import torch

from ipu_pipeline.stages.executable import EvalResult
from ipu_pipeline.train import TrainingArguments
from tasks.evaluation import evaluate_loop
from tests.train.eager_executable import EagerExecutable, Questions, tiny_bert


class WithoutAnswers(Questions):
    def __getitem__(self, index):
        return {"input_ids": self.rows[index].tolist()}


def test_loss_and_outputs_are_those_of_the_model():
    model, data = tiny_bert(), Questions(11)
    arguments = TrainingArguments(per_device_eval_batch_size=2, gradient_accumulation_steps=2)
    output = evaluate_loop(EagerExecutable(model, None), data, arguments)
    model.eval()
    whole = model(input_ids=data.rows, start_positions=data.places, end_positions=data.places)
    assert output.loss == pytest.approx(whole.loss.item(), rel=1e-6)
    assert set(output.outputs) == {"start_logits", "end_logits"}
    torch.testing.assert_close(output.outputs["start_logits"], whole.start_logits.detach())
    assert output.num_samples == 11
    assert output.metrics["eval_loss"] == output.loss
    assert set(output.metrics) == {
        "eval_loss", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second",
    }  # fmt: skip


def test_without_labels_and_without_outputs():
    executable = EagerExecutable(tiny_bert(), None)
    output = evaluate_loop(executable, WithoutAnswers(3), TrainingArguments())
    assert output.loss is None
    assert "eval_loss" not in output.metrics
    assert output.outputs["end_logits"].shape == (3, 12)


def test_lengths_that_differ_are_padded():
    class Growing(EagerExecutable):
        length = 1

        def eval_step(self, batch):
            self.length += 1
            size = len(batch["input_ids"])
            return EvalResult(None, {"x": torch.ones(size, self.length), "n": torch.tensor(1)})

    arguments = TrainingArguments(per_device_eval_batch_size=2)
    output = evaluate_loop(Growing(tiny_bert(), None), WithoutAnswers(3), arguments)
    assert output.outputs["x"].tolist() == [[1, 1, -100], [1, 1, -100], [1, 1, 1]]
    assert list(output.outputs) == ["x"]


def test_what_is_measured_is_kept_in_place_of_the_outputs():
    data, arguments = Questions(7), TrainingArguments(per_device_eval_batch_size=4)
    executable = EagerExecutable(tiny_bert(), None)

    def measure(outputs, batch):
        places = outputs["start_logits"].argmax(dim=1)
        return {"right": places == batch["start_positions"], "count": torch.tensor(1)}

    output = evaluate_loop(executable, data, arguments, measure=measure)
    assert list(output.outputs) == ["right"]
    assert output.outputs["right"].shape == (7,)
    whole = evaluate_loop(executable, data, arguments)
    expected = whole.outputs["start_logits"].argmax(dim=1) == data.places
    assert torch.equal(output.outputs["right"], expected)

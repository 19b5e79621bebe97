r"""Train LXMERT for visual question answering, split over pipeline stages.

    python examples/question-answering/run_vqa.py --model_name_or_path small \
        --dataset_name easy-vqa --ipu_config_name Graphcore/lxmert-base-ipu \
        --do_train --do_eval --output_dir out/vqa

Options are spelled as in transformers' own scripts; ``vqa_options.py`` lists them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "common"))

from plan_report import TimedExecutable, describe, measured_against_predicted
from script_run import (
    check_output_dir,
    make_plan,
    microbatch_size,
    read_ipu_config,
    run_command_line,
    training_arguments,
)
from vqa_data import read_splits
from vqa_model import Loaded, load_lxmert
from vqa_options import Options
from vqa_placement import in_execution_order, with_published_placement
from vqa_unsplit import Unsplit, train_unsplit

import ipu_pipeline as ipp
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.targets.base import Executable
from ipu_pipeline.tasks.visual_question_answering import (
    VisualQuestionAnsweringDataset,
    score_answers,
)
from ipu_pipeline.training import (
    TrainingArguments,
    build_optimizer,
    evaluate_loop,
    save_results,
    train,
)

Dataset = VisualQuestionAnsweringDataset


def run(options: Options) -> None:
    """Train and evaluate LXMERT for visual question answering, split over pipeline stages."""
    from transformers import set_seed
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]  # of loading and saving files
    check_output_dir(options)
    splits = read_splits(options)
    set_seed(options.seed)  # new weights
    loaded = load_lxmert(options, splits)
    width = loaded.model.config.visual_feat_dim
    train_set, validation = splits.build(options, loaded.tokenizer, loaded.answers, width)
    if options.unsplit:
        _run_unsplit(options, loaded, train_set, validation)
        return

    plan = plan_for(options, loaded.model, train_set or validation)
    typer.echo(describe(plan))
    arguments = training_arguments(
        options, microbatches=plan.num_microbatches, replicas=plan.replicas
    )
    executable = ipp.compile(
        loaded.model,
        plan,
        target=options.target,
        optimizer=build_optimizer(loaded.model, arguments) if options.do_train else None,
        **asdict(arguments.execution_options(schedule=options.schedule)),
    )
    timed = TimedExecutable(executable)
    try:
        if options.eval_before_training:
            _evaluate(options, executable, validation, arguments, loaded, "before")
        if train_set is not None:
            train(cast(Executable, timed), train_set, arguments, tokenizer=loaded.tokenizer)
            typer.echo(measured_against_predicted(plan, timed))
            _save(options.output_dir, loaded, executable)
        if options.do_eval:
            _evaluate(options, executable, validation, arguments, loaded, "eval")
        plan.save(options.output_dir / "plan.json")
    finally:
        executable.close()


def plan_for(options: Options, model: Any, dataset: Dataset | None) -> Plan:
    """Read the plan, or find the best split: in the published placement, or in any."""
    assert dataset is not None  # the options refuse to do neither training nor evaluation
    config = with_published_placement(read_ipu_config(options), model.config)
    pod = options.pod_type if options.target == "poptorch" else None
    limits = in_execution_order(config, options.machine or pod or "local")
    batch = dataset.head(microbatch_size(options))
    return make_plan(options, model, batch, config, constraints=limits)


def _run_unsplit(
    options: Options, loaded: Loaded, train_set: Dataset | None, validation: Dataset | None
) -> None:
    """Train and evaluate the model in one piece."""
    arguments = training_arguments(options, microbatches=1, replicas=1)
    runner = cast(Executable, Unsplit(loaded.model))
    if options.eval_before_training:
        _evaluate(options, runner, validation, arguments, loaded, "before")
    if train_set is not None:
        save_results(options.output_dir, "train", train_unsplit(loaded.model, train_set, arguments))
        _save(options.output_dir, loaded, runner)
    if options.do_eval:
        _evaluate(options, runner, validation, arguments, loaded, "eval")


def _save(folder: Path, loaded: Loaded, executable: Executable) -> None:
    loaded.model.save_pretrained(folder, state_dict=executable.state_dict())
    loaded.tokenizer.save_pretrained(folder)


def _evaluate(
    options: Options,
    executable: Executable,
    dataset: Dataset | None,
    arguments: TrainingArguments,
    loaded: Loaded,
    when: str,
) -> None:
    """Answer every validation question; write and print the answers' scores."""
    assert dataset is not None  # read_splits gives it whenever something is evaluated
    output = evaluate_loop(executable, dataset, arguments)
    chosen = output.outputs["question_answering_score"].argmax(dim=1).tolist()
    scores = score_answers(dataset.labels.weights, chosen)
    metrics = output.metrics | {
        "eval_accuracy": scores.accuracy,
        "eval_constant_accuracy": scores.constant_accuracy,
        "eval_samples": scores.total,
    }
    prefix = "" if when == "eval" else f"{when}_"
    save_results(options.output_dir, when, {f"{prefix}{name}": metrics[name] for name in metrics})
    _write_predictions(options.output_dir, dataset, [loaded.answers.names[i] for i in chosen])
    title = "before training" if when == "before" else "after training"
    typer.echo(
        f"{title if options.do_train else 'result'}: accuracy {scores.accuracy:.2f} on "
        f"{scores.total} questions ({metrics['eval_runtime']:.1f} s); the best single answer to "
        f"all of them: {scores.constant_accuracy:.2f}"
    )


def _write_predictions(folder: Path, dataset: Dataset, answers: Sequence[str]) -> None:
    """Write ``predictions.json`` in the format of VQA's results."""
    rows = [{"question_id": i, "answer": a} for i, a in zip(dataset.ids, answers, strict=True)]
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(rows, indent=1, default=int)
    (folder / "predictions.json").write_text(text + "\n", encoding="utf-8")


def main() -> None:
    """Run the command line."""
    run_command_line(run, Options)


if __name__ == "__main__":
    main()

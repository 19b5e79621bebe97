r"""Fine-tune a Transformers model for extractive question answering, split over pipeline stages.

    python examples/question-answering/run_qa.py --model_name_or_path minilm --num_stages 2 \
        --train_file out/demo_data/train.json --validation_file out/demo_data/validation.json \
        --do_train --do_eval --output_dir out/qa

Options are spelled as in transformers' own run_qa.py; ``qa_options.py`` lists them.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, fields
from typing import Any, cast

import typer
from demo_model import load_model_and_tokenizer
from qa_data import load_windows
from qa_options import Options, as_command
from qa_report import (
    TimedExecutable,
    describe,
    is_first,
    local_note,
    measured_against_predicted,
    say,
)

import ipu_pipeline as ipp
from ipu_pipeline.config import IPUConfig, find_config
from ipu_pipeline.errors import PipelineError
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.targets.base import Executable
from ipu_pipeline.tasks.question_answering import (
    QuestionAnsweringDataset,
    score_predictions,
    select_answers,
    write_predictions,
)
from ipu_pipeline.training import (
    TrainingArguments,
    build_optimizer,
    evaluate_loop,
    save_results,
    train,
)


def run(options: Options) -> None:
    """Fine-tune and evaluate a question-answering model that is split over pipeline stages."""
    from transformers import set_seed
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()  # type: ignore[no-untyped-call]  # of loading and saving files
    if not is_first():
        set_verbosity_error()  # type: ignore[no-untyped-call]  # the first process says the same
    check_output_dir(options)
    set_seed(options.seed)  # the new head's weights
    model, tokenizer = load_model_and_tokenizer(options.model_name_or_path)
    train_windows, validation_windows = load_windows(options, tokenizer)

    plan = make_plan(options, model, train_windows or validation_windows)
    say(describe(plan))
    arguments = training_arguments(options, plan)
    executable = ipp.compile(
        model,
        plan,
        target=options.target,
        optimizer=build_optimizer(model, arguments) if options.do_train else None,
        **asdict(arguments.execution_options(schedule=options.schedule)),
    )
    timed = TimedExecutable(executable)
    try:
        if options.eval_before_training:
            scores = evaluate(options, executable, validation_windows, arguments)
            say(f"before training: {in_words(scores)}")
            write_results(options, "before", {f"before_{name}": scores[name] for name in scores})
        if train_windows is not None:
            train(cast(Executable, timed), train_windows, arguments, tokenizer=tokenizer)
            say(measured_against_predicted(plan, timed))
            weights = executable.state_dict()  # of all processes, so all of them ask
            if is_first():
                model.save_pretrained(options.output_dir, state_dict=weights)
                tokenizer.save_pretrained(options.output_dir)
        if options.do_eval:
            scores = evaluate(options, executable, validation_windows, arguments)
            say(f"{'after training' if options.do_train else 'result'}: {in_words(scores)}")
            write_results(options, "eval", scores)
        if is_first():
            plan.save(options.output_dir / "plan.json")
    finally:
        executable.close()


def check_output_dir(options: Options) -> None:
    """Refuse to train into a folder that holds another run."""
    folder = options.output_dir
    fresh = options.do_train and options.resume_from_checkpoint is None
    if fresh and not options.overwrite_output_dir and folder.is_dir() and any(folder.iterdir()):
        raise PipelineError(
            f"{folder} is not empty; resume with --resume_from_checkpoint latest, start over with "
            "--overwrite_output_dir, or choose another --output_dir"
        )


def make_plan(options: Options, model: Any, windows: QuestionAnsweringDataset | None) -> Plan:
    """Read the plan of ``--plan``, or find the best split."""
    if options.plan is not None:
        return Plan.load(options.plan)
    assert windows is not None  # Options refuses to do neither training nor evaluation
    config = read_ipu_config(options)
    microbatches = options.gradient_accumulation_steps
    if microbatches is None:
        microbatches = 1 if config is None else config.gradient_accumulation_steps
    replicas = 1 if config is None else config.replicas()
    if config is not None and options.target == "local":
        replicas = 1
        if note := local_note(config):
            say(note)
    pod = options.pod_type if options.target == "poptorch" else None
    size = options.per_device_eval_batch_size
    if options.do_train:
        size = options.per_device_train_batch_size
    return ipp.plan(
        model,
        {name: column[:size] for name, column in windows.tensors.items()},
        machine=options.machine or pod or "local",
        num_stages=options.num_stages,
        microbatches=microbatches,
        replicas=replicas,
        schedule=options.schedule,
        costs=options.costs,
        config=config,
    )


def read_ipu_config(options: Options) -> IPUConfig | None:
    """Return the configuration that the IPU options describe, ``None`` when all are absent."""
    name, overrides = options.ipu_config_name, options.ipu_config_overrides
    if name is None and not overrides and options.pod_type is None:
        return None
    config = IPUConfig() if name is None else find_config(name)
    return config.apply_overrides(overrides).for_pod(options.pod_type)


def training_arguments(options: Options, plan: Plan) -> TrainingArguments:
    """Hand over every option that ``TrainingArguments`` has a field for."""
    names = {item.name for item in fields(TrainingArguments)} & {f.name for f in fields(Options)}
    given: dict[str, Any] = {name: getattr(options, name) for name in sorted(names)}
    given |= {"output_dir": str(options.output_dir), "replicas": plan.replicas}
    if options.gradient_accumulation_steps is None:
        given["gradient_accumulation_steps"] = plan.num_microbatches
    config = read_ipu_config(options)
    if config is not None and options.target == "distributed":
        given["replicated_tensor_sharding"] = config.replicated_tensor_sharding
    return TrainingArguments(**given)


def evaluate(
    options: Options,
    executable: Executable,
    windows: QuestionAnsweringDataset | None,
    arguments: TrainingArguments,
) -> dict[str, Any]:
    """Answer every validation question; write the answers and return the scores."""
    assert windows is not None  # load_windows gives them whenever something is evaluated
    output = evaluate_loop(executable, windows, arguments)
    answers = select_answers(
        windows.examples,
        windows.windows,
        output.outputs["start_logits"].float().numpy(),
        output.outputs["end_logits"].float().numpy(),
        n_best_size=options.n_best_size,
        max_answer_length=options.max_answer_length,
    )
    best = {identifier: candidates[0].text for identifier, candidates in answers.items()}
    scores = score_predictions(windows.examples, best)
    if is_first():
        write_predictions(options.output_dir, answers)
    return output.metrics | {
        "eval_f1": scores.f1,
        "eval_exact_match": scores.exact_match,
        "eval_samples": scores.total,
    }


def write_results(options: Options, split: str, scores: dict[str, Any]) -> None:
    """Write scores to the result files, if this is the process that writes."""
    if is_first():
        save_results(options.output_dir, split, scores)


def in_words(scores: dict[str, Any]) -> str:
    """Return the scores as a line."""
    return (
        f"F1 {scores['eval_f1']:.2f}, exact match {scores['eval_exact_match']:.2f} "
        f"on {scores['eval_samples']} questions ({scores['eval_runtime']:.1f} s)"
    )


def main() -> None:
    """Run the command line; an error that the user can act on is one line."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(as_command(run))
    try:
        app()
    except (PipelineError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

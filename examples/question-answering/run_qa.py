r"""Fine-tune a Transformers model for extractive question answering, split over pipeline stages.

    python examples/question-answering/run_qa.py --model_name_or_path minilm --num_stages 2 \
        --train_file out/demo_data/train.json --validation_file out/demo_data/validation.json \
        --do_train --do_eval --output_dir out/qa

Options are spelled as in transformers' own run_qa.py; ``qa_options.py`` lists them.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, cast

import typer
from demo_model import load_model_and_tokenizer
from plan_report import TimedExecutable, describe, measured_against_predicted
from qa_data import load_windows
from qa_options import Options
from script_run import (
    check_output_dir,
    make_plan,
    read_ipu_config,
    run_command_line,
    training_arguments,
)

import ipu_pipeline as ipp
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
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]  # of loading and saving files
    check_output_dir(options)
    set_seed(options.seed)  # the new head's weights
    model, tokenizer = load_model_and_tokenizer(options.model_name_or_path)
    train_windows, validation_windows = load_windows(options, tokenizer)

    windows = train_windows or validation_windows
    assert windows is not None  # the options refuse to do neither training nor evaluation
    plan = make_plan(options, model, windows.tensors, read_ipu_config(options))
    typer.echo(describe(plan))
    arguments = training_arguments(
        options, microbatches=plan.num_microbatches, replicas=plan.replicas
    )
    executable = ipp.compile(
        model,
        plan,
        target=options.target,
        optimizer=build_optimizer(model, arguments) if options.do_train else None,
        **asdict(arguments.execution_options(schedule=options.schedule)),
    )
    timed = TimedExecutable(executable)
    folder = options.output_dir
    try:
        if options.eval_before_training:
            scores = evaluate(options, executable, validation_windows, arguments)
            typer.echo(f"before training: {in_words(scores)}")
            save_results(folder, "before", {f"before_{name}": scores[name] for name in scores})
        if train_windows is not None:
            train(cast(Executable, timed), train_windows, arguments, tokenizer=tokenizer)
            typer.echo(measured_against_predicted(plan, timed))
            model.save_pretrained(folder, state_dict=executable.state_dict())
            tokenizer.save_pretrained(folder)
        if options.do_eval:
            scores = evaluate(options, executable, validation_windows, arguments)
            typer.echo(f"{'after training' if options.do_train else 'result'}: {in_words(scores)}")
            save_results(folder, "eval", scores)
        plan.save(folder / "plan.json")
    finally:
        executable.close()


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
    write_predictions(options.output_dir, answers)
    return output.metrics | {
        "eval_f1": scores.f1,
        "eval_exact_match": scores.exact_match,
        "eval_samples": scores.total,
    }


def in_words(scores: dict[str, Any]) -> str:
    """Return the scores as a line."""
    return (
        f"F1 {scores['eval_f1']:.2f}, exact match {scores['eval_exact_match']:.2f} "
        f"on {scores['eval_samples']} questions ({scores['eval_runtime']:.1f} s)"
    )


def main() -> None:
    """Run the command line."""
    run_command_line(run, Options)


if __name__ == "__main__":
    main()

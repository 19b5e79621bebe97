"""The example scripts as modules, and an unsplit executable that stands in for a target."""

import importlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ipu_pipeline
from ipu_pipeline.ir.graph import Block, BlockGraph, TensorSpec
from ipu_pipeline.ir.machine import Device, Link, Machine
from ipu_pipeline.ir.plan import ModelIdentity, Plan, PlannedStage
from ipu_pipeline.stages.executable import EvalResult, ExecutionOptions, StepResult

FOLDER = Path(__file__).parents[2] / "examples" / "question-answering"


@pytest.fixture
def example(monkeypatch):
    """Return a function that imports a module of the example by name."""
    monkeypatch.syspath_prepend(str(FOLDER.parent / "common"))
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


class EagerExecutable:
    """The unsplit model, driven microbatch by microbatch: enough to test a script around it."""

    batch_divisor: int | None = None

    def __init__(self, model, plan, optimizer, options):
        self.model, self.plan, self.optimizer, self.options = model, plan, optimizer, options
        self.global_step = 0
        self.closed = False

    def train_step(self, batch):
        self.model.train()
        self.optimizer.zero_grad()
        loss = self.model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.options.max_grad_norm)
        self.optimizer.step()
        self.global_step += 1
        return StepResult(loss.item(), num_samples=len(batch["input_ids"]), stage_s=(0.25, 0.5))

    def share_of(self, num_samples):
        return slice(num_samples)

    def eval_step(self, batch):
        self.model.eval()
        with torch.no_grad():
            output = self.model(**batch)
        logits = {name: getattr(output, name) for name in ("start_logits", "end_logits")}
        return EvalResult(output.loss.item(), logits)

    def state_dict(self):
        return self.model.state_dict()

    def save_checkpoint(self, path, extra=None, *, blocking=True, attach=None):
        Path(path).mkdir(parents=True, exist_ok=True)
        return Path(path)

    def wait_for_checkpoint(self):
        pass

    def broadcast(self, value):
        return value

    def close(self):
        self.closed = True


def make_plan(microbatches=2, size=4):
    """Return a plan of two stages with made-up prices."""
    device = Device("cpu", 10**9, {"float32": 1e9}, 1e9)
    blocks = tuple(Block(name, "layer") for name in ("a", "b"))
    stages = tuple(
        PlannedStage(i, (b.name,), forward_s=0.01, backward_s=0.02) for i, b in enumerate(blocks)
    )
    inputs = (TensorSpec("input_ids", (size, 64), "int64"),)
    return Plan(
        ModelIdentity("Tiny", {}),
        Machine("local", (device, device), Link(1e9)),
        stages,
        BlockGraph("Tiny", blocks, inputs=inputs),
        num_microbatches=microbatches,
        objective_s=0.1,
        lower_bound_s=0.1,
    )


@pytest.fixture
def eager(monkeypatch):
    """Replace planning and compiling; return what they were called with, and the executable."""
    calls = {}

    def plan(model, batch, **options):
        calls["plan"] = {"model": model, "batch": batch, **options}
        made = make_plan(options["microbatches"], len(batch["input_ids"]))
        return replace(made, replicas=options["replicas"])

    def compile_(model, plan, *, target, optimizer, **given):
        options = ExecutionOptions(**given)
        calls["compile"] = {"target": target, "optimizer": optimizer, "options": options}
        calls["executable"] = EagerExecutable(model, plan, optimizer, options)
        return calls["executable"]

    monkeypatch.setattr(ipu_pipeline, "plan", plan, raising=False)
    monkeypatch.setattr(ipu_pipeline, "compile", compile_, raising=False)
    return calls


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Write a tiny BERT with a word-level tokenizer of the demo data; return its folder."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertForQuestionAnswering, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    pieces = [chr(c) for c in range(33, 127)]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = [*special, *pieces, *("##" + piece for piece in pieces)]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]"}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask", "token_type_ids"],
        **{f"{kind}_token": text for kind, text in names.items()},
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    BertForQuestionAnswering(config).save_pretrained(folder)
    return folder


@pytest.fixture
def script(example):
    return example("run_qa")


@pytest.fixture
def files(example, tmp_path):
    example("make_demo_data").main(tmp_path, 1, 24, 8)
    return tmp_path / "train.json", tmp_path / "validation.json"


@pytest.fixture
def options(example, tiny_model, files, tmp_path):
    def given(**changes):
        """Return what the options are made of."""
        return {
            "model_name_or_path": str(tiny_model),
            "output_dir": tmp_path / "out",
            "train_file": files[0],
            "validation_file": files[1],
            "max_seq_length": 192,
            "doc_stride": 16,
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "max_steps": 3,
            "learning_rate": 1e-3,
            "disable_tqdm": True,
            **changes,
        }

    def make(**changes):
        return example("qa_options").Options(**given(**changes))

    make.given = given
    return make

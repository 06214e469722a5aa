"""Asserts that the tokens, losses and gradients here are those of TRL's own SFT, DPO and KTO trainers."""
import tempfile

import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

from . import adapters, data, models
from .expected import Scorer, batch
from .objectives import BETA, OBJECTIVES

COMMON = dict(per_device_train_batch_size=8, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
              disable_tqdm=True, max_length=None)
TRAINERS = {"sft": (SFTTrainer, SFTConfig, dict(loss_type="nll")),
            "dpo": (DPOTrainer, DPOConfig, dict(loss_type=["sigmoid"], beta=BETA)),
            "kto": (KTOTrainer, KTOConfig, dict(loss_type="kto", beta=BETA))}


def check(folder, files):
    """All three trainers on one model; returns {objective: largest relative gradient difference}."""
    if "{%- generation" in models.load(folder)[1].chat_template:
        check_assistant_only(folder, files["turns"])
    return {name: check_objective(folder, files[OBJECTIVES[name].data], name) for name in TRAINERS}


def make_trainer(name, folder, rows, **extra):
    """TRL's trainer on a loaded adapter. The reference is given as a model of its own: left alone, TRL would take a
    frozen copy of the loaded adapter."""
    trainer, config, options = TRAINERS[name]
    peft, tok = adapters.load(folder, folder / "adapter", attention="sdpa")
    more = {} if name == "sft" else dict(ref_model=models.load(folder, "sdpa")[0])
    with tempfile.TemporaryDirectory() as scratch:
        args = config(output_dir=scratch, **{**COMMON, **options, **extra})
        return trainer(model=peft, args=args, train_dataset=Dataset.from_list(rows), processing_class=tok, **more)


def check_objective(folder, rows, name):
    rows = [data.with_prompt(row) for row in rows]
    talks = [isinstance(row["prompt"], list) for row in rows]
    make_plain = make_trainer(name, folder, [row for row, talk in zip(rows, talks) if not talk])
    trainer = make_trainer(name, folder, [row for row, talk in zip(rows, talks) if talk])
    plain, conversational = iter(make_plain.train_dataset), iter(trainer.train_dataset)
    prepared = [next(conversational if talk else plain) for talk in talks]  # TRL's tokens, in the file's order

    tok, keys = trainer.processing_class, data.response_keys(rows[0])
    encoded = [data.encode(tok, row) for row in rows]
    for row, ours, theirs in zip(rows, encoded, prepared):
        if name == "sft":
            mask = [-100] * len(ours[0].prompt_ids)
            assert theirs["input_ids"] == ours[0].prompt_ids + ours[0].ids, row
            assert theirs["labels"] == mask + ours[0].ids, row
        else:
            assert theirs["prompt_ids"] == ours[0].prompt_ids, row
            assert [theirs[f"{k}_ids"] for k in keys] == [r.ids for r in ours], row
    if name == "kto":  # one rotation over the whole file
        for i, row in enumerate(prepared):
            row["KL_completion_ids"] = prepared[i - 1]["completion_ids"]

    trainer.model.eval()
    theirs = trainer.compute_loss(trainer.model, trainer.data_collator(prepared))
    theirs.backward()
    peft, _ = adapters.load(folder, folder / "adapter")
    ours = OBJECTIVES[name].loss(batch(Scorer(peft), tok, rows))
    ours.backward()
    assert abs(theirs.item() - ours.item()) < 1e-5 * max(1, abs(ours.item())), (name, theirs.item(), ours.item())
    other, worst = adapters.lora_parameters(trainer.model), 0.0
    for n, p in adapters.lora_parameters(peft).items():
        worst = max(worst, ((p.grad - other[n].grad).norm() / p.grad.norm()).item())
    assert worst < 1e-4, (name, worst)
    return worst


def check_assistant_only(folder, rows):
    """SFT on all assistant turns of a conversation at once, by the template's `generation` tags."""
    trainer = make_trainer("sft", folder, rows, assistant_only_loss=True)
    tok, trained = trainer.processing_class, []
    for row, theirs in zip(rows, trainer.train_dataset):
        labels = [-100] * len(theirs["labels"])
        for r in data.encode_turns(tok, row):
            labels[len(r.prompt_ids):len(r.prompt_ids + r.ids)] = r.ids
        assert theirs["labels"] == labels, row
        trained.append(theirs)
    trainer.model.eval()
    theirs = trainer.compute_loss(trainer.model, trainer.data_collator(trained)).item()
    peft, _ = adapters.load(folder, folder / "adapter")
    ours = OBJECTIVES["sft-turns"].loss(batch(Scorer(peft), tok, rows)).item()
    assert abs(theirs - ours) < 1e-5 * ours, (theirs, ours)

"""What to write instead: names that users bring along from Lightning, and the form that a setting of folders has."""

from __future__ import annotations

import re

# Lightning's name to what does it here.
LIGHTNING = {
    "accumulate_grad_batches": "trainer.micro_batch_size=SAMPLES, which splits the batch of a step",
    "auto_lr_find": "optim.lr=RATE",
    "check_val_every_n_epoch": "callbacks.validation.every_steps=STEPS",
    "default_root_dir": "runs_dir=DIR",
    "detect_anomaly": "trainer.nonfinite_limit=STEPS",
    "enable_checkpointing": "callbacks.checkpoint.every_steps=STEPS",
    "enable_progress_bar": "callbacks.progress=false",
    "every_n_train_steps": "callbacks.checkpoint.every_steps=STEPS",
    "fast_dev_run": "debug=fdr",
    "gpus": "trainer=ddp trainer.devices=NUMBER",
    "gradient_clip_algorithm": "optim.clip_norm=NORM",
    "gradient_clip_val": "optim.clip_norm=NORM",
    "learning_rate": "optim.lr=RATE",
    "limit_train_batches": "trainer.max_steps=STEPS",
    "limit_val_batches": "callbacks.validation.limit=SAMPLES",
    "log_every_n_steps": "callbacks.log_every=STEPS",
    "max_epochs": "trainer.max_steps=STEPS",
    "min_epochs": "trainer.max_steps=STEPS",
    "min_steps": "trainer.max_steps=STEPS",
    "num_workers": "data.workers=NUMBER",
    "resume_from_checkpoint": "ckpt_path=last",
    "save_top_k": "callbacks.checkpoint.keep=NUMBER",
    "seed_everything": "seed=NUMBER",
    "sync_batchnorm": "nothing: batch statistics are those of the whole batch on any number of ranks",
    "val_check_interval": "callbacks.validation.every_steps",
}
_WRONG_TYPE = re.compile(r"not a ListConfig|Cannot assign|incompatible with type hint|Error merging override")


def lightning_name(key: str) -> str | None:
    """A sentence about a setting that Lightning has under this name, or None."""
    instead = LIGHTNING.get(key.rpartition(".")[2])
    return None if instead is None else f"{key!r} is a name of Lightning's; here it is {instead}."


def wrong_form(key: str, text: str, arguments: list[str]) -> str | None:
    """A sentence with the form that a list or a mapping of folders is given in, or None for another fault.

    Args:
        key: the dotted name of the setting; empty where the error names none.
        text: the error's own words.
        arguments: of the command line, for what was given.
    """
    if key == "trainer.devices" and "auto" in text:
        return (
            "trainer.devices=auto is Lightning's; give the number of devices to train on, as in trainer=ddp "
            "trainer.devices=8 (`nvidia-smi -L` lists them)."
        )
    if not _WRONG_TYPE.search(text):
        return None
    given = next((a.lstrip("+") for a in arguments if _names(a, key)), "")
    key, _, value = given.partition("=") if given else (key, "", "DIR")
    value = value.strip("[]{}'\"").rpartition(": ")[2]
    value = "DIR" if value in {"", "null", "true", "false"} else value
    if key.startswith(("data.sources", "data.val")) and "list" not in text.partition("Dict")[0]:
        name = key.split(".")[2] if key.count(".") == 2 else "mine"
        setting = ".".join(key.split(".")[:2])
        return (
            f"{given or key} is not of the form that {setting} has; give names and their folders, "
            f"{setting}={{{name}: [{value}]}}, or {setting}={{}} for none."
        )
    if "ListConfig" in text or "List[" in text:
        return f"{given or key}: {key} is a list; give {key}=[{value}]."
    return None


def _names(argument: str, key: str) -> bool:
    """Whether an argument sets ``key`` or what it lies in."""
    given, equals, _ = argument.lstrip("+").partition("=")
    return bool(equals and given and key) and (key == given or key.startswith(f"{given}."))


def path_for_group(group: str, name: str) -> str | None:
    """A sentence about ``data=DIR`` for `interloom train`, where ``data`` chooses a configuration; or None."""
    whole = f"{group}/{name}" if group else name
    if group.split("/")[0] != "data" or ("/" not in whole.removeprefix("data/") and "." not in name):
        return None
    folder = whole.removeprefix("data/")
    return (
        f"data={folder}: data chooses a configuration, pairs or documents; its folders are given as "
        f"data.train=[{folder}] for pairs, as data.sources={{mine: [{folder}]}} for documents."
    )


def other_familys(key: str, known: list[str]) -> str | None:
    """A sentence about ``data.train`` given for documents, or ``data.sources`` for pairs; or None."""
    if key == "data.train" and "data.sources" in known:
        return "'data.train' is a setting of pairs; documents are given as data.sources={mine: [DIR]}."
    if key.startswith("data.sources") and "data.train" in known:
        return "'data.sources' is a setting of documents; pairs are given as data.train=[DIR]."
    return None

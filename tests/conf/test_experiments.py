"""Every file of conf/ composes into the typed configuration, and every experiment says what to expect of it."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from interloom.train.checkpointing.load import family_of
from interloom.train.commands.schemas import register_schemas
from interloom.train.config import TrainConfig, typed
from interloom.train.evaluation.tasks import check_task
from interloom.train.optim.adamw import learning_rate

CONF = Path(str(files("interloom.conf")))


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def composed(*overrides: str) -> TrainConfig:
    register_schemas()
    with initialize_config_module("interloom.conf", version_base="1.3"):
        return typed(compose("train", overrides=list(overrides)))


@pytest.mark.parametrize("experiment", names("experiment"))
def test_every_experiment_composes_and_builds_its_model_config(experiment: str) -> None:
    settings = composed(f"experiment={experiment}")
    assert family_of(settings.model.model_config().to_dict()["model_type"]) == settings.model.family
    if settings.task:
        check_task(settings.task)


@pytest.mark.parametrize("experiment", names("experiment"))
def test_every_experiment_says_how_to_run_it_and_what_to_expect(experiment: str) -> None:
    head = (CONF / "experiment" / f"{experiment}.yaml").read_text().split("\n\n")[0]
    for word in ("Command:", "Hardware:", "Time:", "Expected:", f"experiment={experiment}"):
        assert word in head, word


@pytest.mark.parametrize(
    "choice",
    [f"{group}={name}" for group in ("model", "data", "optim", "trainer", "callbacks", "logger", "task", "debug")
     for name in names(group)],
)  # fmt: skip
def test_every_choice_of_every_group_composes(choice: str) -> None:
    assert isinstance(composed(choice), TrainConfig)


def test_the_published_recipe() -> None:
    settings = composed("experiment=groupvit_gcc_yfcc")
    model = settings.model.model_config()
    vision, text = model.vision_config, model.text_config
    assert (vision.hidden_size, *vision.depths, *vision.num_group_tokens) == (384, 6, 3, 3, 64, 8, 0)
    assert (vision.num_attention_heads, vision.patch_size, vision.drop_path_rate) == (6, 16, 0.1)
    assert (text.hidden_size, text.num_hidden_layers, text.num_attention_heads) == (256, 12, 4)
    assert (settings.data.batch_size, settings.model.multi_label, settings.optim.clip_norm) == (4096, 3, 5.0)
    pairs = 2_891_445 + 11_156_203 + 14_615_499
    assert settings.trainer.max_steps == pairs // 4096 * 30
    assert settings.optim.warmup_steps == pairs // 4096 * 2
    rates = [learning_rate(settings.optim, step, 209_910, 4096) for step in (0, 13_994, 209_910)]
    assert rates == pytest.approx([4e-6, 1.6e-3, 4e-5])


def test_the_second_recipe_differs_where_the_authors_say() -> None:
    first, second = composed("experiment=groupvit_gcc_yfcc"), composed("experiment=groupvit_gcc_redcaps")
    assert second.model.multi_label == 0
    assert second.trainer.max_steps == (2_891_445 + 11_156_203 + 11_866_987) // 4096 * 30
    assert first.model.model_config() == second.model.model_config()
    assert (first.data.augment, first.optim.lr) == (second.data.augment, second.optim.lr)


ROOT = Path(__file__).parents[2]
WRITTEN = [
    *sorted((CONF / "experiment").glob("*.yaml")),
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "README.md",
]


def commands_in(text: str) -> list[tuple[str, str, list[str]]]:
    """(verb, subcommand, flags) of every command of Typer's that a page shows, continued lines included."""
    text = re.sub(r"\\\n|\n#\s{3,}(?=--)", " ", text)
    found = []
    for verb, rest in re.findall(r"interloom (data|bench|segment|generate|convert)\b([^`\n|;]*)", text):
        words = rest.split()
        sub = words[0] if verb in {"data", "bench"} and words and not words[0].startswith("-") else ""
        found.append((verb, sub, re.findall(r"(?<![\w-])--[a-z][a-z-]*", rest.partition("&&")[0])))
    return found


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_commands_in_recipes_and_pages_name_flags_that_exist(page: Path) -> None:
    import typer
    from interloom.train.cli import VERBS, load

    for verb, sub, flags in commands_in(page.read_text(encoding="utf-8")):
        target = load(VERBS[verb].target)
        if not isinstance(target, typer.Typer):
            app = typer.Typer()
            app.command()(target)
            target = app
        command: Any = typer.main.get_command(target)
        if sub:
            assert sub in command.commands, f"interloom {verb} {sub}"
            command = command.commands[sub]
            if getattr(command, "context_settings", {}).get("ignore_unknown_options"):
                continue
        known = {option for parameter in getattr(command, "params", ()) for option in parameter.opts}
        known |= {
            option for parameter in getattr(command, "params", ()) for option in parameter.secondary_opts
        }
        assert set(flags) <= known | {"--help", "--json"}, (verb, sub, flags)

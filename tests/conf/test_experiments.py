"""Every file of conf/ composes into the typed configuration, and every experiment says what to expect of it."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from interloom.train.config import TrainConfig, register_schemas, typed
from interloom.train.evaluation.tasks import check_task
from interloom.train.optim import learning_rate

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
    assert settings.model.model_config().to_dict()["model_type"] == settings.model.family
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

"""The commands that the recipe names build its four sources, and training takes steps on all of them."""

import base64
import csv
import io
import json
import math
import re
import shlex
import tarfile
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from interloom.train.cli import main
from interloom.train.data.drawn.documents import write_tokenizer
from PIL import Image

RECIPES = Path(str(files("interloom.conf"))) / "experiment"
WORDS = "the number of objects is one . the red one is a mushroom . "


def commands(recipe):
    """The words of each `interloom data documents` that a recipe's head names."""
    head = (RECIPES / f"{recipe}.yaml").read_text().split("\ndefaults:")[0]
    joined = re.sub(r"\n#\s+(?=--)", " ", head)
    return [shlex.split(found) for found in re.findall(r"interloom (data documents [^\n]*)", joined)]


def png(seed):
    pixels = np.random.default_rng(seed).integers(0, 255, (160, 200, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


def write_tar(path, start):
    """As img2dataset writes them."""
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w") as file:
        for number in range(start, start + 6):
            about = {"caption": WORDS, "url": f"http://example.org/{number}.png", "status": "success"}
            for suffix, data in (
                ("json", json.dumps(about).encode()),
                ("png", png(number)),
                ("txt", WORDS.encode()),
            ):
                info = tarfile.TarInfo(f"{number:09d}.{suffix}")
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))


def raw(root):
    """Small stand-ins for what the recipe reads."""
    (root / "raw" / "wikipedia").mkdir(parents=True)
    pages = [
        {"id": str(n), "url": f"https://example.org/{n}", "title": "A", "text": WORDS * 4} for n in range(6)
    ]
    (root / "raw" / "wikipedia" / "a.jsonl").write_text("".join(json.dumps(page) + "\n" for page in pages))
    write_tar(root / "raw" / "laion" / "00000.tar", 0)
    write_tar(root / "raw" / "pmd" / "00000.tar", 100)
    records = [
        {
            "images": [None, base64.b64encode(png(200 + n)).decode(), None],
            "texts": [WORDS, None, WORDS],
            "metadata": json.dumps([None, {"src": f"http://example.org/{n}.png"}, None]),
            "general_metadata": "{}",
        }
        for n in range(6)
    ]
    (root / "obelics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    write_tokenizer(root / "data" / "tokenizer")


@pytest.mark.parametrize("recipe", ["idefics_9b", "idefics_80b"])
def test_a_recipe_names_a_command_for_each_of_its_sources(recipe):
    import yaml

    settings = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text())
    assert [words[3] for words in commands(recipe)] == [
        folder for (folder,) in settings["data"]["sources"].values()
    ]


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("idefics_9b*.yaml")))
def test_every_recipe_of_this_size_says_how_its_sources_are_made(recipe):
    import yaml

    settings = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text())
    wanted = {folder for folders in settings["data"]["sources"].values() for folder in folders}
    assert {words[3] for words in commands(recipe)} == wanted


def test_the_four_sources_and_two_steps(tmp_path, monkeypatch, capsys):
    raw(tmp_path)
    monkeypatch.chdir(tmp_path)
    for words in commands("idefics_9b"):
        made = ["obelics.jsonl" if word == "HuggingFaceM4/OBELICS" else word for word in words]
        assert main([*made, "--workers", "1"]) == 0, words
    small = [
        "vocab_size=128", "additional_vocab_size=2", "hidden_size=32", "intermediate_size=48", "num_hidden_layers=2",
        "num_attention_heads=2", "cross_layer_interval=1", "use_resampler=false", "vision_config.embed_dim=16",
        "vision_config.image_size=32", "vision_config.patch_size=16", "vision_config.intermediate_size=32",
        "vision_config.num_hidden_layers=1", "vision_config.num_attention_heads=2",
    ]  # fmt: skip
    code = main([
        "train", "experiment=idefics_9b", "trainer=cpu", "trainer.precision=32-true", "trainer.max_steps=2",
        "data.batch_size=8", "data.max_tokens=64", "data.image_size=32", "data.workers=0", "callbacks.progress=false",
        "callbacks.log_every=1",
        "data.weights={obelics: 25, wikipedia: 25, laion: 25, pmd: 25}",
        *(f"model.config.{setting}" for setting in small),
    ])  # fmt: skip
    assert code == 0, capsys.readouterr().err
    (rows,) = tmp_path.glob("runs/idefics_9b/2*/metrics.csv")
    steps = list(csv.DictReader(rows.open()))
    losses = [float(row["train/loss"]) for row in steps if row.get("train/loss")]
    assert len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses)
    seen = {name for row in steps for name, value in row.items() if name.startswith("train/loss/") and value}
    assert seen == {f"train/loss/{source}" for source in ("obelics", "wikipedia", "laion", "pmd")}

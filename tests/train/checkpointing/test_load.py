"""One way from a name to a model: every verb and both families take the same names and refuse them alike."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError
from interloom.models import IdeficsForVisionText2Text
from interloom.train.checkpointing.load import load_pretrained, load_processor, model_type, saved_config
from interloom.train.cli import main

FIXTURES = Path(__file__).parents[2] / "fixtures" / "transformers_437"


@pytest.fixture(name="hub")
def make_hub(tmp_path, monkeypatch):
    """A hub that has owner/idefics and owner/groupvit, and owner/gated for others."""
    import httpx

    answer = httpx.Response(403, request=httpx.Request("GET", "https://example.org"))

    def download(repo, name, **options):
        owner, kind = repo.split("/")
        if kind == "gated":
            raise GatedRepoError("403 Client Error.", response=answer)
        if owner != "owner" or not (FIXTURES / kind).is_dir():
            raise RepositoryNotFoundError("404 Client Error.", response=answer)
        if not (FIXTURES / kind / name).exists():
            raise EntryNotFoundError("404")
        (tmp_path / "cache" / kind).mkdir(exist_ok=True, parents=True)
        return shutil.copy(FIXTURES / kind / name, tmp_path / "cache" / kind / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)


def test_hub_ids_serve_both_families_and_every_verb(hub, tmp_path, capsys):
    for family in ("idefics", "groupvit"):
        name = f"owner/{family}"
        assert model_type(name) == family
        model, processor = load_pretrained(name, family=family)
        assert type(processor) is type(load_processor(name))
        assert saved_config(name)["model_type"] == family
        assert main(["convert", name, str(tmp_path / family)]) == 0
        again, _ = load_pretrained(tmp_path / family)
        state = again.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert main(["generate", "--checkpoint", "owner/idefics", "--prompt", "the cat", "--json"]) == 0
    written = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(written["tokens"]) <= 7  # of its generation_config.json


def arguments(verb, name):
    return {
        "generate": ["generate", "--checkpoint", name, "--prompt", "x"],
        "convert": ["convert", name, "NOWHERE/x"],
        "train idefics": ["train", "experiment=idefics_demo", f"model.init_checkpoint={name}"],
        "train groupvit": ["train", "experiment=groupvit_demo", f"model.init_checkpoint={name}"],
        "eval": ["eval", "task=perplexity", f"checkpoint={name}", "data=x", "runs_dir=NOWHERE/runs"],
    }[verb]


@pytest.mark.parametrize("verb", ["generate", "convert", "train idefics", "train groupvit", "eval"])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("owner/typo", "there is no such repository"),
        ("owner/gated", "is gated"),
        ("no/such/folder", "does not exist"),
    ],
)
def test_what_is_not_to_be_had_is_one_sentence(hub, tmp_path, capsys, verb, name, words):
    given = [argument.replace("NOWHERE", str(tmp_path)) for argument in arguments(verb, name)]
    assert main(given) == 2
    error = capsys.readouterr().err.strip()
    assert words in error
    assert name in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.rglob("config.yaml"))


def test_the_wrong_family_is_named(capsys):
    assert main(["generate", "--checkpoint", str(FIXTURES / "groupvit"), "--prompt", "x"]) == 2
    assert "holds a groupvit model; this needs an IDEFICS" in capsys.readouterr().err


def test_a_folder_of_adapters_is_its_base_with_them_merged(tmp_path):
    peft = pytest.importorskip("peft")
    model = IdeficsForVisionText2Text.from_pretrained(FIXTURES / "idefics")
    settings = peft.LoraConfig(r=2, lora_alpha=6, target_modules=r".*(q_proj|down_proj|fc1)")
    adapted = peft.get_peft_model(model, settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_" in name:
                value.normal_(std=0.3, generator=generator)
    adapted.eval()
    ids = torch.tensor([[1, 5, 9, 4]])
    expected = adapted(input_ids=ids).logits
    adapted.save_pretrained(tmp_path / "adapters")
    path = tmp_path / "adapters" / "adapter_config.json"
    values = {**json.loads(path.read_text()), "base_model_name_or_path": str(FIXTURES / "idefics")}
    path.write_text(json.dumps(values))
    assert model_type(tmp_path / "adapters") == "idefics"
    merged, processor = load_pretrained(tmp_path / "adapters")
    torch.testing.assert_close(merged(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert processor.image_processor.image_size == 28
    plain = IdeficsForVisionText2Text.from_pretrained(FIXTURES / "idefics")(input_ids=ids).logits
    assert not torch.allclose(plain, expected, atol=1e-2)
    for name, value in (("use_dora", True), ("bias", "all"), ("peft_type", "IA3")):
        path.write_text(json.dumps({**values, name: value}))
        with pytest.raises(ValueError, match="merged here"):
            load_pretrained(tmp_path / "adapters")
    path.write_text(json.dumps({**values, "base_model_name_or_path": "no/such/base"}))
    with pytest.raises((ValueError, FileNotFoundError), match="no/such/base"):
        load_pretrained(tmp_path / "adapters")

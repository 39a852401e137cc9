"""Caption tokenizers: what they do not know is counted, and one can be made of one's own captions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from interloom.train.cli import main
from interloom.train.data.pairs.vocabulary import (
    build_tokenizer,
    check_captions,
    unknown_names,
    unknown_words,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors

CAPTIONS = ["A dog on the beach", "two dogs and a cat on a sofa", "a café in Paris, 1999"] * 30


def word_tokenizer(*words: str) -> Any:
    from interloom.models.groupvit.tokenizer import GroupViTTokenizer

    vocabulary = {word: i for i, word in enumerate(["[UNK]", *words, "<s>", "</s>"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(t, vocabulary[t]) for t in ("<s>", "</s>")]
    )
    return GroupViTTokenizer(backend, bos_token="<s>", eos_token="</s>")


def test_unknown_words_are_counted() -> None:
    found = unknown_words(word_tokenizer("a", "cat", "on"), ["a cat on a sofa", "a sofa", "Sofa dog"])
    assert (found.tokens, found.of) == (4, 9)
    assert found.words == ("sofa", "dog")
    assert unknown_names(word_tokenizer("cat", "dog"), ["cat", "red cat", "blue sofa"]) == ["blue sofa"]


def test_a_few_are_said_and_many_refused() -> None:
    tokenizer = word_tokenizer(
        *["a", "dog", "on", "the", "beach", "two", "dogs", "and", "cat", "sofa", "in", "Paris"]
    )
    assert check_captions(word_tokenizer("a"), ["a a a"], "t") is None
    warning = check_captions(tokenizer, CAPTIONS, "t")
    assert warning is not None
    assert "'café'" in warning
    assert "interloom data tokenizer" in warning
    with pytest.raises(ValueError, match="does not know 80% of the words"):
        check_captions(word_tokenizer("a"), ["a dog on the beach or a sofa or two"], "t")


def test_a_tokenizer_of_ones_own_knows_every_text_and_transformers_reads_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    made = build_tokenizer(CAPTIONS, vocab_size=700)
    made.save_pretrained(tmp_path)
    assert made.eos_token_id == len(made) - 1
    assert len(made) <= 700
    texts = ["A dog on the beach", "犬 and 🐶: déjà vu?", "unseen words"]
    assert unknown_words(made, texts).tokens == 0
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    assert [theirs(text)["input_ids"] for text in texts] == [made.encode([text])[0] for text in texts]
    assert len(made.encode(["a dog"])[0]) == 4  # words that are frequent are one token


def without_vocabulary(overrides: list[str]) -> list[str]:
    """The overrides of a run that says nothing of its vocabulary itself."""
    return [o for o in overrides if "vocab_size" not in o and "eos_token_id" not in o]


def test_the_command_and_a_run_with_it(tiny_world: Any, tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "tokenizer"
    assert main(["data", "tokenizer", str(tiny_world.shards), str(folder)]) == 0
    assert f"model.tokenizer={folder}" in capsys.readouterr().out
    assert main(["data", "tokenizer", str(tiny_world.shards), str(folder)]) == 2
    assert "is not empty" in capsys.readouterr().err
    # The model is made for it, whatever the experiment says of another vocabulary.
    arguments = [
        *without_vocabulary(tiny_world.overrides),
        f"model.tokenizer={folder}",
        "trainer.max_steps=1",
        f"runs_dir={tmp_path}",
    ]
    assert main(["train", *arguments, "name=own"]) == 0
    said = capsys.readouterr().err
    assert "those of the tokenizer" in said
    from interloom.models import GroupViTConfig

    config = GroupViTConfig.from_pretrained(tmp_path / "own" / "latest" / "model")
    assert config.text_config.eos_token_id == config.text_config.vocab_size - 1 > 512


def test_captions_of_another_vocabulary_are_refused(tiny_world: Any, tmp_path: Path, capsys: Any) -> None:
    word_tokenizer("nothing", "of", "theirs").save_pretrained(tmp_path / "words")
    arguments = [
        *without_vocabulary(tiny_world.overrides),
        f"model.tokenizer={tmp_path / 'words'}",
        f"runs_dir={tmp_path / 'runs'}",
    ]
    assert main(["train", *arguments]) == 2
    assert "of the words of the captions" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()

"""bfloat16 where the processor has no instructions for it is said to be slow, once."""

import warnings

import pytest
from interloom.train import trainer
from interloom.train.config import TrainerConfig


@pytest.mark.parametrize(
    ("precision", "accelerator", "instructions", "told"),
    [
        ("bf16-mixed", "cpu", False, True),
        ("bf16-mixed", "cpu", True, False),
        ("bf16-mixed", "cuda", False, False),
        ("32-true", "cpu", False, False),
    ],
)
def test_slow_bfloat16_is_said_once(monkeypatch, precision, accelerator, instructions, told):
    monkeypatch.setattr(trainer, "has_bfloat16_instructions", lambda: instructions)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            trainer.warn_of_slow_precision(TrainerConfig(precision=precision), accelerator)
    assert len(caught) == told
    assert all("20 times slower" in str(warning.message) for warning in caught)


@pytest.mark.parametrize(
    ("flags", "found"),
    [("fpu avx2 avx512f", False), ("fpu avx512f avx512_bf16", True), ("fp asimd bf16 i8mm", True)],
)
def test_instructions_are_read_from_the_flags_of_the_processor(monkeypatch, flags, found):
    monkeypatch.setattr(trainer.Path, "read_text", lambda path: f"processor\t: 0\nflags\t\t: {flags}\n")
    trainer.has_bfloat16_instructions.cache_clear()
    assert trainer.has_bfloat16_instructions() == found
    trainer.has_bfloat16_instructions.cache_clear()

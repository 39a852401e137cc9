"""Other people's loops and tools around the model: Transformers' ``Trainer``, ``peft``, compilers, exporters."""

import copy
import warnings

import pytest
import torch
import transformers
from interloom.models import IdeficsForVisionText2Text

peft = pytest.importorskip("peft")


def test_transformers_trainer_trains_and_resumes(pair_of, inputs_of, tmp_path):
    model, inputs = copy.deepcopy(pair_of().ours), inputs_of()
    rows = [{n: v[i] for n, v in inputs.items()} | {"labels": inputs["input_ids"][i]} for i in range(2)] * 2
    settings = transformers.TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=2, save_steps=2, report_to=[], use_cpu=True,
        gradient_checkpointing=True, include_num_input_tokens_seen=True, learning_rate=1e-2, logging_steps=1,
        disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model, settings, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < before
    assert model.is_gradient_checkpointing
    trainer.train(resume_from_checkpoint=True)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(after, rel=1e-4)
    model.save_pretrained(tmp_path / "model")
    back = IdeficsForVisionText2Text.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(back(**inputs).logits, model.eval()(**inputs).logits)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"},
        {"target_modules": ["embed_tokens", "q_proj"], "task_type": "CAUSAL_LM"},
    ],
)
def test_adapters_of_peft(options, pair_of, inputs_of, tmp_path):
    plain, inputs = pair_of().ours, inputs_of()
    inputs["input_ids"][0, 5] = plain.config.vocab_size + 1  # an added token is among them
    adapted = peft.get_peft_model(copy.deepcopy(plain), peft.LoraConfig(r=4, **options))
    adapted.eval()
    expected = plain.generate(**inputs, max_new_tokens=4)
    assert torch.equal(adapted.generate(**inputs, max_new_tokens=4), expected)  # B starts at zero
    adapted.train()
    adapted(**inputs, labels=inputs["input_ids"]).loss.backward()
    trained = [name for name, weight in adapted.named_parameters() if weight.requires_grad]
    assert trained
    assert all("lora_" in name and adapted.get_parameter(name).grad is not None for name in trained)
    with torch.no_grad():
        for name in trained:
            adapted.get_parameter(name).normal_(std=0.1)
    adapted.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft says that the table is saved too
        adapted.save_pretrained(tmp_path)
    back = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).eval()
    torch.testing.assert_close(back(**inputs).logits, adapted(**inputs).logits)
    if "embed_tokens" not in options["target_modules"]:
        logits = adapted(**inputs).logits
        torch.testing.assert_close(adapted.merge_and_unload()(**inputs).logits, logits, atol=1e-4, rtol=1e-4)


def test_one_graph_with_the_torch_backend(pair_of, inputs_of, monkeypatch):
    monkeypatch.setenv("INTERLOOM_KERNELS", "torch")
    model, inputs = copy.deepcopy(pair_of().ours).train(), inputs_of()
    traced = torch.compile(model, fullgraph=True, backend="eager")
    losses = []
    for run in (model, traced):
        model.zero_grad()
        loss = run(**inputs, labels=inputs["input_ids"], use_cache=False, z_loss=0.1).loss
        loss.backward()
        losses.append((loss.detach(), model.lm_head.weight.grad.clone()))
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-4)


def test_export(pair_of, inputs_of):
    model, inputs = pair_of().ours, inputs_of()
    with torch.no_grad():
        program = torch.export.export(model, (), {**inputs, "use_cache": False}, strict=False)
        output = program.module()(**inputs, use_cache=False)
        expected = model(**inputs, use_cache=False)
    assert type(output) is type(expected)
    torch.testing.assert_close(output.logits, expected.logits)


def test_checkpointing_is_asked_for_as_in_transformers(pair_of, inputs_of):
    model, inputs = copy.deepcopy(pair_of().ours).train(), inputs_of()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with pytest.warns(UserWarning, match="no cache is kept"):
        assert model(**inputs, use_cache=True).past_key_values is None
    with pytest.warns(UserWarning, match="use_reentrant"):
        model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="every_n_layers"):
        model.gradient_checkpointing_enable(every_n_layers=2)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    model.requires_grad_(False)
    model.enable_input_require_grads()
    assert model(**inputs).logits.requires_grad
    model.disable_input_require_grads()
    assert not model(**inputs).logits.requires_grad


def test_steps_as_adapter_libraries_ask_for_them(pair_of, inputs_of):
    model, inputs = pair_of().ours, inputs_of()
    first = model(**inputs, use_cache=True)
    ids = torch.cat((inputs["input_ids"], torch.tensor([[40], [41]])), 1)
    mask = torch.cat((inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)), 1)
    given = {**inputs, "input_ids": ids, "attention_mask": mask, "use_cache": True}
    whole = model(**{**model.prepare_inputs_for_generation(**given), "use_cache": False})
    step = model(**model.prepare_inputs_for_generation(**given, past_key_values=first.past_key_values))
    torch.testing.assert_close(step.logits[:, -1], whole.logits[:, -1], atol=1e-4, rtol=1e-4)


def test_settings_of_transformers_own_names(pair_of, inputs_of):
    """Recomputation asked for by a configuration, ways of attention, and what a step is given to pass on."""
    pair, inputs = pair_of(), inputs_of()
    model = pair.ours
    assert not model.is_activation_checkpointing
    config = copy.deepcopy(model.config)
    config.gradient_checkpointing = True
    assert IdeficsForVisionText2Text(config).is_activation_checkpointing
    for name in ("eager", "sdpa", {"vision_config": "eager"}):
        model.set_attn_implementation(name)
    with pytest.raises(ValueError, match="flash"):
        model.set_attn_implementation("flash_attention_2")
    given = model.prepare_inputs_for_generation(**inputs, output_attentions=True, custom=4)
    assert given["custom"] == 4
    del given["custom"]
    torch.testing.assert_close(
        model(**given).attentions[0], model(**inputs, output_attentions=True).attentions[0]
    )

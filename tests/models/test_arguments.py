"""Arguments that peft, pipelines and tokenizers pass to every model: taken, without effect where they have none."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.testing import assert_close
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    pipeline,
)

from tests.models.cases import FAMILIES, LRU, S5, VOCAB_SIZE, tokens
from tests.trainers import arguments


HEADS = ("model_class", "classifier_class", "causal_class")
TASKS = {"model_class": "FEATURE_EXTRACTION", "classifier_class": "SEQ_CLS", "causal_class": "CAUSAL_LM"}
TOLERANCE = 1e-5  # float32 sums in another order

families = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
heads = pytest.mark.parametrize("head", HEADS)


def make(family, head, **fields):
    return getattr(family, head)(family.config(vocab_size=VOCAB_SIZE, pad_token_id=0, **fields))


@families
@heads
@pytest.mark.parametrize(
    "extra",
    [
        {"token_type_ids": torch.zeros(3, 9, dtype=torch.long)},
        {"output_attentions": False},
        {"output_attentions": True},
        {"use_cache": False},
        {"use_cache": True},
        {"position_ids": torch.arange(9)[None]},
        {"position_ids": None, "seq_idx": None, "cu_seq_lens_q": None, "past_key_values": None},
        {"cache_position": torch.arange(9)},
        {"num_items_in_batch": 27},
        {"max_length_q": 9, "max_length_k": 9, "is_causal": True},
    ],
    ids=lambda extra: next(iter(extra)),
)
def test_taken_without_effect(family, head, extra):
    model, x = make(family, head).eval(), tokens()
    assert torch.equal(model(input_ids=x, **extra)[0], model(input_ids=x)[0])
    as_tuple = model(input_ids=x, return_dict=False, **extra)
    assert torch.equal(as_tuple[0], model(input_ids=x)[0])


@families
@heads
def test_keys_and_values_are_refused_everywhere(family, head):
    with pytest.raises(ValueError, match="Got `past_key_values`; this model has no keys or values"):
        make(family, head)(tokens(), past_key_values=object())


@families
@heads
def test_lora_of_every_task(family, head, tmp_path):
    model, x = make(family, head), tokens()
    labels = {
        "model_class": {},
        "classifier_class": {"labels": torch.tensor([0, 1, 1])},
        "causal_class": {"labels": x},
    }
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = LoraConfig(task_type=TASKS[head], target_modules="all-linear", init_lora_weights=False)
    wrapped = get_peft_model(model, config).train()
    outputs = wrapped(input_ids=x, attention_mask=torch.ones_like(x), **labels[head])
    (outputs[0].sum() if head == "model_class" else outputs.loss).backward()
    assert all(parameter.grad is not None for parameter in wrapped.parameters() if parameter.requires_grad)
    wrapped.save_pretrained(tmp_path)
    base = make(family, head)
    base.load_state_dict(start)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert_close(loaded(input_ids=x)[0], wrapped.eval()(input_ids=x)[0])


def bert_like_tokenizer():
    """One that makes `token_type_ids`, as those of BERT do."""
    vocabulary = {"<pad>": 0, "<cls>": 1, **{f"w{k}": k for k in range(2, VOCAB_SIZE)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<cls> $A", pair="<cls> $A $B:1", special_tokens=[("<cls>", 1)]
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", model_input_names=names)


@families
@heads
def test_what_a_tokenizer_makes(family, head):
    model, tokenizer = make(family, head).eval(), bert_like_tokenizer()
    batch = tokenizer([("w3 w4", "w5"), ("w6", "w7 w8 w9")], return_tensors="pt", padding=True)
    assert batch["token_type_ids"].any()
    expected = model(batch["input_ids"], attention_mask=batch["attention_mask"])[0]
    assert torch.equal(model(**batch)[0], expected)


@families
@pytest.mark.parametrize(
    ("task", "head"),
    [
        ("text-classification", "classifier_class"),
        ("feature-extraction", "model_class"),
        ("text-generation", "causal_class"),
    ],
)
def test_pipelines(family, task, head):
    run = pipeline(task, model=make(family, head).eval(), tokenizer=bert_like_tokenizer(), device="cpu")
    options = {"max_new_tokens": 3} if task == "text-generation" else {}
    results = run(["w3 w4 w5", "w6"], **options)
    assert len(results) == 2


def causal_models():
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 8, "num_hidden_layers": 2, "pad_token_id": 0}
    return {
        "s5": lambda: make(S5, "causal_class"),
        "lru": lambda: make(LRU, "causal_class"),
        "mamba": lambda: MambaForCausalLM(MambaConfig(**sizes, state_size=4)),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, intermediate_size=8)),
    }


@pytest.mark.parametrize(
    "wrapped", [pytest.param(False, id="plain"), pytest.param(True, id="LoRA", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", causal_models())
def test_gradient_accumulation_counts_the_tokens_of_the_whole_step(name, wrapped, tmp_path):
    """Half batches with accumulation take the step of the whole batch, though they have other numbers of labels."""
    data = [{"input_ids": row, "labels": row.clone()} for row in tokens(4)]
    data[0]["labels"][2:] = -100  # the loss of this row would count four times as much
    start = causal_models()[name]()
    weights = []
    for batch_size, steps in ((4, 1), (2, 2), (1, 4)):
        model = causal_models()[name]()
        model.load_state_dict(start.state_dict())
        if wrapped:
            torch.manual_seed(0)
            targets = {"mamba": ["in_proj"], "llama": ["q_proj"]}.get(name, ["gate"])
            model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=targets, lora_dropout=0.0))
        one_step = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
        sizes = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": steps}
        args = arguments(tmp_path, **one_step, **sizes)
        trainer = Trainer(model=model, args=args, train_dataset=data)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        assert trainer.model_accepts_loss_kwargs
        trainer.train()
        weights.append(model.state_dict())
        assert any(not torch.equal(before[name], tensor) for name, tensor in weights[-1].items())
    for others in weights[1:]:
        assert_close(others, weights[0], rtol=TOLERANCE, atol=1e-6)

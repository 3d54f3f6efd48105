import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from transformers import Trainer

from tests.models.cases import FAMILIES, LRU, VOCAB_SIZE, perturbed, tokens
from tests.trainers import arguments


TOLERANCE = 1e-5  # float32 sums in another order

families = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


PROBLEMS = {
    "regression": (1, torch.randn(3), lambda logits, labels: F.mse_loss(logits.squeeze(), labels)),
    "regression-2": (2, torch.randn(3, 2), F.mse_loss),
    "single_label_classification": (4, torch.tensor([0, 3, 1]), F.cross_entropy),
    "multi_label_classification": (
        4,
        torch.randint(2, (3, 4)).float(),
        F.binary_cross_entropy_with_logits,
    ),
}


@families
@pytest.mark.parametrize("problem", PROBLEMS)
def test_loss_of_each_problem_type(family, problem):
    num_labels, labels, loss = PROBLEMS[problem]
    problem_type = problem.removesuffix("-2")
    config = family.config(input_size=2, num_labels=num_labels, problem_type=problem_type)
    model, values = family.classifier_class(config).eval(), torch.randn(3, 9, 2)
    outputs = model(input_values=values, labels=labels)
    assert outputs.logits.shape == (3, num_labels)
    assert_close(outputs.loss, loss(outputs.logits, labels))
    guessed = family.classifier_class(family.config(input_size=2, num_labels=num_labels))
    guessed.load_state_dict(model.state_dict())
    if problem != "regression-2":  # several float targets read as several labels unless the config says otherwise
        assert_close(guessed.eval()(input_values=values, labels=labels).loss, outputs.loss)
    assert_close(model(input_values=values, return_dict=False)[0], outputs.logits)


@families
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_pooling_ignores_padding_on_either_side(family, pooling):
    model = perturbed(family.classifier_class(family.config(vocab_size=VOCAB_SIZE, pooling=pooling)), 0.3).eval()
    lengths, x = [9, 4, 1], tokens()
    expected = torch.cat([model(row[None, :length]).logits for row, length in zip(x, lengths, strict=True)])
    right = (torch.arange(9) < torch.tensor(lengths)[:, None]).long()
    assert_close(model(x, attention_mask=right).logits, expected, rtol=TOLERANCE, atol=TOLERANCE)
    left = torch.stack([row.roll(9 - length) for row, length in zip(x, lengths, strict=True)])
    assert_close(model(left, attention_mask=right.flip(1)).logits, expected, rtol=TOLERANCE, atol=TOLERANCE)


@families
def test_causal_loss_is_shifted_and_counts_the_items_of_the_whole_batch(family):
    model, x = family.causal_model(), tokens()
    labels = x.clone()
    labels[0, :4] = -100
    outputs = model(x, labels=labels)
    expected = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    count = (labels[:, 1:] != -100).sum()
    assert_close(outputs.loss, expected / count)
    assert_close(model(x, labels=labels, num_items_in_batch=100).loss, expected / 100)
    assert_close(model(x, logits_to_keep=2).logits, outputs.logits[:, -2:], rtol=TOLERANCE, atol=TOLERANCE)


@families
def test_the_head_is_tied_to_the_embeddings(family):
    model = family.causal_model()
    assert model.lm_head.weight is model.backbone.embeddings.weight
    assert family.causal_model(tie_word_embeddings=False).lm_head.weight is not model.backbone.embeddings.weight
    model.resize_token_embeddings(VOCAB_SIZE + 2)
    assert model(tokens()).logits.shape[-1] == VOCAB_SIZE + 2


@families
@pytest.mark.parametrize("task", ["classification", "language"])
def test_trainer_trains_evaluates_and_saves(family, task, tmp_path):
    if task == "classification":
        model = family.classifier_class(family.config(input_size=2, num_labels=3, norm="batch"))
        data = [{"input_values": torch.randn(9, 2), "labels": k % 3} for k in range(8)]
    else:
        model = family.causal_class(family.config(vocab_size=VOCAB_SIZE))
        data = [{"input_ids": row, "labels": row} for row in tokens(8)]
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    every_third_step = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 3}
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, max_steps=3, gradient_accumulation_steps=2, **every_third_step),
        train_dataset=data,
        eval_dataset=data[:3],
    )
    assert trainer.model_accepts_loss_kwargs is (task == "language")
    trainer.train()
    predictions = trainer.predict(data[:3]).predictions
    assert predictions.shape[0] == 3  # one array of logits, no cache among them
    assert any(not torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert (tmp_path / "checkpoint-3" / "config.json").exists()


def test_gradient_accumulation_averages_the_classification_loss(tmp_path):
    """Two half batches with accumulation take the step that one whole batch takes."""
    data = [{"input_values": torch.randn(5, 2), "labels": k % 2} for k in range(4)]
    start = LRU.classifier_class(LRU.config(input_size=2)).state_dict()
    weights = []
    for batch_size, steps in ((4, 1), (2, 2)):
        model = LRU.classifier_class(LRU.config(input_size=2))
        model.load_state_dict(start)
        one_step = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
        sizes = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": steps}
        args = arguments(tmp_path, **one_step, **sizes)
        Trainer(model=model, args=args, train_dataset=data).train()
        weights.append(model.state_dict())
    assert_close(weights[0], weights[1], rtol=TOLERANCE, atol=1e-6)

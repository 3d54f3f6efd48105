import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from tests.models.cases import FAMILIES, LRU, S5, VOCAB_SIZE, enable_checkpointing, perturbed, tokens


# The same float32 sums in another order, through two blocks.
TOLERANCE = 1e-5

families = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
norms = pytest.mark.parametrize("norm", ["layer", "batch"])


def reference_block(block, x, norm, activation, prenorm):
    """The S5 reference's SequenceLayer without dropout, written out."""
    residual = x
    if prenorm:
        x = norm(x)
    y = block.ssm(x)
    gelu = F.gelu(y, approximate="tanh")
    gates = {
        "gelu": lambda: gelu,
        "half_glu1": lambda: gelu * torch.sigmoid(block.activation.gate(gelu)),
        "half_glu2": lambda: y * torch.sigmoid(block.activation.gate(gelu)),
        "full_glu": lambda: block.activation.value(gelu) * torch.sigmoid(block.activation.gate(gelu)),
    }
    x = residual + gates[activation]()
    return x if prenorm else norm(x)


@pytest.mark.parametrize("prenorm", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "half_glu1", "half_glu2", "full_glu"])
def test_block_order_is_that_of_the_reference(activation, prenorm):
    config = LRU.config(input_size=2, activation=activation, prenorm=prenorm, norm="batch")
    model = perturbed(LRU.model_class(config), 0.3).eval()
    block, x = model.layers[0], torch.randn(2, 7, 6)

    def norm(x):
        bn = block.norm
        return (x - bn.running_mean) / (bn.running_var + bn.eps).sqrt() * bn.weight + bn.bias

    expected = reference_block(block, x, norm, activation, prenorm)
    assert_close(block(x), expected, rtol=TOLERANCE, atol=TOLERANCE)


@families
@norms
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(family, norm, training, side):
    """Whatever the padding holds, outputs elsewhere and batch statistics are those of the unpadded sequences."""
    model = perturbed(family.model_class(family.config(input_size=2, norm=norm)), 0.3).train(training)
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    values, pad = torch.randn(2, 6, 2), 100 * torch.randn(2, 4, 2)
    mask, pad_mask = torch.ones(2, 6, dtype=torch.long), torch.zeros(2, 4, dtype=torch.long)
    expected = model(input_values=values).last_hidden_state
    expected_statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.load_state_dict(statistics, strict=False)
    order = (1, -1) if side == "right" else (-1, 1)
    padded = torch.cat([values, pad][:: order[0]], dim=1)
    padded_mask = torch.cat([mask, pad_mask][:: order[0]], dim=1)
    outputs = model(input_values=padded, attention_mask=padded_mask).last_hidden_state
    kept = outputs[:, :6] if side == "right" else outputs[:, -6:]
    assert_close(kept, expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert_close({name: buffer.clone() for name, buffer in model.named_buffers()}, expected_statistics)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_in_both_directions(side):
    model = perturbed(S5.model_class(S5.config(vocab_size=VOCAB_SIZE, bidirectional=True))).eval()
    x, pad = tokens(2, 6), tokens(2, 3)
    mask, pad_mask = torch.ones_like(x), torch.zeros_like(pad)
    step = 1 if side == "right" else -1
    outputs = model(torch.cat([x, pad][::step], 1), torch.cat([mask, pad_mask][::step], 1)).last_hidden_state
    kept = outputs[:, :6] if side == "right" else outputs[:, -6:]
    assert_close(kept, model(x).last_hidden_state, rtol=TOLERANCE, atol=TOLERANCE)
    assert model(x, use_cache=True).cache is None


@families
@norms
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(family, norm, use_reentrant):
    model = family.classifier_class(family.config(vocab_size=VOCAB_SIZE, norm=norm)).train()
    x, labels = tokens(), torch.tensor([0, 1, 1])
    mask = (torch.arange(9) < torch.tensor([[9], [5], [7]])).long()

    def gradients():
        model.zero_grad()
        model(x, attention_mask=mask, labels=labels).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected = gradients()
    enable_checkpointing(model, use_reentrant)
    assert_close(gradients(), expected, rtol=TOLERANCE, atol=1e-7)


@families
def test_every_parameter_gets_a_gradient(family):
    for fields, inputs in (
        ({"vocab_size": VOCAB_SIZE}, {"input_ids": tokens()}),
        ({"input_size": 2}, {"input_values": torch.randn(3, 9, 2)}),
    ):
        model = family.classifier_class(family.config(**fields, activation="full_glu", norm="batch"))
        model(**inputs, labels=torch.tensor([0, 1, 1])).loss.backward()
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


@families
def test_outputs_and_tuples(family):
    model, x = family.model_class(family.config(vocab_size=VOCAB_SIZE)).eval(), tokens()
    outputs = model(x, output_hidden_states=True)
    assert len(outputs.hidden_states) == 3
    assert_close(outputs.hidden_states[0], model.embeddings(x))
    assert_close(outputs.hidden_states[-1], outputs.last_hidden_state)
    last, cache = model(x, return_dict=False)
    assert_close(last, outputs.last_hidden_state)
    assert cache.layers[0].recurrent_states[0].is_complex()
    assert model(x, use_cache=False).cache is None
    assert model.train()(x).cache is None
    assert_close(model.eval()(inputs_embeds=model.embeddings(x)).last_hidden_state, last)


@families
def test_bfloat16_model_runs_and_trains(family):
    model = family.causal_class(family.config(vocab_size=VOCAB_SIZE)).to(torch.bfloat16)
    loss = model(x := tokens(), labels=x).loss
    loss.backward()
    assert loss.dtype is torch.float32
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_bad_inputs_are_named():
    tokens_model = LRU.model_class(LRU.config(vocab_size=VOCAB_SIZE))
    values_model = LRU.model_class(LRU.config(input_size=2))
    x, values = tokens(), torch.randn(3, 9, 2)
    mistakes = [
        (tokens_model, {}, "Got no input"),
        (tokens_model, {"input_ids": x, "input_values": values}, "Got input_ids and input_values"),
        (tokens_model, {"input_values": values}, "`config.input_size` is None"),
        (values_model, {"input_ids": x}, "`config.vocab_size` is None"),
        (values_model, {"input_values": values[0]}, r"has shape \(9, 2\); it must be \(batch, length, 2\)"),
        (values_model, {"input_values": torch.randn(3, 9, 4)}, r"has shape \(3, 9, 4\)"),
        (tokens_model, {"input_ids": x, "attention_mask": torch.ones(3, 8)}, r"\(3, 8\); the input needs \(3, 9\)"),
        (tokens_model, {"input_ids": x, "attention_mask": torch.ones(3, 10)}, r"\(3, 10\); the input needs"),
    ]
    for model, inputs, message in mistakes:
        with pytest.raises(ValueError, match=message):
            model(**inputs)

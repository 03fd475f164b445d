"""Models that leave blocks out of their training passes: refused before it happens, with the line that ends it."""

import pytest
import torch
import transformers as hf
from torch import nn

import kdloss

SPEECH = {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16, "conv_dim": (8, 8),
    "conv_stride": (4, 4), "conv_kernel": (8, 4), "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
    "vocab_size": 9, "mask_time_prob": 0.0, "hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0, "final_dropout": 0.0, "hidden_dropout_prob": 0.0,
}  # fmt: skip
TEXT = {
    "d_model": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "vocab_size": 31,
    "decoder_ffn_dim": 16, "encoder_layers": 2, "decoder_layers": 3, "dropout": 0.0, "attention_dropout": 0.0,
}  # fmt: skip


def speech(kind=hf.Wav2Vec2ForCTC, config=hf.Wav2Vec2Config, **more):
    torch.manual_seed(0)
    return kind(config(**SPEECH, **more))


def bart(**more):
    torch.manual_seed(0)
    return hf.BartForConditionalGeneration(hf.BartConfig(**TEXT, **more))


def tokens():
    x = torch.randint(3, 31, (2, 5))
    return {"input_ids": x, "labels": x}


WAVES = {"input_values": torch.randn(2, 400)}
IN_CONFIG = r"0 can't be .*LayerDrop, here 0\.1.*model\.config\.layerdrop = 0\.0"
SAID = [
    (speech, WAVES, IN_CONFIG),
    (lambda: speech(hf.HubertForCTC, hf.HubertConfig), WAVES, IN_CONFIG),
    (lambda: bart(decoder_layerdrop=0.3), tokens(), r"here 0\.3.*model\.model\.decoder\.layerdrop = 0\.0"),
]


def criterion(**more):
    return kdloss.FeatureKD("all", alpha=0.0, **more)


@pytest.mark.parametrize(("make", "batch", "said"), SAID)
def test_a_student_that_drops_blocks_at_random_is_refused_at_its_first_step(make, batch, said):
    student, teacher = make().train(), make().eval()
    distill = kdloss.Distiller(teacher, criterion())
    with pytest.raises(ValueError, match=said):
        distill(student, **batch)
    student.eval()  # where nothing is dropped
    assert distill(student, **batch).loss == 0
    student.train()
    with pytest.raises(ValueError, match=said):
        distill(student, **batch)


@pytest.mark.parametrize(("make", "batch", "said"), SAID)
def test_the_line_in_the_message_turns_layer_drop_off(make, batch, said):
    model, teacher = make().train(), make().eval()
    distill = kdloss.Distiller(teacher, criterion())
    with pytest.raises(ValueError, match=r"; write (model\.\S+ = 0\.0)$") as raised:
        distill(model, **batch)
    exec(str(raised.value).rpartition("write ")[2], {"model": model})
    for _ in range(20):  # a rate of 0.1 in three blocks would be met
        assert torch.isfinite(distill(model, **batch).loss)


def test_the_other_stacks_drops_are_none_of_its_business():
    student = bart(encoder_layerdrop=0.5).train()
    with pytest.raises(ValueError, match=r"model\.model\.encoder\.layerdrop = 0\.0"):
        kdloss.Distiller(bart().eval(), criterion(blocks="model.encoder.layers"))(student, **tokens())
    out = kdloss.Distiller(bart().eval(), criterion(blocks="model.decoder.layers"))(student, **tokens())
    assert torch.isfinite(out.loss)


def test_a_stack_that_stays_in_evaluation_drops_nothing():
    student = bart(decoder_layerdrop=0.9).train()
    student.model.decoder.eval()
    assert torch.isfinite(kdloss.Distiller(bart().eval(), criterion())(student, **tokens()).loss)


def test_capture_names_the_drop_where_it_happened():
    student = bart(decoder_layerdrop=1.0).train()
    x = tokens()["input_ids"]
    with (
        pytest.raises(RuntimeError, match=r"\[0, 2\] did not run.*LayerDrop, here 1.*decoder\.layerdrop = 0\.0"),
        kdloss.capture(student, [0, 2]),
    ):
        student(input_ids=x, decoder_input_ids=x)


def test_a_wrapped_student_is_looked_through():
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, **batch):
            return self.module(**batch)

    student = Wrapper(bart(decoder_layerdrop=0.3)).train()
    with pytest.raises(ValueError, match=r"model\.model\.decoder\.layerdrop = 0\.0"):
        kdloss.Distiller(bart().eval(), criterion())(student, **tokens() | {"decoder_input_ids": tokens()["input_ids"]})

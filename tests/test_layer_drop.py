"""Models that skip random blocks in training are refused before the pass, with the line that turns this off."""

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
CASES = [
    (speech, WAVES, IN_CONFIG),
    (lambda: speech(hf.HubertForCTC, hf.HubertConfig), WAVES, IN_CONFIG),
    (lambda: bart(decoder_layerdrop=0.3), tokens(), r"here 0\.3.*model\.model\.decoder\.layerdrop = 0\.0"),
]


def criterion(**more):
    return kdloss.FeatureKD("all", alpha=0.0, **more)


@pytest.mark.parametrize(("make", "batch", "message"), CASES)
def test_a_student_that_drops_random_blocks_is_refused_at_every_training_step(make, batch, message):
    student, teacher = make().train(), make().eval()
    distill = kdloss.Distiller(teacher, criterion())
    with pytest.raises(ValueError, match=message):
        distill(student, **batch)
    student.eval()  # nothing is dropped in evaluation
    assert distill(student, **batch).loss == 0
    student.train()
    with pytest.raises(ValueError, match=message):
        distill(student, **batch)


@pytest.mark.parametrize(("make", "batch", "message"), CASES)
def test_the_line_in_the_message_turns_layer_drop_off(make, batch, message):
    model, teacher = make().train(), make().eval()
    distill = kdloss.Distiller(teacher, criterion())
    with pytest.raises(ValueError, match=r"; write (model\.\S+ = 0\.0)$") as raised:
        distill(model, **batch)
    exec(str(raised.value).rpartition("write ")[2], {"model": model})
    for _ in range(20):  # often enough to see a drop at a rate of 0.1 in three blocks
        assert torch.isfinite(distill(model, **batch).loss)


def test_layer_drop_in_a_stack_that_is_not_compared_is_allowed():
    student = bart(encoder_layerdrop=0.5).train()
    with pytest.raises(ValueError, match=r"model\.model\.encoder\.layerdrop = 0\.0"):
        kdloss.Distiller(bart().eval(), criterion(blocks="model.encoder.layers"))(student, **tokens())
    out = kdloss.Distiller(bart().eval(), criterion(blocks="model.decoder.layers"))(student, **tokens())
    assert torch.isfinite(out.loss)


def test_layer_drop_in_a_stack_in_evaluation_mode_is_allowed():
    student = bart(decoder_layerdrop=0.9).train()
    student.model.decoder.eval()
    assert torch.isfinite(kdloss.Distiller(bart().eval(), criterion())(student, **tokens()).loss)


def test_capture_names_layer_drop_when_blocks_did_not_run():
    student = bart(decoder_layerdrop=1.0).train()
    x = tokens()["input_ids"]
    with (
        pytest.raises(RuntimeError, match=r"\[0, 2\] did not run.*LayerDrop, here 1.*decoder\.layerdrop = 0\.0"),
        kdloss.capture(student, [0, 2]),
    ):
        student(input_ids=x, decoder_input_ids=x)


def test_layer_drop_is_detected_inside_a_wrapper():
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, **batch):
            return self.module(**batch)

    student = Wrapper(bart(decoder_layerdrop=0.3)).train()
    with pytest.raises(ValueError, match=r"model\.model\.decoder\.layerdrop = 0\.0"):
        kdloss.Distiller(bart().eval(), criterion())(student, **tokens() | {"decoder_input_ids": tokens()["input_ids"]})

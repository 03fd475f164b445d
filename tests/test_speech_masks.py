"""A mask of audio samples becomes a mask of frames by the model's length function, or is refused."""

import pytest
import torch
import transformers as hf
from stepping import Steps, holds_to, kl, recipe

import kdloss
from kdloss import Distillation, Distiller, Features, Logits, Task

pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")  # a warning in WavLM

SMALL = {
    "vocab_size": 12,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "conv_dim": (8, 8),
    "conv_stride": (4, 2),
    "conv_kernel": (8, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "feat_extract_norm": "layer",
    "initializer_range": 0.5,
    "mask_time_prob": 0.0,
    "pad_token_id": 0,
    "ctc_loss_reduction": "mean",
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "final_dropout": 0.0,
    "layerdrop": 0.0,
}
KINDS = {
    "Wav2Vec2": {},
    "Hubert": {},
    "WavLM": {},
    "UniSpeech": {},
    "UniSpeechSat": {},
    "Wav2Vec2Conformer": {"position_embeddings_type": None},
    "Data2VecAudio": {"num_conv_pos_embeddings": 1, "conv_pos_kernel_size": 3},
    "SEW": {"squeeze_factor": 2},
}


def ctc(kind, depth, seed):
    torch.manual_seed(seed)
    config = getattr(hf, f"{kind}Config")(**SMALL | KINDS[kind], hidden_size=16, num_hidden_layers=depth)
    return getattr(hf, f"{kind}ForCTC")(config).double().eval()


def sound(samples=160, real=81):
    x = torch.randn(2, samples, dtype=torch.float64)
    mask = torch.ones(2, samples, dtype=torch.long)
    mask[1, real:] = 0
    return {"input_values": x * mask, "attention_mask": mask}


def frames(samples):
    """The number of frames, by the definition of a convolution: kernels 8 and 4, strides 4 and 2, no padding."""
    for kernel, stride in ((8, 4), (4, 2)):
        samples = (samples - kernel) // stride + 1
    return samples


def real_frames(batch):
    lengths = [frames(int(n)) for n in batch["attention_mask"].sum(1)]
    count = frames(batch["attention_mask"].shape[1])
    return torch.tensor([[t < n for t in range(count)] for n in lengths])


def blocks(model):
    """The path of the transformer's blocks."""
    return f"{model.base_model_prefix}.encoder.layers"


def captured(model, i, batch, where):
    """The output of block `i`, from a pass of the model."""
    found = []
    handle = model.get_submodule(f"{where}.{i}").register_forward_hook(lambda m, a, out: found.append(out))
    model(**batch)
    handle.remove()
    return found[0][0] if isinstance(found[0], tuple) else found[0]


def squares(student, teacher, batch, where, pair=(0, 1)):
    """The mean squared error between a pair of blocks, at every frame."""
    with torch.no_grad():
        target = captured(teacher, pair[1], batch, where)
    return (captured(student, pair[0], batch, where) - target).square().mean(-1)


@pytest.mark.parametrize("kind", KINDS)
def test_frames_of_padding_are_not_distilled(kind):
    student, teacher, batch = ctc(kind, 2, 0), ctc(kind, 3, 1), sound()
    loss = Distiller(teacher, kdloss.VanillaKD(temperature=2.0, alpha=0.0))(student, **batch).loss
    with torch.no_grad():
        target = teacher(**batch).logits
    keep = real_frames(batch)
    assert 0 < keep.sum() < keep.numel()
    expected = kl(student(**batch).logits, target, 2.0)[keep].mean()
    torch.testing.assert_close(loss, expected)
    own, hand = (torch.autograd.grad(x, student.lm_head.weight)[0] for x in (loss, expected))
    torch.testing.assert_close(own, hand)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "SEW"])
def test_features_of_padded_frames_do_not_count(kind):
    student, teacher, batch = ctc(kind, 2, 0), ctc(kind, 3, 1), sound()
    where = blocks(student)
    loss = Distiller(teacher, 1.0 * Features(pairing=[(0, 1)], blocks=where))(student, **batch).loss
    expected = squares(student, teacher, batch, where)[real_frames(batch)].mean()
    torch.testing.assert_close(loss, expected)
    weight = student.get_submodule(where)[0].feed_forward.output_dense.weight if kind != "Wav2Vec2Conformer" else None
    if weight is not None:
        own, hand = (torch.autograd.grad(x, weight)[0] for x in (loss, expected))
        torch.testing.assert_close(own, hand)


def test_features_of_padded_frames_do_not_count_in_a_model_without_logits():
    student, teacher, batch = (ctc("Wav2Vec2", 2, 0).wav2vec2, ctc("Wav2Vec2", 3, 1).wav2vec2, sound())
    loss = Distiller(teacher, 1.0 * Features(pairing=[(0, 1)], blocks="encoder.layers"))(student, **batch).loss
    values = squares(student, teacher, batch, "encoder.layers")
    torch.testing.assert_close(loss, values[real_frames(batch)].mean())


def test_the_mask_has_the_frames_of_blocks_in_front_of_an_adapter_not_those_of_its_output():
    config = SMALL | {"add_adapter": True, "num_adapter_layers": 1, "output_hidden_size": 16, "hidden_size": 16}
    models = [hf.Wav2Vec2Model(hf.Wav2Vec2Config(**config, num_hidden_layers=n)).double().eval() for n in (2, 3)]
    batch = sound()
    loss = Distiller(models[1], 1.0 * Features(pairing=[(0, 1)], blocks="encoder.layers"))(models[0], **batch).loss
    values = squares(*models, batch, "encoder.layers")
    torch.testing.assert_close(loss, values[real_frames(batch)].mean())


def test_squeezed_frames_that_no_length_function_gives_are_refused_with_the_line_to_write():
    """SEW squeezes the frames inside its encoder, and has no function that gives the number of squeezed frames."""
    student, teacher, batch = ctc("SEW", 2, 0), ctc("SEW", 3, 1), sound()
    where = blocks(student)
    distill = Distiller(teacher, 1.0 * Features(pairing=[(0, 1)], blocks=where))
    with pytest.raises(ValueError, match=r"attention_mask \(2, 160\).*\(2, 9\).*feature_mask=\{'feature': \.\.\.\}"):
        distill(student, **batch)
    squeezed = torch.ones(2, 9, dtype=torch.bool)
    squeezed[1, 4:] = False
    values = squares(student, teacher, batch, where)
    per_example = torch.stack([values[0].mean(), values[1, :4].mean()])
    for own in (squeezed, {"feature": squeezed}):
        torch.testing.assert_close(distill(student, **batch, feature_mask=own).loss, per_example.mean())
    everywhere = distill(student, **batch, feature_mask={"feature": None}).loss
    torch.testing.assert_close(everywhere, values.mean())


def test_a_mask_of_frames_replaces_a_missing_length_function():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = torch.nn.Conv1d(1, 4, 8, 4), torch.nn.Linear(4, 5)

        def forward(self, x, attention_mask=None):
            return self.head(self.conv(x.unsqueeze(1)).transpose(1, 2))

    student, teacher = Net(), Net()
    x, mask = torch.randn(2, 40), torch.ones(2, 40)
    mask[1, 20:] = 0
    distill = Distiller(teacher, kdloss.VanillaKD(1.0, alpha=0.0))
    with pytest.raises(ValueError, match=r"\(2, 40\).*\(2, 9\).*Net.*write mask=\.\.\., boolean, \(2, 9\)"):
        distill(student, x, attention_mask=mask)
    own = torch.arange(9) < torch.tensor([[9], [4]])
    loss = distill(student, x, attention_mask=mask, mask=own).loss
    torch.testing.assert_close(loss, kl(student(x), teacher(x).detach(), 1.0)[own].mean())


BLOCKS = "wav2vec2.encoder.layers"


def transcripts(batch):
    return batch | {"labels": torch.tensor([[3, 4, 5, 4], [6, 7, -100, -100]])}


@recipe
def ctc_with_a_teacher(student, teacher, batch):
    criterion = kdloss.Sum(0.3 * Task(), 0.5 * Logits(temperature=2.0), 0.2 * Features("last", blocks=BLOCKS))
    model = Distillation(student, teacher, criterion)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()


def test_ctc_learns_from_transcripts_and_the_teachers_frames_in_one_pass():
    """Transcripts and frames differ in length: only the task reads the transcripts, and they select no frames."""
    student, teacher = ctc("Wav2Vec2", 2, 0), ctc("Wav2Vec2", 3, 1)
    batch = transcripts(sound())
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    keep = real_frames(batch)

    def expected(model):
        s = model.student.eval()
        with torch.no_grad():
            t = teacher(**inputs)
        log_probs = s(**inputs).logits.log_softmax(-1, dtype=torch.float32).transpose(0, 1)
        own = torch.nn.functional.ctc_loss(
            log_probs, torch.tensor([3, 4, 5, 4, 6, 7]), keep.sum(1), torch.tensor([4, 2]), blank=0, reduction="mean"
        )
        z, values = s(**inputs).logits, squares(s, teacher, inputs, BLOCKS, (1, 2))
        learned = kl(z, t.logits, 2.0)[keep].mean()
        return 0.3 * own + 0.5 * learned + 0.2 * values[keep].mean()

    with Steps() as steps:
        ctc_with_a_teacher(student, teacher, batch)
    assert (steps.ran[student], steps.ran[teacher]) == (1, 1)
    holds_to(steps, expected, rtol=1e-5, atol=1e-7)  # the model computes CTC in float32


def test_features_with_ctc_and_without_a_logits_term_count_frames_not_letters():
    student, teacher, batch = ctc("Wav2Vec2", 2, 0), ctc("Wav2Vec2", 3, 1), sound()
    criterion = Task() + Features("last", blocks=BLOCKS)
    out = Distiller(teacher, criterion)(student, **transcripts(batch))
    values = squares(student, teacher, batch, BLOCKS, (1, 2)).detach()
    torch.testing.assert_close(out.components["feature"], values[real_frames(batch)].mean())
    torch.testing.assert_close(out.components["task"], student(**transcripts(batch)).loss.detach())


def test_transcripts_are_refused_unless_a_task_is_the_only_term_that_reads_labels():
    student, teacher, batch = ctc("Wav2Vec2", 2, 0), ctc("Wav2Vec2", 3, 1), transcripts(sound())
    for criterion in (kdloss.VanillaKD(), kdloss.VanillaKD(alpha=0.0), Task() + kdloss.CrossEntropy()):
        with pytest.raises(ValueError, match=r"labels have shape \(2, 4\) but logits \(2, 18, 12\) need \(2, 18\)"):
            Distiller(teacher, criterion)(student, **batch)


def whisper(depth, seed):
    torch.manual_seed(seed)
    config = hf.WhisperConfig(
        vocab_size=30, num_mel_bins=4, d_model=16, encoder_layers=depth, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_source_positions=10, init_std=0.5,
        max_target_positions=12, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    return hf.WhisperForConditionalGeneration(config).double().eval()


@pytest.mark.parametrize("masked", [True, False])
def test_features_of_an_encoder_are_averaged_over_its_mask_and_weighted_by_the_decoders_labels(masked):
    student, teacher = whisper(2, 0), whisper(3, 1)
    batch = {"input_features": torch.randn(2, 4, 20, dtype=torch.float64)}
    batch |= {"labels": torch.tensor([[3, 4, 5], [6, -100, -100]])}
    batch |= {"decoder_input_ids": torch.tensor([[1, 3, 4], [1, 6, 0]])}
    keep = torch.ones(2, 10, dtype=torch.bool)
    if masked:
        batch["attention_mask"] = (torch.arange(20) < torch.tensor([[20], [11]])).long()
        keep[1, 6:] = False  # 11 spectra make 6 frames: a convolution of stride 2 with padding
    criterion = 1.0 * Features(pairing=[(0, 1)], blocks="model.encoder.layers")
    loss = Distiller(teacher, criterion)(student, **batch).loss
    inputs = {"input_features": batch["input_features"], "decoder_input_ids": batch["decoder_input_ids"]}
    values = squares(student, teacher, inputs, "model.encoder.layers")
    per_example = torch.stack([values[i][keep[i]].mean() for i in range(2)])
    torch.testing.assert_close(loss, (3 * per_example[0] + per_example[1]) / 4)


def moonshine(depth, seed):
    torch.manual_seed(seed)
    heads = {"encoder_num_attention_heads": 2, "decoder_num_attention_heads": 2}
    config = hf.MoonshineConfig(
        vocab_size=30, hidden_size=32, intermediate_size=16, encoder_num_hidden_layers=depth, pad_token_id=0,
        decoder_num_hidden_layers=1, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, **heads,
    )  # fmt: skip
    return hf.MoonshineForConditionalGeneration(config).double().eval()


def test_a_length_function_that_takes_one_number_at_a_time_works():
    student, teacher = moonshine(1, 0), moonshine(2, 1)
    batch = {"input_values": torch.randn(2, 4000, dtype=torch.float64)}
    batch |= {"attention_mask": (torch.arange(4000) < torch.tensor([[4000], [2000]])).long()}
    batch |= {"decoder_input_ids": torch.tensor([[1, 3], [1, 4]])}
    where = "model.encoder.layers"
    loss = Distiller(teacher, 1.0 * Features(pairing=[(0, 1)], blocks=where))(student, **batch).loss
    values, lengths = squares(student, teacher, batch, where), []
    for samples in (4000, 2000):
        for kernel, stride in ((127, 64), (7, 3), (3, 2)):
            samples = (samples - kernel) // stride + 1
        lengths.append(samples)
    assert lengths == [9, 3]
    torch.testing.assert_close(loss, torch.stack([values[i, :n].mean() for i, n in enumerate(lengths)]).mean())

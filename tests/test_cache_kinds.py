"""Kinds of teachers and examples that a cache takes: packed rows, segments, images, classifiers, offloaded weights."""

import datasets
import pytest
import torch
import transformers as hf
from accelerate import cpu_offload
from caching import contents
from families import build
from tokenizers import Tokenizer, models
from torch import nn

import kdloss
import kdloss.cache
from kdloss.cache._weights import fingerprint

pytestmark = pytest.mark.filterwarnings("ignore:.*loss_type=None.*")
ROUNDING = 2.0**-10  # of float16
TOKENIZER = Tokenizer(models.WordLevel({str(i): i for i in range(61)}, "0"))
DOCUMENTS = [[5, 9, 11, 3, 8], [7, 4, 6], [12, 13]]


def write_and_open(folder, teacher, k=61, tokenizer=TOKENIZER, batch_size=2, **columns):
    data = datasets.Dataset.from_dict(columns)
    kdloss.cache.write(folder, teacher, data, tokenizer=tokenizer, k=k, batch_size=batch_size)
    return kdloss.cache.open(folder, tokenizer=tokenizer)


def dense(stored):
    """Log-probabilities by class."""
    shape = (*stored.shape[:-1], stored.vocabulary)
    return torch.full(shape, torch.nan).scatter(-1, stored.ids().clamp_min(0), stored.log_probs.float())


def assert_near(stored, logits):
    torch.testing.assert_close(dense(stored), logits.detach().log_softmax(-1), rtol=ROUNDING, atol=1e-4)


def bloom():
    torch.manual_seed(0)
    return hf.BloomForCausalLM(
        hf.BloomConfig(vocab_size=61, hidden_size=16, n_layer=1, n_head=2, initializer_range=0.5, pad_token_id=3)
    ).eval()


def bert(kind, classes=5, **settings):
    torch.manual_seed(0)
    return getattr(hf, f"BertFor{kind}")(
        hf.BertConfig(
            vocab_size=61, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            initializer_range=0.5, num_labels=classes, **settings,
        )
    ).eval()  # fmt: skip


# -- inputs of the teacher --

PACKED = {
    "position_ids": [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1]],
    "attention_mask": [[1] * 5 + [2] * 3, [1, 1]],
    "seq_idx": [[0] * 5 + [1] * 3, [0, 0]],
    "seq_lengths": [[5, 3], [2]],
}


@pytest.mark.parametrize("column", PACKED)
@pytest.mark.parametrize("teacher", [lambda: build("llama", depth=1).eval(), bloom, lambda: bert("MaskedLM")])
def test_each_document_of_a_packed_row_is_read_separately(column, teacher, tmp_path):
    """With any model, including one without position_ids and one with bidirectional attention."""
    teacher, (one, two, three) = teacher(), DOCUMENTS
    cache = write_and_open(tmp_path, teacher, id=["p", "q"], input_ids=[one + two, three], **{column: PACKED[column]})
    stored = cache[["q", "p"]]
    separate = [teacher(torch.tensor([document])).logits[0] for document in DOCUMENTS]
    assert_near(stored.at(lambda x: x[1]), torch.cat(separate[:2]))
    assert_near(stored.at(lambda x: x[0, :2]), separate[2])
    joined = teacher(torch.tensor([one + two])).logits[0]
    assert (joined[5:] - separate[1]).abs().max() > 1e-2


def test_padding_around_packed_documents_is_cut(tmp_path):
    teacher, (one, two, _) = build("llama", depth=1).eval(), DOCUMENTS
    columns = {"position_ids": [[1, 0, 1, 2, 3, 4, 0, 1, 2]], "attention_mask": [[0] + [1] * 8]}
    cache = write_and_open(tmp_path, teacher, id=["p"], input_ids=[[0, *one, *two]], **columns)
    assert_near(cache[["p"]].at(lambda x: x[0]), torch.cat([teacher(torch.tensor([d])).logits[0] for d in (one, two)]))


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"position_ids": [[2, 3, 4]]}, r"position_ids of example 'p' don't count 0, 1, 2"),
        ({"position_ids": [[0, 2, 3]]}, r"position_ids of example 'p' don't count 0, 1, 2"),
        ({"position_ids": [[0, 1, 2]], "attention_mask": [[1, 1, 2]]}, "position_ids of example 'p'"),
        ({"seq_lengths": [[2, 2]]}, r"example 'p' has 3 tokens, and seq_lengths \[2, 2\]"),
    ],
)
def test_columns_that_describe_no_packing_are_refused(columns, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        write_and_open(tmp_path, build("llama", depth=1), id=["p"], input_ids=[[5, 6, 7]], **columns)


def test_token_types_reach_the_teacher_cut_to_the_same_length_as_its_tokens(tmp_path):
    teacher = bert("TokenClassification")
    rows = {"input_ids": [[5, 6, 7, 8], [9, 10, 0]], "token_type_ids": [[0, 0, 1, 1], [0, 1, 0]]}
    cache = write_and_open(tmp_path, teacher, k=5, id=[1, 2], attention_mask=[[1] * 4, [1, 1, 0]], **rows)
    stored = cache[[2, 1]]
    for i, n in ((0, 4), (1, 2)):
        ids, segments = (torch.tensor([rows[name][i][:n]]) for name in rows)
        assert_near(stored.at(lambda x, i=i, n=n: x[1 - i, :n]), teacher(ids, token_type_ids=segments).logits[0])
        assert (teacher(ids).logits - teacher(ids, token_type_ids=segments).logits).abs().max() > 1e-2
    with pytest.raises(ValueError, match=r"other examples"):
        write_and_open(tmp_path, teacher, k=5, id=[1, 2], attention_mask=[[1] * 4, [1, 1, 0]],
                input_ids=rows["input_ids"], token_type_ids=[[0] * 4, [0] * 3])  # fmt: skip


def test_images_are_read_without_tokens(tmp_path):
    teacher = build("vit").eval()
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    cache = write_and_open(tmp_path, teacher, k=5, tokenizer=None, id=["a", "b", "c"], pixel_values=images.tolist())
    assert_near(cache[["c", "a"]], teacher(images[[2, 0]]).logits)
    with pytest.raises(ValueError, match=r"the teacher takes .*'pixel_values'.* dataset has the columns \['id', 'x'\]"):
        write_and_open(tmp_path, teacher, tokenizer=None, id=["a"], x=[1])


def test_a_teacher_without_an_attention_mask_needs_a_batch_size_of_one(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(61, 61)

        def forward(self, input_ids):
            return self.embedding(input_ids) + self.embedding(input_ids).mean(1, keepdim=True)

    teacher, (one, two, _) = Net(), DOCUMENTS
    with pytest.raises(ValueError, match=r"no attention_mask, and would read padding .* batch_size=1"):
        write_and_open(tmp_path / "two", teacher, id=["a", "b"], input_ids=[one, two])
    cache = write_and_open(tmp_path / "one", teacher, batch_size=1, id=["a", "b"], input_ids=[one, two])
    assert_near(cache[["b"]].at(lambda x: x[0]), teacher(torch.tensor([two]))[0])


# -- classifiers --


@pytest.mark.parametrize("k", [2, 5])
def test_stored_outputs_of_a_classifier_give_the_loss_of_its_logits(k, tmp_path):
    teacher, student = bert("SequenceClassification"), bert("SequenceClassification", hidden_act="relu")
    torch.nn.init.normal_(student.classifier.weight, std=0.5)
    cache = write_and_open(tmp_path, teacher, k=k, id=["a", "b"], input_ids=DOCUMENTS[:2])
    logits = torch.cat([teacher(torch.tensor([row])).logits for row in DOCUMENTS[1::-1]]).detach()
    stored = cache[["b", "a"]]
    assert stored.shape == (2, k)
    order = logits.argsort(-1, descending=True)
    assert stored.indices.tolist() == order[:, :k].tolist()
    log_p = logits.double().log_softmax(-1).gather(-1, order)
    torch.testing.assert_close(stored.log_probs.double(), log_p[:, :k], rtol=ROUNDING, atol=1e-5)
    if k < 5:
        torch.testing.assert_close(stored.log_rest.double(), log_p[:, k:].logsumexp(-1), rtol=ROUNDING, atol=1e-5)
    batch = {"input_ids": torch.tensor([[*DOCUMENTS[1], 0, 0], DOCUMENTS[0]]), "labels": torch.tensor([4, 0])}
    batch["attention_mask"] = (batch["input_ids"] > 0).long()
    out = kdloss.Distiller(None, kdloss.VanillaKD(1.0, 0.0))(student, **batch, teacher=stored)
    s = student(batch["input_ids"], batch["attention_mask"]).logits.double().log_softmax(-1).gather(-1, order)
    if k < 5:  # the remaining classes are one class with their total probability
        s, log_p = (torch.cat([x[:, :k], x[:, k:].logsumexp(-1, keepdim=True)], -1) for x in (s, log_p))
    expected = (log_p.exp() * (log_p - s)).sum(-1).mean()
    torch.testing.assert_close(out.loss.double(), expected, rtol=5e-3, atol=1e-4)


def test_a_classifier_finds_its_last_token_in_a_padded_batch(tmp_path):
    torch.manual_seed(0)
    config = hf.GPT2Config(vocab_size=61, n_embd=16, n_layer=1, n_head=2, num_labels=4, pad_token_id=2)
    teacher = hf.GPT2ForSequenceClassification(config).eval()
    torch.nn.init.normal_(teacher.score.weight)
    cache = write_and_open(tmp_path, teacher, k=4, id=["a", "b"], input_ids=DOCUMENTS[:2])
    assert_near(cache[["a", "b"]], torch.cat([teacher(torch.tensor([row])).logits for row in DOCUMENTS[:2]]))


def test_a_classifiers_cache_takes_no_length_and_no_packed_rows(tmp_path):
    teacher = bert("SequenceClassification")
    cache = write_and_open(tmp_path / "a", teacher, k=2, id=["a", "b"], input_ids=DOCUMENTS[:2])
    with pytest.raises(TypeError, match="one row of classes for each example, of a classifier"):
        cache.batch(["a"], length=7)
    rows = {"id": ["a", "b"], "input_ids": DOCUMENTS[:2], "seq_lengths": [[5], [2, 1]]}
    with pytest.raises(ValueError, match="one row of logits for each example, and 'b' holds several documents"):
        write_and_open(tmp_path / "b", teacher, k=2, **rows)


def test_outputs_that_are_no_logits_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a cache keeps logits .* QuestionAnsweringModelOutput of .*'start_logits'"):
        write_and_open(tmp_path, bert("QuestionAnswering", 2), k=1, id=["a"], input_ids=DOCUMENTS[:1])
    with pytest.raises(TypeError, match="teacher is a model, got function"):
        write_and_open(tmp_path, lambda input_ids: input_ids, id=["a"], input_ids=DOCUMENTS[:1])


# -- weights --


@pytest.mark.parametrize("buffers", [False, True])
def test_an_offloaded_teacher_writes_the_same_cache_as_in_memory(buffers, tmp_path):
    rows = {"id": ["a", "b"], "input_ids": DOCUMENTS[:2]}
    teacher = build("gemma3", depth=1).eval()
    write_and_open(tmp_path / "memory", teacher, k=5, **rows)
    before = fingerprint(teacher)
    cpu_offload(teacher, offload_buffers=buffers)
    assert all(p.is_meta for p in teacher.parameters())
    write_and_open(tmp_path / "offloaded", teacher, k=5, **rows)
    assert contents(tmp_path / "offloaded") == contents(tmp_path / "memory")
    assert fingerprint(teacher) == before
    with pytest.raises(ValueError, match="on the device 'meta' and nothing says where its values are"):
        fingerprint(nn.Linear(2, 2, device="meta"))


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.quantize_per_tensor.*")
def test_the_fingerprint_of_a_teacher_depends_on_buffers_and_packed_weights(tmp_path):
    def changed(model, change):
        before = fingerprint(model)
        assert fingerprint(model) == before
        with torch.no_grad():
            change(model)
        return fingerprint(model) != before

    assert changed(nn.BatchNorm1d(3), lambda m: m.running_var.add_(1))
    assert changed(nn.Linear(3, 3), lambda m: m.bias.add_(1))

    def quantised(seed):
        torch.manual_seed(seed)
        plain = nn.Sequential(nn.Linear(8, 8), nn.Flatten())
        return torch.ao.quantization.quantize_dynamic(plain, {nn.Linear}, dtype=torch.qint8)

    assert not list(quantised(0).parameters())
    assert fingerprint(quantised(0)) == fingerprint(quantised(0)) != fingerprint(quantised(1))


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.quantize_per_tensor.*")
def test_outputs_of_a_quantised_teacher_are_stored(tmp_path):
    plain = bert("SequenceClassification")
    teacher = torch.ao.quantization.quantize_dynamic(plain, {nn.Linear}, dtype=torch.qint8)
    cache = write_and_open(tmp_path, teacher, k=5, batch_size=1, id=["a", "b"], input_ids=DOCUMENTS[:2])
    assert_near(cache[["b"]], teacher(torch.tensor(DOCUMENTS[1:2])).logits)


def test_the_fingerprint_depends_on_every_tensor_of_a_composed_weight():
    class Packed(torch.Tensor):
        """A tensor of integers and a scale, like torchao's."""

        @staticmethod
        def __new__(cls, numbers, scale):
            return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=torch.float32)

        def __init__(self, numbers, scale):
            self.numbers, self.scale = numbers, scale

        def __tensor_flatten__(self):
            return ["numbers", "scale"], None

        @classmethod
        def __tensor_unflatten__(cls, parts, settings, size, stride):
            return cls(parts["numbers"], parts["scale"])

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.detach.default:
                return cls(args[0].numbers, args[0].scale)
            raise NotImplementedError(function)

    def model(numbers, scale):
        net = nn.Linear(3, 3, bias=False)
        net.weight = nn.Parameter(Packed(numbers, scale), requires_grad=False)
        return net

    numbers, scale = torch.arange(9, dtype=torch.uint8).reshape(3, 3), torch.ones(3)
    assert len({fingerprint(model(n, s)) for n in (numbers, numbers + 1) for s in (scale, scale * 2)}) == 4

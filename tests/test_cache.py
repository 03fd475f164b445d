"""A cached teacher gives the outputs of the live teacher in every batch; damaged or mismatched files are refused."""

import json
import os
import pickle
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path

import caching
import numpy as np
import pytest
import torch
from caching import SETTINGS, VOCAB, Teacher
from families import batch, build
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast
from watching import as_on_an_accelerator, never_waiting

import kdloss
import kdloss.cache
from kdloss.cache import _files

FLOAT16_ERROR = 2.0**-11  # largest relative error of rounding a normal number to float16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    return caching.write(tmp_path_factory.mktemp("cache") / "whole")


@pytest.fixture
def copy(folder, tmp_path):
    for name, content in caching.contents(folder).items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def opened(folder, **settings):
    return kdloss.cache.open(folder, tokenizer=caching.tokenizer(), **settings)


def live(i):
    """Return the live teacher's float64 log-probabilities for a batch of one example, at the cache's temperature."""
    ids = torch.tensor([caching.tokens()[i]])
    with torch.no_grad():
        z = Teacher().eval()(ids, torch.ones_like(ids))[0].double().numpy() / SETTINGS["temperature"]
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def name(i):
    return f"example {i}"


# -- what is stored and what is read --


def test_the_most_probable_classes_and_the_total_of_the_others_are_stored(folder):
    cache = opened(folder)
    for i, ids in enumerate(caching.tokens()):
        x, expected = cache[[name(i)]], live(i)
        assert x.shape == (1, len(ids), SETTINGS["k"])
        order = np.argsort(-expected, -1)
        assert x.indices[0].tolist() == order[:, :5].tolist()
        ordered = np.take_along_axis(expected, order, -1)
        np.testing.assert_allclose(x.log_probs[0], ordered[:, :5], rtol=1.01 * FLOAT16_ERROR, atol=1e-6)
        rest = np.log(np.exp(ordered[:, 5:]).sum(-1))
        np.testing.assert_allclose(x.log_rest[0], rest, rtol=1.01 * FLOAT16_ERROR, atol=1e-6)
        assert (x.temperature, x.vocabulary, x.tail) == (2.0, VOCAB, "bucket")


def test_a_shard_has_no_padding_and_the_manifest_records_settings_and_checksums(folder):
    lengths = [len(ids) for ids in caching.tokens()]
    for shard, in_shard in (("shard-00000", lengths[:4]), ("shard-00002", lengths[8:])):
        tensors = load_file(folder / f"{shard}.safetensors")
        assert tensors["offsets"].tolist() == [0, *np.cumsum(in_shard)]
        assert {x: (tuple(t.shape), t.dtype) for x, t in tensors.items() if x != "offsets"} == {
            "indices": ((sum(in_shard), 5), torch.uint8),
            "log_probs": ((sum(in_shard), 5), torch.float16),
            "log_rest": ((sum(in_shard),), torch.float16),
        }
    manifest = json.loads((folder / "manifest.json").read_text())
    expected = {"format": 1, "teacher": "Teacher", "vocabulary": VOCAB, "k": 5, "temperature": 2.0}
    assert manifest.items() >= (expected | {"dtype": "float16", "examples": 10}).items()
    assert manifest["tokenizer"] == kdloss.cache.tokenizer_hash(caching.tokenizer())
    for shard, sums in manifest["shards"].items():
        output = subprocess.check_output(["sha256sum", folder / f"{shard}.safetensors"], text=True)
        assert output.split()[0] == sums["sha256"]


@pytest.mark.parametrize(
    ("vocabulary", "dtype"),
    [
        (256, torch.uint8),
        (257, torch.uint16),
        (65536, torch.uint16),
        (65537, torch.int32),
        (262144, torch.int32),
    ],
)
def test_indices_have_the_smallest_type_that_fits_the_vocabulary(tmp_path, vocabulary, dtype):
    class Last(torch.nn.Module):
        """A teacher that gives the last classes the highest logits."""

        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(1.0))

        def forward(self, input_ids, attention_mask):
            ramp = torch.arange(vocabulary).float() * self.scale
            return ramp.expand(*input_ids.shape, vocabulary)

    caching.write(tmp_path, Last(), caching.dataset(2), k=2)
    assert load_file(tmp_path / "shard-00000.safetensors")["indices"].dtype == dtype
    assert opened(tmp_path)[[name(1)]].indices[0, 0].tolist() == [vocabulary - 1, vocabulary - 2]


def test_values_depend_on_neither_the_order_nor_the_other_examples_of_a_batch(folder):
    cache = opened(folder)
    single = {i: cache[[name(i)]] for i in range(10)}
    for order in ([9, 0, 5, 5, 2], [3, 1], [4, 8, 7, 6]):
        x = cache[[name(i) for i in order]]
        lengths = [len(caching.tokens()[i]) for i in order]
        assert x.shape == (len(order), max(lengths), 5)
        for row, (i, n) in enumerate(zip(order, lengths, strict=True)):
            for field in ("indices", "log_probs", "log_rest"):
                assert torch.equal(getattr(x, field)[row, :n], getattr(single[i], field)[0])
            assert (x.ids()[row, n:] == -1).all()


def test_positions_past_the_end_of_an_example_have_zero_loss_without_a_mask(folder):
    x = opened(folder).batch([name(0)], 12)
    student = torch.randn(1, 12, VOCAB, requires_grad=True)
    value = kdloss.divergences.forward_kl(student, x, temperature=2.0)
    n = len(caching.tokens()[0])
    assert value[0, :n].min() > 0
    assert value[0, n:].tolist() == [0.0] * (12 - n)
    assert not torch.autograd.grad(value.sum(), student)[0][0, n:].any()


def test_ids_may_be_integers_in_a_list_or_a_tensor(tmp_path):
    data = caching.dataset().remove_columns("id").add_column("number", list(range(100, 110)))
    caching.write(tmp_path, data=data, id_column="number")
    cache = opened(tmp_path)
    assert torch.equal(cache[torch.tensor([103, 101])].log_probs, cache[[103, 101]].log_probs)
    assert 103 in cache
    assert "103" not in cache
    with pytest.raises(ValueError, match=r"no example '103' among its 10, whose ids look like 100"):
        cache[["103"]]


def test_padding_on_either_side_is_neither_read_nor_stored(folder, tmp_path):
    width = max(map(len, caching.tokens()))
    left, right = ({"input_ids": [], "attention_mask": []} for _ in range(2))
    for ids in caching.tokens():
        pad = [0] * (width - len(ids))
        right["input_ids"].append(ids + [39] * len(pad))
        right["attention_mask"].append([1] * len(ids) + pad)
        left["input_ids"].append([39] * len(pad) + ids)
        left["attention_mask"].append(pad + [1] * len(ids))
    shards = [x for x in caching.contents(folder) if x.endswith("safetensors")]
    for side, rows in (("left", left), ("right", right)):
        data = caching.datasets.Dataset.from_dict({"id": [name(i) for i in range(10)], **rows})
        caching.write(tmp_path / side, data=data)
        assert [caching.contents(tmp_path / side)[x] == caching.contents(folder)[x] for x in shards] == [True] * 3
    mask = torch.tensor(left["attention_mask"])[2:4]
    x, plain = (
        opened(folder).batch([name(2), name(3)], attention_mask=mask),
        opened(folder)[[name(2), name(3)]],
    )
    for row, n in enumerate(mask.sum(-1).tolist()):
        assert torch.equal(x.indices[row, width - n :], plain.indices[row, :n])
        assert (x.ids()[row, : width - n] == -1).all()


class OfTokens(torch.nn.Module):
    """A student that sees one token at a time, so that where padding stands changes nothing."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.embedding, self.head = torch.nn.Embedding(VOCAB, 8), torch.nn.Linear(8, VOCAB)

    def forward(self, input_ids, attention_mask):
        return self.head(self.embedding(input_ids))


def padded(side):
    """Examples 2 and 3, whose lengths differ, and their ids."""
    rows = [torch.tensor(caching.tokens()[i]) for i in (2, 3)]
    width = max(map(len, rows))
    assert min(map(len, rows)) < width
    both = [(ids, torch.ones_like(ids)) for ids in rows]
    pads = [(width - len(ids), 0) if side == "left" else (0, width - len(ids)) for ids in rows]
    ids, mask = (
        torch.stack([torch.nn.functional.pad(x[k], pad) for x, pad in zip(both, pads, strict=True)]) for k in (0, 1)
    )
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("call", ["by keyword", "by position", "a criterion"])
def test_stored_rows_beside_a_batch_padded_on_the_left_are_refused_unless_the_mask_places_them(folder, causal, call):
    student, cache = OfTokens(), opened(folder)
    criterion = kdloss.VanillaKD(temperature=2.0, alpha=0.0, causal=causal)

    def loss(side, stored):
        ids, mask, labels = padded(side).values()
        if call == "a criterion":
            return criterion(student(ids, mask), stored, labels, attention_mask=mask.bool())
        model = kdloss.Distillation(student, None, criterion)
        if call == "by position":
            return model(ids, mask, labels=labels, teacher=stored).loss
        return model(input_ids=ids, attention_mask=mask, labels=labels, teacher=stored).loss

    ids = [name(2), name(3)]
    right = loss("right", cache[ids])
    at = padded("left")["attention_mask"]
    left = loss("left", cache.batch(ids, attention_mask=at))
    torch.testing.assert_close(left, right)
    torch.testing.assert_close(*(torch.autograd.grad(x, student.head.weight)[0] for x in (left, right)))
    example = int(at.sum(-1).argmin())
    words = (
        rf"a row at position 0 of example {example}, where attention_mask is 0, and none at \d+.*cache\.batch\(ids, "
    )
    for side, stored in (("left", cache[ids]), ("right", cache.batch(ids, attention_mask=at))):
        with pytest.raises(ValueError, match=words if side == "left" else "where attention_mask is 0, and none at 0"):
            loss(side, stored)


def test_stored_rows_at_padding_or_without_classes_are_no_misplaced_rows(folder):
    student, (ids, mask, labels) = OfTokens(), padded("left").values()
    model = kdloss.Distillation(student, None, kdloss.VanillaKD(temperature=2.0, alpha=0.0, causal=True))
    full = kdloss.TopKLogits.of(Teacher().eval()(ids, mask), 5, temperature=2.0)
    assert model(input_ids=ids, attention_mask=mask, labels=labels, teacher=full).loss > 0  # rows at padding too
    served = [[None] + [{3: -0.5, 7: -1.5}] * (n - 1) for n in padded("right")["attention_mask"].sum(-1).tolist()]
    ids, mask, labels = padded("right").values()
    rows = kdloss.TopKLogits.from_served(served, temperature=2.0)  # none at the last token
    assert model(input_ids=ids, attention_mask=mask, labels=labels, teacher=rows).loss > 0


def test_the_places_of_stored_rows_are_looked_at_once_on_an_accelerator(folder, monkeypatch):
    ids, cache = [name(2), name(3)], opened(folder)
    right, left = padded("right"), padded("left")
    as_on_an_accelerator(monkeypatch)
    monkeypatch.setattr(kdloss._runner, "on_cpu", lambda device: True)  # the rows are there already
    criterion = kdloss.VanillaKD(temperature=2.0, alpha=0.0, causal=True)
    with pytest.raises(ValueError, match="where attention_mask is 0"):
        kdloss.Distillation(OfTokens(), None, criterion)(**left, teacher=cache[ids])
    model = kdloss.Distillation(OfTokens(), None, criterion)
    model(**right, teacher=cache[ids])
    with never_waiting():
        model(**right, teacher=cache[ids])


def test_only_the_shards_of_a_batch_are_read_and_each_is_verified_once(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # forgets what earlier tests verified
    cache = opened(folder)
    verified = []
    sha256 = _files.sha256
    monkeypatch.setattr(_files, "sha256", lambda file: verified.append(file.name) or sha256(file))
    for ids in ([name(9)], [name(8), name(9)], [name(0), name(9)]):
        cache[ids]
    assert verified == ["shard-00002.safetensors", "shard-00000.safetensors"]


def test_writing_restores_the_teachers_modes_and_the_cache_pickles_without_the_teacher(folder, tmp_path):
    teacher = Teacher()
    teacher.gru.train()
    teacher.head.eval()
    kdloss.cache.write(tmp_path, teacher, caching.dataset(), tokenizer=caching.tokenizer(), **SETTINGS)
    assert [teacher.training, teacher.gru.training, teacher.head.training] == [True, True, False]
    cache, reference = opened(tmp_path), weakref.ref(teacher)
    del teacher
    assert reference() is None
    cache[[name(1)]]
    unpickled = pickle.loads(pickle.dumps(cache))
    assert torch.equal(unpickled[[name(1)]].log_probs, cache[[name(1)]].log_probs)


# -- the loss --


def dense_kl(log_p, log_q):
    return (np.exp(log_p) * (log_p - log_q)).sum(-1)


@pytest.mark.parametrize("k", [1, 5, 20, VOCAB])
def test_the_cached_loss_equals_the_live_loss_within_the_bound_from_the_tail(tmp_path, k):
    r"""Dense KL = bucket KL + r · KL(tail of p || tail of q), with both tails normalised and r the mass of p's tail.

    So bucket <= dense <= bucket + r · (log of q's tail mass - smallest log q in the tail), a bound that depends on
    the teacher only by r. Gradients with respect to the student's logits differ by at most 2 r T (sum of absolute
    values). Rounding to float16 changes each log p by at most e = max |log p| · 2^-11, and the normalised one by 2 e.
    """
    caching.write(tmp_path, k=k)
    generator = torch.Generator().manual_seed(3)
    ids, t = list(range(10)), SETTINGS["temperature"]
    x = opened(tmp_path)[[name(i) for i in ids]]
    student = 3 * torch.randn(*x.shape[:2], VOCAB, generator=generator, dtype=torch.float64)
    student.requires_grad_()
    value = kdloss.divergences.forward_kl(student, x, temperature=t)
    slope = torch.autograd.grad(value.sum(), student)[0].numpy()
    gaps = []
    for row, i in enumerate(ids):
        log_p = live(i)
        n = len(log_p)
        z = student[row, :n].detach().numpy() / t
        log_q = z - np.log(np.exp(z).sum(-1, keepdims=True))
        dense, ours = t * t * dense_kl(log_p, log_q), value[row, :n].detach().numpy()
        tail = np.argsort(-log_p, -1)[:, k:]
        p, q = (np.take_along_axis(y, tail, -1) for y in (log_p, log_q))
        r = np.exp(p).sum(-1)
        change = 2.02 * FLOAT16_ERROR * np.abs(np.where(np.isin(log_p, p), 0, log_p)).max(-1)
        if k < VOCAB:
            change = np.maximum(change, 2.02 * FLOAT16_ERROR * np.abs(np.log(r)))
        rounding = t * t * (np.expm1(change) * (np.abs(log_p - log_q).max(-1) + 2 * change) + change) + 1e-6
        assert (ours <= dense + rounding).all()
        bound = r * (np.log(np.exp(q).sum(-1)) - q.min(-1)) if k < VOCAB else 0
        assert (dense <= ours + t * t * bound + rounding).all()
        gradient_gap = np.abs(slope[row, :n] - t * (np.exp(log_q) - np.exp(log_p))).sum(-1)
        assert (gradient_gap <= t * (2 * r + 2 * np.expm1(change)) + 1e-6).all()
        gaps.append((dense - ours).max())
    assert max(gaps) < 0.02 if k == VOCAB else max(gaps) > 0.02  # a tail makes a visible difference


def test_a_cached_batch_replaces_the_teachers_logits_in_a_plain_loop(tmp_path):
    """Causal and padded: with all V classes stored, loss and gradient are the live teacher's up to float16 rounding."""
    teacher, student, inputs = build("gpt2", width=24), build("gpt2", depth=2, seed=1), batch("gpt2")
    labels = inputs.pop("labels")
    data = {"id": ["a", "b"]} | {column: x.tolist() for column, x in inputs.items()}
    tokenizer = caching.tokenizer(61)
    settings = {"tokenizer": tokenizer, "k": 61, "temperature": 2.0}
    kdloss.cache.write(tmp_path, teacher, caching.datasets.Dataset.from_dict(data), **settings)
    cache = kdloss.cache.open(tmp_path, tokenizer=tokenizer)
    criterion = kdloss.VanillaKD(temperature=2.0, alpha=0.3, causal=True)
    student_logits = student(**inputs).logits
    losses = [
        criterion(student_logits, target, labels)
        for target in (cache.batch(["a", "b"]), teacher(**inputs).logits.detach())
    ]
    slopes = [torch.autograd.grad(loss, student_logits, retain_graph=True)[0] for loss in losses]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=0)
    torch.testing.assert_close(*slopes, rtol=0, atol=2e-3 * slopes[1].abs().max().item())


def test_a_student_with_another_vocabulary_is_refused_with_both_sizes(folder):
    student = torch.randn(1, len(caching.tokens()[0]), VOCAB + 1)
    with pytest.raises(ValueError, match="the student has 41 classes and the teacher 40"):
        kdloss.VanillaKD(alpha=0.0)(student, opened(folder)[[name(0)]])


# -- damaged, altered and mismatched files --


def flip_one_bit(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def exchange_with_shard_0(file):
    other = file.with_name(file.name.replace("00001", "00000"))
    ours, theirs = file.read_bytes(), other.read_bytes()
    file.write_bytes(theirs)
    other.write_bytes(ours)


DAMAGE = {
    "truncated": (lambda file: file.write_bytes(file.read_bytes()[:-3]), "was cut or altered"),
    "one bit flipped": (flip_one_bit, "was cut or altered"),
    "two files exchanged": (exchange_with_shard_0, "was cut or altered"),
    "deleted": (lambda file: file.unlink(), "is gone"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_shard_is_named_when_it_is_read_and_rewritten_by_the_same_call(copy, damage, folder):
    damage_file, message = DAMAGE[damage]
    damage_file(copy / "shard-00001.safetensors")
    cache = opened(copy)
    assert cache[[name(8)]].shape[0] == 1  # from an undamaged shard
    for read in (lambda: cache[[name(8), name(5)]], cache.verify):
        with pytest.raises(
            ValueError, match=rf"shard-0000.\.safetensors {message}.*kdloss.cache.write writes it again"
        ):
            read()
    caching.write(copy)
    assert caching.contents(copy) == caching.contents(folder)
    opened(copy).verify()


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_index_is_named_when_the_cache_is_opened(copy, damage, folder):
    damage_file, message = DAMAGE[damage]
    damage_file(copy / "shard-00001.json")
    with pytest.raises(ValueError, match=rf"shard-0000.\.json {message}"):
        opened(copy)
    caching.write(copy)
    assert caching.contents(copy) == caching.contents(folder)


def test_a_manifest_that_is_missing_broken_or_of_another_format_is_refused(copy):
    manifest = copy / "manifest.json"
    content = json.loads(manifest.read_text())
    for text, message in [
        (json.dumps(content | {"format": 2}), r"has format 2; kdloss reads 1 here"),
        ("{", r"manifest.json can't be read"),
    ]:
        manifest.write_text(text)
        with pytest.raises(ValueError, match=message):
            opened(copy)
    manifest.unlink()
    with pytest.raises(ValueError, match=r"holds no manifest.json, so it is no cache: kdloss.cache.write makes"):
        opened(copy)


def test_another_tokenizer_is_refused(folder):
    with pytest.raises(ValueError, match=r"another tokenizer \(hash .*that of its teacher 'Teacher'"):
        kdloss.cache.open(folder, tokenizer=caching.tokenizer(VOCAB + 1))


def test_invalid_requests_for_a_batch_are_refused(folder):
    cache = opened(folder)
    n = len(caching.tokens()[0])
    with pytest.raises(ValueError, match=r"no example 'another' among its 10, whose ids look like 'example 0'"):
        cache[[name(0), "another"]]
    with pytest.raises(ValueError, match=rf"'example 0' has {n} positions in shard-00000, the batch {n - 1}"):
        cache.batch([name(0)], n - 1)
    with pytest.raises(ValueError, match=rf"'example 0' has {n} positions in shard-00000, the batch {n + 1}"):
        cache.batch([name(0)], attention_mask=torch.ones(1, n + 1))
    with pytest.raises(ValueError, match="2 ids and an attention_mask of 1 rows"):
        cache.batch([name(0), name(1)], attention_mask=torch.ones(1, n))
    for ids in (name(0), [], torch.tensor([[1]]), 3):
        with pytest.raises(TypeError, match="ids must be a list or a 1-D tensor"):
            cache[ids]
    with pytest.raises(ValueError, match=r"tail='bukcet' is unknown; .* did you mean 'bucket'"):
        opened(folder, tail="bukcet")[[name(0)]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 6}, "k=5, not 6"),
        ({"temperature": 1.0}, r"temperature=2.0, not 1.0"),
        ({"tokenizer": caching.tokenizer(first=1)}, "tokenizer="),
        ({"teacher": Teacher(seed=1)}, "teacher_weights="),
        ({"teacher": Teacher(), "teacher_name": "another"}, "teacher='Teacher', not 'another'"),
        ({"teacher": Teacher(VOCAB + 1)}, "vocabulary=40, not 41"),
        ({"batch_size": 3, "shard_size": 5}, "batch_size=2, not 3, shard_size=4, not 5"),
        ({"data": caching.dataset(9)}, "examples=10, not 9"),
    ],
)
def test_writing_with_other_settings_into_the_same_folder_is_refused_and_names_them(copy, folder, settings, message):
    with pytest.raises(ValueError, match=rf"written with other settings: .*{message}.*into another folder"):
        caching.write(copy, **settings)
    assert caching.contents(copy) == caching.contents(folder)


def test_another_dataset_of_the_same_length_is_refused(copy):
    rows = caching.dataset().to_dict()
    rows["input_ids"][5] = [1, *rows["input_ids"][5]]
    with pytest.raises(ValueError, match=r"shard-00001.safetensors was written from other examples"):
        caching.write(copy, data=caching.datasets.Dataset.from_dict(rows))


@pytest.mark.parametrize(
    ("change", "settings", "error", "message"),
    [
        ({"id": None}, {}, ValueError, r"columns \['input_ids'\], not \['id'\].*with_indices=True"),
        ({"id": ["a", "b", "a"]}, {}, ValueError, "id 'a' stands for 2 examples"),
        ({"id": [0.5, 1.0, 2.0]}, {}, TypeError, "ids must be strings or integers, got 0.5"),
        ({"id": ["a", "b", None]}, {}, TypeError, "all strings or all integers, got 'a' and None"),
        (
            {"attention_mask": [[1, 1], [1], [1, 0, 1]]},
            {},
            ValueError,
            "of example 'c' has zeros between ones",
        ),
        (
            {"attention_mask": [[1, 1], [1], [1]]},
            {},
            ValueError,
            "'c' has 3 input_ids and an attention_mask of 1",
        ),
        ({"id": [], "input_ids": []}, {}, ValueError, "the dataset is empty"),
        ({}, {"k": 41}, ValueError, "k=41, but the teacher has 40 classes"),
        ({}, {"k": 0}, ValueError, "k must be a whole number of 1 or more, got 0"),
        ({}, {"shard_size": 2.5}, ValueError, "shard_size must be a whole number of 1 or more, got 2.5"),
        ({}, {"temperature": 0.0}, ValueError, "temperature must be finite and above 0"),
        ({}, {"tokenizer": "gpt2"}, TypeError, r"tokenizer needs get_vocab\(\), got str"),
    ],
)
def test_invalid_data_or_settings_are_refused_before_a_shard_is_written(tmp_path, change, settings, error, message):
    columns = {"id": ["a", "b", "c"], "input_ids": [[1, 2], [3], [4, 5, 6]]} | change
    data = caching.datasets.Dataset.from_dict({column: x for column, x in columns.items() if x is not None})
    with pytest.raises(error, match=message):
        caching.write(tmp_path, data=data, **settings)
    assert not list(tmp_path.glob("shard*"))


def test_a_dataset_without_length_is_refused(tmp_path):
    with pytest.raises(TypeError, match="has a length, got IterableDataset"):
        caching.write(tmp_path, data=caching.dataset().to_iterable_dataset())


def test_nan_outputs_of_a_teacher_are_refused(tmp_path):
    teacher = Teacher()
    token = caching.tokens()[5][0]
    with torch.no_grad():
        teacher.embedding.weight[token] = torch.nan
    first = next(i for i, ids in enumerate(caching.tokens()) if token in ids)
    with pytest.raises(ValueError, match=rf"of example '{name(first)}' hold NaN"):
        caching.write(tmp_path, teacher)
    with pytest.raises(ValueError, match="is not complete"):
        opened(tmp_path)


def test_an_example_without_tokens_has_no_positions(tmp_path):
    data = caching.datasets.Dataset.from_dict({"id": ["a", "b"], "input_ids": [[], [3, 4]]})
    caching.write(tmp_path, data=data)
    assert opened(tmp_path)[["a", "b"]].ids()[0].tolist() == [[-1] * 5] * 2


# -- writing that is killed, runs out of disk space, or is done by several processes --


def script(file, *arguments, **environment):
    path = os.pathsep.join([str(Path(file).parent), *sys.path])
    variables = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(
        [sys.executable, file, *map(str, arguments)],
        env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def next_to_this_file(file):
    return str(Path(__file__).parent / file)


def test_writing_again_after_a_kill_at_any_instant_gives_the_bytes_of_an_undisturbed_run(tmp_path):
    """Kill before every call of the teacher, every fsync and every rename, and halfway through every file."""
    process = script(next_to_this_file("killed_writer.py"), tmp_path)
    output, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    instants, half_written = map(int, output.split())
    # 1 + 5 calls of the teacher; 3 shards, 3 indices, 2 manifests: each written, fsynced with its folder, and renamed
    assert instants == 6 + 8 + 2 * 8 + 8
    assert half_written > 0  # some kills left half-written files


def test_two_processes_restarted_after_a_kill_write_the_files_of_one_process(folder, tmp_path):
    def ranks(store, dies_at):
        file, arguments = next_to_this_file("cache_rank.py"), (tmp_path / "two", tmp_path / store, dies_at)
        return [script(file, *arguments, RANK=rank, WORLD_SIZE="2") for rank in ("0", "1")]

    first, second = ranks("store", 2)
    outputs = second.communicate()
    first.kill()  # it is still waiting for the killed process
    first.communicate()
    assert second.returncode == -9, outputs[1][-3000:]
    with pytest.raises(ValueError, match=r"is not complete: [123] of 3 shards are missing; the same call"):
        opened(tmp_path / "two")
    restarted = ranks("another-store", 0)
    outputs = [rank.communicate()[1] for rank in restarted]
    assert [rank.returncode for rank in restarted] == [0, 0], outputs
    assert caching.contents(tmp_path / "two") == caching.contents(folder)


def test_two_processes_of_torchrun_write_the_files_of_one_process(folder, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*torchrun, next_to_this_file("cache_rank.py"), tmp_path / "two", "torchrun", "0"], check=True)
    assert caching.contents(tmp_path / "two") == caching.contents(folder)


def test_the_variables_of_torchrun_suffice_and_the_last_process_completes_the_cache(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, missing in (("1", 2), ("0", 0)):
        monkeypatch.setenv("RANK", rank)
        caching.write(tmp_path)
        if missing:
            with pytest.raises(ValueError, match=f"is not complete: {missing} of 3 shards are missing"):
                opened(tmp_path)
    assert caching.contents(tmp_path) == caching.contents(folder)


def test_partial_files_of_killed_processes_are_deleted_by_a_run_with_fewer_processes(folder, tmp_path):
    for rank in (0, 3):
        (tmp_path / f"manifest.json.{rank}.partial").write_text("{")
    caching.write(tmp_path)
    assert caching.contents(tmp_path) == caching.contents(folder)


def test_a_full_disk_is_reported_and_finished_shards_remain(folder, tmp_path, monkeypatch):
    write_bytes, calls = Path.write_bytes, []

    def full(path, content):
        calls.append(path)
        if len(calls) == 2:
            write_bytes(path, content[: len(content) // 2])
            raise OSError(28, "No space left on device")
        write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"shard-00001.safetensors could not be written .*No space.*the same call"):
        caching.write(tmp_path)
    assert [file.name for file in sorted(tmp_path.iterdir())] == [
        "manifest.json",
        "shard-00000.json",
        "shard-00000.safetensors",
    ]
    batch_sizes = []
    caching.write(tmp_path, teacher_that_records(batch_sizes))
    assert caching.contents(tmp_path) == caching.contents(folder)
    assert sum(batch_sizes) == 1 + 6  # one to find the vocabulary's size, and the examples of the two missing shards


def teacher_that_records(batch_sizes):
    teacher = Teacher()
    teacher.register_forward_pre_hook(
        lambda _, args, inputs: batch_sizes.append(len(inputs["input_ids"])), with_kwargs=True
    )
    return teacher


def test_writing_a_finished_cache_again_runs_the_teacher_only_for_the_vocabularys_size(copy):
    batch_sizes = []
    caching.write(copy, teacher_that_records(batch_sizes))
    assert batch_sizes == [1]  # one example, to find the vocabulary's size


def test_a_progress_bar_is_shown_if_tqdm_is_installed(tmp_path, capsys, monkeypatch):
    caching.write(tmp_path / "with")
    assert "teacher: 100%" in (shown := capsys.readouterr().err)
    assert "10/10" in shown
    monkeypatch.setitem(sys.modules, "tqdm", None)
    caching.write(tmp_path / "without")
    assert capsys.readouterr().err == ""
    assert caching.contents(tmp_path / "without") == caching.contents(tmp_path / "with")


def test_kdloss_does_not_import_safetensors_and_the_cache_imports_no_datasets_or_transformers():
    code = (
        "import sys, kdloss; assert 'safetensors' not in sys.modules\n"
        "import kdloss.cache; assert not {'datasets', 'transformers'} & set(sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


# -- the tokenizer --


def test_the_hash_of_a_tokenizer_depends_only_on_its_content(tmp_path):
    ours = kdloss.cache.tokenizer_hash(caching.bpe())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=caching.bpe())
    for place in ("here", "there"):
        tokenizer.save_pretrained(tmp_path / place)
        assert kdloss.cache.tokenizer_hash(PreTrainedTokenizerFast.from_pretrained(tmp_path / place)) == ours
    code = "import caching; print(caching.kdloss.cache.tokenizer_hash(caching.bpe()))"
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"  # another seed than this process's
    process = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": seed},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert process.stdout.strip() == ours
    tokenizer.add_tokens(["new"])
    others = [tokenizer, caching.bpe(merges=()), caching.bpe(vocabulary=("b", "a", "ab"))]
    assert len({ours, *map(kdloss.cache.tokenizer_hash, others)}) == 4

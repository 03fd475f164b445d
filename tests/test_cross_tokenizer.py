"""A teacher and a student whose tokenizers split the same text into different tokens."""

import math

import cross_tokenizer
import distill_lm
import numpy as np
import oracles
import pytest
import tiny
import torch
from families import build
from parts import alignment, options, text

import kdloss

WORDS = ["The naïve café: 12 → 13 😀 numbers follow.", "Even, odd, and even again…", "x"]
CORPUS = "".join(f"{words}\0" for words in WORDS * 3).encode()
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = {chr(b): b for b in PRINTABLE} | {
    chr(256 + n): b for n, b in enumerate(b for b in range(256) if b not in PRINTABLE)
}  # as in GPT-2's vocabulary, an unprintable byte is written as a character from 256 on


def never(*args, **settings):
    raise AssertionError("this was done before")


@pytest.fixture(scope="module")
def tokenizers():
    """The student's tokenizer, with few tokens beyond single bytes, and the teacher's, with longer tokens."""
    return text.train_tokenizer(WORDS, 265), text.train_tokenizer([*tiny.SENTENCES, *WORDS], 400)


def bytes_of(tokenizer, ids):
    """The bytes that these tokens spell, with 0 for the end of a text."""
    end = tokenizer.eos_token_id
    pieces = ([0] if i == end else map(BYTES.get, tokenizer.convert_ids_to_tokens(i)) for i in ids.tolist())
    return b"".join(map(bytes, pieces))


def test_tokens_are_aligned_where_both_have_read_the_same_complete_characters(tokenizers):
    mine, theirs = tokenizers
    context = 9
    tokens = (alignment.read(tokenizer, WORDS * 3) for tokenizer in tokenizers)
    blocks = alignment.aligned(*tokens, length=12, context=context)
    read, counted = 0, 0
    starts = [0]
    for token in alignment.read(theirs, WORDS * 3)[0]:
        starts.append(starts[-1] + len(bytes_of(theirs, token[None])))
    for ids, teacher_ids, at, mask in zip(*blocks.values(), strict=True):
        block = bytes_of(mine, ids)
        assert CORPUS[read : read + len(block)] == block
        complete_before = read == 0 or CORPUS[read : read + 1].decode(errors="ignore") != "" or CORPUS[read] >= 0xC0
        begin = next(s for s in starts if s >= read and (complete_before or s > read) and not 0x80 <= CORPUS[s] < 0xC0)
        assert (CORPUS[begin:] + bytes(99)).startswith(bytes_of(theirs, teacher_ids[:3]))
        assert not mask[0]
        for j in range(len(ids) - 1):
            end = read + len(bytes_of(mine, ids[: j + 1]))
            ends = [begin + len(bytes_of(theirs, teacher_ids[: i + 1])) for i in range(min(context, len(teacher_ids)))]
            complete = end == len(CORPUS) or not 0x80 <= CORPUS[end] < 0xC0  # otherwise the character has more bytes
            assert mask[j + 1].item() == (complete and end in ends)
            if mask[j + 1]:
                assert ends[at[j]] == end
                counted += 1
        read += len(block)
    assert counted > 30


def test_a_token_of_the_teacher_counts_as_the_first_of_the_students_tokens_that_spell_it():
    student, teacher = text.train_tokenizer(["ab ab ab"], 258), text.train_tokenizer(["abc abc abc abd abd"], 262)
    student.add_special_tokens({"eos_token": "<end>"})  # the end token has another name
    words = {i: teacher.decode([i]) for i in range(len(teacher))}
    to_student = alignment.begun(student, teacher)
    logits = torch.randn(3, len(teacher), dtype=torch.float64)
    s, log_p = to_student("the student's, as they are", logits)
    assert s == "the student's, as they are"
    p, expected = logits.softmax(-1).numpy(), np.zeros((3, len(student)))
    for i, word in words.items():
        if i == teacher.eos_token_id:
            expected[:, student.eos_token_id] += p[:, i]
        elif "\ufffd" not in word:
            longest = max(n for n in range(1, len(word) + 1) if token_of(student, word[:n]) is not None)
            expected[:, token_of(student, word[:longest])] += p[:, i]
    assert token_of(student, "ab") is not None
    np.testing.assert_allclose(log_p.exp().numpy(), expected, rtol=1e-5)


def token_of(tokenizer, word):
    """The token that spells this word, or None."""
    letters = {byte: letter for letter, byte in BYTES.items()}
    return tokenizer.get_vocab().get("".join(letters[byte] for byte in word.encode()))


def test_aligned_tokens_learn_from_label_and_teacher_and_the_others_from_the_label():
    student, teacher = build("gpt2", depth=2, seed=1).eval(), build("gpt2", width=24).eval()
    ids, theirs = torch.randint(0, 61, (2, 6)), torch.randint(0, 61, (2, 5))
    at, mask = torch.tensor([[0, 1, 1, 3, 4, 0], [2, 0, 0, 0, 0, 0]]), torch.zeros(2, 6, dtype=torch.bool)
    mask[0, [2, 5]] = mask[1, 1] = True  # predicted at positions 1 and 4, and at 0
    shared = kdloss.Logits(vocabulary=kdloss.TokenMap(torch.arange(40), torch.arange(20, 60)))
    criterion = kdloss.Sum(0.25 * kdloss.CrossEntropy() + 0.75 * shared, causal=True)
    loop = cross_tokenizer.AlignedLoss(alignment.TeacherAtStudentTokens(teacher), criterion)
    loss = loop(student, ids, ids, theirs, at, mask).loss
    with torch.no_grad():
        s = student(input_ids=ids).logits.double()
        t = teacher(input_ids=theirs).logits.double()
    ce = -s.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    share = torch.ones(2, 5, dtype=torch.float64)
    share[0, [1, 4]] = share[1, 0] = 0.25
    s, t = (torch.stack(x).numpy() for x in ([s[0, 1], s[0, 4], s[1, 0]], [t[0, 1], t[0, 4], t[1, 2]]))
    kl = oracles.forward_kl(s[:, :40], t[:, 20:60]).sum()
    assert loss.item() == pytest.approx(((share * ce).sum().item() + 0.75 * kl) / 10, rel=1e-5)


def test_students_learn_across_tokenizers_and_the_same_command_trains_nothing_again(
    data, teachers, tmp_path, monkeypatch
):
    arguments = [*tiny.flags(data, tmp_path, teachers, student_vocabulary=280), "--seeds", "0", "1"]
    runs = cross_tokenizer.main(arguments)
    assert list(runs) == ["teacher", "none", "shared", "begun", "uld", "none-same-compute"]
    for row, found in runs.items():
        assert len(found) == (1 if row == "teacher" else 2)
        if row != "teacher":
            assert found[0]["perplexity"] < 0.9 * found[0]["curve"][0]["perplexity"]
    first = {row: found[0] for row, found in runs.items()}
    assert len({round(x["perplexity"], 4) for row, x in first.items() if row != "teacher"}) == 5
    assert "perplexity" not in first["teacher"]  # it would be per token of another tokenizer
    most = max(first[row]["teraflop"] for row in ("shared", "begun", "uld"))
    assert first["none-same-compute"]["teraflop"] == pytest.approx(most, rel=0.05)
    texts = text.read_texts(str(data))[-40:]
    tokenizer = cross_tokenizer.tokenizer_of(options.read(cross_tokenizer.DEFAULTS, arguments, None))
    tokens = sum(len(ids) + 1 for ids in tokenizer(texts, add_special_tokens=False)["input_ids"])
    expected = math.log2(first["none"]["perplexity"]) * tokens / sum(len(x) + 1 for x in texts)
    assert first["none"]["bits_per_character"] == pytest.approx(expected)
    monkeypatch.setattr(distill_lm, "train", never)
    assert cross_tokenizer.main(arguments) == runs


def test_a_student_of_the_teachers_blocks_is_refused(data, teachers, tmp_path):
    with pytest.raises(ValueError, match="has the teacher's tokenizer: leave out --keep-blocks"):
        cross_tokenizer.main([*tiny.flags(data, tmp_path, teachers), "--keep-blocks", "auto"])

"""The recipes of docs/recipes_language.md: one step of each is compared with the paper's formula in float64."""

import re
from functools import partial
from pathlib import Path

import pytest
import readme
import torch
import torch.nn.functional as F
import transformers as hf
from families import VOCAB, build
from stepping import asked, kl, texts

from kdloss import Distillation, Logits, Teacher

pytestmark = pytest.mark.filterwarnings("ignore:.*loss_type=None.*")

PAGE = "recipes_language.md"


def assert_step_equals(criterion, formula, student, teachers, batch):
    """Assert that the loss of a step and the gradients of all trained parameters are those of a formula."""
    model = Distillation(student, teachers, criterion).prepare(**batch).double()
    out = model(**batch)
    expected = formula(model)
    torch.testing.assert_close(out.loss.detach(), expected.detach(), rtol=1e-9, atol=1e-12)
    names, trained = zip(*((name, p) for name, p in model.named_parameters() if p.requires_grad), strict=True)
    ours, paper = (torch.autograd.grad(x, trained, allow_unused=True) for x in (out.loss, expected))
    nonzero = 0
    for name, a, b in zip(names, ours, paper, strict=True):
        a, b = (torch.zeros(()) if g is None or not g.any() else g for g in (a, b))
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")
        nonzero += bool(b.any())
    assert nonzero
    return out


def test_every_recipe_is_in_the_table_and_every_marked_recipe_is_tested_here():
    page, tests = (readme.ROOT / "docs" / PAGE).read_text(), Path(__file__).read_text()
    rows = re.findall(r"^\| \[(.+?)\]\(#(.+?)\) .*\| (✓?) *\|$", page, re.MULTILINE)
    assert [title for title, _, _ in rows] == re.findall(r"^### (.+)$", page, re.MULTILINE)
    assert all(anchor == title.lower().replace(" ", "-") for title, anchor, _ in rows)
    assert [title for title, _, mark in rows if mark and f'"{title}"' not in tests] == []


def test_distilbert():
    student, teacher, batch = build("distilbert", depth=2), build("bert", depth=4, seed=1).double(), texts()
    token, labelled = batch["attention_mask"].bool(), batch["labels"] != -100

    def paper(model):
        s, t = asked(model.student, batch), asked(teacher, batch)
        mlm = F.cross_entropy(s.logits[labelled], batch["labels"][labelled])
        cos = 1 - F.cosine_similarity(s.hidden_states[-1], t.hidden_states[-1].detach(), -1)[token].mean()
        return 2 * mlm + 5 * kl(s.logits, t.logits.detach(), 2.0)[token].mean() + cos

    assert_step_equals(readme.recipe(PAGE, "DistilBERT").criterion, paper, student, teacher, batch)


def bert(kind, width, depth, seed):
    """A BERT with 12 heads in double precision, with large initial weights and without dropout."""
    torch.manual_seed(seed)
    config = hf.BertConfig(
        vocab_size=VOCAB, hidden_size=width, intermediate_size=width, num_hidden_layers=depth, num_attention_heads=12,
        initializer_range=0.3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=2,
    )  # fmt: skip
    return getattr(hf, f"BertFor{kind}")(config).double()


def pair(kind, widths, depths):
    """A student and a teacher."""
    return [bert(kind, *sizes, seed) for seed, sizes in enumerate(zip(widths, depths, strict=True))]


def queries_keys_values(model, hidden, block):
    """Queries, keys and values of a block of BERT, computed from its input, `[B, N, D]` each."""
    attention = model.bert.encoder.layer[block].attention.self
    return [linear(hidden) for linear in (attention.query, attention.key, attention.value)]


def products(x, y, heads):
    """Scaled dot products of each head, `[B, heads, N, N]`."""
    x, y = (z.unflatten(-1, (heads, -1)).transpose(1, 2) for z in (x, y))
    return x @ y.mT / x.shape[-1] ** 0.5


def unpadded(x, lengths):
    """The tokens of all texts without padding, `[tokens, D]`."""
    return torch.cat([z[:n] for z, n in zip(x, lengths, strict=True)])


LENGTHS = [8, 5]  # of the texts of `texts()`


def unlabelled():
    return {name: x for name, x in texts().items() if name != "labels"}


def classes():
    return {**texts(), "labels": torch.tensor([1, 0])}


def test_tinybert():
    (student, teacher), batch = pair("MaskedLM", (12, 24), (4, 12)), unlabelled()
    recipe = readme.recipe(PAGE, "TinyBERT")

    def paper(model):
        s, t = (asked(m, batch).hidden_states for m in (model.student, teacher))
        terms = model.criterion.terms
        embedded, hidden = (terms[name].projections for name in ("embedding", "hidden"))
        (embedding,), (shared,) = embedded.values(), set(hidden.values())
        total = unpadded(embedding(s[0]) - t[0].detach(), LENGTHS).square().mean()
        for i in range(4):
            j = 3 * i + 2
            total = total + unpadded(shared(s[i + 1]) - t[j + 1].detach(), LENGTHS).square().mean()
            (q, k, _), (tq, tk, _) = (
                queries_keys_values(model.student, s[i], i),
                queries_keys_values(teacher, t[j].detach(), j),
            )
            gap = (products(q, k, 12) - products(tq, tk, 12).detach()).square()
            queries = [g[:, :n, :n].mean((0, 2)) for g, n in zip(gap, LENGTHS, strict=True)]
            total = total + torch.cat(queries).mean()
        return total

    assert_step_equals(recipe.criterion, paper, student, teacher, batch)
    student, teacher = pair("SequenceClassification", (12, 24), (4, 12))

    def predictions(model):
        s, t = (asked(m, batch).logits for m in (model.student, teacher))
        return kl(s, t.detach(), 1.0).mean()

    assert_step_equals(recipe.predictions, predictions, student, teacher, batch)


def relation_kl(s, t, n):
    """KL(t || s) of the softmax over the first n columns, for the first n rows, `[heads, n]`."""
    log_q, log_p = (x[:, :n, :n].log_softmax(-1) for x in (s, t))
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@pytest.mark.parametrize(("title", "widths", "heads"), [("MiniLM", (12, 24), 12), ("MiniLMv2", (48, 96), 48)])
def test_minilm(title, widths, heads):
    (student, teacher), batch = pair("MaskedLM", widths, (6, 12)), unlabelled()

    def paper(model):
        s, t = (asked(m, batch).hidden_states for m in (model.student, teacher))
        ours, theirs = queries_keys_values(model.student, s[5], 5), queries_keys_values(teacher, t[11].detach(), 11)
        relations = [(0, 0), (1, 1), (2, 2)] if title == "MiniLMv2" else [(0, 1), (2, 2)]
        total = 0
        for a, b in relations:
            both = products(ours[a], ours[b], heads), products(theirs[a], theirs[b], heads).detach()
            values = [relation_kl(x, y, n).mean(0) for x, y, n in zip(*both, LENGTHS, strict=True)]
            total = total + torch.cat(values).mean()
        return total

    assert_step_equals(readme.recipe(PAGE, title).criterion, paper, student, teacher, batch)


def test_pkd():
    (student, teacher), batch = pair("SequenceClassification", (24, 24), (6, 12)), classes()

    def paper(model):  # as in the authors' code, scaled to the width of BERT-base
        s, t = asked(model.student, batch), asked(teacher, batch)
        kd = kl(s.logits, t.logits.detach(), 10.0).mean() / 2  # the authors also average over classes
        ours = torch.stack([s.hidden_states[i + 1][:, 0] for i in range(5)], 1)
        theirs = torch.stack([t.hidden_states[j + 1][:, 0] for j in (1, 3, 5, 7, 9)], 1).detach()
        patient = F.mse_loss(F.normalize(ours, dim=2), F.normalize(theirs, dim=2)) * 24 / 768
        return 0.3 * F.cross_entropy(s.logits, batch["labels"]) + 0.7 * kd + 500 * patient

    assert_step_equals(readme.recipe(PAGE, "PKD").criterion, paper, student, teacher, batch)


def mean_over_texts(values):
    """The mean over the tokens of each text, then over the texts."""
    return sum(x[:n].mean() for x, n in zip(values, LENGTHS, strict=True)) / len(LENGTHS)


def test_bert_emd():
    pytest.importorskip("scipy")
    from scipy.optimize import linprog

    (student, teacher), batch = pair("SequenceClassification", (12, 24), (2, 3)), classes()

    def paper(model):
        s, t = asked(model.student, batch), asked(teacher, batch)
        terms = model.criterion.terms
        (embedding,), (shared,) = (set(terms[name].projections.values()) for name in ("embedding", "hidden"))
        cost = [
            [mean_over_texts((shared(h) - g.detach()).square()) for g in t.hidden_states[1:]]
            for h in s.hidden_states[1:]
        ]
        cost = torch.stack([torch.stack(row) for row in cost])
        sums = torch.cat([torch.eye(2).repeat_interleave(3, 1), torch.eye(3).repeat(1, 2)]).numpy()
        shares = [1 / 2] * 2 + [1 / 3] * 3
        flow = torch.tensor(linprog(cost.detach().flatten().numpy(), A_eq=sums, b_eq=shares).x).view(2, 3)
        soft = -(t.logits.softmax(1).detach() * s.logits.log_softmax(1)).mean()
        entropy = -(t.logits.softmax(1) * t.logits.log_softmax(1)).mean().detach()
        outputs = 0.2 * F.cross_entropy(s.logits, batch["labels"]) + 0.8 * (soft - entropy)
        first = mean_over_texts((embedding(s.hidden_states[0]) - t.hidden_states[0].detach()).square())
        return outputs + 0.01 * ((flow * cost).sum() + first)

    assert_step_equals(readme.recipe(PAGE, "BERT-EMD").criterion, paper, student, teacher, batch)


def test_alp_kd():
    (student, teacher), batch = pair("SequenceClassification", (12, 12), (2, 3)), classes()

    def paper(model):
        s, t = asked(model.student, batch), asked(teacher, batch)
        theirs, gap, spread = torch.stack(t.hidden_states[1:]).detach(), 0, 0
        for h in s.hidden_states[1:]:
            share = (h.detach() * theirs).sum(-1, keepdim=True).softmax(0)
            mixture = (share * theirs).sum(0)
            gap = gap + mean_over_texts((h - mixture).square()) / 2
            spread = spread + mean_over_texts((share * (theirs - mixture).square()).sum(0)) / 2  # does not depend on h
        outputs = 0.3 * F.cross_entropy(s.logits, batch["labels"]) + 0.7 * kl(s.logits, t.logits.detach(), 10.0).mean()
        return outputs + 500 / 768 * (gap + spread)

    assert_step_equals(readme.recipe(PAGE, "ALP-KD").criterion, paper, student, teacher, batch)


def test_rail_kd():
    (student, teacher), batch = pair("SequenceClassification", (12, 24), (6, 12)), classes()

    def paper(model):
        s, t = asked(model.student, batch), asked(teacher, batch)
        drawn = [tuple(map(int, name.split("/")[1].split("-"))) for name in model.criterion.components if "/" in name]
        assert [i for i, _ in drawn] == [0, 1, 2, 3, 4]
        assert [j for _, j in drawn] == sorted({j for _, j in drawn})
        total = F.cross_entropy(s.logits, batch["labels"]) + kl(s.logits, t.logits.detach(), 10.0).mean()
        for i, j in drawn:
            maps = model.criterion.terms["feature"].distances[str(i)].maps
            pooled = []
            for project, x in zip(maps, (s.hidden_states[i + 1], t.hidden_states[j + 1].detach()), strict=True):
                pooled.append(project(torch.stack([z[:n].mean(0) for z, n in zip(x, LENGTHS, strict=True)])))
            a, b = (x / x.norm(dim=1, keepdim=True) for x in pooled)
            total = total + (a - b).square().sum(1).mean()
        return total / 3

    torch.manual_seed(5)
    assert_step_equals(readme.recipe(PAGE, "RAIL-KD").criterion, paper, student, teacher, batch)


def mobilebert(depth, seed):
    """A MobileBERT in double precision, without dropout. The outputs of its blocks have 16 channels."""
    torch.manual_seed(seed)
    config = hf.MobileBertConfig(
        vocab_size=VOCAB, hidden_size=16, embedding_size=8, num_hidden_layers=depth, num_attention_heads=4,
        intermediate_size=8, intra_bottleneck_size=8, num_feedforward_networks=1, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, initializer_range=0.3, normalization_type="layer_norm",
    )  # fmt: skip
    return hf.MobileBertForMaskedLM(config).double()


def test_mobilebert():
    layer, student, teacher, batch = 17, mobilebert(24, 0), mobilebert(24, 1), unlabelled()
    recipe = readme.recipe(PAGE, "MobileBERT")
    recipe.criterion.step = 10_000 * layer + 9_999  # the last step in which this layer is distilled
    seen = []
    name = f"mobilebert.encoder.layer.{layer}.attention.self"
    handles = [m.get_submodule(name).register_forward_pre_hook(lambda m, a: seen.append(a)) for m in (student, teacher)]

    def paper(model):
        seen.clear()
        s, t = (asked(m, batch).hidden_states[layer + 1] for m in (model.student, teacher))
        for handle in handles:
            handle.remove()
        ours, theirs = (F.layer_norm(unpadded(x, LENGTHS), (16,)) for x in (s, t.detach()))
        both = []
        for m, (queries, keys, *_) in zip((model.student, teacher), seen, strict=True):
            attention = m.get_submodule(name)
            both.append(products(attention.query(queries), attention.key(keys), 4))
        values = [relation_kl(x, y.detach(), n).mean(0) for x, y, n in zip(*both, LENGTHS, strict=True)]
        return 100 / 24 * (ours - theirs).square().mean() + torch.cat(values).mean() / 24

    out = assert_step_equals(recipe.criterion, paper, student, teacher, batch)
    assert {name.split("/")[0] for name in out.components} == {f"attention{layer}", f"map{layer}"}
    (student, teacher), labelled = (mobilebert(1, seed) for seed in (0, 1)), texts()

    def predictions(model):  # targets that are half the label, half the teacher
        s, t = (asked(m, labelled).logits[labelled["labels"] != -100] for m in (model.student, teacher))
        truth, p = F.one_hot(labelled["labels"][labelled["labels"] != -100], VOCAB).double(), t.softmax(-1).detach()
        entropy = -(p * p.log()).sum(-1)
        return (-((truth + p) / 2 * s.log_softmax(-1)).sum(-1) - entropy / 2).mean()

    assert_step_equals(recipe.predictions, predictions, student, teacher, labelled)


def gpt2(batch=None, labelled=0.9):
    """A small causal student and its teacher, in double precision, and texts with this share of labelled tokens."""
    return build("gpt2", depth=2).double(), build("gpt2", 24, 3, seed=1).double(), batch or texts(labelled=labelled)


def counted(batch):
    """The mask of labelled tokens, shifted to the logits that predict them."""
    return batch["labels"][:, 1:] != -100


def logits(model, batch):
    """The logits that predict a labelled token, `[tokens, V]`."""
    return asked(model, batch).logits[:, :-1][counted(batch)]


def ce(s, batch):
    return F.cross_entropy(s, batch["labels"][:, 1:][counted(batch)])


def test_babyllama():
    student, teachers, batch = build("llama", 16, 2), [build(f, 24, 3, 1).double() for f in ("llama", "gpt2")], texts()

    def paper(model):
        s, *targets = (logits(m, batch) for m in (model.student, *teachers))
        return 0.5 * ce(s, batch) + 0.5 * kl(s, sum(targets).detach() / 2, 2.0).mean()

    assert_step_equals(readme.recipe(PAGE, "BabyLlama").criterion, paper, student, teachers, batch)


def whisper(depth, seed):
    """A Whisper in double precision, without dropout."""
    torch.manual_seed(seed)
    sizes = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "encoder_attention_heads": 2}
    config = hf.WhisperConfig(
        **sizes, decoder_attention_heads=2, encoder_layers=2, decoder_layers=depth, vocab_size=VOCAB, num_mel_bins=8,
        max_source_positions=10, max_target_positions=12, pad_token_id=2, bos_token_id=0, eos_token_id=1,
        decoder_start_token_id=0, dropout=0.0, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    return hf.WhisperForConditionalGeneration(config).double()


def test_distil_whisper():
    student, teacher = whisper(2, 0), whisper(4, 1)
    labels = torch.randint(3, VOCAB, (2, 6))
    labels[1, 4:] = -100
    batch = {"input_features": torch.randn(2, 8, 20).double(), "labels": labels}

    def paper(model):
        s, t = (m.eval()(**batch).logits[labels != -100] for m in (model.student, teacher))
        return 0.8 * F.cross_entropy(s, labels[labels != -100]) + kl(s, t.detach(), 2.0).mean()

    assert_step_equals(readme.recipe(PAGE, "Distil-Whisper").criterion, paper, student, teacher, batch)


def test_gkd():
    student, teacher, batch = gpt2()
    recipe = readme.recipe(PAGE, "GKD", student=student, teacher=teacher, loader=[])
    torch.manual_seed(2)
    written = recipe.own_words(batch["input_ids"][:, :4])
    assert torch.equal(written["input_ids"][:, :4], batch["input_ids"][:, :4])
    assert (written["labels"][:, :4] == -100).all()
    assert (written["labels"][:, 4:] != -100).sum() > 8

    def paper(model):
        q, p = (logits(m, written).softmax(-1) for m in (model.student, teacher))
        m = (p.detach() + q) / 2
        return ((p.detach() * (p.detach() / m).log() + q * (q / m).log()) / 2).sum(-1).mean()

    assert_step_equals(recipe.criterion, paper, student, teacher, written)


def test_minillm():
    student, teacher, batch = gpt2(labelled=1.0)
    recipe = readme.recipe(PAGE, "MiniLLM")

    def paper(model):
        total, tokens = 0, 0
        for row, n in enumerate(LENGTHS):
            text = {name: x[row : row + 1, :n] for name, x in batch.items()}
            q, p = (logits(m, text).log_softmax(-1) for m in (model.student, teacher))
            tokens_read = text["labels"][0, 1:, None]
            total = total + (q.exp() * (q - p.detach())).sum()
            q, p = q.gather(1, tokens_read)[:, 0], p.gather(1, tokens_read)[:, 0].detach()
            for t in range(n - 2):  # no token comes after the last one
                later = (p - q.detach())[t + 1 :].sum() / (n - 2 - t)
                total = total - later * q[t]
            tokens += n - 1
        return total / tokens

    assert_step_equals(recipe.criterion, paper, student, teacher, batch)

    def pretraining(model):
        s, t = (logits(m, batch) for m in (model.student, teacher))
        return 0.5 * ce(s, batch) + 0.5 * kl(s, t.detach(), 1.0).mean()

    assert_step_equals(recipe.pretraining, pretraining, *gpt2(batch))


@pytest.mark.parametrize("name", ["criterion", "reverse"])
def test_distillm(name):
    student, teacher, batch = gpt2()

    def paper(model):
        q, p = (logits(m, batch).softmax(-1) for m in (model.student, teacher))
        first, second = (p.detach(), q) if name == "criterion" else (q, p.detach())
        return (first * (first / (0.1 * first + 0.9 * second)).log()).sum(-1).mean()

    assert_step_equals(getattr(readme.recipe(PAGE, "DistiLLM"), name), paper, student, teacher, batch)


def other_vocabulary():
    """A GPT-2 with a vocabulary of 67 tokens."""
    torch.manual_seed(1)
    sizes = {"n_embd": 24, "n_layer": 3, "n_head": 2, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 1}
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=67, **sizes)).double()


def test_dskd():
    (student, _, batch), teacher = gpt2(), other_vocabulary()
    recipe, ids = readme.recipe(PAGE, "DSKD", student=student, teacher=teacher), torch.randperm(67)[:VOCAB]
    theirs = {**batch, "input_ids": ids[batch["input_ids"]]}

    def paper(model):
        keep, dual = counted(batch), model.criterion.terms["dual"]
        both = (model.student, batch), (teacher, theirs)
        h, g = (asked(*one).hidden_states[-1][:, :-1][keep] for one in both)
        s, t = (logits(*one) for one in both)
        t_in_student = dual.to_student(g.detach()) @ model.student.lm_head.weight.detach().T
        s_in_teacher = dual.to_teacher(h) @ teacher.lm_head.weight.detach().T
        gap = kl(s, t_in_student.detach(), 2.0).mean() / 4 + kl(s_in_teacher, t.detach(), 2.0).mean() / 4
        return 0.5 * ce(s, batch) + 0.5 * (ce(t_in_student, batch) + gap)

    translated = Teacher(teacher, inputs=lambda inputs: {**inputs, "input_ids": ids[inputs["input_ids"]]})
    assert_step_equals(recipe.criterion, paper, student, translated, batch)


def test_dskd_across_tokenizers():
    (student, _, batch), teacher = gpt2(labelled=0.7), other_vocabulary()
    recipe = readme.recipe(PAGE, "DSKD across tokenizers", student=student, teacher=teacher)
    batch["labels"][:, 3] = batch["input_ids"][:, 3] = (
        7  # the token that the teacher always predicts through the student's head
    )
    recipe.dual.to_student.bias.data = 1000 * student.transformer.wte.weight.data[7].float()
    ids = torch.randint(67, (2, 11))
    theirs = {"input_ids": ids, "labels": ids.masked_fill(torch.rand(2, 11) < 0.3, -100)}

    def paper(model):  # for each text and each token
        dual, embeddings = recipe.dual, [m.transformer.wte.weight.detach() for m in (model.student, teacher)]
        head, its_head = embeddings  # tied to the embeddings
        s, t = asked(model.student, batch), asked(teacher, {"input_ids": ids})
        keys = torch.cat([embeddings[1][ids[:, :-1]], embeddings[1][ids[:, 1:]]], -1)
        words, hidden = embeddings[1][ids[:, 1:]], t.hidden_states[-1].detach()
        total, tokens = 0, int(counted(batch).sum())
        for b in range(2):
            s_at, t_at = (counted(x)[b].nonzero()[:, 0] for x in (batch, theirs))
            tokens_read = batch["input_ids"][b]
            queries = dual.query(
                torch.stack(
                    [torch.cat([embeddings[0][tokens_read[i]], embeddings[0][tokens_read[i + 1]]]) for i in s_at]
                )
            )
            scores = queries @ (keys[b, t_at] / keys.std()).T / 48**0.5
            values = dual.to_student(hidden[b, t_at] / hidden.std() + words[b, t_at] / words.std())
            t_in_student = scores.softmax(1) @ values @ head.T
            right = t_in_student.argmax(1) == tokens_read[s_at + 1]
            assert 0 < right.sum() < len(right)
            s_in_teacher = scores.T.softmax(1) @ dual.to_teacher(s.hidden_states[-1][b, s_at]) @ its_head.T
            total = total + F.cross_entropy(t_in_student, tokens_read[s_at + 1], reduction="sum")
            total = total + (kl(s.logits[b, s_at], t_in_student.detach(), 2.0) / 4)[right].sum()
            total = total + (kl(s_in_teacher, t.logits[b, t_at].detach(), 2.0) / 4).sum()
        return 0.5 * ce(logits(model.student, batch), batch) + 0.5 * total / tokens

    both = {**batch, "teacher_input_ids": ids, "teacher_labels": theirs["labels"]}
    assert_step_equals(recipe.criterion, paper, student, Teacher(teacher, inputs=recipe.dual.theirs), both)


def test_uld():
    (student, _, batch), teacher = gpt2(), other_vocabulary()

    def paper(model):
        q, p = (logits(m, batch).softmax(-1).sort(-1, descending=True).values for m in (model.student, teacher))
        gap = (q - p[:, :VOCAB].detach()).abs().sum(-1) + p[:, VOCAB:].sum(-1).detach()
        return ce(logits(model.student, batch), batch) + 1.5 * gap.mean()

    assert_step_equals(readme.recipe(PAGE, "ULD").criterion, paper, student, teacher, batch)


def test_adaptive_kl():
    student, teacher, batch = gpt2()

    def paper(model):
        total, (s, t) = 0, (logits(m, batch) for m in (model.student, teacher))
        for q, p in zip(s.softmax(-1), t.softmax(-1).detach(), strict=True):
            order = p.argsort(descending=True)
            head = order[: max(1, int((p[order].cumsum(0) <= 0.5).sum()))]
            gap = (p - q.detach()).abs()
            share = gap[head].sum() / gap.sum()
            total = total + share * (p * (p / q).log()).sum() + (1 - share) * (q * (q / p).log()).sum()
        return total / len(s)

    assert_step_equals(readme.recipe(PAGE, "Adaptive KL").criterion, paper, student, teacher, batch)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_adakd(share):
    student, teacher, batch = gpt2()
    recipe = readme.recipe(PAGE, "AdaKD")
    criterion = recipe.criterion if share == 1 else 1.0 * Logits(partial(recipe.adakd, share=share))

    def paper(model):
        s, t = (logits(m, batch) for m in (model.student, teacher))
        q, p = s.softmax(-1).detach(), t.softmax(-1).detach()
        hard = (1 - (q * p).sqrt().sum(-1)).sqrt()
        order = hard.argsort(descending=True)[: int(share * len(hard))]
        middle = hard[order].sort().values[(len(order) - 1) // 2]
        total = 0
        for i in order.tolist():
            T = torch.exp(-0.5 * torch.tanh((hard[i] / middle).log()))
            log_q, log_p = (s[i] / T).log_softmax(0), (t[i].detach() / T).log_softmax(0)
            total = total + T**2 * (log_q.exp() * (log_q - log_p)).sum()
        return total / len(order)

    assert_step_equals(criterion, paper, student, teacher, batch)


def test_abkd():
    student, teacher, batch = gpt2()

    def paper(model):
        q, p = (logits(m, batch).softmax(-1) for m in (model.student, teacher))
        p, a, b = p.detach(), 0.2, 0.7
        inside = p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)
        return -inside.sum(-1).mean() / (a * b)

    assert_step_equals(readme.recipe(PAGE, "ABKD").criterion, paper, student, teacher, batch)


def test_sequence_level_kd():
    student, teacher, batch = gpt2()
    recipe = readme.recipe(PAGE, "Sequence-level KD", student=student, teacher=teacher, loader=[batch])
    text = recipe.text
    scores = teacher(text).logits[:, :-1].log_softmax(-1).gather(-1, text[:, 1:, None])[:, 3:, 0].sum(1)
    greedy = teacher.generate(batch["input_ids"][:, :4], do_sample=False, max_new_tokens=8, pad_token_id=0)
    greedy_scores = teacher(greedy).logits[:, :-1].log_softmax(-1).gather(-1, greedy[:, 1:, None])[:, 3:, 0].sum(1)
    assert (scores > greedy_scores).any(), "beams find what is likelier"
    log_q = student(text).logits[:, 3:-1].log_softmax(-1).gather(-1, text[:, 4:, None])[..., 0]
    expected = -log_q[text[:, 4:] != 0].mean()
    torch.testing.assert_close(recipe.loss, expected, rtol=1e-9, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(x, [*student.parameters()]) for x in (recipe.loss, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("done", [0, 250, 1000])
def test_bam(done):
    (student, teacher), batch = pair("SequenceClassification", (12, 24), (2, 3)), classes()
    criterion = readme.recipe(PAGE, "BAM").criterion
    criterion.step = done

    def paper(model):  # mixed targets, less the entropy of the teacher, which is constant
        s, t = (asked(m, batch).logits for m in (model.student, teacher))
        p = t.softmax(1).detach()
        mixed = done / 1000 * F.one_hot(batch["labels"], 2) + (1 - done / 1000) * p
        entropy = (1 - done / 1000) * (p * p.log()).sum(1)
        return (-(mixed * s.log_softmax(1)).sum(1) + entropy).mean()

    assert_step_equals(criterion, paper, student, teacher, batch)

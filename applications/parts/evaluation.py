"""Evaluate a language model: perplexity, generated text, speed, size."""

import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import kdloss


def clock(device: torch.device) -> float:
    """CPU time in seconds with one thread (OMP_NUM_THREADS=1), because other programs hardly change it.

    Otherwise wall time: with several threads, waiting threads spin, and their CPU time would count as work.
    """
    if device.type != "cpu":
        torch.accelerator.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


@torch.no_grad()
def perplexity(model: PreTrainedModel, blocks: Tensor, batch_size: int = 16) -> float:
    """The exponential of the mean cross-entropy over all tokens of the blocks except the first of each block."""
    was_training = model.training
    model.eval()
    total = sum(  # without labels: transformers would compute its own loss, with a warning
        kdloss.cross_entropy(model(input_ids=batch).logits[:, :-1], batch[:, 1:]).sum().item()
        for batch in blocks.to(model.device).split(batch_size)
    )
    model.train(was_training)
    return math.exp(min(total / blocks[:, 1:].numel(), 700))  # a float overflows soon after 700


def generate(model: PreTrainedModel, prompts: Tensor, tokens: int) -> tuple[Tensor, float]:
    """Greedy continuations `[prompts, tokens]`, and the generated tokens per second."""
    was_training = model.training
    model.eval()
    start = clock(model.device)
    prompts = prompts.to(model.device)
    ids = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        pad_token_id=0,  # transformers wants one; all prompts have the same length, so there is no padding
    )
    seconds = clock(model.device) - start
    model.train(was_training)
    return ids[:, prompts.shape[1] :], prompts.shape[0] * tokens / seconds


@torch.no_grad()
def sample(model: PreTrainedModel, prompts: Tensor, length: int, generator: torch.Generator | None = None) -> Tensor:
    """Sample continuations; return prompts and continuations together, `length` tokens long."""
    was_training = model.training
    model.eval()
    tokens, seen = prompts, None
    while tokens.shape[1] < length:
        new = tokens if seen is None else tokens[:, -1:]
        out = model(input_ids=new, past_key_values=seen, use_cache=True)
        drawn = torch.multinomial(out.logits[:, -1].float().softmax(-1), 1, generator=generator)
        tokens, seen = torch.cat([tokens, drawn], 1), out.past_key_values
    model.train(was_training)
    return tokens


@torch.no_grad()
def judged(judge: PreTrainedModel, written: Tensor, prompt: int) -> float:
    """The judge's perplexity on the text after the first `prompt` tokens."""
    was_training = judge.training
    judge.eval()
    logits = judge(input_ids=written).logits[:, prompt - 1 : -1]
    judge.train(was_training)
    return kdloss.cross_entropy(logits, written[:, prompt:]).mean().exp().item()


def distinct(written: Tensor) -> float:
    """Different pairs of neighbouring tokens, in percent of all pairs."""
    pairs = written.unfold(1, 2, 1).flatten(0, 1)
    return 100 * len(pairs.unique(dim=0)) / len(pairs)


def rouge(written: Sequence[str], real: Sequence[str]) -> dict[str, float]:
    """Mean ROUGE-1, -2 and -L (words, word pairs, longest common subsequence) as F1 in percent."""
    from rouge_score.rouge_scorer import RougeScorer  # imported here because that takes longer than importing torch

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    scores = [scorer.score(target, prediction) for target, prediction in zip(real, written, strict=True)]
    kinds = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}
    return {name: 100 * sum(score[kind].fmeasure for score in scores) / len(scores) for name, kind in kinds.items()}


def continuations(token_ids: Sequence[Sequence[int]], count: int, length: int) -> tuple[Tensor, Tensor]:
    """The beginnings of texts as prompts, and their real continuations; both have length / 2 tokens."""
    long_enough = [ids[:length] for ids in token_ids if len(ids) >= length][:count]
    if not long_enough:
        raise ValueError(f"no held-out text has {length} tokens: hold out more, or lower --max-length")
    ids = torch.tensor(long_enough)
    return ids[:, : length // 2], ids[:, length // 2 :]


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Tensor,
    reference: Tensor,
    judge: PreTrainedModel | None = None,
) -> dict[str, float]:
    """ROUGE-L of greedy continuations, perplexity of sampled ones by the judge and by the model, speed and size."""
    ids, speed = generate(model, prompts, reference.shape[1])
    texts, real = (tokenizer.batch_decode(x, skip_special_tokens=True) for x in (ids, reference))
    prompts, length = prompts.to(model.device), prompts.shape[1]
    always_the_same = torch.Generator(model.device).manual_seed(0)
    drawn = sample(model, prompts, length + reference.shape[1], always_the_same)
    judges = {"own": model} | ({} if judge is None else {"samples": judge})
    return {
        "rouge_l": rouge(texts, real)["rouge_l"],
        "distinct_2": distinct(ids),
        **{name: judged(one, drawn, length) for name, one in judges.items()},
        "generated_tokens_per_second": speed,
        "parameters": model.num_parameters(),
    }

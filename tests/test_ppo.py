"""PPO: the mathematics against written-out references; rollouts, scaling, resume, export and learning."""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from post_training.stages import ppo
from tests.training import DEADLINE, base_environment, free_port, server

LETTERS = "abcdefgh"
EOS, PAD = "<eos>", "<pad>"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}={% endif %}"
)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocab = {token: i for i, token in enumerate([PAD, EOS, "=", *LETTERS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_config(**changes) -> LlamaConfig:
    values = {
        "vocab_size": 3 + len(LETTERS),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
        "tie_word_embeddings": True,  # the harder case for saving
    }
    return LlamaConfig(**(values | changes))


def make_policy(seed: int = 0, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(make_config(**changes))


def make_reward_model(seed: int = 7, **changes) -> LlamaForSequenceClassification:
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(make_config(num_labels=1, **changes))


def prompts(n: int) -> list[dict]:
    """Conversations of unequal length, each with a column of its own."""
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list(LETTERS), size=1 + i % 5)) for i in range(n)]
    return [{"prompt": [{"role": "user", "content": text}], "answer": text[0]} for text in texts]


def starts_with_answer(prompts, completions, answer, **_):
    return [float(c[0]["content"][:1] == a) for c, a in zip(completions, answer, strict=True)]


def share_of_a(prompts, completions, **_):
    return [c[0]["content"].count("a") / max(len(c[0]["content"]), 1) for c in completions]


def make_trainer(
    out: Path,
    funcs=(starts_with_answer,),
    data=None,
    policy_changes=None,
    callbacks=None,
    trainer=None,
    **arguments,
) -> ppo.PPOTrainer:
    changes = policy_changes or {}
    defaults = {
        "output_dir": str(out),
        "per_device_train_batch_size": 4,
        "max_completion_length": 8,
        "learning_rate": 1e-2,
        "max_steps": 2,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return ppo.PPOTrainer(
        model=ppo.PolicyWithValue(make_policy(**changes)),
        ref_model=make_policy(seed=1),
        reward_funcs=list(funcs),
        reward_weights=[1.0] * len(funcs),
        args=ppo.PPOArguments(**(defaults | arguments)),
        train_dataset=prompts(40) if data is None else data,
        processing_class=make_tokenizer(),
        callbacks=callbacks,
        **(trainer or {}),
    )


def weights_hash(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


# ---- the mathematics, against loops in plain Python ----


@st.composite
def ragged(draw, columns: int, most_rows: int = 4, most_tokens: int = 7):
    """Arrays [B, T] of float64 and a prefix mask with at least one token a row; junk under the padding."""
    rows, tokens = draw(st.integers(1, most_rows)), draw(st.integers(1, most_tokens))
    lengths = [draw(st.integers(1, tokens)) for _ in range(rows)]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    arrays = [rng.normal(size=(rows, tokens)) for _ in range(columns)]
    mask = np.array([[t < n for t in range(tokens)] for n in lengths])
    return [*arrays, mask]


def t64(*arrays):
    return [torch.from_numpy(np.asarray(a)) for a in arrays]


def valid(*arrays, mask):
    """The values under the mask, row by row, as lists of tuples."""
    out = []
    for b in range(mask.shape[0]):
        out += [tuple(float(a[b, t]) for a in arrays) for t in range(mask.shape[1]) if mask[b, t]]
    return out


@given(ragged(2), st.floats(0, 1), st.floats(0, 1))
def test_gae_is_the_sum_of_discounted_deltas(case, gamma, lam):
    rewards, values, mask = case
    advantages, returns = ppo.gae(*t64(rewards, values, mask), gamma, lam)
    expected = np.zeros_like(rewards)
    for b, n in enumerate(mask.sum(1)):
        v = [*values[b, :n], 0.0]
        deltas = [rewards[b, t] + gamma * v[t + 1] - v[t] for t in range(n)]
        for t in range(n):
            expected[b, t] = sum((gamma * lam) ** k * deltas[t + k] for k in range(n - t))
    np.testing.assert_allclose(advantages.numpy(), expected, atol=1e-9)
    np.testing.assert_allclose(returns.numpy(), (expected + values) * mask, atol=1e-9)


def test_gae_with_lambda_one_is_the_return_minus_the_value():
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.2, 0.5, 0.7]])
    advantages, returns = ppo.gae(rewards, values, torch.ones(1, 3), 1.0, 1.0)
    torch.testing.assert_close(returns, torch.ones(1, 3))
    torch.testing.assert_close(advantages, torch.tensor([[0.8, 0.5, 0.3]]))


@given(ragged(2), st.floats(0, 2), st.sampled_from(["k1", "k3"]))
def test_token_rewards_put_the_score_on_the_last_token(case, kl_coef, estimator):
    logprobs, ref, mask = case
    scores = np.random.default_rng(1).normal(size=len(mask))
    rewards, kl = ppo.token_rewards(*t64(scores, logprobs, ref, mask), kl_coef, estimator)
    for b, n in enumerate(mask.sum(1)):
        for t in range(mask.shape[1]):
            d = logprobs[b, t] - ref[b, t]
            k = 0.0 if t >= n else (d if estimator == "k1" else math.exp(-d) - 1 + d)
            assert math.isclose(kl[b, t], k, abs_tol=1e-9)
            expected = (-kl_coef * k + (scores[b] if t == n - 1 else 0.0)) if t < n else 0.0
            assert math.isclose(rewards[b, t], expected, abs_tol=1e-9)


def test_both_kl_estimators_have_the_true_kl_as_their_mean():
    p, q = torch.tensor([0.7, 0.2, 0.1]).double(), torch.tensor([0.3, 0.3, 0.4]).double()
    true = (p * (p / q).log()).sum()
    one = torch.ones(3, 1)
    for estimator in ("k1", "k3"):  # the mean under p, exactly: one row per outcome
        _, kl = ppo.token_rewards(torch.zeros(3), p.log()[:, None], q.log()[:, None], one, 0.1, estimator)
        torch.testing.assert_close((p * kl[:, 0]).sum(), true)
    with pytest.raises(ValueError, match="k1, k3"):
        ppo.token_rewards(torch.zeros(1), one, one, one, 0.1, "k2")


@given(ragged(3), st.floats(0.05, 0.5))
def test_policy_loss(case, clip):
    logprobs, old, advantages, mask = case
    loss, clip_fraction, approx_kl = ppo.policy_loss(*t64(logprobs, old, advantages, mask), clip)
    losses, clips, kls = [], [], []
    for new, was, a in valid(logprobs, old, advantages, mask=mask):
        ratio = math.exp(new - was)
        surrogate = min(ratio * a, min(max(ratio, 1 - clip), 1 + clip) * a)
        losses.append(-surrogate)
        clips.append(surrogate < ratio * a)
        kls.append(ratio - 1 - math.log(ratio))
    n = len(losses)
    np.testing.assert_allclose(
        [loss, clip_fraction, approx_kl],
        [sum(losses) / n, sum(clips) / n, sum(kls) / n],
        rtol=1e-6,
        atol=1e-9,
    )


def test_policy_gradient_stops_where_the_clip_holds():
    old, mask = torch.zeros(1, 4), torch.ones(1, 4)
    # ratio, advantage: above the clip and good; above and bad; below and good; below and bad
    logprobs = torch.tensor([[1.5, 1.5, 0.5, 0.5]]).log().requires_grad_()
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    ppo.policy_loss(logprobs, old, advantages, mask, 0.2)[0].backward()
    assert (logprobs.grad != 0).tolist() == [[False, True, True, False]]


@given(ragged(3), st.floats(0.05, 0.5))
def test_value_loss(case, clip):
    values, old, returns, mask = case
    losses = []
    for v, was, r in valid(values, old, returns, mask=mask):
        near = min(max(v, was - clip), was + clip)
        losses.append(0.5 * max((v - r) ** 2, (near - r) ** 2))
    loss = ppo.value_loss(*t64(values, old, returns, mask), clip)
    assert math.isclose(loss, sum(losses) / len(losses), rel_tol=1e-9)
    halves = ppo.value_loss(*t64(values, old, returns, mask), clip, count=torch.tensor(2.0 * len(losses)))
    assert math.isclose(halves, loss / 2, rel_tol=1e-6)


@given(ragged(1))
def test_masked_mean_and_whiten(case):
    x, mask = case
    numbers = [v for (v,) in valid(x, mask=mask)]
    n = len(numbers)
    mean = sum(numbers) / n
    variance = sum((v - mean) ** 2 for v in numbers) / max(n - 1, 1)
    junk = np.where(mask, x, np.inf)  # what lies under the padding must not matter
    assert math.isclose(ppo.masked_mean(*t64(junk, mask)), mean, rel_tol=1e-9, abs_tol=1e-12)
    for shift in (True, False):
        expected = (x - mean) / math.sqrt(variance + 1e-8) + (0 if shift else mean)
        whitened = ppo.masked_whiten(*t64(junk, mask), shift_mean=shift)
        np.testing.assert_allclose(whitened.numpy(), expected * mask, rtol=1e-6, atol=1e-9)


def test_whitening_over_ranks_is_whitening_of_everything():
    x, mask = torch.randn(6, 5, dtype=torch.float64), torch.rand(6, 5) < 0.7
    whole = ppo.masked_whiten(x, mask)
    # two ranks in lockstep: each call to reduce sees both halves' sums in turn
    halves = [(x[:2], mask[:2]), (x[2:], mask[2:])]
    count = mask.sum()
    mean = ppo.masked_mean(x, mask)
    answers = [torch.stack([mean * count, count.double()]), (((x - mean) ** 2) * mask).sum()]
    parts = []
    for part, part_mask in halves:
        replies = iter(answers)
        parts.append(ppo.masked_whiten(part, part_mask, reduce=lambda _, replies=replies: next(replies)))
    torch.testing.assert_close(torch.cat(parts), whole)


@given(ragged(2))
def test_explained_variance(case):
    values, returns, mask = case
    pairs = valid(values, returns, mask=mask)
    got = ppo.explained_variance(*t64(values, returns, mask))
    if len(pairs) == 1:
        assert math.isnan(got)
    else:
        v, r = np.array(pairs).T
        assert math.isclose(got, 1 - np.var(r - v) / np.var(r), rel_tol=1e-6, abs_tol=1e-9)


def test_entropy_and_logprobs():
    logits = torch.randn(2, 3, 5, dtype=torch.float64)
    p = torch.softmax(logits, -1)
    torch.testing.assert_close(
        ppo.entropy_from_logits(logits).double(), -(p * p.log()).sum(-1), atol=1e-6, rtol=1e-6
    )
    excluded = torch.tensor([0.0, 0.0, -math.inf])
    torch.testing.assert_close(ppo.entropy_from_logits(excluded), torch.tensor(math.log(2)))
    ids = torch.randint(5, (2, 3))
    expected = torch.tensor([[math.log(p[b, t, ids[b, t]]) for t in range(3)] for b in range(2)])
    torch.testing.assert_close(ppo.logprobs_from_logits(logits, ids), expected)


def test_adaptive_kl():
    kl = ppo.AdaptiveKL(0.1, target=6.0, horizon=1000)
    kl.update(6.6, 100)  # 10 % above the target
    assert math.isclose(kl.coef, 0.1 * (1 + 0.1 * 100 / 1000))
    kl.update(600.0, 100)  # clipped at 20 %
    assert math.isclose(kl.coef, 0.1 * 1.01 * 1.02)
    kl.update(0.0, 100)
    assert math.isclose(kl.coef, 0.1 * 1.01 * 1.02 * 0.98)
    fixed = ppo.AdaptiveKL(0.1)
    fixed.update(600.0, 100)
    assert fixed.coef == 0.1


# ---- arguments, module, data ----


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"rollout_batches": 3, "gradient_accumulation_steps": 2}, "multiple of gradient_accumulation_steps"),
        ({"kl_estimator": "k2"}, "k1, k3"),
        ({"num_ppo_epochs": 0}, "at least 1"),
        ({"temperature": 0.0}, "temperature"),
        ({"remove_unused_columns": True}, "remove_unused_columns"),
    ],
)
def test_arguments_that_cannot_work_are_refused(tmp_path, wrong, says):
    with pytest.raises(ValueError, match=says):
        ppo.PPOArguments(output_dir=str(tmp_path), use_cpu=True, **wrong)


def test_every_argument_has_its_line_of_help():
    for name, field in ppo.PPOArguments.__dataclass_fields__.items():
        if name in ppo.PPOArguments.__annotations__:
            assert field.metadata.get("help"), name


def test_module_leaves_the_policy_as_it_was_and_starts_values_as_asked():
    ids = torch.randint(3, 11, (2, 6))
    policy = make_policy().eval()
    expected, before = policy(ids).logits, weights_hash(policy)
    reward_model = make_reward_model().eval()
    module = ppo.PolicyWithValue(policy, reward_model, "rm").eval()
    assert weights_hash(module.policy) == before
    logits, values = module(ids, torch.ones_like(ids))
    torch.testing.assert_close(logits, expected)
    hidden = policy.model(ids).last_hidden_state
    torch.testing.assert_close(values, reward_model.score(hidden).squeeze(-1))
    last_logits, last_values = module(ids, torch.ones_like(ids), logits_to_keep=2)
    torch.testing.assert_close((last_logits, last_values), (logits[:, -2:], values[:, -2:]))
    assert not ppo.PolicyWithValue(make_policy()).eval()(ids, torch.ones_like(ids))[1].any()
    with pytest.raises(ValueError, match=r"ppo\.value_init=policy"):
        ppo.PolicyWithValue(policy, make_reward_model(hidden_size=16), "rm")
    with pytest.raises(ValueError, match=r"ppo\.value_init=policy"):
        ppo.PolicyWithValue(policy, None, "rm")


def test_left_padding_does_not_move_the_positions():
    """With absolute positions: rotary embeddings, being relative, would hide a shift."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=11, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=1
    )
    module = ppo.PolicyWithValue(GPT2LMHeadModel(config)).eval()
    module.value_head.weight.data.normal_()
    ids = torch.randint(3, 11, (1, 5))
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1)
    attention_mask = (torch.arange(8) >= 3).long().unsqueeze(0)
    positions = ppo.position_ids_of(attention_mask)
    assert positions.tolist() == [[0, 0, 0, 0, 1, 2, 3, 4]]
    alone = module(ids, torch.ones_like(ids))
    torch.testing.assert_close(module(padded, attention_mask, positions, logits_to_keep=5), alone)


def test_sampler_uses_every_prompt_once_a_pass_and_passes_differ():
    epoch = 0
    sampler = ppo.RolloutSampler(size=11, rollout_size=4, repeats=3, seed=5, epoch=lambda: epoch)
    first = list(sampler)
    assert len(first) == len(sampler) == 24
    rollouts = [first[i : i + 4] for i in range(0, 24, 12)]
    assert first == [i for rollout in rollouts for _ in range(3) for i in rollout]
    assert len(set(first)) == 8
    epoch = 1
    second = list(sampler)
    assert second != first
    epoch = 0
    assert list(sampler) == first


def test_a_dataset_smaller_than_a_rollout_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, data=prompts(7), gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match="7 prompts"):
        trainer.train()


# ---- the rollout ----


def one_rollout(tmp_path, **kwargs):
    seen = {}

    def spy(prompts, completions, answer, **columns):
        seen.update(prompts=prompts, completions=completions, answer=answer, columns=columns)
        return share_of_a(prompts, completions)

    trainer = make_trainer(tmp_path, funcs=[spy], **kwargs)
    rows = prompts(16)
    return trainer, rows, trainer._make_rollout(rows), seen


def test_rollout_agrees_with_each_sequence_alone(tmp_path):
    """Left padding, positions, shift, temperature and EOS: against one unpadded forward per sequence."""
    trainer, rows, _, seen = one_rollout(
        tmp_path,
        temperature=0.7,
        kl_coef=0.3,
        whiten_advantages=False,
        missing_eos_penalty=0.5,
        trainer={"reward_model": make_reward_model(), "reward_model_weight": 2.0},
        policy_changes={"initializer_range": 0.3, "attention_dropout": 0.5},
    )
    tokenizer, policy = trainer.tokenizer, trainer.model.policy
    trainer.model.value_head.weight.data.normal_()
    trainer.model.train()
    rollout = trainer._make_rollout(rows)  # again, with values that are not all zero
    assert policy.training
    trainer.model.eval()
    assert list(seen["columns"]) == ["completion_ids"]
    assert seen["answer"] == [row["answer"] for row in rows]
    width = rollout["mask"].shape[1]
    lengths = rollout["mask"].sum(1).tolist()
    ended = 0
    for b, row in enumerate(rows):
        prompt = tokenizer(row["prompt"][0]["content"] + "=")["input_ids"]
        n = lengths[b]
        completion = rollout["input_ids"][b, -width:][:n].tolist()
        assert tokenizer.eos_token_id not in completion[:-1]
        terminated = completion[-1] == tokenizer.eos_token_id
        assert terminated or n == 8
        ended += terminated
        text = tokenizer.decode(completion, skip_special_tokens=True)
        assert seen["completions"][b] == [{"role": "assistant", "content": text}]
        assert rollout["input_ids"][b][rollout["attention_mask"][b].bool()].tolist() == prompt + completion
        ids = torch.tensor([prompt + completion])
        with torch.no_grad():
            logps = torch.log_softmax(policy(ids).logits / 0.7, -1)[0]
            ref = torch.log_softmax(trainer.ref_model(ids).logits / 0.7, -1)[0]
            values = trainer.model(ids, torch.ones_like(ids))[1][0]
            complete = ids if terminated else torch.cat([ids, torch.tensor([[tokenizer.eos_token_id]])], 1)
            score = 2.0 * float(trainer.reward_model(complete).logits)
        at = [(len(prompt) + t - 1, completion[t]) for t in range(n)]
        old = torch.stack([logps[i, token] for i, token in at])
        old_values = torch.stack([values[i] for i, _ in at])
        torch.testing.assert_close(rollout["old_logprobs"][b, :n], old, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(rollout["old_values"][b, :n], old_values, atol=1e-5, rtol=1e-5)
        score += share_of_a([row["prompt"]], [seen["completions"][b]])[0] - 0.5 * (not terminated)
        kl = old - torch.stack([ref[i, token] for i, token in at])
        rewards = -0.3 * kl
        rewards[-1] += score
        # lam 0.95, gamma 1: the first advantage, by the definition
        v = torch.cat([old_values, torch.zeros(1)])
        first = sum(0.95**t * (rewards[t] + v[t + 1] - v[t]) for t in range(n))
        torch.testing.assert_close(rollout["advantages"][b, 0], first, atol=1e-4, rtol=1e-4)
        assert not rollout["advantages"][b, n:].any()
    assert 0 < ended < len(rows), "the case should hold both kinds of completions"


def test_sampling_is_not_touched_by_the_models_own_generation_config(tmp_path):
    trainer, rows, _, _ = one_rollout(tmp_path)
    trainer.model.policy.generation_config.top_k = 1
    trainer.model.policy.generation_config.repetition_penalty = 5.0
    ends = []
    for generation_config in (trainer.model.policy.generation_config, GenerationConfig()):
        trainer.model.policy.generation_config = generation_config
        torch.manual_seed(3)
        ends.append(trainer._make_rollout(rows)["input_ids"])
        assert trainer.model.policy.generation_config is generation_config
    assert torch.equal(*ends)


def test_score_clip_none_rewards_and_text_prompts(tmp_path):
    def maybe(prompts, completions, **_):
        assert all(isinstance(c, str) for c in completions)
        return [None if i % 2 else 100.0 for i in range(len(completions))]

    data = [{"prompt": "abc="[i % 3 :]} for i in range(16)]
    trainer = make_trainer(tmp_path, funcs=[maybe], data=data, reward_clip=3.0, max_steps=1)
    trainer.train()
    logs = trainer.state.log_history[0]
    assert logs["rewards/maybe"] == 100.0
    assert logs["reward"] == 1.5
    assert trainer.args.rollout_batches == 1


def test_trimmed_takes_off_only_common_padding():
    attention = torch.tensor([[0, 0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 0]])
    mask = attention[:, 3:].bool()
    batch = ppo.trimmed({"input_ids": torch.arange(14).view(2, 7), "attention_mask": attention, "mask": mask})
    assert batch["attention_mask"].tolist() == [[0, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert batch["input_ids"][:, 0].tolist() == [1, 8]
    assert batch["mask"].tolist() == mask[:, :3].tolist()


# ---- training ----


def test_accumulation_is_one_mean_over_all_tokens(tmp_path):
    """The same rollout as one batch of 16 and as four of 4: the same step, whatever the lengths."""
    ends = []
    for size, steps in ((16, 1), (4, 4)):
        trainer = make_trainer(
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            optim="sgd",
            learning_rate=1.0,
            max_steps=1,
            max_grad_norm=0,
            entropy_coef=0.1,
            value_coef=1.0,
            policy_changes={"initializer_range": 0.3},
        )
        start = {k: v.clone() for k, v in trainer.model.state_dict().items()}
        trainer.train()
        ends.append({k: v - start[k] for k, v in trainer.model.state_dict().items()})
        lengths = trainer._rollout["mask"].sum(1)
        assert lengths.min() < lengths.max()
        ends[-1]["loss"] = torch.tensor(trainer.state.log_history[0]["loss"])
        ends[-1]["value_loss"] = torch.tensor(trainer.state.log_history[0]["value_loss"])
    assert ends[0]["policy.lm_head.weight"].abs().max() > 1e-3
    torch.testing.assert_close(ends[0], ends[1], atol=2e-6, rtol=1e-3)


def test_rollouts_are_used_for_every_epoch_in_another_order(tmp_path):
    trainer = make_trainer(
        tmp_path,
        gradient_accumulation_steps=1,
        rollout_batches=2,
        num_ppo_epochs=2,
        data=prompts(20),
        max_steps=8,
    )
    rollouts, batches = [], []
    make, prepare = trainer._make_rollout, trainer._prepare_inputs
    trainer._make_rollout = lambda rows: rollouts.append(rows) or make(rows)
    trainer._prepare_inputs = lambda inputs: batches.append(prepare(inputs)) or batches[-1]
    trainer.train()
    assert len(rollouts) == 2
    assert len(batches) == 8
    assert not {json.dumps(r) for r in rollouts[0]} <= {json.dumps(r) for r in rollouts[1]}

    def rows_of(batch):  # the log-probabilities tell the sequences apart
        return [round(float(row[0]), 6) for row in batch["old_logprobs"]]

    first, second = rows_of(batches[0]) + rows_of(batches[1]), rows_of(batches[2]) + rows_of(batches[3])
    assert sorted(first) == sorted(second)
    assert first != second
    names = {
        "reward", "rewards/starts_with_answer", "reward_std", "kl", "kl_coef", "clip_fraction", "approx_kl",
        "policy_loss", "value_loss", "explained_variance", "entropy", "completion_length", "terminated",
    }  # fmt: skip
    assert names <= set(trainer.state.log_history[0])


class StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


RESUME_CASES = {
    # in phase, one epoch; 12 prompts make 3 rollouts a pass, so 6 steps cross into the second pass
    "in phase": {"gradient_accumulation_steps": 1, "data": prompts(12)},
    # a rollout lasts 4 steps and is cut after 3; 8 prompts make one rollout a pass
    "within a rollout": {
        "gradient_accumulation_steps": 1, "rollout_batches": 2, "num_ppo_epochs": 2, "data": prompts(8),
        "adaptive_kl": True, "kl_target": 0.01, "kl_horizon": 100,
    },
    "accumulating": {
        "gradient_accumulation_steps": 2, "rollout_batches": 4, "num_ppo_epochs": 2, "data": prompts(35),
        "per_device_train_batch_size": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize("case", RESUME_CASES.values(), ids=RESUME_CASES.keys())
def test_resume_is_exact(tmp_path, case):
    settings = {"policy_changes": {"attention_dropout": 0.2}, "max_steps": 6, **case}
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()
    part = make_trainer(tmp_path / "parts", callbacks=[StopAt(3)], **settings)
    part.train()
    assert part.state.global_step == 3
    torch.manual_seed(12345)  # a new process knows nothing of the old one's generator
    rest = make_trainer(tmp_path / "parts", **settings)
    rest.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    assert rest.state.global_step == 6
    assert weights_hash(part.model) != weights_hash(rest.model)
    assert weights_hash(rest.model) == weights_hash(whole.model)
    assert rest.kl.coef == whole.kl.coef
    assert (rest.kl.coef != 0.05) == ("adaptive_kl" in case)
    last_whole, last_rest = (t.state.log_history[-2] for t in (whole, rest))
    assert last_whole["step"] == last_rest["step"] == 6
    for key in ("loss", "policy_loss", "approx_kl"):
        assert last_whole[key] == last_rest[key]


def test_resume_without_its_state_file_is_refused(tmp_path):
    make_trainer(tmp_path, callbacks=[StopAt(1)]).train()
    (tmp_path / "checkpoint-1" / "rank_state_0.pt").unlink()
    with pytest.raises(FileNotFoundError, match="rank_state_0"):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize("tied", [True, False])
def test_export_is_a_plain_causal_lm(tmp_path, tied):
    changes = {"policy_changes": {"tie_word_embeddings": tied}}
    trainer = make_trainer(tmp_path / "run", save_strategy="steps", save_steps=2, **changes)
    trainer.train()
    trainer.save_policy(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert loaded.config.use_cache, "the Trainer's use_cache=False must not reach the exported model"
    ids = torch.randint(3, 11, (2, 6))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, trainer.model.policy.eval()(ids).logits)
        # as under ZeRO-3: the state comes from outside
        state = {k: v.clone() for k, v in trainer.model.state_dict().items()}
        ppo.PolicyWithValue(make_policy(seed=9, tie_word_embeddings=tied)).export(
            tmp_path / "other", state_dict=state
        )
        assert torch.equal(
            AutoModelForCausalLM.from_pretrained(tmp_path / "other")(ids).logits, loaded(ids).logits
        )
    # a checkpoint is not a causal LM, and must not load as one with random weights
    with pytest.raises(ValueError, match="policy_with_value"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-2")


def test_reward_model_of_trl_kind_loads_from_disk(tmp_path):
    """Saved and loaded, as the `rm` stage hands it on; without a pad token id in its config."""
    reward_model = make_reward_model(pad_token_id=None)
    reward_model.save_pretrained(tmp_path / "rm")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm", num_labels=1)
    trainer = make_trainer(
        tmp_path / "run", funcs=[], trainer={"reward_model": loaded, "reward_model_weight": 1.0}
    )
    trainer.train()
    logs = trainer.state.log_history[0]
    assert logs["reward"] == pytest.approx(logs["score_rm"])
    assert not any(p.requires_grad for p in trainer.reward_model.parameters())


def test_it_learns_to_emit_a_token(tmp_path):
    trainer = make_trainer(
        tmp_path,
        funcs=[share_of_a],
        data=prompts(640),
        per_device_train_batch_size=32,
        num_ppo_epochs=2,
        max_steps=80,
        learning_rate=5e-3,
        kl_coef=0.01,
    )
    trainer.train()
    rewards = [log["reward"] for log in trainer.state.log_history if "reward" in log]
    start, end = np.mean(rewards[:3]), np.mean(rewards[-3:])
    assert start < 0.25
    assert end > 0.7
    kl = [log["kl"] for log in trainer.state.log_history if "kl" in log]
    assert kl[-1] > kl[0]


# ---- two ranks ----

def test_two_ranks_sample_apart_step_together_and_resume_exactly(tmp_path):
    """The cut lies in the second pass over the data, within the first of its two rollouts."""
    env = base_environment() | {
        "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
        # else the device is cpu:0, to which torch.load cannot map the optimizer's state on resume
        "ACCELERATE_TORCH_DEVICE": "cpu",
    }  # fmt: skip
    ranks = []
    for rank in range(2):
        ranked = env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with (tmp_path / f"out{rank}").open("wb") as output:
            ranks.append(server(compiler=False).start("tests.ppo_ranks", [str(tmp_path)], ranked, tmp_path, output))
    try:
        codes = [rank.wait(timeout=DEADLINE) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0, 0], "\n".join((tmp_path / f"out{rank}").read_text() for rank in range(2))
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert first["whole"].pop("seed") != second["whole"].pop("seed")
    assert first["whole"] == second["whole"]
    assert first["part"]["hash"] != first["rest"]["hash"]
    for rank in (first, second):
        rank["rest"].pop("seed")
        assert rank["rest"] == rank["whole"]

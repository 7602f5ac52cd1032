"""Trained type × observed type, and ‖K‖ by random projection, against plain torch."""

import copy

import pytest
import torch

import causal_lms
from ift import tiny
from ift.dynamics import Probe, ProbeEvaluator, heat_map, heatmap, kernel_norms, report
from ift.dynamics.responses import encoded_responses

PROBES = [
    Probe("Say red", {"chosen": " red", "rejected": " blue dog"}),
    Probe("Say cat:", {"chosen": " the cat", "rejected": " sun", "mine": " one two three"}),
    Probe("Say sun", {"rejected": " moon"}),
]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.train_tokenizer(["red blue dog the cat sun one two three moon Say"], 280)


def sequence(response):
    """Token ids, and the positions whose logits predict the answer."""
    ids = torch.tensor([[*response.prefix, *response.ids[:-1]]])
    return ids, slice(len(response.prefix) - 1, None)


def logprob(model, response):
    ids, rows = sequence(response)
    logp = model(input_ids=ids).logits[0, rows].log_softmax(-1)
    return logp.gather(1, torch.tensor(response.ids)[:, None])[:, 0]


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_heat_map(name, tokenizer):
    """Each type trained from the same weights, which are there again at the end."""
    model = causal_lms.make(name, vocab_size=len(tokenizer)).train()
    weights = copy.deepcopy(model.state_dict())
    model.lm_head.weight.requires_grad_(False)
    found = heat_map(model, tokenizer, PROBES, lr=1e-3, passes=2, batch_size=2)
    assert found.types == ["chosen", "rejected", "mine"] and model.training
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert "forward" not in model.lm_head.__dict__
    responses = encoded_responses(PROBES, tokenizer, 64)

    def means(of):
        with torch.no_grad():
            each = {t: [logprob(of, r).mean() for r in responses if r.type == t]
                    for t in found.types}  # fmt: skip
        return torch.stack([torch.stack(v).mean() for v in each.values()])

    for row, type_ in zip(found.values, found.types, strict=True):
        other = copy.deepcopy(model).eval()
        before = means(other)
        mine = [r for r in responses if r.type == type_]
        some = [p for p in other.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(some, lr=1e-3, weight_decay=0)
        for _ in range(2):
            for first in range(0, len(mine), 2):
                optimizer.zero_grad()
                (-torch.cat([logprob(other, r) for r in mine[first : first + 2]]).mean()).backward()
                optimizer.step()
        torch.testing.assert_close(row.float(), means(other) - before, rtol=0.02, atol=1e-3)


def test_kernel_norms(tokenizer):
    """From Jacobians of all logits by what is trained: with the same signs, and without any."""
    model = causal_lms.make("llama", vocab_size=len(tokenizer), num_hidden_layers=1)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("o_proj" in name or "lm_head" in name)
    probes, projections = PROBES[:1], 40
    found = kernel_norms(model, tokenizer, probes, projections=projections, seed=3)
    parameters = [p for p in model.eval().parameters() if p.requires_grad]
    assert sum(p.numel() for p in parameters) <= heatmap.SKETCH
    draw, jacobians, vectors = torch.Generator().manual_seed(3), [], []
    for response in encoded_responses(probes, tokenizer, 64):
        ids, rows = sequence(response)
        logits = model(input_ids=ids).logits[0, rows]
        flat = logits.flatten()
        grads = torch.autograd.grad(flat, parameters, torch.eye(len(flat)), is_grads_batched=True)
        jacobians.append(torch.cat([g.flatten(1) for g in grads], 1) / len(response.ids) ** 0.5)
        signs = [2.0 * torch.randint(0, 2, logits.shape, generator=draw) - 1
                 for _ in range(projections)]  # fmt: skip
        vectors.append(torch.stack(signs).flatten(1) @ jacobians[-1])
    different = ~torch.eye(projections, dtype=torch.bool)
    same = [[(a @ b.T)[different].double().square().mean().sqrt() for b in vectors]
            for a in vectors]  # fmt: skip
    torch.testing.assert_close(found.values, torch.tensor(same).double(), rtol=1e-4, atol=0)
    exact = [[(a @ b.T).norm().item() for b in jacobians] for a in jacobians]
    torch.testing.assert_close(found.values, torch.tensor(exact).double(), rtol=0.3, atol=0)
    assert not any(p.grad is not None for p in parameters)


def test_projected_gradients(monkeypatch):
    """Linear, the same signs for all, and products as before on average."""
    monkeypatch.setattr(heatmap, "SKETCH", 1 << 10)
    a, b = ([torch.randn(50, 100), torch.randn(2000)] for _ in range(2))
    c = [x + y for x, y in zip(a, b, strict=True)]
    sa, sb, sc = (heatmap._sketch(x, seed=1) for x in (a, b, c))
    torch.testing.assert_close(sa + sb, sc)
    exact = [torch.cat([x.flatten() for x in g]) for g in (a, c)]
    assert sa.shape == (1 << 10,)
    assert float(sa @ sc) == pytest.approx(float(exact[0] @ exact[1]), rel=0.15)


def test_errors(tokenizer):
    model = causal_lms.make("llama", vocab_size=len(tokenizer))
    for options, match in (
        ({"lr": 0}, "lr: expected a number above 0, got 0"),
        ({"lr": 1e-3, "passes": 0}, "passes: expected at least 1, got 0"),
        ({"lr": 1e-3, "batch_size": 0}, "batch_size: expected at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=match):
            heat_map(model, tokenizer, PROBES, **options)
    with pytest.raises(ValueError, match="projections: expected at least 2, got 1"):
        kernel_norms(model, tokenizer, PROBES, projections=1)


def test_what_runs_did_to_types(tokenizer, tmp_path):
    """The map of runs: the last evaluation less the first."""
    model = causal_lms.make("llama", vocab_size=len(tokenizer))
    first = {"chosen": {"mean_logprob": -2.0}, "rejected": {"mean_logprob": -3.0}}
    last = {"chosen": {"mean_logprob": -1.5}, "rejected": {"mean_logprob": None}}
    runs = {"a": [{"step": 0, "types": first}, {"step": 5, "types": last}],
            "b": [{"step": 0, "types": {"own": {"mean_logprob": 0.0}}}]}  # fmt: skip
    types, values = report.changes(runs)
    nan = pytest.approx(float("nan"), nan_ok=True)
    assert types == ["chosen", "rejected", "own"] and values == [[0.5, nan, nan], [nan, nan, 0.0]]
    report.plot_heat_map(tmp_path / "h.png", list(runs), types, values, "of $ runs")
    assert (tmp_path / "h.png").stat().st_size > 5000
    assert ProbeEvaluator(PROBES, tokenizer)(model)[0].vocabulary == model.config.vocab_size

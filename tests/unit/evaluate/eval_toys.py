"""Seeded token rows and the slow, obvious twin of the losses: one row at a time, float64, written out by hand."""

from __future__ import annotations

import numpy as np
import torch
from tests.toy import VOCABULARY

from gradsift.types import RowStatus, TokenRow


def token_rows(count, seed, longest=17, first_trained=False):
    generator = np.random.default_rng(seed)
    rows = []
    for n in range(count):
        length = int(generator.integers(2, longest))
        ids = generator.integers(4, VOCABULARY, size=length).astype(np.int32)
        trained = generator.random(length) < 0.5
        trained[0], trained[-1] = first_trained, True
        rows.append(TokenRow(f"row{n}", ids, trained, length, RowStatus.OK))
    return rows


def slow_log_probs(model, row):
    """float64 [T, V]: position t is what the model expects of token t + 1."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(row.input_ids[None].astype(np.int64))).logits[0]
    return logits.double().log_softmax(-1).numpy()


def slow_loss(model, row):
    """Mean nats of the trained tokens, token t read at position t - 1, and whether each was the likeliest."""
    table = slow_log_probs(model, row)
    places = [t for t in range(1, row.num_tokens) if row.trained[t]]
    nats = [-table[t - 1, row.input_ids[t]] for t in places]
    return float(np.mean(nats)), all(table[t - 1].argmax() == row.input_ids[t] for t in places)


def slow_kl(base, tuned, row):
    p, q = slow_log_probs(base, row), slow_log_probs(tuned, row)
    places = [t for t in range(1, row.num_tokens) if row.trained[t]]
    return float(np.mean([(np.exp(p[t - 1]) * (p[t - 1] - q[t - 1])).sum() for t in places]))


def train_a_little(model, rows, steps=3, lr=0.05):
    """A few plain gradient steps on some rows."""
    from gradsift.train.parts import make_batch, token_nats

    parameters = [p for p in model.parameters() if p.requires_grad]
    for _ in range(steps):
        batch = make_batch(rows, 3, torch.device("cpu"))
        nats = token_nats(model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits, batch.labels)
        grads = torch.autograd.grad(nats.sum() / (batch.labels[:, 1:] != -100).sum(), parameters)
        with torch.no_grad():
            for p, g in zip(parameters, grads, strict=True):
                p -= lr * g

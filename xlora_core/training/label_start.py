"""Starting a classifier from labels: it learns to tell the domains before it learns to mix.

The classifier reads the base model's hidden states, which training does not change. So they are
read once, and a few hundred steps of the classifier alone cost less than a few of the whole model.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from xlora_core.config.training import RouterTrainConfig
from xlora_core.errors import ConfigError
from xlora_core.model import XLoraModel
from xlora_core.training.data import IGNORE, NO_DOMAIN, Example, by_length, collate
from xlora_core.training.losses import label_losses, soft_scalings, token_weights
from xlora_core.training.progress import Progress

_TOKENS = 2048  # of one step
_REPORTED = 100  # steps between two lines of progress


def start_from_labels(
    model: XLoraModel,
    pad_id: int,
    examples: Sequence[Example],
    settings: RouterTrainConfig,
    *,
    progress: Progress | None = None,
) -> list[float]:
    """Trains the classifier alone to give each token to the expert of its row's domain.

    It learns on questions and answers; not on the tokens with which all examples begin (a system
    prompt), nor where two questions share a prompt. A question and an answer of every domain
    count the same, however long they are. All modules start alike, since a label does not say
    which module needs which expert.

    Args:
        model: Its classifier is trained in place; nothing else changes.
        pad_id: Token id to pad with.
        examples: The training examples; ``settings.label_start_rows`` of them are drawn.
        settings: Of the run: those of the start, rows of a forward pass, autocast, seed.
        progress: Gets a line now and then.

    Returns:
        The label loss of each step, nats a token.

    Raises:
        ConfigError: If no row that was drawn has the domain of an expert.
    """
    count = min(settings.label_start_rows, len(examples))
    chosen = random.Random(settings.seed).sample(range(len(examples)), count)
    hidden, targets, weights = _read(model, pad_id, [examples[i] for i in chosen], settings)
    if not len(targets):
        raise ConfigError(
            f"a start from labels needs rows of the domains {', '.join(model.adapter_names)}; none "
            f"of the {count} that were drawn is of them",
            hint="name the adapters as the rows' domains, or leave label_start_rows at 0",
        )
    steps = settings.label_start_steps
    rate = settings.label_start_learning_rate or settings.learning_rate
    optimizer = torch.optim.AdamW(model.classifier.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    draws = _draws(len(targets), settings.seed)
    losses: list[float] = []
    torch.manual_seed(settings.seed)  # of its dropout
    model.classifier.train()
    for step in range(1, steps + 1):
        tokens = next(draws).to(targets.device)
        router_logits = model.classifier(hidden[tokens])  # [N, L or 1, K]
        scalings = soft_scalings(router_logits, model.config_xlora)
        of_tokens = label_losses(scalings, targets[tokens], settings.label_start_smoothing)
        loss = (of_tokens * weights[tokens]).sum() / weights[tokens].sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if progress is not None and (step == 1 or step % _REPORTED == 0):
            progress.note(f"label start {step}/{steps}  label loss {losses[-1]:.3f}")
    model.classifier.eval()
    return losses


@torch.no_grad()
def _read(
    model: XLoraModel, pad_id: int, examples: Sequence[Example], settings: RouterTrainConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns of each labelled token: hidden state ``[N, H]``, expert, and weight ``[N]``."""
    experts = {name: k for k, name in enumerate(model.adapter_names)}
    shared = _n_shared([e.input_ids for e in examples if e.labels[0] == IGNORE])
    observed: list[Tensor] = []
    hook = model.classifier.register_forward_pre_hook(lambda _, inputs: observed.append(inputs[0]))
    hidden, targets, kinds = [], [], []
    try:
        for group in by_length(examples, settings.rows):
            batch = collate(group, pad_id).to(model.device)
            with torch.autocast(model.device.type, torch.bfloat16, enabled=settings.autocast):
                model.scaling_pass(
                    input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
                )
            # The scalings of a token write the next one.
            ahead = torch.full_like(batch.labels, NO_DOMAIN)
            for row, example in enumerate(group):
                topics = example.topics or example.domains
                known = ahead.new_tensor([experts.get(name, NO_DOMAIN) for name in topics])
                start = shared if example.labels[0] == IGNORE else 0
                ahead[row, start : len(known) - 1] = known[start + 1 :]
            is_answer = batch.labels.roll(-1, dims=1) != IGNORE
            kept = ahead != NO_DOMAIN
            hidden.append(observed.pop()[kept])
            targets.append(ahead[kept])
            kinds.append(2 * ahead[kept] + is_answer[kept])
    finally:
        hook.remove()
    weights = token_weights([torch.cat(kinds)], balanced=True)[0]
    return torch.cat(hidden), torch.cat(targets), weights


def _n_shared(prompts: Sequence[Sequence[int]]) -> int:
    """Returns with how many tokens all prompts begin alike; 0 for a single one."""
    columns = zip(*prompts, strict=False)
    alike = itertools.takewhile(lambda column: len(set(column)) == 1, columns)
    return len(list(alike)) if len(prompts) > 1 else 0


def _draws(n_tokens: int, seed: int) -> Iterator[Tensor]:
    """Yields the tokens of each step, int64 ``[N]``; all of them before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(n_tokens, generator=generator).split(_TOKENS)

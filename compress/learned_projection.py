"""A projection of the residual stream that is learnt: all weights stay products of the full model's with it.

Where principal components keep what the stream holds most of, this keeps what the answers need. Source:
low-rank clone, arXiv 2505.12781, with one projection of the stream and one of each norm's readers.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compress.basis import Readers
from compress.calibrate import CalibrationBatch
from models.losses import ValidLogProbs, ValidTokens, valid_kl

STEPS = 192
LEARNING_RATE = 2e-3


def learn_projection(
    model: PreTrainedModel,
    tensors: Callable[[Tensor, Readers], dict[str, Tensor]],
    *,
    basis: Tensor,
    readers: Readers,
    batches: Sequence[CalibrationBatch],
    valid: ValidTokens,
    reference: Sequence[ValidLogProbs],
) -> tuple[Tensor, Readers]:
    """Return the basis and readers after descent on the KL from the full model's answers.

    Args:
        model: of the narrow shape; its weights are not read.
        tensors: what a basis and its readers make of the full model, by the narrow model's names.
    """
    learnt = [basis.float(), *(one.float() for one in readers.bases), readers.final_weight.float()]
    learnt = [one.clone().requires_grad_() for one in learnt]
    optimizer = torch.optim.AdamW(learnt, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * step / STEPS))
    )
    prefix = "model."
    for step in range(STEPS):
        batch, expected = batches[step % len(batches)], reference[step % len(batches)]
        made = tensors(learnt[0], Readers(learnt[1:-1], learnt[-1]))
        body = {name.removeprefix(prefix): one for name, one in made.items() if name.startswith(prefix)}
        tied = model.config.tie_word_embeddings
        head = made["model.embed_tokens.weight" if tied else "lm_head.weight"]
        hidden = torch.func.functional_call(
            model.model,
            body,
            kwargs={
                "input_ids": batch.input_ids,
                "attention_mask": batch.attention_mask,
                "position_ids": batch.position_ids,
                "use_cache": False,
            },
        ).last_hidden_state
        at = batch.node_ids >= 0
        loss = valid_kl(expected, valid.log_probs(hidden[at], head, batch.node_ids[at]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learnt, 1.0)
        optimizer.step()
        rate.step()
    done = [one.detach().double() for one in learnt]
    return done[0], Readers(done[1:-1], done[-1])

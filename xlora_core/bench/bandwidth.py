"""A routed decode step beside the least that one read of the weights takes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from xlora_core.bench.random_parts import (
    n_bytes,
    number_tokenizer,
    random_llama,
    random_numbers,
    random_xlora,
)
from xlora_core.bench.report import Cell, Report
from xlora_core.bench.reroute import least_ms
from xlora_core.bench.sides import engine_side, hugging_face_side, model_facts
from xlora_core.bench.turns import take_turns
from xlora_core.config import Arm
from xlora_core.engine import Engine
from xlora_core.threads import apart

if TYPE_CHECKING:
    from xlora_core.model import XLoraModel

# GB/s of the memory, by what the device is called; as its maker states it.
_STATED = {"H100 80GB HBM3": 3350, "H100 PCIe": 2000, "H200": 4800, "A100-SXM4-80GB": 2039}
_READ_BYTES = {"cuda": 4 << 30, "cpu": 512 << 20}
# Weak experts: a random base model then guesses the mixture's next token about as often as a
# trained one does.
_STRENGTH = 0.02
METHOD = (
    "A random-weight Llama with random experts in every linear module, batch 1, greedy. bound: "
    "bytes of the weights that a step reads (base, experts, router) over the bandwidth; of it: "
    "bound over the routed step, 1 is the most. reading: bandwidth that PyTorch reaches when it "
    "sums up a large tensor; stated: the maker's figure. The sides take turns, the quietest round "
    "counts."
)


def measure(
    sizes: Sequence[str],
    *,
    device: str | torch.device,
    dtype: torch.dtype = torch.bfloat16,
    n_adapters: int = 4,
    rank: int = 8,
    context: int = 128,
    n_tokens: int = 64,
    rounds: int = 3,
    strength: float = _STRENGTH,
) -> Report:
    """Times routed decoding of random models of several sizes.

    Args:
        sizes: Of ``random_parts.SIZES``.
        device: Where the models run.
        dtype: Of their weights.
        n_adapters: K.
        rank: Of every adapter.
        context: Tokens of the prompt.
        n_tokens: Tokens decoded.
        rounds: How often each side has its turn.
        strength: Of the experts, see ``random_xlora``.
    """
    device = torch.device(device)
    read, stated = apart(lambda: reading_bandwidth(device)), stated_bandwidth(device)
    rows: list[dict[str, Cell]] = []
    facts: dict[str, Any] = {}
    for size in sizes:
        base = apart(partial(random_llama, size, device=device, dtype=dtype))
        ids = [int(i) for i in random_numbers(context, base.config.vocab_size).split()]
        of = take_turns({"hf": hugging_face_side(base, ids, n_tokens)}, rounds)
        with TemporaryDirectory() as folder:
            add = partial(random_xlora, n_adapters=n_adapters, rank=rank, strength=strength)
            model = apart(partial(add, base, folder))
        row: dict[str, Cell] = {"model": size}
        rows.append(row | _row(model, of["hf"].ms, context, n_tokens, rounds, read, stated))
        facts = model_facts(model)
        del model, base
    facts |= {"context": context, "tokens": n_tokens, "rounds": rounds}
    return Report(name="bandwidth", method=METHOD, rows=rows, facts=facts)


def _row(
    model: XLoraModel,
    hf_ms: float,
    context: int,
    n_tokens: int,
    rounds: int,
    read: float,
    stated: float | None,
) -> dict[str, Cell]:
    n_vocabulary = int(model.base_model.config.vocab_size)
    prompt = random_numbers(context, n_vocabulary)
    with Engine(model, number_tokenizer(n_vocabulary)) as engine:
        side = engine_side(engine, prompt, [Arm.routed()], n_tokens)
        sample = take_turns({"routed": side}, rounds)["routed"]
    weights = weight_bytes(model)
    return {
        "weights (GB)": weights / 1e9,
        "hf (ms)": hf_ms,
        "routed (ms)": sample.ms,
        "hit rate": sample.hit_rate,
        "reading (GB/s)": read / 1e9,
        "of it": weights / read * 1000 / sample.ms,
        "stated (GB/s)": None if stated is None else stated / 1e9,
        "of stated": None if stated is None else weights / stated * 1000 / sample.ms,
    }


def weight_bytes(model: XLoraModel) -> int:
    """Returns the bytes of all weights that a decode step reads at least once.

    Of an embedding that is not the head, too, a step reads only a row.
    """
    embedding = model.get_input_embeddings().weight
    head = model.base_model.get_output_embeddings()
    is_tied = head is not None and head.weight.data_ptr() == embedding.data_ptr()
    everything = [*model.parameters(), *model.router.parameters()]
    return n_bytes(everything) - (0 if is_tied else n_bytes([embedding]))


def reading_bandwidth(device: torch.device) -> float:
    """Returns the bytes a second that PyTorch reads from a device's memory at best."""
    n = _READ_BYTES.get(device.type, _READ_BYTES["cpu"])
    values = torch.ones(n // 4, dtype=torch.float32, device=device)
    # The sum comes to the host, so the clock stops after the work.
    return n / (least_ms(lambda: values.sum().item(), 8) / 1000)


def stated_bandwidth(device: torch.device) -> float | None:
    """Returns the maker's figure for a device in bytes a second; None for one not listed."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e9 * value for key, value in _STATED.items() if key in name), None)

"""Decode steps compute with as many threads as are worth it just now."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.tiny_models import tiny_xlora
from xlora_core.engine.step_threads import StepThreads, _counts, matrix_products


class Machine:
    """A machine whose products take as long as a table says; it stands in for PyTorch's threads.

    Args:
        seconds: Number of threads -> what a product takes with them.
    """

    def __init__(self, seconds: dict[int, float]) -> None:
        self.seconds = seconds
        self.n_threads = 8
        self.now = 0.0
        self.computed = 0.0
        self.alone = 0.001  # what a product takes of a core, whoever else wants it
        self.n_products = 0

    def multiply(self) -> None:
        self.now += self.seconds[self.n_threads]
        self.computed += self.alone
        self.n_products += 1

    def set_num_threads(self, n: int) -> None:
        self.n_threads = n

    def threads(self, n_threads: int) -> StepThreads:
        return StepThreads(
            [self.multiply] * 2,
            n_threads,
            interval=1.0,
            longest=4.0,
            clock=lambda: self.now,
            thread_clock=lambda: self.computed,
        )


def machine(monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float]) -> Machine:
    made = Machine(seconds)
    monkeypatch.setattr(torch, "set_num_threads", made.set_num_threads)
    return made


def step(threads: StepThreads, machine: Machine) -> int:
    with threads.running():
        return machine.n_threads


@pytest.mark.parametrize(
    ("seconds", "fastest"),
    [
        ({1: 0.001, 2: 0.0006, 4: 0.0004, 8: 0.0003}, 8),
        ({1: 0.001, 2: 0.0006, 4: 0.0004, 8: 0.0005}, 4),
        ({1: 0.001, 2: 0.0011, 4: 0.0020, 8: 0.0100}, 1),
        # Another process slows one thread down, too, but the others still wait for each other.
        ({1: 0.003, 2: 0.0100, 4: 0.0100, 8: 0.0100}, 1),
    ],
)
def test_the_fastest_number_computes(
    monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float], fastest: int
) -> None:
    of = machine(monkeypatch, seconds)
    threads = of.threads(8)
    assert step(threads, of) == threads.chosen == fastest
    assert of.n_threads == 8  # outside of steps nothing is held back


def test_a_slow_probe_is_cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    of = machine(monkeypatch, {1: 0.001, 2: 1.0})
    threads = of.threads(2)
    assert step(threads, of) == 1
    before = of.n_products
    of.now += 10
    assert step(threads, of) == 1
    alone = 4  # products that take 4 ms
    assert of.n_products - before == alone + 2  # one wakes the threads, one is too slow


def test_what_changes_is_noticed_at_the_next_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    of = machine(monkeypatch, {1: 0.001, 2: 0.0006})
    threads = of.threads(2)
    assert step(threads, of) == 2
    of.seconds[2] = 0.5  # another process has come
    assert step(threads, of) == 2
    of.now += 2.1
    assert step(threads, of) == 1
    of.seconds[2] = 0.0006  # it has gone
    assert step(threads, of) == 1
    of.now += 1.1
    assert step(threads, of) == 2


def test_a_core_that_became_slower_is_the_new_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    of = machine(monkeypatch, {1: 0.001, 2: 0.0006})
    threads = of.threads(2)
    assert step(threads, of) == 2
    of.seconds, of.alone, of.now = {1: 0.002, 2: 0.0012}, 0.002, of.now + 10
    assert step(threads, of) == 2


def test_probes_become_rare_while_the_choice_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    of = machine(monkeypatch, {1: 0.001, 2: 0.0006})
    threads = of.threads(2)
    probed = []
    for second in range(16):
        of.now, before = float(second), of.n_products
        step(threads, of)
        probed += [second] if of.n_products > before else []
    assert probed == [0, 3, 8, 13]  # 2, then 4 seconds after the last one's end


def test_a_failing_step_gives_the_threads_back(monkeypatch: pytest.MonkeyPatch) -> None:
    of = machine(monkeypatch, {1: 0.001, 2: 0.002})
    threads = of.threads(2)
    with pytest.raises(KeyError), threads.running():
        raise KeyError
    assert of.n_threads == 2


def test_one_thread_and_no_work_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    of = machine(monkeypatch, {1: 0.001})
    assert step(of.threads(1), of) == 8
    assert step(StepThreads([], 4), of) == 8
    assert of.n_products == 0


def test_the_work_is_the_models_own(tmp_path: Path) -> None:
    model = tiny_xlora(tmp_path)
    products = matrix_products(model)
    assert 0 < len(products) <= 32
    for product, layer in zip(products, model.lora_layers, strict=False):
        expected = layer.weight.sum(dim=1, keepdim=True).expand(-1, 2)
        torch.testing.assert_close(product(), expected)


def test_products_of_large_matrices_stay_short() -> None:
    large = SimpleNamespace(weight=torch.ones(5000, 1000))
    model = SimpleNamespace(device=torch.device("cpu"), lora_layers=[large])
    assert [product().shape for product in matrix_products(model)] == [(1048, 2)]


def test_packed_and_absent_weights_are_left_out() -> None:
    weights = [
        torch.ones(4, 4, dtype=torch.int8),
        torch.ones(4, 4).to(torch.float8_e4m3fn),
        torch.ones(4, 4, device="meta"),
        torch.ones(4, 4, 3, 3),
        torch.ones(4, 6, dtype=torch.bfloat16),
    ]
    layers = [SimpleNamespace(weight=weight) for weight in weights]
    model = SimpleNamespace(device=torch.device("cpu"), lora_layers=[SimpleNamespace(), *layers])
    (product,) = matrix_products(model)
    assert product().tolist() == [[6, 6]] * 4


def test_a_gpu_has_no_use_for_threads() -> None:
    on_gpu = SimpleNamespace(device=torch.device("cuda:0"))
    assert matrix_products(on_gpu) == []


def test_counts_double_up_to_the_number() -> None:
    assert [_counts(n) for n in (2, 3, 4, 6, 16)] == [
        [2],
        [2, 3],
        [2, 4],
        [2, 4, 6],
        [2, 4, 8, 16],
    ]

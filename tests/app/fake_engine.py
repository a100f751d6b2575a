"""An engine without a model: scripted words, structured made-up router logits, real recording.

Same interface as ``xlora_core.engine.Engine`` as far as the app uses it. What it records goes
through the real ``TrackRecorder``, so everything after the engine is the real thing. A prompt
with the word "slowly" runs ten times slower; one with "script" is answered with markup.
"""

from __future__ import annotations

import re
import threading
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from app.engine_client import EngineClient, ModelCard
from xlora_core import (
    AdapterOverride,
    Arm,
    EngineLimits,
    RoutingKnobs,
    Run,
    SamplingParams,
    XLoraConfig,
)
from xlora_core.errors import ConfigError, PromptError, QueueFullError, XLoraError
from xlora_core.recording import RunHeader, RunRecorder, TrackRecorder

ADAPTERS = ("math", "chemistry", "python", "verse")
KINDS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)

_ANSWER = (
    "Salt dissolves because water molecules are polar: the oxygen end pulls at the sodium ions "
    "and the hydrogen end at the chloride ions. Each gram of salt frees about 1.03e22 ions, so "
    "3 g give 3 * 1.03e22 = 3.09e22 of them.\n\n"
    "def ions(grams):\n    return grams / 58.44 * 2 * 6.022e23\n\n"
    "The sea is a page that the moonlight has read,\n"
    "and salt is the word that the water has said.\n"
)
_OTHER = (
    "Salt dissolves because water is a solvent, and the ions are pulled apart by the molecules "
    "that surround them. This is called dissociation and it happens quickly in warm water.\n"
)
INERT = "Inert: <script>document.title='broken'</script> <img src=x onerror=alert(1)> "
# Which adapter leads on which part of the script.
_TOPICS = ((r"[=*]|\d", 0), (r"def |return|grams|ions\(", 2), (r"sea|moon|word|said|page|read", 3))


def words(text: str) -> list[str]:
    """Returns the text cut into pieces whose join is the text."""
    return re.findall(r"<\|[^|]*\|>|\n|\s?[^\s<]+|\s|<", text)


@dataclass(frozen=True, kw_only=True)
class Fake:
    """How the fake model is built and how fast it writes."""

    n_blocks: int = 30
    delay: float = 0.02
    layerwise: bool = True
    enable_softmax: bool = True
    absent: tuple[tuple[int, int], ...] = ()
    context_length: int = 600
    max_queue: int = 2
    overrides: tuple[AdapterOverride, ...] = ()
    fails_after: int | None = None
    waits_for: threading.Event | None = None
    expected_seconds: float | None = None
    limits: EngineLimits = field(default_factory=EngineLimits)

    @property
    def layer_names(self) -> list[str]:
        return [f"model.layers.{b}.{kind}" for b in range(self.n_blocks) for kind in KINDS]


class FakeHandle:
    """A request to the fake engine."""

    def __init__(self, engine: FakeEngine, run: RunRecorder, work: Any, arms: list[Arm]) -> None:
        self.engine, self.work, self.arms, self._run = engine, work, arms, run
        self.state = "queued"
        self.error: XLoraError | None = None
        self.cancelled = threading.Event()
        self.ended = threading.Event()
        self.knobs = [arm.knobs for arm in arms]
        self.client: str | None = None

    @property
    def position(self) -> int:
        return self.engine.position(self)

    @property
    def expected_seconds(self) -> float | None:
        return self.engine.fake.expected_seconds

    @property
    def version(self) -> int:
        return self._run.version + (1000 if self.ended.is_set() else 0)

    @property
    def run(self) -> Run:
        return self._run.snapshot()

    def cancel(self) -> None:
        self.cancelled.set()
        self.engine.leave(self)

    def set_knobs(self, arm: int, knobs: RoutingKnobs) -> bool:
        self.knobs[arm] = knobs.check_names(ADAPTERS, self.engine.fake.layer_names)
        return not self.ended.is_set()

    def wait(self, timeout: float | None = None) -> Run:
        if not self.ended.wait(timeout):
            raise TimeoutError
        if self.error:
            raise self.error
        return self.run


class FakeEngine:
    """First come, first served, one request at a time, in a thread of its own."""

    def __init__(self, fake: Fake) -> None:
        self.fake = fake
        self._queue: list[FakeHandle] = []
        self._changed = threading.Condition()
        rng = np.random.default_rng(7)
        n_layers = len(fake.layer_names) if fake.layerwise else 1
        self._module_taste = rng.normal(0, 0.9, (n_layers, len(ADAPTERS)))
        depth = np.linspace(0, 1, n_layers)[:, None]
        self._module_gain = 0.4 + 2.6 * np.sin(np.pi * depth) ** 2 + rng.random((n_layers, 1))
        threading.Thread(target=self._serve, daemon=True).start()

    def submit(
        self,
        prompt: str | list[dict[str, str]],
        arms: Sequence[Arm] = (Arm.routed(),),
        sampling: SamplingParams | None = None,
        *,
        client: str | None = None,
        **_: Any,
    ) -> FakeHandle:
        sampling = sampling or SamplingParams()
        question = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        if not question.strip():
            raise PromptError("the prompt is empty", hint="type a prompt")
        text = question
        if not isinstance(prompt, str):
            text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        pieces = words(text)
        limit = self.fake.context_length
        if len(pieces) > limit:
            raise PromptError(
                f"the prompt has {len(pieces)} tokens, the model reads at most {limit}",
                hint="shorten the prompt",
            )
        arms = [
            replace(a, knobs=a.knobs or RoutingKnobs()) if a.kind == "routed" else a for a in arms
        ]
        for arm in arms:
            if arm.kind == "expert" and arm.adapter not in ADAPTERS:
                raise ConfigError(f"there is no expert {arm.adapter!r}")
        header = self._header(text, sampling)
        n_layers = len(self.fake.layer_names) if self.fake.layerwise else 1
        recorders = [
            TrackRecorder(
                arm,
                len(pieces) + sampling.max_new_tokens,
                n_layers if arm.kind == "routed" else None,
                len(ADAPTERS),
            )
            for arm in arms
        ]
        answers = [self._answer(arm, question)[: sampling.max_new_tokens] for arm in arms]
        work = (pieces, answers, recorders, sampling)
        handle = FakeHandle(self, RunRecorder(header, recorders), work, list(arms))
        handle.client = client
        with self._changed:
            if len(self._queue) > self.fake.max_queue:
                raise QueueFullError("the queue is full", hint="try again in a minute")
            self._queue.append(handle)
            self._changed.notify_all()
        return handle

    def position(self, handle: FakeHandle) -> int:
        with self._changed:
            return self._queue.index(handle) if handle in self._queue else 0

    def leave(self, handle: FakeHandle) -> None:
        with self._changed:
            if handle.state == "queued" and handle in self._queue:
                self._queue.remove(handle)
                handle.state = "cancelled"
                handle.ended.set()

    def _answer(self, arm: Arm, question: str) -> list[str]:
        text = _ANSWER if arm.kind == "routed" else _OTHER
        if "script" in question:
            text = INERT + text
        return words(text)

    def _header(self, text: str, sampling: SamplingParams) -> RunHeader:
        names = self.fake.layer_names
        present = np.ones((len(names), len(ADAPTERS)), dtype=bool)
        for layer, adapter in self.fake.absent:
            present[layer, adapter] = False
        return RunHeader(
            run_id=uuid.uuid4().hex,
            created="2026-01-01T00:00:00+00:00",
            adapter_names=list(ADAPTERS),
            layer_names=names,
            present=present.tolist(),
            enable_softmax=self.fake.enable_softmax,
            enable_softmax_topk=False,
            layerwise=self.fake.layerwise,
            scaling_pass_value=0.0,
            model_id="fake-model",
            base_hash="0",
            adapter_hashes={},
            sampling=sampling,
            prompt_text=text,
            versions={},
        )

    def _logits(self, piece: str, t: int) -> np.ndarray:
        topic = next((k for pattern, k in _TOPICS if re.search(pattern, piece)), 1)
        rng = np.random.default_rng(abs(hash((piece, t // 3))) % 2**32)
        pull = np.zeros(len(ADAPTERS))
        pull[topic] = 1.0
        noise = rng.normal(0, 0.35, self._module_taste.shape)
        return (self._module_taste + self._module_gain * pull + noise).astype(np.float32)

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._queue))
                handle = self._queue[0]
                handle.state = "prefill"
            try:
                self._write(handle)
                handle.state = "cancelled" if handle.cancelled.is_set() else "done"
            except XLoraError as error:
                handle.error, handle.state = error, "failed"
            with self._changed:
                self._queue.remove(handle)
            handle.ended.set()

    def _write(self, handle: FakeHandle) -> None:
        prompt, answers, recorders, _ = handle.work
        pause = threading.Event()
        for recorder in recorders:
            recorder.append_prompt([len(p) + ord(p[-1]) for p in prompt], prompt)
        self._route(handle, 0, prompt)
        handle.state = "decode"
        if self.fake.waits_for:
            self.fake.waits_for.wait()
        slowly = 10 if "slowly" in "".join(prompt) else 1
        for n in range(max(map(len, answers))):
            if self.fake.fails_after is not None and n >= self.fake.fails_after:
                for recorder in recorders:
                    recorder.finish("error")
                raise XLoraError("the step failed: made up for a test", hint="try again")
            for index, (answer, recorder) in enumerate(zip(answers, recorders, strict=True)):
                if n >= len(answer):
                    continue
                pause.wait(self.fake.delay * slowly)
                recorder.append(
                    sum(map(ord, answer[n])),
                    answer[n],
                    -0.2,
                    -0.7,
                    alternatives=([1, 2], [-1.0, -2.0]),
                    seconds=(n + 1) * self.fake.delay * len(answers),
                )
                if handle.arms[index].kind == "routed":
                    self._route(handle, len(prompt) + n, answer[n : n + 1])
                    recorder.count_guess(hit=n % 4 != 3)
                if n == len(answer) - 1:
                    recorder.finish("length")
            if handle.cancelled.is_set():
                for recorder, answer in zip(recorders, answers, strict=True):
                    if n < len(answer) - 1:
                        recorder.finish("cancelled")
                return

    def _route(self, handle: FakeHandle, start: int, pieces: list[str]) -> None:
        for index, arm in enumerate(handle.arms):
            if arm.kind == "routed":
                logits = np.stack([self._logits(p, start + i) for i, p in enumerate(pieces)])
                recorder = handle.work[2][index]
                recorder.set_router_logits(start, logits)
                recorder.set_knobs(start, len(pieces), handle.knobs[index])


def fake_client(fake: Fake | None = None) -> EngineClient:
    """Returns a client whose engine needs no model."""
    fake = fake or Fake()
    config = XLoraConfig(
        hidden_size=8,
        adapters={name: name for name in ADAPTERS},
        enable_softmax=fake.enable_softmax,
        layerwise_scalings=fake.layerwise,
    )
    card = ModelCard(
        model_id="fake-model",
        adapter_names=ADAPTERS,
        n_modules=len(fake.layer_names),
        device="cpu",
        dtype="float32",
        context_length=fake.context_length,
        config=config,
        limits=fake.limits,
        knobs=RoutingKnobs(overrides=fake.overrides),
    )
    return EngineClient(FakeEngine(fake), card)

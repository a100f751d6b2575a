"""Every error the core raises on purpose: what is wrong, what was expected, what to do next."""

from __future__ import annotations


class XLoraError(Exception):
    """Base of all errors raised by ``xlora_core``.

    Args:
        message: What is wrong and what was expected; names the file, tensor, layer or field.
        hint: What to do about it. Shown on its own line after the message.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class ConfigError(XLoraError, ValueError):
    """A configuration or a knob is out of range or contradicts another one.

    Args:
        faults: Every fault found, one sentence each.
        hint: What to do about it.
    """

    def __init__(self, faults: str | list[str], *, hint: str = "") -> None:
        self.faults = [faults] if isinstance(faults, str) else list(faults)
        super().__init__("\n".join(self.faults), hint=hint)


class AdapterError(XLoraError, ValueError):
    """A LoRA adapter cannot be read, or does not fit the model."""


class CheckpointError(XLoraError, ValueError):
    """An X-LoRA checkpoint or a base model folder cannot be read or written."""


class ModelError(XLoraError, RuntimeError):
    """A model is used in a way it cannot serve (spent, wrong cache, wrong shape)."""


class PromptError(XLoraError, ValueError):
    """A prompt is empty, or longer than the context window."""


class RunFileError(XLoraError, ValueError):
    """A run file is truncated, doctored, or of a newer version."""


class RecordError(XLoraError, ValueError):
    """A record is written out of order or with wrong shapes, or an export cannot be written."""


class EngineError(XLoraError, RuntimeError):
    """The engine cannot serve a request (closed, or the step failed)."""


class QueueFullError(EngineError):
    """The engine's queue has no room for another request."""

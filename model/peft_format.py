"""LoRA adapters in the format of the `peft` library: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .atomic_folder import replacing_folder
from .errors import CheckpointError
from .lora import adapted_layers, add_lora, is_target, linear_layers

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."

_UNSUPPORTED = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "exclude_modules",
    "layers_pattern",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)
"""Settings of PEFT that change what an adapter computes, beyond W + scale·B·A on linear layers."""

_PLAIN_INITIALISATIONS = (None, True, False, "gaussian", "orthogonal", "eva")
"""Those that leave the base's weights and the forward pass as they are; PiSSA, OLoRA and others do not."""


def save_adapter(
    model: nn.Module,
    folder: Path,
    *,
    base_model_name: str | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a model's LoRA adapters, in their present dtype, so that `peft.PeftModel.from_pretrained` reads them.

    Args:
        model: with adapters that share rank, alpha, dropout and kind of scaling.
        folder: appears complete or not at all; an existing one is replaced.
        base_model_name: checkpoint folder or hub name of the model that the adapters belong to.
        tensors: the adapters' matrices by name, where those in the model are not whole.

    Raises:
        CheckpointError: if there are no adapters, or they differ in their settings.
    """
    layers = adapted_layers(model)
    if not layers:
        raise CheckpointError(f"{folder} would be an adapter, but the model has none: add_lora or load_adapter first")
    settings = {(layer.r, layer.alpha, layer.dropout, layer.rslora) for layer in layers.values()}
    if len(settings) > 1:
        raise CheckpointError(
            f"{folder} cannot hold adapters with {len(settings)} different settings (rank, alpha, dropout, rsLoRA): "
            "save them from models of their own, or merge_lora"
        )
    ((r, alpha, dropout, rslora),) = settings
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name,
        "inference_mode": True,
        "r": r,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": dropout,
        "use_rslora": rslora,
        "target_modules": _target_modules(model, list(layers)),
        "bias": "none",
    }
    written = {}
    for name, layer in layers.items():
        matrices = (layer.lora_A, layer.lora_B)
        if tensors is not None:
            matrices = (tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"])
        for key, matrix in zip(_keys(name), matrices, strict=True):
            written[key] = matrix.detach().cpu().contiguous()
    with replacing_folder(folder) as staging:
        (staging / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(written, staging / WEIGHTS_NAME, metadata={"format": "pt"})


def load_adapter(model: nn.Module, folder: Path) -> list[str]:
    """Add a PEFT LoRA adapter to a model, in place, in the dtype and on the device of its weights.

    Args:
        model: the base that the adapter was trained on, without adapters of its own.
        folder: holds `adapter_config.json` and `adapter_model.safetensors`.

    Returns:
        The names of the new parameters, which are frozen like those of `load_model`.

    Raises:
        CheckpointError: naming every setting that plain LoRA does not have, or every missing, unexpected or
            mis-shaped tensor, at once; the model is then as it was.
    """
    folder = Path(folder)
    config = _read_config(folder)
    layers = linear_layers(model)
    chosen = [name for name in layers if _is_chosen(name, config)]
    if not chosen:
        raise CheckpointError(
            f"{folder / CONFIG_NAME}: target_modules {config['target_modules']!r} match no linear layer of this model"
        )
    expected: dict[str, tuple[int, ...]] = {}
    for name in chosen:
        down, up = _keys(name)
        expected[down] = (config["r"], layers[name].in_features)
        expected[up] = (layers[name].out_features, config["r"])
    tensors = _read_tensors(folder / WEIGHTS_NAME)
    problems = [f"missing {key}" for key in expected if key not in tensors]
    problems += [f"unexpected {key}" for key in tensors if key not in expected]
    problems += [
        f"{key} has shape {tuple(tensors[key].shape)}, model and rank say {shape}"
        for key, shape in expected.items()
        if key in tensors and tuple(tensors[key].shape) != shape
    ]
    if problems:
        raise CheckpointError(f"{folder} does not fit this model: {'; '.join(problems)}")
    names = add_lora(
        model,
        r=config["r"],
        alpha=config["lora_alpha"],
        targets=chosen,
        dropout=config.get("lora_dropout", 0.0),
        rslora=bool(config.get("use_rslora")),
    )
    with torch.no_grad():
        for name in names:
            model.get_parameter(name).requires_grad_(False).copy_(tensors[f"{_PREFIX}{name}.weight"])
    return names


def _keys(name: str) -> tuple[str, str]:
    return f"{_PREFIX}{name}.lora_A.weight", f"{_PREFIX}{name}.lora_B.weight"


def _target_modules(model: nn.Module, adapted: list[str]) -> list[str]:
    """Last names where these mean exactly the adapted layers, else their whole names."""
    last = sorted({name.rpartition(".")[2] for name in adapted})
    return last if [name for name in linear_layers(model) if is_target(name, last)] == adapted else adapted


def _is_chosen(name: str, config: dict[str, Any]) -> bool:
    """PEFT's rule: a whole name chooses its layer, last names can be limited to the layers of some numbers."""
    targets, numbers = config["target_modules"], config.get("layers_to_transform")
    if not is_target(name, targets):
        return False
    if numbers is None or numbers == [] or isinstance(targets, str) or name in targets:
        return True
    number = re.match(r".*?\.[^.]*\.(\d+)\.", name)
    return number is not None and int(number[1]) in ([numbers] if isinstance(numbers, int) else numbers)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{folder} is no PEFT adapter: it has no {CONFIG_NAME}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}); copy or download it again") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is damaged (not a JSON object); copy or download it again")
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{path} describes an adapter of type {config.get('peft_type')!r}; only LORA is read")
    unsupported = [f"{key} = {json.dumps(config[key])}" for key in _UNSUPPORTED if config.get(key)]
    if config.get("bias", "none") != "none":
        unsupported.append(f"bias = {json.dumps(config['bias'])}")
    if config.get("init_lora_weights") not in _PLAIN_INITIALISATIONS:
        unsupported.append(f"init_lora_weights = {json.dumps(config['init_lora_weights'])}")
    if unsupported:
        raise CheckpointError(
            f"{path} asks for {', '.join(unsupported)}, which plain LoRA does not have: "
            "merge the adapter with peft (merge_and_unload) and load the merged checkpoint"
        )
    checks = {
        "r": lambda value: _is_number(value) and isinstance(value, int) and value >= 1,
        "lora_alpha": _is_number,
        "lora_dropout": lambda value: _is_number(value) and 0 <= value < 1,
        "target_modules": lambda value: isinstance(value, str) or _is_list(value, str),
        "layers_to_transform": lambda value: value is None or isinstance(value, int) or _is_list(value, int),
    }
    defaults = {"lora_dropout": 0.0, "layers_to_transform": None}
    for key, is_valid in checks.items():
        if not is_valid(config.get(key, defaults.get(key))):
            raise CheckpointError(f"{path}: {key} = {json.dumps(config.get(key))} cannot be used; correct the file")
    return config


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_list(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(entry, kind) for entry in value)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; save the adapter with peft's safe_serialization=True") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); copy or download it again") from None

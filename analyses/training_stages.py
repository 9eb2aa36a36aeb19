"""A stage of training for ``train_family.py``: it checkpoints, and resumes to the same weights."""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from training_pictures import ClassFolders, SceneStream, augment, normalised


@dataclass(frozen=True)
class Stage:
    """What is trained, on how many images, and how.

    parts: all that is trained and kept in the checkpoint, the network as "module".
    loss: of (n, 3, side, side) normalised images and (n,) labels.
    test: what is measured on the test images at every checkpoint, by name.
    stem: of its checkpoint and log in OUT/NAME.
    """

    parts: dict[str, nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    test: Callable[[], dict[str, float]]
    stem: str
    log_stem: str
    images: int
    batch_size: int
    learning_rate: float
    betas: tuple[float, float]

    @property
    def steps(self) -> int:
        return self.images // self.batch_size


def run(
    stage: Stage,
    card: dict,
    options: argparse.Namespace,
    pictures: SceneStream | ClassFolders,
    stop: int,
) -> list[dict[str, Any]]:
    """Train up to step ``stop``, on from the stage's checkpoint where there is one; its log.

    card: what the weights depend on; a checkpoint of another is refused.
    """
    folder, n = options.out / card["name"], stage.batch_size
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.device(options.device)
    optimizer = _optimizer(stage, options.weight_decay)
    first_step, log, loss_sum = 0, [], 0.0
    checkpoint_path = folder / f"{stage.stem}.pt"
    if checkpoint_path.exists():
        state = torch.load(checkpoint_path, map_location=device, weights_only=True)
        if state["card"] != card:
            raise SystemExit(f"{checkpoint_path} was trained by another recipe: move it away first")
        for name, part in stage.parts.items():
            part.load_state_dict(state[name])
        optimizer.load_state_dict(state["optimizer"])
        first_step, log = state["step"], state["log"]
    minutes, started = log[-1]["minutes"] if log else 0.0, time.monotonic()
    bar = tqdm(
        range(first_step, stop),
        desc=f"{card['name']} {stage.stem}",
        initial=first_step,
        total=stage.steps,
        disable=None,
        unit_scale=n,
    )
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = stage.learning_rate * schedule(step, stage.steps)
        loss = _loss(stage, options, pictures, step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(_parameters(stage), 1.0)
        optimizer.step()
        loss_sum += loss.item()
        if (step + 1) % options.log_every == 0 or step + 1 == stop:
            since = step + 1 - (log[-1]["step"] if log else 0)
            seconds = time.monotonic() - started
            entry = {"step": step + 1, "pictures_seen": (step + 1) * n, "loss": loss_sum / since}
            entry |= stage.test()
            entry |= {"pictures_per_s": (step + 1 - first_step) * n / seconds}
            log.append(entry | {"minutes": minutes + (time.monotonic() - started) / 60})
            loss_sum = 0.0
            bar.set_postfix(log[-1])
            state = {name: part.state_dict() for name, part in stage.parts.items()}
            state |= {"card": card, "step": step + 1, "log": log}
            write_whole(checkpoint_path, state | {"optimizer": optimizer.state_dict()})
            lines = "".join(json.dumps(entry) + "\n" for entry in log)
            write_whole(folder / f"{stage.log_stem}.jsonl", lines.encode())
    return log


def _loss(
    stage: Stage, options: argparse.Namespace, pictures: SceneStream | ClassFolders, step: int
) -> Tensor:
    images, labels = pictures.batch(step * stage.batch_size, stage.batch_size)
    # A seed per step: an interrupted run goes on with what it would have seen.
    if options.augment:
        images = augment(images, np.random.default_rng([options.seed, step]), pictures.flip)
    torch.manual_seed(int(np.random.SeedSequence([options.seed, step]).generate_state(1)[0]))
    device = torch.device(options.device)
    with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
        return stage.loss(normalised(images, device), torch.from_numpy(labels).to(device))


def _parameters(stage: Stage) -> list[nn.Parameter]:
    return list(chain.from_iterable(part.parameters() for part in stage.parts.values()))


def _optimizer(stage: Stage, weight_decay: float) -> torch.optim.Optimizer:
    decayed = [p for p in _parameters(stage) if p.ndim > 1]
    others = [p for p in _parameters(stage) if p.ndim <= 1]
    return torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        betas=stage.betas,
    )


def schedule(step: int, steps: int) -> float:
    """Share of the learning rate: linear warm-up over a twentieth, then a cosine to 0."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))


def write_whole(path: Path, content: dict | bytes) -> None:
    """Write beside and rename, so that a kill leaves the old file or the new one."""
    beside = path.with_name(path.name + ".part")
    if isinstance(content, bytes):
        beside.write_bytes(content)
    else:
        torch.save(content, beside)
    os.replace(beside, path)

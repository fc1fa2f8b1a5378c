"""Weights to the engine: written once as a model directory, loaded by every worker, confirmed by asking it back."""

from __future__ import annotations

import shutil
from pathlib import Path

import httpx

from pacenote.trainer.errors import EngineDied, StaleWeights

KEEP = 2  # an engine may be restarted from the last version while the next is being written


def weights_path(root: Path, version: int) -> Path:
    """Where the weights of a version stand."""
    return root / f"{version:06d}"


def push(url: str, path: Path, version: int, *, timeout: float = 120.0) -> None:
    """Have the engine at `url` load the model directory `path` as weight version `version`, and confirm that it did.

    Protocol: SGLang's POST /update_weights_from_disk, then GET /model_info.

    Raises:
        EngineDied: the engine did not answer.
        StaleWeights: it refused, or it serves another version afterwards.
    """
    body = {"model_path": str(path), "weight_version": str(version), "flush_cache": True}
    try:
        with httpx.Client(timeout=timeout, trust_env=False) as client:
            answer = client.post(f"{url}/update_weights_from_disk", json=body)
            reply = answer.json() if "json" in answer.headers.get("content-type", "") else {}
            if answer.is_error or not reply.get("success"):
                raise StaleWeights(
                    f"the engine refused weight version {version}: {reply.get('message') or answer.text[:300]}"
                )
            serving = str(client.get(f"{url}/model_info").json().get("weight_version"))
    except httpx.HTTPError as error:
        raise EngineDied(
            f"the engine at {url} did not take weight version {version}: {type(error).__name__}: {error}"
        ) from error
    if serving != str(version):
        raise StaleWeights(f"expected the engine to serve weight version {version}, it says {serving}")


def prune(root: Path, version: int) -> None:
    """Remove weight directories older than the last KEEP versions."""
    for path in root.iterdir():
        if path.name.isdigit() and int(path.name) <= version - KEEP:
            shutil.rmtree(path, ignore_errors=True)

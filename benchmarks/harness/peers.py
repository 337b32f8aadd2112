"""The peers that are not torch itself, in an environment of their own, made when it is missing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
PEERS = ROOT / ".venv-peers"
STAMP = PEERS / "installed.json"
EXTENSIONS = PEERS / "torch_extensions"
BASE = ("torch==2.13.0", "numpy", "safetensors", "ninja", "setuptools<81", "wheel", "packaging")
PACKAGES = {
    "accelerate": "accelerate==1.15.0",
    "deepspeed": "deepspeed==0.19.8",
    "fairscale": "fairscale==0.4.13",
    "jax": "jax==0.10.2",
    "torchgpipe": "torchgpipe==0.0.7",
}
INSTALL_SECONDS = 600


def ensure() -> dict[str, str]:
    """Install what is missing; the reason for each peer that cannot be."""
    if not (PEERS / "bin" / "python").exists():
        venv.create(PEERS, with_pip=True, clear=True)
    if not STAMP.exists():
        _install(*BASE)
    tried: dict[str, str] = json.loads(STAMP.read_text()) if STAMP.exists() else {}
    missing = {name: what for name, what in PACKAGES.items() if name not in tried}
    if missing:
        tried |= {n: _install("--no-build-isolation", what) for n, what in missing.items()}
        STAMP.write_text(json.dumps(tried))
    # A build that was killed leaves a lock behind, for which every later start waits for ever.
    for lock in EXTENSIONS.rglob("lock"):
        lock.unlink()
    return {name: why for name, why in tried.items() if why}


def peers_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What their processes need: ninja on PATH, a folder for DeepSpeed's C++ op, no GPU."""
    return {
        "PATH": f"{PEERS / 'bin'}{os.pathsep}{environ.get('PATH', os.defpath)}",
        "TORCH_EXTENSIONS_DIR": str(EXTENSIONS),
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
    }


def versions(python: Path, names: tuple[str, ...]) -> dict[str, str]:
    """Of installed packages, in an environment."""
    script = (
        "import json, sys; from importlib import metadata as m\n"
        "have = {d.name.lower(): d.version for d in m.distributions()}\n"
        "print(json.dumps({n: have[n] for n in sys.argv[1:] if n in have}))"
    )
    if not python.exists():
        return {}
    ran = subprocess.run([python, "-c", script, *names], capture_output=True, text=True, check=True)
    return dict(json.loads(ran.stdout))


def _install(*what: str) -> str:
    """Why it failed; empty when it did not."""
    pip = [PEERS / "bin" / "python", "-m", "pip", "install", "--quiet", *what]
    environ = os.environ | {"PATH": f"{PEERS / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    try:
        ran = subprocess.run(
            pip, env=environ, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"pip did not end in {INSTALL_SECONDS} s"
    said = ran.stderr.strip().splitlines()
    return "" if ran.returncode == 0 else (said[-1] if said else f"pip ended {ran.returncode}")


if __name__ == "__main__":
    if "--again" in sys.argv:
        shutil.rmtree(PEERS, ignore_errors=True)
    print(ensure() or "all peers are installed")

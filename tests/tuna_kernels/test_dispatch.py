"""Which backend is taken, and what is said when one cannot be."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

import tuna_kernels as tk
from tuna_kernels.dispatch import ENVIRONMENT_VARIABLE, resolve_backend

CPU = torch.device("cpu")


def test_auto_takes_native_code_where_it_serves() -> None:
    native = not tk.available_backends()["cpu"]
    assert resolve_backend("auto", CPU, torch.float32, torch.bfloat16) == ("cpu" if native else "torch")
    assert resolve_backend("auto", CPU, torch.float64) == "torch"
    assert resolve_backend("auto", torch.device("meta"), torch.float32) == "torch"


def test_environment_overrides_auto_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")
    assert resolve_backend("auto", CPU, torch.float32) == "reference"
    assert resolve_backend("torch", CPU, torch.float32) == "torch"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "fast")
    with pytest.raises(ValueError, match=f"{ENVIRONMENT_VARIABLE} = 'fast'"):
        resolve_backend("auto", CPU, torch.float32)


def test_without_the_extension_everything_runs_on_torch() -> None:
    """In a process of its own: the import of the native module is made to fail."""
    program = (
        "import sys; sys.modules['tuna_kernels.native._cpu'] = None\n"
        "import torch, tuna_kernels as tk\n"
        "print(tk.linear_logprobs(torch.zeros(1, 2), torch.zeros(4, 2), torch.tensor([0])).item())\n"
        "print(tk.available_backends()['cpu'])\n"
        "try: tk.linear_logprobs(torch.zeros(1, 2), torch.zeros(4, 2), torch.tensor([0]), backend='cpu')\n"
        "except RuntimeError as e: print('refused:', e)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    value, why, refused = done.stdout.splitlines()
    assert abs(float(value) + 1.3862944) < 1e-6
    assert "is missing" in why and refused.startswith("refused: backend = 'cpu' does not support this call")


def test_a_checkout_that_hides_the_installed_package_is_named(tmp_path: Path) -> None:
    """`pip install .`, then Python in the clone: its copy has no extension. Said at the first use, with both places."""
    source = Path(tk.__file__).parent
    checkout, site = tmp_path / "checkout" / source.name, tmp_path / "site" / source.name
    shutil.copytree(source, checkout, ignore=shutil.ignore_patterns("_cpu*", "__pycache__"))
    shutil.copytree(checkout, site)
    (site / "native" / f"_cpu{EXTENSION_SUFFIXES[0]}").write_bytes(b"")
    (checkout / "native" / "_cpu.cpython-36m-x86_64-linux-gnu.so").write_bytes(b"")
    program = (
        "import torch, tuna_kernels as tk\n"
        "for _ in range(2): tk.linear_logprobs(torch.zeros(1, 2), torch.zeros(4, 2), torch.tensor([0]))\n"
        "print(tk.available_backends()['cpu'])\n"
    )

    def run(folder: Path) -> tuple[str, str]:
        environment = os.environ | {"PYTHONPATH": str(site.parent)}
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
        return done.stdout.strip(), done.stderr

    why, warned = run(checkout.parent)
    assert str(checkout) in why and str(site) in why and "pip install --editable ." in why
    assert warned.count(why) == 1
    why, warned = run(tmp_path)
    assert "Python imported" not in why + warned  # that the file is no extension is another matter
    shutil.rmtree(site)
    why, warned = run(checkout.parent)
    assert "built for another Python (_cpu.cpython-36m-x86_64-linux-gnu.so)" in why and "Python imported" not in warned


def test_importing_the_library_needs_torch_and_numpy_only() -> None:
    optional = ("transformers", "pydantic", "typer")
    program = f"import sys, tuna_kernels; print([m for m in {optional} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_show_config_names_every_backend() -> None:
    text = tk.show_config()
    assert all(f"backend {name}:" in text for name in tk.available_backends())

"""The installation: versions, extras and devices, without importing what need not be imported."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from m2f2cli import __version__

PACKAGES = (
    "torch",
    "transformers",
    "timm",
    "open_clip_torch",
    "peft",
    "accelerate",
    "safetensors",
    "numpy",
    "pillow",
    "dlib-bin",
    "av",
    "h5py",
    "typer",
)
_REQUIREMENT = re.compile(r"^\s*([A-Za-z0-9._-]+)(?:\[([^\]]*)\])?.*?(?:;(.*))?$")
_EXTRA = re.compile(r"""extra\s*==\s*["']([^"']+)["']""")


def describe_environment() -> dict[str, Any]:
    """Versions, extras, devices and dtypes of this installation, as plain data.

    Imports torch, for the devices, and nothing else that is heavy; a torch that cannot be imported
    is reported, not raised.
    """
    return {
        "m2f2cli": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "extras": describe_extras(),
        **_devices(),
    }


def library_versions(*packages: str) -> dict[str, str]:
    """Versions of what a result may depend on; imports none of it.

    Args:
        packages: Distributions; one that is not installed is ``unknown``. By default m2f2, Python
            and whichever of ``PACKAGES`` and of the reports' libraries are installed.
    """
    if packages:
        return {name: _version(name) or "unknown" for name in packages}
    found = {name: _version(name) for name in (*PACKAGES, "pycocoevalcap", "matplotlib")}
    own = {"m2f2cli": __version__, "python": platform.python_version()}
    return own | {name: number for name, number in found.items() if number}


def describe_extras() -> list[dict[str, Any]]:
    """For each extra its packages' versions, whether it is complete, and how to install it."""
    extras = []
    for extra, names in sorted(_extra_packages(_requirements()).items()):
        versions = {name: _version(name) for name in names}
        extras.append(
            {
                "name": extra,
                "present": all(versions.values()),
                "packages": versions,
                "install": f"pip install 'm2f2cli[{extra}]'",
            }
        )
    return extras


def _requirements() -> list[str]:
    try:
        return requires("m2f2cli") or []
    except PackageNotFoundError:
        return []


def _extra_packages(requirements: Iterable[str]) -> dict[str, list[str]]:
    """Packages by extra; an extra that only joins others (``m2f2cli[train]``) is left out."""
    extras: dict[str, list[str]] = {}
    for line in requirements:
        match = _REQUIREMENT.match(line)
        marker = _EXTRA.search(match.group(3) or "") if match else None
        if match and marker and match.group(1).lower() != "m2f2cli":
            extras.setdefault(marker.group(1), []).append(match.group(1))
    return extras


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _devices() -> dict[str, Any]:
    try:
        import torch
    except (ImportError, OSError) as error:
        first = (str(error).splitlines() or [""])[0]
        return {"devices": [], "torch_error": f"torch cannot be imported: {first}"}
    threads, capability = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    devices = [_device("cpu", f"{_processor()}, {threads} threads, {capability}")]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        size = f"{properties.total_memory / 2**30:.0f} GiB"
        found = _device(f"cuda:{index}", f"{properties.name}, {size}", properties.major >= 8)
        devices.append(found)
    if torch.backends.mps.is_available():
        devices.append(_device("mps", "Apple GPU"))
    return {"devices": devices}


def _device(name: str, description: str, bfloat16: bool = True) -> dict[str, Any]:
    dtypes = ["float32", *(["bfloat16"] if bfloat16 else []), "float16"]
    return {"name": name, "description": description, "dtypes": dtypes}


def _processor() -> str:
    if sys.platform == "linux":
        try:
            with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
                for line in file:
                    if line.startswith("model name"):
                        return line.partition(":")[2].strip()
        except OSError:
            pass
    return platform.processor() or platform.machine()

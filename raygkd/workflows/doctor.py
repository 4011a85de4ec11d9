"""Check the installation and report what to fix: ``raygkd doctor``.

Checks do the real thing: run operators, start a cluster, open the store.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raygkd.errors import ResourceError, TrackingError, UserError
from raygkd.storage.atomic_files import is_remote, local_path

OK, NOTE, FIX = "ok", "note", "fix"
PACKAGE = "raygkd"
# of the UI, and of Ray's dashboard
PORTS = {
    5000: "stop the program that uses it, or choose another port with raygkd ui --port",
    8265: "nothing: Ray's dashboard uses another port",
}
SHARED_MEMORY = "/dev/shm"
GIB = 1 << 30
# a share of the memory that Ray's object store takes of shared memory, and GiB that do in any case
STORE_SHARE, STORE_ENOUGH = 0.3, 8
# Docker's own /dev/shm, with which Ray and the loaders of several workers fail
SHARED_LEAST = 64 << 20
# GiB on a disk below which a run may not end, and below which a search may not
DISK_LEAST, DISK_ENOUGH = 1, 10
# Ray writes nothing to a disk that is fuller
DISK_FULL = 0.95


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
        check: what was checked.
        status: "ok", "note" (not a problem) or "fix".
        found: the finding.
        advice: what to do; empty if nothing.
    """

    check: str
    status: str
    found: str
    advice: str = ""


def examine(
    *,
    output: str,
    tracking_uri: str | None,
    address: str | None,
    advance: Callable[..., None],
) -> dict[str, Any]:
    """Check the installation; return what ``--json`` prints.

    Args:
        output: folder of the runs.
        tracking_uri: of the MLflow store; None for the environment's, or the output folder's.
        address: of a running cluster; None to start one here.
        advance: is called with the checks done, their number and the next one.
    """
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "versions": _versions,
        "torch": _torch,
        "GPU": _gpus,
        "output folder": lambda: _output(output),
        "disk": lambda: _disks(output),
        "shared memory": _shared_memory,
        "ports": _ports,
        "MLflow": lambda: _store(output, tracking_uri),
        "Ray": lambda: _ray(address),
    }
    findings: list[Finding] = []
    for number, (name, check) in enumerate(checks.items()):
        advance(number, len(checks), name)
        try:
            findings += check()
        except UserError as error:
            found, _, advice = str(error).partition("; ")
            findings.append(Finding(name, FIX, found, advice))
        # whatever a broken installation raises is what is looked for
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            findings.append(
                Finding(name, FIX, reason, "the installation is broken; reinstall raygkd")
            )
    advance(len(checks), len(checks))
    return {
        "ok": all(finding.status != FIX for finding in findings),
        "checks": [asdict(finding) for finding in findings],
    }


def _versions() -> Iterator[Finding]:
    """Compare the installed packages with the requirements of raygkd."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    try:
        metadata = importlib.metadata.metadata(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        yield Finding("raygkd", FIX, "is not installed", "pip install . in its checkout")
        return
    python, wanted = platform.python_version(), metadata["Requires-Python"] or ""
    fits = SpecifierSet(wanted).contains(python, prereleases=True)
    yield Finding("Python", OK if fits else FIX, python, "" if fits else f"install Python {wanted}")
    needed, wrong = 0, False
    missing: dict[str, list[str]] = {}
    for requirement in map(Requirement, importlib.metadata.requires(PACKAGE) or ()):
        extra = _extra(requirement)
        if extra == "test" or not _applies(requirement, extra):
            continue
        found = _installed(requirement.name)
        if found is None and extra:
            missing.setdefault(extra, []).append(requirement.name)
            continue
        needed += 1
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            wrong = True
            advice = f"pip install '{requirement.name}{requirement.specifier}'"
            yield Finding(requirement.name, FIX, found or "not installed", advice)
    for extra, names in missing.items():
        found = f"{', '.join(names)}: not installed"
        yield Finding(f"extra {extra}", NOTE, found, f"if needed: pip install 'raygkd[{extra}]'")
    if not wrong:
        yield Finding("packages", OK, f"{needed} packages in the required versions")


def _extra(requirement: Any) -> str:
    """Return the extra that a requirement belongs to, empty for none."""
    _, quote, rest = str(requirement.marker or "").partition('extra == "')
    return rest.partition('"')[0] if quote else ""


def _applies(requirement: Any, extra: str) -> bool:
    """Return whether a requirement applies to this platform."""
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _installed(name: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return None


def _torch() -> Iterator[Finding]:
    """Run an operator of torch and one of torchvision, which fails if they do not match."""
    import torch
    import torchvision

    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    try:
        image_1CHW = torch.rand(1, 3, 8, 8)
        torch.nn.functional.conv2d(image_1CHW, torch.rand(4, 3, 3, 3))
        boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 3.9]])
        kept = torchvision.ops.nms(boxes, torch.tensor([0.9, 0.8]), 0.5)
    except (RuntimeError, NotImplementedError) as error:
        yield Finding(
            "torch",
            FIX,
            f"{versions}: {str(error).splitlines()[0]}",
            "reinstall both from one release: pip install --force-reinstall torch torchvision",
        )
        return
    right = kept.tolist() == [0]
    advice = "" if right else "pip install --force-reinstall torch torchvision"
    yield Finding("torch", OK if right else FIX, f"{versions}, operators run", advice)


def _gpus() -> Iterator[Finding]:
    """Compare the GPUs that torch sees with those that the driver sees."""
    import torch

    known = _driver_gpus()
    if not torch.cuda.is_available():
        if known:
            advice = "install a torch for CUDA: https://pytorch.org/get-started/locally"
            found = f"the driver has {known} GPU(s), but torch {torch.__version__} uses none"
            yield Finding("GPU", FIX, found, advice)
        else:
            yield Finding("GPU", OK, "none; models train on the CPU")
        return
    for number in range(torch.cuda.device_count()):
        device = torch.device("cuda", number)
        properties = torch.cuda.get_device_properties(device)
        found = f"{properties.name}, {properties.total_memory / GIB:.0f} GiB"
        try:
            ones = torch.ones(64, 64, device=device)
            works = bool((ones @ ones == 64).all())
        except RuntimeError as error:
            works, found = False, f"{found}: {str(error).splitlines()[0]}"
        advice = "" if works else "install a torch for this GPU and its driver"
        yield Finding(f"GPU {number}", OK if works else FIX, found, advice)


def _driver_gpus() -> int:
    """Return how many GPUs NVIDIA's driver sees."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return 0
    try:
        return pynvml.nvmlDeviceGetCount()
    finally:
        pynvml.nvmlShutdown()


def _output(output: str) -> Iterator[Finding]:
    """Try to write to the output folder."""
    if is_remote(output):
        yield Finding("output folder", NOTE, f"{output} is not checked", "")
        return
    folder = _existing(output)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        found = f"{folder} cannot be written: {error.strerror}"
        yield Finding("output folder", FIX, found, "choose another --output")
        return
    new = "" if folder == local_path(output).resolve() else ", created by the first run"
    yield Finding("output folder", OK, f"{local_path(output).resolve()}{new}")


def _existing(path: str) -> Path:
    """Return a folder, or its nearest existing parent."""
    folder = local_path(path).resolve()
    return next(part for part in (folder, *folder.parents) if part.is_dir())


def _disks(output: str) -> Iterator[Finding]:
    """Check the free disk space for the runs and for Ray."""
    folders = {"disk of Ray": Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir()))}
    if not is_remote(output):
        folders = {"disk of the runs": _existing(output), **folders}
    for name, folder in folders.items():
        usage = shutil.disk_usage(folder)
        full = 1 - usage.free / max(1, usage.total)
        found = f"{folder}: {usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB are free"
        where = "RAY_TMPDIR" if name == "disk of Ray" else "--output"
        advice = f"free some space, or choose another {where}"
        if usage.free < DISK_LEAST * GIB:
            yield Finding(name, FIX, found, advice)
        elif usage.free < DISK_ENOUGH * GIB or full > DISK_FULL:
            yield Finding(name, NOTE, found, advice)
        else:
            yield Finding(name, OK, found)


def _shared_memory() -> Iterator[Finding]:
    """Compare shared memory with the size of Ray's object store."""
    import psutil

    if not os.path.isdir(SHARED_MEMORY):
        yield Finding("shared memory", NOTE, f"no {SHARED_MEMORY}; Ray uses files", "")
        return
    usage, memory = shutil.disk_usage(SHARED_MEMORY), psutil.virtual_memory().total
    wanted = min(STORE_SHARE * memory, STORE_ENOUGH * GIB)
    found = f"{SHARED_MEMORY}: {usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB are free"
    if usage.free >= wanted:
        yield Finding("shared memory", OK, found)
        return
    status = FIX if usage.total <= SHARED_LEAST else NOTE
    advice = (
        f"enlarge it to {wanted / GIB:.1f} GiB: docker run --shm-size, or mount -o "
        "remount,size=...; otherwise Ray keeps its objects on the disk, which is slow"
    )
    yield Finding("shared memory", status, found, advice)


def _ports() -> Iterator[Finding]:
    """Check whether the ports of the servers are free."""
    from raygkd.tracking.server import check_port

    for port, advice in PORTS.items():
        try:
            check_port("127.0.0.1", port)
        except ResourceError:
            yield Finding(f"port {port}", NOTE, "used by another program", advice)
        else:
            yield Finding(f"port {port}", OK, "free")


def _store(output: str, tracking_uri: str | None) -> Iterator[Finding]:
    """Open the MLflow store."""
    from raygkd.tracking.redaction import shown
    from raygkd.tracking.store import chosen_uri, probe

    try:
        uri = chosen_uri(tracking_uri, output)
        found = probe(uri)
    except TrackingError as error:
        yield Finding(
            "MLflow", FIX, str(error), "start or repair it, or choose another --tracking-uri"
        )
        return
    yield Finding("MLflow", OK, found or f"{shown(uri)}, created by the first run")


def _ray(address: str | None) -> Iterator[Finding]:
    """Start a cluster, or join the given one, and run a task."""
    from raygkd.rayrun.cluster import is_joined, probe

    joined = is_joined(address)
    nodes = probe(address)
    sums = {kind: sum(node[kind] for node in nodes) for kind in ("CPU", "GPU")}
    where = address or os.environ.get("RAY_ADDRESS") if joined else "started here"
    found = f"{where}: {len(nodes)} node(s), {sums['CPU']:g} CPUs, {sums['GPU']:g} GPUs"
    yield Finding("Ray", OK, f"{found}, ran a task")

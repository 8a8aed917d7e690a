"""Rivals for a machine without a network: their wheels in one folder.

    python bench/cuda/wheels.py FOLDER [--cuda 130] [--only NAME ...]   # gather, with a network
    python bench/cuda/check.py --wheels FOLDER                          # install, without one

Gathering takes the packages below without what they depend on (torch, transformers and accelerate
have to be on the machine already; hqq wants the latter two), makes wheels of source packages, keeps
one CUDA version of bitsandbytes, and prints the size of each wheel and of all. Put quantal's own
wheel beside them: `pip wheel --no-build-isolation --no-deps -w FOLDER .` with the Python of the
machine. Installing goes into a folder of its own; a wheel that does not fit is named, no more.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

#: Package and version that bench/cuda/peers.py was written for.
RIVALS = {
    "bitsandbytes": "0.50.2",
    "hqq": "0.2.8.post1",
    "gemlite": "0.6.0.post2",
    "torchao": "0.18.0",
    "peft": "0.21.2",
    "termcolor": "",
    "einops": "",
}
PIP = [sys.executable, "-m", "pip"]
OTHER_CUDA = re.compile(r"bitsandbytes/libbitsandbytes_(cuda\d+|rocm\d+|xpu\d+)\.so$")


def slim(wheel: pathlib.Path, cuda: str) -> None:
    """Leaves out the libraries of other CUDA versions and devices."""
    keep = f"bitsandbytes/libbitsandbytes_cuda{cuda}.so"

    def unwanted(name: str) -> bool:
        return bool(OTHER_CUDA.search(name)) and name != keep

    beside = wheel.with_suffix(".part")
    with zipfile.ZipFile(wheel) as old:
        if keep not in old.namelist():
            raise SystemExit(f"wheels: {wheel.name} has no CUDA {cuda}")
        with zipfile.ZipFile(beside, "w", zipfile.ZIP_DEFLATED) as new:
            for name in old.namelist():
                data = old.read(name)
                if unwanted(name):
                    continue
                if name.endswith("/RECORD"):
                    lines = data.decode().splitlines(keepends=True)
                    data = "".join(x for x in lines if not unwanted(x.split(",")[0])).encode()
                new.writestr(old.getinfo(name), data)
    beside.replace(wheel)


def gather(folder: pathlib.Path, cuda: str, names: list[str]) -> list[str]:
    """Fills the folder; returns the names that could not be had."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = []
    for name in names:
        wanted = f"{name}=={RIVALS[name]}" if RIVALS[name] else name
        command = [*PIP, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder)]
        if subprocess.run([*command, wanted], check=False).returncode != 0:
            missing.append(name)
    for wheel in folder.glob("bitsandbytes-*.whl"):
        slim(wheel, cuda)
    return missing


def sizes(folder: pathlib.Path) -> dict[str, int]:
    """Bytes of each wheel."""
    return {path.name: path.stat().st_size for path in sorted(folder.glob("*.whl"))}


def described(found: dict[str, int]) -> str:
    return f"{len(found)} wheels, {sum(found.values()) / 1e6:.1f} MB"


def install(folder: pathlib.Path, target: pathlib.Path) -> list[str]:
    """Unpacks the wheels into `target`, first on the path from then on; returns those that do not
    fit this machine. Nothing is fetched."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    failed = []
    options = ["-q", "--no-index", "--no-deps", "--no-compile", "--upgrade", "--target"]
    for wheel in sorted(folder.glob("*.whl")):
        command = [*PIP, "install", *options, str(target), str(wheel)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode != 0:
            failed.append(wheel.name)
    sys.path.insert(0, str(target))
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--cuda", default="130", help="of the machine's torch, as 130 (default)")
    parser.add_argument("--only", nargs="+", choices=list(RIVALS), default=list(RIVALS))
    args = parser.parse_args()
    missing = gather(args.folder, args.cuda, args.only)
    found = sizes(args.folder)
    for name, size in found.items():
        print(f"{size / 1e6:8.1f} MB  {name}")
    print(described(found))
    if missing:
        sys.exit(f"wheels: not to be had: {', '.join(missing)}")


if __name__ == "__main__":
    main()

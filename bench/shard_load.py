"""Memory and time of shard-direct loading of a 7B-shaped folder, on every rank.

    python bench/shard_load.py [--folder build/llama7b] [--shape 7b] [--ranks 2 4] \
        [--output bench/results/shard_load.md]

The folder is written if it is not there (13.5 GB). Each row starts fresh processes with torchrun.
The figure is the peak of RssAnon during `load_sharded` minus its value after imports, the process
group and the construction of the model; the limit is the rank's share + one row panel + 200 MB.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time

import llama_folder
import pairs
from memory import PeakSampler, anonymous_bytes

MB = 1e6
LIMIT = 200e6
NOTE = """Random bfloat16 weights in the shape of a Llama; the worst rank of each row, one thread
per rank. Peak growth: RssAnon, sampled every millisecond, minus its value after imports, process
group and construction of the model on the meta device. Limit: share + one row panel (the rank's
rows of the largest layer in bfloat16) + 200 MB. Mapped pages of the files are not anonymous and not
counted."""
CASES = {
    "NF4 + double quantization": {"method": "bnb_nf4"},
    "HQQ 4-bit g64": {"method": "hqq", "bits": 4, "group_size": 64},
    "MLX 4-bit g64": {"method": "mlx_int4"},
}


def child(folder: str, case: str) -> None:
    import torch
    import torch.distributed as dist

    import quantal
    from quantal import fsdp
    from quantal._loading import build_model

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    stored = json.loads(pathlib.Path(folder, "config.json").read_text())
    model = build_model(None, stored)
    config = quantal.QuantizationConfig(backend_options={"support": "extended"}, **CASES[case])
    dist.barrier()
    before = anonymous_bytes()
    sampler = PeakSampler()
    sampler.start()
    start = time.perf_counter()
    model = fsdp.load_sharded(folder, model, config)
    seconds = time.perf_counter() - start
    sampler.running = False
    sampler.join()
    base = fsdp.local_base_bytes(model)
    packed = {id(p) for m in model.modules() if hasattr(m, "_spec") for p in m.parameters()}
    dense = sum(
        p.to_local().numel() * p.element_size() for p in model.parameters() if id(p) not in packed
    )
    rows = max(-(-m._rows // world) * m._cols * 2 for m in model.modules() if hasattr(m, "_spec"))
    result = {
        "rank": rank,
        "base": base,
        "dense": dense,
        "panel": rows,
        "peak": sampler.peak - before,
        "after": anonymous_bytes() - before,
        "seconds": seconds,
        "total": sum(m.packed_bytes() for m in model.modules() if hasattr(m, "packed_bytes")),
    }
    results: list = [None] * world
    dist.all_gather_object(results, result)
    if rank == 0:
        print("RESULT " + json.dumps(results), flush=True)
    dist.destroy_process_group()


def table(results: list[tuple[str, int, list[dict]]]) -> str:
    lines = [
        "| method | ranks | whole base MB | share of a rank MB (base + dense) | row panel MB "
        "| peak growth MB | limit MB | after MB | s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case, ranks, rows in results:
        worst = max(rows, key=lambda r: r["peak"])
        share = worst["base"] + worst["dense"]
        limit = share + worst["panel"] + LIMIT
        lines.append(
            f"| {case} | {ranks} | {worst['total'] / MB:.0f} | {worst['base'] / MB:.0f} + "
            f"{worst['dense'] / MB:.0f} | {worst['panel'] / MB:.0f} | {worst['peak'] / MB:.0f} | "
            f"{limit / MB:.0f} ({'kept' if worst['peak'] <= limit else 'EXCEEDED'}) | "
            f"{worst['after'] / MB:.0f} | {max(r['seconds'] for r in rows):.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("build/llama7b"))
    parser.add_argument("--shape", choices=list(llama_folder.SHAPES), default="7b")
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(str(args.folder), args.child)
        return
    if not (args.folder / "config.json").exists():
        llama_folder.write(args.folder, args.shape, args.layers)
    results = []
    for case in args.cases:
        for n in args.ranks:
            found = pairs.torchrun(__file__, n, "--child", case, "--folder", str(args.folder))
            results.append((case, n, found))
            print(table(results[-1:]), flush=True)
    ranks = " ".join(map(str, args.ranks))
    text = (
        pairs.heading(
            "Shard-direct loading",
            f"python bench/shard_load.py --shape {args.shape} --ranks {ranks}",
        ).replace(pairs.FIGURE + "\n", "")
        + f"\n{table(results)}\n\n{NOTE}\n"
    )
    print(text)
    if args.output:
        args.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

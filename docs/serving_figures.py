"""Tables of what benchmarks/ measured of serving."""

import json
from pathlib import Path
from typing import Any

from docs.tables import table

ROOT = Path(__file__).parent.parent


def servers() -> str:
    """Throughput in benchmarks/embed_servers.json, which `make bench-servers` writes."""
    result = json.loads((ROOT / "benchmarks/embed_servers.json").read_text())
    sizes = result["sizes"]
    header = ["cells/s"]
    for n_genes in sizes:
        header += [f"{int(n_genes):,} genes, 1 client", f"{int(n_genes):,} genes, 8 clients"]
    names = dict.fromkeys(side for size in sizes.values() for side in size["sides"])
    rows = [(side, *(_rate(size, side, n) for size in sizes.values() for n in (1, 8))) for side in names]
    best = [
        f"{size['scvi_tools']['cells_per_second']:,} (minibatch {size['scvi_tools']['minibatch']})"
        for size in sizes.values()
    ]
    rows.append(("scvi-tools, in its process", *(cell for rate in best for cell in (rate, ""))))
    for title, key in (("ratio to the best other server", "best_server"), ("ratio to scvi-tools", "scvi_tools")):
        found = (f"{size['ratios'][f'{n}_clients_to_{key}']:.2f}" for size in sizes.values() for n in (1, 8))
        rows.append((f"**cellserve: {title}**", *found))
    data = "; ".join(
        f"{int(n_genes):,} genes of {size['data']}, {size['nonzero_per_cell']} counts per cell that are not zero"
        for n_genes, size in sizes.items()
    )
    machine = f"{result['machine']['cpus']} CPUs of {result['machine']['processor']}"
    n_rounds = min(size["rounds"] for size in sizes.values())
    about = (
        f"{machine}, {result['cells_per_request']} cells per request; {data}. Medians of {n_rounds} rounds in turns."
    )
    return f"{table(tuple(header), rows)}\n{about}\n"


def _rate(size: dict[str, Any], side: str, n_clients: int) -> str:
    found = size["sides"].get(side)
    return f"{found[f'{n_clients}_clients']:,.0f}" if found else ""


def single_cells() -> str:
    """Latency and memory in benchmarks/embed_servers.json."""
    result = json.loads((ROOT / "benchmarks/embed_servers.json").read_text())
    sizes = result["sizes"]
    header = [
        "milliseconds: p50 / p99; p50 without a pause",
        *(f"{int(n_genes):,} genes" for n_genes in sizes),
        "memory in MB (PSS)",
    ]
    names = dict.fromkeys(side for size in sizes.values() for side in size["sides"])
    rows = []
    for side in names:
        found = [size["sides"].get(side) for size in sizes.values()]
        times = (_times(one, "") if one else "" for one in found)
        rows.append((side, *times, " / ".join(f"{one['memory_mb']:,}" if one else "" for one in found)))
    ratios = (_times(size["ratios"], "_to_triton") for size in sizes.values())
    rows.append(("**cellserve: ratio to Triton**", *ratios, ""))
    how = (
        f"{result['rate']:g} requests of one cell a second, due at fixed times; and one client that asks again at once."
    )
    return f"{table(tuple(header), rows)}\n{how}\n"


def _times(found: dict[str, float], suffix: str) -> str:
    p50, p99, closed = (found[f"{name}_ms{suffix}"] for name in ("p50", "p99", "closed_p50"))
    return f"{p50:.2f} / {p99:.2f}; {closed:.2f}"


def variants() -> str:
    """benchmarks/variants.json, which `make bench-variants` writes."""
    result = json.loads((ROOT / "benchmarks/variants.json").read_text())
    sizes = result["sizes"]
    header = [""]
    for n_genes in sizes:
        header += [f"{int(n_genes):,} genes, cells/s", "p50 of one cell in ms"]
    rows = []
    for side in next(iter(sizes.values()))["sides"]:
        row = [side]
        for size in sizes.values():
            found, ratio = size["sides"][side], size["ratios"].get(side)
            row += [
                f"{found['cells_per_second']:,.0f}" + (f" ({ratio['cells_per_second']:.2f})" if ratio else ""),
                f"{found['p50_ms']:.2f}" + (f" ({ratio['p50_ms']:.2f})" if ratio else ""),
            ]
        rows.append(tuple(row))
    off = "; ".join(
        f"{int(n_genes):,} genes: {size['int8_difference']['root_mean_square']:.3f}, {size['int8_difference']['largest']:.2f} at most"
        for n_genes, size in sizes.items()
    )
    n_rounds = min(size["rounds"] for size in sizes.values())
    about = (
        f"{result['machine']['cpus']} CPUs of {result['machine']['processor']}, {result['cells_per_request']} cells per request, "
        f"{result['rate']:g} requests of one cell a second. Medians of {n_rounds} rounds in turns; in brackets the ratio to the first line. "
        f"How far the int8 latent is off, in standard deviations of a unit (root mean square over all cells and units): {off}."
    )
    return f"{table(tuple(header), rows)}\n{about}\n"


def cold_start() -> str:
    """benchmarks/cold_start.json, which `make bench-cold-start` writes."""
    result = json.loads((ROOT / "benchmarks/cold_start.json").read_text())
    rows = [
        (
            side,
            *(f"{found[name]:.2f}" for name in ("ready_seconds", "first_answer_seconds")),
            *(f"{found[name]:.0f}" for name in ("pss_mb", "rss_mb")),
        )
        for side, found in result["sides"].items()
    ]
    header = ("", "seconds to ready", "seconds to the first answer", "memory in MB, PSS", "RSS")
    return f"{table(header, rows)}\nMedians of {result['rounds']} starts in turns.\n"


def overload() -> str:
    """benchmarks/overload.json and overload_large.json, which `make bench-overload` writes."""
    columns = [
        _overloaded(json.loads((ROOT / f"benchmarks/{name}.json").read_text()))
        for name in ("overload", "overload_large")
    ]
    return table(("", "", ""), [(what, *(column[what] for column in columns)) for what in columns[0]])


def _overloaded(result: dict[str, Any]) -> dict[str, str]:
    bulk, single, memory = result["overload"], result["single_cells"], result["memory_mb"]
    capacity = result["capacity_cells_per_second"]
    outcomes = "; ".join(f"{name}: {number:,}" for name, number in sorted(bulk["outcomes"].items()))
    retry_after = bulk["retry_after_seconds"]
    return {
        "cells per request": f"{result['cells_per_request']:,}",
        "seconds; deadline in seconds": f"{result['seconds']:g}; {result['deadline_seconds']:g}",
        "capacity before and after, cells/s": f"{capacity['before']:,}, {capacity['after']:,}",
        "capacity beside the same load on a server that only refuses": f"{capacity['beside_load']:,}",
        "offered, cells/s": f"{result['offered_cells_per_second']:,}",
        "goodput, cells/s": f"{result['goodput_cells_per_second']:,}",
        "share of capacity; of that beside the load": f"{result['goodput_to_capacity']:.2f}; "
        f"{result['goodput_to_capacity_beside_load']:.2f}",
        "requests by outcome": outcomes,
        "Retry-After, seconds": f"{min(retry_after)} to {max(retry_after)}" if retry_after else "none",
        "accepted requests, p50 and p99 in ms": f"{bulk['accepted_ms_p50']}, {bulk['accepted_ms_p99']}",
        "single cells meanwhile, p50 and p99 in ms": f"{single['accepted_ms_p50']}, {single['accepted_ms_p99']}",
        "memory in MB (RSS), second and last quarter": f"{memory['second_quarter']}, {memory['last_quarter']}",
    }


def million_cells() -> str:
    """benchmarks/million_cells.json, which `make bench-stream` writes."""
    result = json.loads((ROOT / "benchmarks/million_cells.json").read_text())
    rows = [
        ("cells; seconds; cells/s", f"{result['n_cells']:,}; {result['seconds']}; {result['cells_per_second']:,}"),
        ("seconds to the first answer", f"{result['seconds_to_first_answer']:.3f}"),
        *(
            (
                f"memory of the {name} in MB (RSS): before, at its highest, growth",
                f"{found['before']}, {found['highest']}, {found['growth']}",
            )
            for name, found in result["memory_mb"].items()
        ),
    ]
    return table(("", "measured"), rows)

"""One table of what bench/gpu.sh measured, and with --keep one file: bench/results/gpu-CARD.json."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from record import record


def table(step: dict, decode: dict) -> list[str]:
    lines = [f"{step.get('device') or decode.get('device')}: a training step, x the frozen base's; MiB above the model"]
    for row in step.get("rows", []):
        floor = row.get("time / floor", {}).get("median")
        cells = f"{row.get('seconds', float('nan')) * 1e3:9.2f} ms" + ("" if floor is None else f"  x {floor:6.3f}")
        memory = row.get("memory_mib")
        lines.append(
            f"  {row['case']:18} {row['variant']:16} {cells}" + ("" if memory is None else f"  {memory:8.0f} MiB")
        )
    for row in decode.get("rows", []):
        times = f"{row['mixed_ms']:9.2f} ms  x {row['mixed_ms'] / row['base_ms']:6.3f}"
        lines.append(
            f"  {'decode':18} {row['adapters']:3} adapters     {times}  {row['tokens_per_second']:8.0f} tokens/s"
        )
    return lines


def main() -> int:
    folder = Path(sys.argv[1])
    step, decode = (
        json.loads(p.read_text()) if (p := folder / f"{n}.json").exists() else {} for n in ("step", "decode")
    )
    print("\n".join(table(step, decode)))
    if "--keep" in sys.argv[2:] and step and decode:
        card = re.sub(r"[^a-z0-9]+", "-", step["device"].lower()).strip("-")
        laws = folder / "laws.txt"
        told = laws.read_text().splitlines()[-15:] if laws.exists() else []
        path = Path(__file__).parent / "results" / f"gpu-{card}.json"
        record(path, {"card": step["device"], "laws": told, "step": step, "decode": decode}, "sh bench/gpu.sh --keep")
        print(f"written: {path}")
    return 0 if step and decode else 1


if __name__ == "__main__":
    raise SystemExit(main())

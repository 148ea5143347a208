"""How fast a corpus becomes training data, beside the peers: python -m benchmarks.data [--save] [--work DIRECTORY]

One corpus of 300 MB (benchmarks/corpus.py), one tokenizer of 131,072 ids, everything in one process with one thread,
in one run on this machine. What counts is CPU-seconds, user and system, of the process and its children: they hold
still on a shared machine, where seconds do not. Each peer's .bin is compared with ours, byte for byte.

  ours          scripts/shards.py on a frozen stage: inputs checked, sample verified, sealed
  bare engine   gigatoken alone on texts in memory, cold: nothing is read or written
  datatrove, datasets.map, and with MEGATRON_LM=CHECKOUT Megatron-LM's preprocess_data.py and preprocess_data_fast.py

Slow peers get 100 MB. "start" is the same command on one document; "marginal" is the speed between the two largest
sizes a tool was given, which leaves the start out. Ours and preprocess_data_fast, which take seconds, are measured
REPEATS times, of which the least counts. --save writes benchmarks/results/data.json.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.corpus import write_corpus, write_slice, write_tokenizer
from nemoflow import kinds
from nemoflow.store import Stage, Store, file_digest, seal

BASE = Path(__file__).resolve().parents[1]
PEERS = BASE / "benchmarks/peers.py"
RESULTS = BASE / "benchmarks/results/data.json"
BENCH = BASE / ".venv-bench"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
REPEATS = 3
SIZES = {"start": 0, "slice": 100_000_000, "whole": 300_000_000}


def _memory(pid: int) -> int:
    """Bytes of memory of a process and its descendants, shared pages counted once (PSS)."""
    total, waiting = 0, [pid]
    while waiting:
        at = waiting.pop()
        try:
            fields = Path(f"/proc/{at}/smaps_rollup").read_text().split()
            total += int(fields[fields.index("Pss:") + 1]) * 1024
            waiting += map(int, Path(f"/proc/{at}/task/{at}/children").read_text().split())
        except (OSError, ValueError):
            continue  # it has ended
    return total


def measured(command: list[str | Path], **environment: str) -> dict:
    """Run a command; {"cpu": seconds with its children's, "peak": bytes, "output": its standard output}."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        env = {**os.environ, **ONE_THREAD, **OFFLINE, "PYTHONPATH": "", **environment}
        process = subprocess.Popen(list(map(str, command)), stdout=output, stderr=errors, env=env)
        peak, over = 0, threading.Event()

        def watch() -> None:
            nonlocal peak
            while not over.wait(0.05):
                peak = max(peak, _memory(process.pid))

        (watcher := threading.Thread(target=watch)).start()
        _, status, usage = os.wait4(process.pid, 0)
        over.set()
        watcher.join()
        output.seek(0)
        errors.seek(0)
        text = output.read().decode(errors="replace")
        if status:
            sys.exit(f"{' '.join(map(str, command))}\n{text}\n{errors.read().decode(errors='replace')}")
    return {"cpu": usage.ru_utime + usage.ru_stime, "peak": peak, "output": text}


class Bench:
    """The inputs of all tools in one directory, and what each did with them."""

    def __init__(self, work: Path):
        self.work = work
        self.tokenizer = work / "tokenizer"
        write_tokenizer(self.tokenizer)
        whole = work / "whole.jsonl"
        self.sizes = {"whole": write_corpus(whole, SIZES["whole"])}
        if self.sizes["whole"]["bytes"] < SIZES["whole"]:
            sys.exit(f"{self.sizes['whole']['bytes']:,} bytes of text on this machine; 300 MB are wanted")
        for name in ("slice", "start"):
            self.sizes[name] = write_slice(whole, work / f"{name}.jsonl", max(SIZES[name], 1))
        self.rows: dict[str, dict] = {}

    def corpus(self, size: str) -> Path:
        return self.work / f"{size}.jsonl"

    def run(self, tool: str, size: str, command: Callable[[Path, Path], list], **environment: str) -> None:
        """Measure `command(corpus, out)`, which writes one .bin below `out`."""
        with tempfile.TemporaryDirectory(dir=self.work) as directory:
            out = Path(directory)
            done = measured(command(self.corpus(size), out), HF_HOME=directory, **environment)
            [found] = out.rglob("*.bin")
            self._note(tool, size, done, found)

    def _note(self, tool: str, size: str, done: dict, found: Path) -> None:
        row = self.rows.setdefault(tool, {"cpu_seconds": {}, "peak_bytes": {}, "sha256": {}})
        digest = hashlib.file_digest(found.open("rb"), "sha256").hexdigest()
        if row["sha256"].setdefault(size, digest) != digest:
            sys.exit(f"{tool}, {size}: other bytes than before")
        row["cpu_seconds"][size] = min(row["cpu_seconds"].get(size, math.inf), round(done["cpu"], 3))
        row["peak_bytes"][size] = max(row["peak_bytes"].get(size, 0), done["peak"])
        print(f"{tool}, {size}: {done['cpu']:.2f} CPU-s, {done['peak'] / 1e6:.0f} MB", flush=True)

    def ours(self, tool: str, size: str, format_: str = "jsonl", **settings: str) -> None:
        """Measure a shards job as Snakemake would start it."""
        with tempfile.TemporaryDirectory(dir=self.work) as directory:
            stage = self._frozen(Store(directory), size, format_, settings)
            command = [sys.executable, BASE / "scripts/shards.py", "--stage", stage.store.stage_file(stage.identity)]
            self._note(tool, size, measured(command), stage.directory / "00000.train.bin")

    def _frozen(self, store: Store, size: str, format_: str, settings: dict) -> Stage:
        """A shards stage of one corpus, its inputs sealed."""
        raw = self.corpus(size).with_suffix(f".{format_}")
        files = [self.tokenizer / "tokenizer.json", self.tokenizer / "tokenizer_config.json"]
        made = {}
        for kind, paths, more in (("tokenizer", files, {}), ("source", [raw], {"format": format_})):
            entries = [{"size": path.stat().st_size, "sha256": file_digest(path)} for path in paths]
            made[kind] = store.add(kinds.payload(kind, files=entries, **more))
            stage = store.load(made[kind])
            names = [path.name if kind == "tokenizer" else f"files/00000.{format_}" for path in paths]
            for name, path in zip(names, paths, strict=True):
                (target := stage.directory / name).parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(path)
            contents = [{"name": name, **entry} for name, entry in zip(names, entries, strict=True)]
            seal(stage, None, {"vocab_size": 131072, "eod": 2}, contents)
        return store.freeze(store.add(kinds.payload("shards", **made, shards=[[[0]]], pool="0", **settings)))

    def parquet(self) -> None:
        """The corpora once more, as hubs have them: zstd, row groups of 1000."""
        program = (
            "import sys, json, pyarrow as pa, pyarrow.parquet as pq\n"
            "for path in sys.argv[1:]:\n"
            "    texts = [json.loads(line)['text'] for line in open(path, 'rb')]\n"
            "    table = pa.table({'text': texts, 'id': range(len(texts))})\n"
            "    pq.write_table(table, path.replace('.jsonl', '.parquet'), compression='zstd', row_group_size=1000)\n"
        )
        subprocess.run([sys.executable, "-c", program, *(self.corpus(size) for size in SIZES)], check=True)

    def bare(self) -> None:
        """The engine alone: the faster of its documented batch call and one call for joined texts."""
        calls = {}
        for call in ("batch", "joined"):
            done = measured([sys.executable, PEERS, "bare", self.corpus("whole"), self.work / call, self.tokenizer])
            told = json.loads(done["output"])
            calls[call] = told["bytes"] / told["seconds"] / 1e6
            print(f"bare engine, {call}: {calls[call]:.0f} MB per CPU-s", flush=True)
        self.rows["bare engine"] = {"mb_per_cpu_second": {call: round(speed, 1) for call, speed in calls.items()}}

    def finish(self) -> dict:
        """Speeds and ratios of all tools, and whether they agree."""
        for tool, row in self.rows.items():
            if tool == "bare engine":
                continue
            cpu = row["cpu_seconds"]
            mega = {size: self.sizes[size]["bytes"] / 1e6 for size in cpu}
            row["whole_job_mb_per_cpu_second"] = {
                size: round(mega[size] / cpu[size], 2) for size in cpu if mega[size] > 1
            }
            least, most = sorted(cpu, key=mega.get)[-2:]
            row["marginal_mb_per_cpu_second"] = round((mega[most] - mega[least]) / (cpu[most] - cpu[least]), 2)
        ours = self.rows["ours, control"]["sha256"]
        for tool, row in self.rows.items():
            if "sha256" in row and tool not in ("ours", "ours, parquet"):
                row["same_bytes_as_ours"] = all(ours[size] == digest for size, digest in row.pop("sha256").items())
        plain = self.rows["ours"].pop("sha256"), self.rows["ours, parquet"].pop("sha256")
        self.rows["ours"]["same_bytes_as_ours"] = self.rows["ours, parquet"]["same_bytes_as_ours"] = (
            plain[0] == plain[1]
        )
        return {"corpus": self.sizes, "tools": self.rows, "python": platform.python_version()}


def table(result: dict) -> str:
    """The results for people."""
    tools = result["tools"]
    bare = tools["bare engine"]["mb_per_cpu_second"]
    ours = tools["ours"]
    whole, part = result["corpus"]["whole"], result["corpus"]["slice"]
    lines = [
        f"corpus: {whole['documents']:,} documents, {whole['bytes'] / 1e6:.0f} MB; slice: {part['bytes'] / 1e6:.0f} MB",
        "MB of text per CPU-second:",
        f"{'':24}{'start s':>9}{'slice':>9}{'whole':>9}{'marginal':>10}{'peak MB':>9}{'ours/it':>17}  same bytes",
    ]
    for tool, row in tools.items():
        if tool == "bare engine":
            lines.append(f"{tool:24}{'':>27}{bare['batch']:>10.1f}   its documented batch call")
            lines.append(f"{'':24}{'':>27}{bare['joined']:>10.1f}   one call for joined texts, as we do")
            continue
        whole = row["whole_job_mb_per_cpu_second"]
        most = "whole" if "whole" in whole else "slice"
        ratio = ours["whole_job_mb_per_cpu_second"][most] / whole[most]
        marginal = ours["marginal_mb_per_cpu_second"] / row["marginal_mb_per_cpu_second"]
        cells = [f"{whole[size]:9.2f}" if size in whole else " " * 9 for size in ("slice", "whole")]
        lines.append(
            f"{tool:24}{row['cpu_seconds']['start']:9.2f}{''.join(cells)}{row['marginal_mb_per_cpu_second']:10.2f}"
            f"{max(row['peak_bytes'].values()) / 1e6:9.0f}{f'{ratio:.1f}x {marginal:.1f}x':>17}  "
            f"{'yes' if row['same_bytes_as_ours'] else 'NO'}"
        )
    for tool in ("ours", "ours, parquet"):
        shares = [tools[tool]["marginal_mb_per_cpu_second"] / bare[call] for call in ("batch", "joined")]
        lines.append(
            f"{tool}: {shares[0]:.0%} of the engine's batch call, {shares[1]:.0%} of its fastest call (marginal)"
        )
    lines.append("ours/it: whole job on the largest common size, and marginal")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help=f"write {RESULTS.relative_to(BASE)}")
    parser.add_argument("--work", type=Path, help="where to work; a temporary directory by default, of 3 GB")
    args = parser.parse_args()
    if not (BENCH / "bin/python").exists():
        uv = [BASE / ".venv/bin/uv"]
        subprocess.run([*uv, "venv", "--quiet", "--python", sys.executable, BENCH], check=True)
        requirements = BASE / "benchmarks/requirements.txt"
        install = ["pip", "install", "--quiet", "--system-certs", "--python", BENCH / "bin/python", "-r", requirements]
        subprocess.run([*uv, *install], check=True)
    with tempfile.TemporaryDirectory(dir=args.work, prefix="bench-data-") as directory:
        bench = Bench(Path(directory))
        bench.parquet()
        begun = time.monotonic()
        for size in [size for size in SIZES for _ in range(REPEATS)]:
            bench.ours("ours", size)
            bench.ours("ours, parquet", size, "parquet")
            bench.ours("ours, control", size, control_strings="control")
        bench.bare()
        if checkout := os.environ.get("MEGATRON_LM"):
            common = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", bench.tokenizer, "--append-eod"]
            for program, sizes, more in (
                ("preprocess_data_fast", [size for size in SIZES for _ in range(REPEATS)], ["--use-gigatoken"]),
                ("preprocess_data", ("start", "slice"), ["--workers", "1"]),
            ):
                command = [sys.executable, Path(checkout, "tools", f"{program}.py"), *common, *more]
                for size in sizes:
                    bench.run(
                        program,
                        size,
                        lambda corpus, out, c=command: [*c, "--input", corpus, "--output-prefix", out / "m"],
                        PYTHONPATH=checkout,
                    )
        for peer, python in (("datatrove", BENCH / "bin/python"), ("datasets", sys.executable)):
            for size in ("start", "slice"):
                bench.run(
                    "datasets.map" if peer == "datasets" else peer,
                    size,
                    lambda corpus, out, c=[python, PEERS, peer]: [*c, corpus, out, bench.tokenizer],
                )
        result = bench.finish()
        result["minutes"] = round((time.monotonic() - begun) / 60, 1)
    print(table(result))
    if args.save:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

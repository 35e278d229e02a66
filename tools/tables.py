"""The tables of the pages, written from the files in benchmarks/ and weights/ (``benchmark.py --tables``).

A page holds a table between ``<!-- table: NAME -->`` and ``<!-- end -->``. Nobody types a figure twice: a
test writes all tables anew and compares.
"""

import itertools
import json
import re
import statistics

from tools import benchmarking
from utils import ROOT

TINY, PEER = "msg_tiny_p4_win7_224", "swin_tiny_patch4_window7_224"
SHORT = {
    "msg_tiny_p4_win7_224": "T", "msg_small_p4_win7_224": "S", "msg_base_p4_win7_224": "B",
    "swin_tiny_patch4_window7_224": "Swin-T", "swin_small_patch4_window7_224": "Swin-S",
    "swin_base_patch4_window7_224": "Swin-B", "convnext_tiny": "ConvNeXt-T",
}  # fmt: skip

# Two-sided 95% quantiles of Student's t for 1 to 30 degrees of freedom.
STUDENT = (
    (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
    + (2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086)
    + (2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)
)


def shelf():
    """All results: (name of the machine's folder, path, result), in the order of folders and dates."""
    for path in sorted((ROOT / "benchmarks").glob("*/20??-??-??-*.json")):
        for result in json.loads(path.read_text()):
            yield path.parent.name, path, result


def ratios(result, setting):
    """What each row of a setting is compared with the peer: (row, low, median, high).

    It is time per step, or speed where the result's ``figure`` says so. Rows without turns are of before
    turns were kept, and hold a ratio with its quartiles.
    """
    rows, found = result["settings"][setting], []
    compiled = {bool(row.get("compiled")): row for row in rows if row["model"] == result["peer"]}
    for row in rows:
        if "turns" not in row:
            low, high = row["quartiles"]
            found.append((row, low, row["ratio"], high))
            continue
        peer = compiled.get(bool(row.get("compiled")), compiled.get(False))
        low, median, high = benchmarking.interval(benchmarking.ratios(row["turns"], peer["turns"]))
        faster = "figure" in result
        found.append((row, *((1 / high, 1 / median, 1 / low) if faster else (low, median, high))))
    return found


def name_of(row):
    """What tables call the candidate of a row."""
    name, _, way = row["model"].partition(":")
    one = ", 1 thread" * (row.get("threads") == 1)
    return SHORT.get(name, name) + f":{way}" * bool(way) + " compiled" * bool(row.get("compiled")) + one


def is_vague(low, median, high):
    """Whether an interval is too wide for its median to be a claim."""
    return (high - low) / 2 > benchmarking.CLAIM * median


def in_words(low, median, high):
    """A ratio with its interval, or only the interval where that is wide."""
    if is_vague(low, median, high):
        return f"between {low:.2f} and {high:.2f}"
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


def in_lines(result, setting):
    """The ratios of a setting for the console, a line each."""
    peer, rows = name_of(dict(model=result["peer"])), result["settings"][setting]
    return "\n".join(
        f"  {name_of(row):30} {in_words(*found)} of {peer}{cold(row, rows, result['peer'])}"
        for row, *found in ratios(result, setting)
    )


def cold(row, rows, peer):
    """The ratio of the cold steps of a row, in words; nothing where they were not timed."""
    (other,) = [other for other in rows if other["model"] == peer and not other.get("compiled")]
    found = benchmarking.cold_ratios(row.get("turns", []), other.get("turns", []))
    return f", cold {in_words(*benchmarking.interval(found))}" if found else ""


def results():
    """Every setting of every result, by machine."""
    machines, lines = {}, []
    for folder, path, result in shelf():
        if "peer" in result:
            machines.setdefault(folder, []).append((path, result))
    for folder, found in machines.items():
        processor = found[-1][1]["machine"]
        flags = ", ".join(processor["flags"])
        device = f"{processor['device']}; " if "device" in processor else ""
        lines += [f"### {device}{name_of_processor(processor)} ({flags})", ""]
        rows = []
        for path, result in found:
            for setting in result["settings"]:
                words = []
                for row, *of_row in ratios(result, setting):
                    if (row["model"], bool(row.get("compiled"))) != (result["peer"], False):
                        of_peer = result["settings"][setting], result["peer"]
                        apart = cold(row, *of_peer) + in_memory(row, *of_peer)
                        words.append(f"{name_of(row)} {in_words(*of_row)}{apart}")
                rates = result.get("rates", {})
                reached = ", ".join(f"{flops / 1e9:.0f}" for flops, _ in rates.values())
                peer = name_of(dict(model=result["peer"]))
                what = f"[{path.stem[:10]}]({folder}/{path.name}) {setting}"
                rows.append([what, peer, "; ".join(words), reached or "-"])
        lines += [*markdown(["date, setting", "1 =", "ratio", "GFLOP/s"], rows), ""]
    return lines


def name_of_processor(machine):
    """Name, family and model of a processor; the family is the whole of what is missing where it is."""
    model = f", model {machine['model']}" if machine["model"] != "unknown" else ""
    name = re.sub(r"\(R\)| Processor", "", machine["processor"])
    return f"{name}, family {machine['family']}{model}"


def in_memory(row, rows, peer):
    """How much memory a row took, over the peer's, in words; nothing where it is not known."""
    if "memory_ratio" in row:
        return f", memory {row['memory_ratio']:.2f}"
    if "memory" not in row:
        return ""
    (other,) = [other["memory"] for other in rows if other["model"] == peer and not other.get("compiled")]
    return f", memory {row['memory'] / other:.2f}"


def speed():
    """T over Swin-T in PyTorch at 224 px, lowest and highest figure of all runs on each known machine.

    Of a ratio that is not known well, both ends of the interval count.
    """
    columns = ("inference float32", "inference bfloat16", "train float32", "train bfloat16")
    found = {}
    for folder, _, result in shelf():
        if result["machine"]["family"] == "unknown":
            continue
        of_machine = found.setdefault(folder, ({column: [] for column in columns}, result["machine"]))[0]
        for setting in result["settings"]:
            column = next((column for column in columns if setting.startswith(f"{column}, batch")), None)
            if column and result.get("peer") == PEER:
                for row, low, median, high in ratios(result, setting):
                    if row["model"] == TINY and not row.get("compiled"):
                        of_machine[column] += [low, high] if is_vague(low, median, high) else [median]
    rows = []
    for of_machine, machine in found.values():
        if any(of_machine.values()):
            name = machine.get("device") or f"{name_of_processor(machine)}, {machine['threads']} threads"
            spans = [span(of_machine[column]) for column in columns]
            rows.append([f"[{name}](benchmarks/README.md)", *spans])
    heads = [column.replace("train", "training") for column in columns]
    return markdown(["T's time, Swin-T's = 1", *heads], rows)


def choices():
    """What computes on each processor that was measured: the time of each value over the least."""
    rows = []
    for folder, path, result in shelf():
        for choice, seconds in seconds_of_choices(result).items():
            what = f"[{path.stem[:10]}]({folder}/{path.name}) {name_of_processor(result['machine'])}"
            value = result["choices"][choice]
            rows.append([what, choice.replace("_", " "), value, over_least(seconds)])
    return markdown(["date, processor", "choice", "taken", "time over the fastest"], rows)


def seconds_of_choices(result):
    """The seconds that all blocks of T take, by choice and value; empty for what measured no choices."""
    found = {}
    for row in itertools.chain.from_iterable(result["settings"].values()):
        if "choice" in row:
            of_choice = found.setdefault(row["choice"], {})
            of_choice[row["model"]] = of_choice.get(row["model"], 0) + row["blocks"] * seconds_of(row)
    return found


def seconds_of(row):
    """The median seconds of a step over the rounds."""
    return statistics.median(seconds / steps for steps, seconds, *_ in row["turns"])


def over_least(seconds):
    """Seconds by name, as words: each over the least."""
    least = min(seconds.values())
    return ", ".join(f"{name} {taken / least:.2f}" for name, taken in seconds.items())


def span(values):
    """Lowest and highest of some values, in words; a dash for none."""
    low, high = (f"{bound(values):.2f}" if values else "-" for bound in (min, max))
    return low if low == high else f"{low} to {high}"


def read(path):
    """The content of a file of benchmarks/."""
    return json.loads((ROOT / "benchmarks" / path).read_text())


def mean_and_interval(values):
    """Mean, standard deviation and 95% interval of the mean, by Student's t, of values by seed.

    Returns:
        dict of ``by_seed``, ``mean``, ``std`` (of a sample) and ``half`` (of the interval); None for what
        too few values leave unknown.
    """
    numbers = list(values.values())
    mean = statistics.fmean(numbers) if numbers else None
    std = statistics.stdev(numbers) if len(numbers) > 1 else None
    half = None
    if std is not None:
        quantile = STUDENT[len(numbers) - 2] if len(numbers) - 2 < len(STUDENT) else 1.96
        half = quantile * std / len(numbers) ** 0.5
    return dict(by_seed=values, mean=mean, std=std, half=half)


def with_half(numbers, form):
    """A mean, and half of its interval where that is known; ``form`` is the format of the mean."""
    half = "" if numbers["half"] is None else f" ± {numbers['half']:{form.lstrip('+')}}"
    return "not finished" if numbers["mean"] is None else f"{numbers['mean']:{form}}{half}"


def ablation(found, what="config"):
    """Best top-1 and paired differences of an ablation; ``what`` the rows are."""
    rows = []
    for row in found["rows"]:
        score, difference = with_half(row["best"], ".2f"), with_half(row["best_difference"], "+.2f")
        difference = difference if rows else "-"
        size = f"{row['parameters'] / 1e6:.2f}M", f"{row['macs'] / 1e6:.1f}M"
        rows.append([row["name"].replace("_", " "), *size, score, difference])
    columns = [what, "parameters", "MACs", "best top-1, 95% interval"]
    return markdown([*columns, "paired difference to the first"], rows)


def by_epoch(one, other, epochs):
    """Other minus one, in pairs of runs, after some epochs.

    Args:
        one, other: patterns of files with metrics, below the repository's root.
        epochs: counted from 1.
    """
    files = (sorted(ROOT.glob(pattern)) for pattern in (one, other))
    runs = [[[json.loads(line) for line in file.read_text().splitlines()] for file in of] for of in files]
    rows = []
    for epoch in epochs:
        row = [f"{epoch}"]
        for key, form in (("train_loss", "+.3f"), ("val_loss", "+.3f"), ("acc1", "+.2f")):
            pairs = enumerate(zip(*runs))
            gaps = {seed: b[epoch - 1][key] - a[epoch - 1][key] for seed, (a, b) in pairs}
            row.append(with_half(mean_and_interval(gaps), form))
        rows.append(row)
    return markdown(["after epoch", "training loss", "validation loss", "top-1"], rows)


def blocks(found):
    """Runs with a way of exchanging, a distance and a number of blocks, by their best epoch."""
    rows = []
    for run in found["runs"]:
        scores = run["top1_by_epoch"]
        rows.append([run["exchange"], f"{run['distance']}", f"{run['blocks']}", f"{max(scores):.1f}"])
    return markdown(["exchange", "windows apart", "blocks", "best top-1"], rows)


def candidates(found):
    """Variants of an exchange, one run each, with what was predicted of them before."""
    rows = []
    for run in found["runs"]:
        epochs = run["epochs"]
        if isinstance(epochs, str):  # a file with the metrics of a run in benchmarks/
            epochs = [json.loads(line) for line in (ROOT / epochs).read_text().splitlines()]
        reached = f"{epochs[-1]['train_loss']:.3f}", f"{max(row['acc1'] for row in epochs):.2f}"
        rows.append([run["cause"], run["variant"], run["prediction"], *reached])
    columns = ["possible cause", "variant", "prediction if it is the cause"]
    return markdown([*columns, "training loss", "best top-1"], rows)


def orders(found):
    """Areas of the curves that :func:`~analysis.messenger_curves.summarize` found, and gains over random."""
    rows = []
    for stage, of_stage in found["curves"].items():
        for order, kinds in of_stage["orders"].items():
            row = [f"stage {int(stage) + 1}", order]
            for kind in ("deletion", "insertion"):
                gain, error = kinds[kind]["gain"], kinds[kind]["error"]
                better = "-" if order == "random" else f"{gain:.2f} ± {error:.2f}"
                row += [f"{kinds[kind]['area']:.2f}", better]
            rows.append(row)
    areas = ["deletion area", "better than random by", "insertion area", "better than random by"]
    return markdown(["", "order", *areas], rows)


def exchange(found):
    """What is lost where exchanges are switched off; ``found`` as in :func:`orders`."""
    rows = []
    for place, kinds in found["exchange"].items():
        cells = [f"{100 * kind['share']:.0f}%, {100 * kind['kept']:.0f}%" for kind in kinds.values()]
        rows.append([place, *cells])
    return markdown(["exchange changed in", "off: score lost, predictions kept", "withheld: the same"], rows)


def weights():
    """What the shipped weights reach, and what training them took."""
    folder = ROOT / "weights" / "msg_cifar10"
    found = json.loads((folder / "eval.json").read_text())
    epochs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    best = max(epochs, key=lambda row: row["ema_acc1"])
    seconds = statistics.median(row["seconds"] for row in epochs)
    rows = [
        [f"top-1, top-5 on {found['images']:,} test images", f"{found['acc1']:.2f}, {found['acc5']:.2f}"],
        ["kept: averaged weights (EMA) of epoch", f"{best['epoch']} of {len(epochs)}, counted from 0"],
        ["top-1 after the last epoch: averaged, not", "{ema_acc1:.2f}, {acc1:.2f}".format(**epochs[-1])],
        ["seconds of training an epoch, median", f"{seconds:.0f}"],
        ["size of the file", f"{(folder / 'msg_cifar10.safetensors').stat().st_size / 1e6:.1f} MB"],
    ]
    of_classes = ", ".join(f"{row['class']} {100 * row['accuracy']:.0f}%" for row in found["classes"])
    return markdown(["", ""], [*rows, ["right, of each class", of_classes]])


def markdown(columns, rows):
    """The lines of a table whose first column is text."""
    table = ["| " + " | ".join(cells) + " |" for cells in (columns, *rows)]
    return [table[0], "|---|" + "---|" * (len(columns) - 1), *table[1:]]


PAGES = {
    "README.md": dict(speed=speed),
    "benchmarks/README.md": dict(results=results, choices=choices),
    "docs/ablations.md": dict(
        cues=lambda: ablation(read("ablation_cues/ablation.json"), "messengers"),
        blocks=lambda: blocks(read("ablation_cues/blocks.json")),
        cifar10=lambda: ablation(read("cifar10/ablation.json"), "messengers"),
        cost=lambda: by_epoch(
            "benchmarks/cifar10/cifar10_not_exchanged/seed*/metrics.jsonl",
            "benchmarks/cifar10/cifar10_shuffled/seed*/metrics.jsonl",
            (2, 4, 8, 12),
        ),
        candidates=lambda: candidates(read("cifar10/candidates.json")),
        longer=lambda: by_epoch(
            "benchmarks/cifar10/forty_epochs/not_exchanged/metrics.jsonl",
            "weights/msg_cifar10/metrics.jsonl",
            (5, 12, 20, 40),
        ),
    ),
    "docs/messengers.md": dict(
        orders=lambda: orders(read("messengers_cifar10/curves.json")),
        exchange=lambda: exchange(read("messengers_cifar10/curves.json")),
    ),
    "weights/msg_cifar10/README.md": dict(weights=weights),
}


def filled(page):
    """The text of a page with its tables written anew."""
    tables = PAGES[page]

    def write_table(place):
        lines = "\n".join(tables[place["name"]]()).strip("\n")
        return f"{place['begin']}\n\n{lines}\n\n<!-- end -->"

    pattern = r"(?P<begin><!-- table: (?P<name>\w+) -->).*?<!-- end -->"
    return re.sub(pattern, write_table, (ROOT / page).read_text(), flags=re.DOTALL)


def write():
    """Write the tables of all pages."""
    for page in PAGES:
        (ROOT / page).write_text(filled(page))
        print(f"wrote the tables of {page}")

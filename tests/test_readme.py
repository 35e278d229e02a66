"""What README.md and docs/ say: their commands parse, their paths exist, their figures are those measured."""

import argparse
import datetime
import glob
import importlib
import json
import re
import shlex
import statistics
import sys

import pytest
import timm
from helpers import ROOT

import models  # noqa: F401  (registers the names)
from config import get_config, parse_args

PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    "benchmarks/cifar10/README.md",
    "weights/msg_cifar10/README.md",
    *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
]
OURS = "msg_(tiny|small|base)_p4_win7_224"
T, SWIN, CONVNEXT = "msg_tiny_p4_win7_224", "swin_tiny_patch4_window7_224", "convnext_tiny"


def text(page):
    return (ROOT / page).read_text()


def commands(page):
    """The words of each command that runs a Python file of ours, as the shell gives them."""
    for block in re.findall(r"```bash\n(.*?)```", text(page), re.DOTALL):
        for line in block.replace("\\\n", " ").replace("<config>", "configs/digits.yaml").split("\n"):
            words = shlex.split(re.sub(r"<[^>]*>", "7", line), comments=True)
            words = [found for word in words for found in sorted(glob.glob(word, root_dir=ROOT)) or [word]]
            files = [place for place, word in enumerate(words) if re.fullmatch(r"(tools/)?\w+\.py", word)]
            if files:
                yield words[files[0] :]


@pytest.mark.parametrize(
    "words",
    [pytest.param(words, id=f"{page} {' '.join(words)}"[:90]) for page in PAGES for words in commands(page)],
)
def test_every_command_parses(words, monkeypatch):
    file, *arguments = words
    monkeypatch.chdir(ROOT)
    if file in ("main.py", "detect.py"):
        args = parse_args("", throughput=file == "main.py", argv=arguments)
        assert get_config(args, "imagenet" if file == "main.py" else "coco")
        return
    monkeypatch.syspath_prepend(ROOT / "tools")
    monkeypatch.setattr(sys, "argv", [str(ROOT / file), *arguments])
    assert isinstance(importlib.import_module(file[6:-3]).parse_args(), argparse.Namespace)


@pytest.mark.parametrize("page", PAGES)
def test_every_path_exists(page):
    folder = (ROOT / page).parent
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text(page)) if "://" not in link]
    assert [link for link in links if not (folder / link).exists()] == []
    written_by_users = re.compile(r"```yaml.*?```", re.DOTALL)
    kinds = "configs|tools|docs|models|data|detection|benchmarks|tests|weights"
    pattern = rf"(?<![\w/<>.*-])((?:{kinds})/[\w/.-]+?\.(?:py|yaml|md|png|json|safetensors))\b"
    named = re.findall(pattern, written_by_users.sub("", text(page)))
    assert [name for name in named if not (ROOT / name).exists()] == []


def found(files, setting, model, compiled=False):
    """Ratios of a model over settings of some results, both given as patterns."""
    return [
        row["ratio"]
        for file in files.split()
        for name, rows in json.loads((ROOT / "benchmarks" / f"{file}.json").read_text())["settings"].items()
        for row in rows
        if re.fullmatch(setting, name) and re.fullmatch(model, row["model"])
        if row.get("compiled", False) == compiled
    ]


def span(values):
    """Lowest and highest of some values, as text; a dash for none."""
    low, high = (f"{bound(values):.2f}" if values else "-" for bound in (min, max))
    return low if low == high else f"{low} to {high}"


def ratios(*arguments):
    """The span of what :func:`found` finds."""
    return span(found(*arguments))


RUNTIMES = "runtimes_cpu runtimes_again_cpu runtimes_bfloat16_cpu"
INFERENCE = f"inference_cpu inference_compiled_cpu inference_compiled_again_cpu growth_batches_cpu {RUNTIMES}"
INFERENCE += " runtimes_batches_cpu"
MAPS = "maps_cpu maps_compiled_cpu"
SIZES = "sizes_cpu growth_sizes_cpu"
TRAINING = "training_cpu training_again_cpu training_peers_cpu"
MODELS = [T, f"{T}:plain", f"{SWIN}:onednn", CONVNEXT, f"{CONVNEXT}:onednn"]


def cells(row):
    """The cells of the row of a table in README.md that begins with ``row``."""
    (line,) = [line for line in text("README.md").split("\n") if line.startswith(f"| {row} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


@pytest.mark.parametrize(
    "row, files, setting",
    [
        ("inference at batch 1 and 16, float32", INFERENCE, "inference float32, batch (1|16)"),
        ("training at batch 16, float32", TRAINING, "train float32, batch 16"),
    ],
)
def test_speeds_are_those_measured(row, files, setting):
    expected = [ratios(files, setting, model) for model in MODELS]
    assert cells(row) == expected
    of_bfloat16 = [ratios(files, setting.replace("float32", "bfloat16"), model) for model in MODELS]
    rows = text("README.md").split(f"| {row} |")[1]
    (next_same,) = re.findall(r"^\| the same, bfloat16 \|(.*)\|$", rows.split("\n\n")[0], re.MULTILINE)[:1]
    assert [cell.strip() for cell in next_same.split("|")] == of_bfloat16


def compiled_to_compiled(setting):
    """Ratios of T to Swin-T, both under torch.compile."""
    in_pairs = found("inference_compiled_cpu inference_compiled_again_cpu", setting, T, True)
    ours, theirs = (found("runtimes_cpu", setting, f"{model}:compile") for model in (T, SWIN))
    return in_pairs + [a / b for a, b in zip(ours, theirs, strict=True)]


def test_the_first_claim_spans_all_recorded_runs():
    claim = " ".join(text("README.md").split())
    files = f"{INFERENCE} {SIZES} inference_sizes_cpu {MAPS}"
    for dtype, words in (
        ("float32", "{} of Swin-T's time for float32 inf"),
        ("bfloat16", "in bfloat16, {} for inf"),
    ):
        all_of = found(files, f".*{dtype}.*", T) + compiled_to_compiled(f"inference {dtype}, batch 1")
        assert words.format(span(all_of)) in claim
    training = [ratios(TRAINING, f"train {dtype}.*", T) for dtype in ("float32", "bfloat16")]
    assert f"{training[0]} for float32 training" in claim and f"and {training[1]} for training" in claim


def test_speeds_at_other_sizes_are_those_measured():
    def both(files, setting):
        return [ratios(files, setting.format(dtype), T) for dtype in ("float32", "bfloat16")]

    assert cells("batch 1, both compiled, float32 / bfloat16")[0] == " / ".join(
        span(compiled_to_compiled(f"inference {dtype}, batch 1")) for dtype in ("float32", "bfloat16")
    )
    assert cells("feature maps of 224 to 1792 px, float32")[0] == ratios(SIZES, ".*", T)
    assert cells("classifier at 224, 256, 384 px") == both("inference_sizes_cpu", ".*inference {}, batch 1")
    maps = both(MAPS, ".*maps, inference {}, batch 1")
    assert cells("feature maps at 800x1280, 512x512, 640x480 px") == maps
    for row, files, setting in (
        ("whole Cascade Mask R-CNN at 800x1280", "detector_cpu detector_again_cpu", ".*{}.*"),
        ("training step of the same", "detector_training_cpu", "train, {}.*"),
    ):
        types = ("float32", "bfloat16")
        assert cells(row) == [ratios(files, setting.format(dtype), "MSG-Transformer") for dtype in types]
    gpu = ratios("inference_gpu", ".*batch 256", T)
    assert f"a batch of 256 takes {gpu} of Swin-T's time" in " ".join(text("README.md").split())


def rows_of_two_types():
    """Files and result of each row of benchmarks/README.md that gives a figure in float32 and in bfloat16."""
    figure = r"\d\.\d\d(?: to \d\.\d\d)?"
    pattern = rf"^\| (`[^|]*`) \|[^|]*\|[^|]*\| ({figure} in float32, {figure} in bfloat16) \|$"
    return re.findall(pattern, text("benchmarks/README.md"), re.MULTILINE)


@pytest.mark.parametrize("files, result", rows_of_two_types())
def test_results_in_the_table_of_benchmarks_are_those_measured(files, result):
    names = " ".join(re.findall(r"`(\w+)`", files))
    found = [ratios(names, f".*{dtype}.*", OURS) for dtype in ("float32", "bfloat16")]
    assert result == "{} in float32, {} in bfloat16".format(*found)


def test_advice_for_cpus_quotes_what_was_measured():
    ways = {"PyTorch, as it is": "", "PyTorch, its linear layers through oneDNN": ":onednn",
            "PyTorch, `torch.compile`": ":compile", "the same, with constant weights": ":frozen",
            "and with max-autotune": ":tuned", "ONNX Runtime": ":ort", "OpenVINO": ":openvino",
            "PyTorch, int8 by torchao": ":int8"}  # fmt: skip
    single, batches = text("docs/deploy.md").split("At batch 16, of [one run]")
    for page, files, count in ((single, RUNTIMES, 8), (batches, "runtimes_batches_cpu", 4)):
        rows = dict(re.findall(r"^\| ([^|]+) \|(.*)\|$", page, re.MULTILINE))
        quoted = {way: rows[name] for name, way in ways.items() if name in rows}
        assert len(quoted) == count
        for way, row in quoted.items():
            expected = [
                ratios(files, f"inference {dtype}.*", model + way)
                for dtype in ("float32", "bfloat16")
                for model in (T, SWIN, CONVNEXT)
            ]
            assert [cell.strip() for cell in row.split("|")] == expected


def rates(files, setting, name):
    """The span of images per second of an input pipeline, as multiples of those of the peer."""
    results = (json.loads((ROOT / "benchmarks" / f"{file}.json").read_text()) for file in files.split())
    rows = (row for result in results for row in result["settings"][setting])
    return span([row["ratio"] for row in rows if row["name"] == name])


def test_input_pipelines_are_quoted_as_they_were_measured():
    page = text("benchmarks/README.md")
    ours = ["pil", "opencv for a GPU", "opencv"]
    of_detection = ["torchvision", "torchvision, tensors", "pil", "opencv"]
    for row, files, setting, names in (
        ("training recipe", "data data_again", "training", ours),
        ("evaluation", "data data_again", "evaluation", ours),
        ("training", "data_coco", "detection, training", of_detection),
        ("evaluation", "data_coco", "detection, evaluation", of_detection),
    ):
        cells = [rates(files, setting, name) for name in names]
        assert f"| {row} | {' | '.join(cells)} |" in page


def test_machines_stand_side_by_side_as_they_were_measured():
    known = f"{RUNTIMES} runtimes_batches_cpu growth_batches_cpu training_peers_cpu".split()
    earlier = " ".join(file for file in f"{INFERENCE} {TRAINING}".split() if file not in known)
    for setting in ("inference {}, batch 1", "training {}, batch 16"):
        for dtype in ("float32", "bfloat16"):
            name = setting.format(dtype).replace("training", "train")
            cells = [ratios(files, name, T) for files in (earlier, " ".join(known))]
            assert f"| {setting.format(dtype)} | {' | '.join(cells)} |" in text("benchmarks/README.md")


def test_the_ablation_is_quoted_as_it_was_measured():
    rows = json.loads((ROOT / "benchmarks" / "ablation_digits" / "ablation.json").read_text())["rows"]
    best = {row["name"]: statistics.mean(row["best"]["by_seed"].values()) for row in rows}
    words = (
        "shuffled {shuffled:.2f}, not exchanged {not_exchanged:.2f}, without messengers {no_messengers:.2f}, "
    )
    assert (words + "Swin {swin:.2f} (").format(**best) in " ".join(text("README.md").split())


def test_the_ablation_on_cifar10_is_quoted_as_it_was_measured():
    rows = json.loads((ROOT / "benchmarks" / "cifar10" / "ablation.json").read_text())["rows"]
    rows = {row["name"]: row for row in rows}
    best = {name: f"{row['best']['mean']:.2f}" for name, row in rows.items()}
    macs = {name: f"{row['macs'] / 1e6:.1f}" for name, row in rows.items()}
    to_shuffled = {name: row["best_difference"] for name, row in rows.items() if name != "shuffled"}
    assert {name for name, row in to_shuffled.items() if row["mean"] > 0} == {"not_exchanged"}
    apart = {name: f"{abs(row['mean']):.1f} ± {row['half']:.1f}" for name, row in to_shuffled.items()}
    none, kept, swin = (apart[name] for name in ("no_messengers", "not_exchanged", "swin"))
    forty = {
        name: [json.loads(line)["ema_acc1"] for line in (ROOT / folder / "metrics.jsonl").open()]
        for name, folder in dict(
            kept="benchmarks/cifar10/forty_epochs/not_exchanged", shuffled="weights/msg_cifar10"
        ).items()
    }
    last, early = ({name: f"{values[epoch]:.2f}" for name, values in forty.items()} for epoch in (39, 11))
    for page, words in {
        "README.md": [
            f"shuffled {best['shuffled']}, not exchanged {best['not_exchanged']}, without messengers "
            f"{best['no_messengers']}, Swin {best['swin']} (",
            f"gains {none} points by messengers that are shuffled, and would gain {kept} more",
        ],
        "benchmarks/README.md": [f"none loses {none} points, the exchange costs {kept}; Swin loses {swin} |"],
        "benchmarks/cifar10/README.md": [
            f"top-1 is {none} points below that of shuffled",
            f"stay in their windows it is {kept} points above. Swin's is {swin} points below",
            f"{macs['shuffled']} million with messengers, {macs['no_messengers']} without, {macs['swin']}",
            f"ends at {last['kept']} (",
            f"at {last['shuffled']}; in epoch 11 they stood at {early['kept']} and {early['shuffled']}.",
        ],
        "docs/messengers.md": [f"by {kept} points after twelve epochs and half a point after forty"],
        "weights/msg_cifar10/README.md": [
            f"is {kept} points better, without messengers {none} worse",
            f"ends at {last['kept']} rather than {last['shuffled']} (",
        ],
    }.items():
        for said in words:
            assert said in " ".join(text(page).split())


def test_the_weights_are_described_as_they_were_measured():
    folder = ROOT / "weights" / "msg_cifar10"
    found = json.loads((folder / "eval.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert found["images"] == 10_000 and found["checkpoint"] == "weights/msg_cifar10/msg_cifar10.safetensors"
    # The same weights in the same arithmetic, which other processors sum in another order.
    assert found["acc1"] == pytest.approx(max(row["ema_acc1"] for row in rows), abs=0.05)
    best = max(rows, key=lambda row: row["ema_acc1"])["epoch"]
    assert [row["epoch"] for row in rows] == list(range(40))
    times = re.findall(r"^\[([\d :-]+)\]", (folder / "log_rank0.txt").read_text(), re.MULTILINE)
    begin, end = map(datetime.datetime.fromisoformat, (times[0], times[-1]))
    right = {row["class"]: f"{100 * row['accuracy']:.1f}%" for row in found["classes"]}
    last, plain = (f"{rows[-1][name]:.2f}" for name in ("ema_acc1", "acc1"))
    top1, minutes = f"{found['acc1']:.2f}", f"{(end - begin).total_seconds() / 60:.0f} minutes"
    seconds = [f"{bound(row['seconds'] for row in rows):.0f}" for bound in (min, max)]
    parameters = f"{sum(x.numel() for x in timm.create_model('msg_cifar10').parameters()):,} parameters"
    megabytes = f"{(folder / 'msg_cifar10.safetensors').stat().st_size / 1e6:.1f} MB"
    for page, said in {
        "README.md": (
            f"for 40 epochs, which took {minutes}",
            f"test images is {top1} (",
            parameters,
            megabytes,
        ),
        "configs/cifar10_small.yaml": (
            f"Top-1 {top1} on the 10,000 test images",
            f"{last} after the last",
            f"in {minutes}",
        ),
        "benchmarks/accuracy.md": (f"top-1 of {top1} on all 10,000 test images", f"{last} after the last"),
        "weights/msg_cifar10/README.md": (
            f"top-1 {top1}, top-5 {found['acc5']:.2f} on the 10,000 test images",
            f"40 epochs in {minutes}",
            f"cats ({right['cat']} of them right",
            f"dogs ({right['dog']}",
            f"birds ({right['bird']}",
            f"(EMA) of epoch {best},",
            f"after the last epoch it was {last} averaged, and {plain} not averaged",
            "epochs took from {} to {} seconds".format(*seconds),
            parameters,
            megabytes,
        ),
    }.items():
        content = " ".join(text(page).replace("#", " ").split())
        assert [words for words in said if words not in content] == [], page


def test_what_messengers_carry_is_quoted_as_it_was_measured():
    page, measured = text("docs/messengers.md"), {}
    for name, folder in {"CIFAR-10": "messengers_cifar10", "digits": "messengers_digits"}.items():
        found = measured[name] = json.loads((ROOT / "benchmarks" / folder / "curves.json").read_text())
        assert found["images"] == 200
        for stage, of_stage in found["curves"].items():
            row = [f"| {name}, stage {int(stage) + 1}"]
            for kinds in of_stage["orders"].values():
                row.append(", ".join(f"{kinds[kind]['area']:.2f}" for kind in ("deletion", "insertion")))
            assert " | ".join(row) + " |" in page
            row = [f"| {name}, stage {int(stage) + 1}"]
            for order in ("attention", "gradient"):
                for entry in of_stage["orders"][order].values():
                    row.append(f"{entry['gain']:.2f} ± {entry['error']:.2f}")
            assert " | ".join(row) + " |" in page
    for place in measured["CIFAR-10"]["exchange"]:
        row = [f"| {place}"]
        for kinds in (found["exchange"][place] for found in measured.values()):
            row += [f"{100 * kind['share']:.0f}%, {100 * kind['kept']:.0f}%" for kind in kinds.values()]
        assert " | ".join(row) + " |" in page
    ours, digits = measured.values()
    off, of_digits = (100 * found["exchange"]["all"]["off"]["share"] for found in (ours, digits))
    best = ours["curves"]["0"]["orders"]["ablation"]["insertion"]["curve"]
    content = " ".join(page.split())
    assert f"loses {off:.0f}% of the score of CIFAR-10 and {of_digits:.0f}% of that of the digits" in content
    assert f"reaches {max(best):.2f} with 14 of 16, more than the {best[-1]:.2f} of all" in content
    assert best.index(max(best)) == 7  # of eight steps of two messengers

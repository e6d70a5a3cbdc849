"""The tables of report.md, and README.md's main one, are what the files in the tree say."""

import csv
import json
import math
import re
import statistics
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

import Evaluation
from analyze_data import CLASS_NAMES, SHORT_NAMES
from MyModels import SkipCNN, count_parameters, layer_markdown

ROOT = Path(__file__).resolve().parents[1]
BEST = ROOT / "runs" / "best"
sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))


@pytest.fixture(scope="module")
def report() -> str:
    return (ROOT / "report.md").read_text()


@pytest.fixture(scope="module")
def record() -> str:
    return (ROOT / "docs" / "searches.md").read_text()


@pytest.fixture(scope="module")
def metrics() -> dict:
    return json.loads((BEST / "metrics.json").read_text())


def rows_missing(table: str, text: str) -> list[str]:
    """Return the rows of a Markdown table that the text does not have, whatever the padding."""
    have = {" ".join(line.split()) for line in text.splitlines()}
    return [row for row in table.splitlines() if row and " ".join(row.split()) not in have]


def test_results_are_those_of_the_committed_run(report: str, metrics: dict) -> None:
    splits = {key: metrics[key] for key in ("val", "val_tta", "test", "test_tta")}
    assert rows_missing(Evaluation.results_markdown(splits), report) == []


def test_per_class_table_is_that_of_the_committed_run(report: str, metrics: dict) -> None:
    for short, name in zip(SHORT_NAMES, CLASS_NAMES, strict=True):
        both = [metrics[split]["per_class"][name] for split in ("test", "val")]
        cells = [f"{m['precision']:.3f} | {m['recall']:.3f} | {m['support']}" for m in both]
        assert rows_missing(f"| {short} | {name} | {' | '.join(cells)} |", report) == []


def test_layer_table_and_parameter_count_are_the_models(report: str, metrics: dict) -> None:
    model = SkipCNN()
    assert rows_missing(layer_markdown(model), report) == []
    count = f"{count_parameters(model):,}"
    assert count in report and count in (ROOT / "README.md").read_text()
    assert metrics["model"]["parameters"] == count_parameters(model)


@pytest.mark.parametrize("name", ["accuracy", "speed"])
def test_benchmark_tables_are_what_the_benchmarks_wrote(report: str, name: str) -> None:
    import importlib

    module = importlib.import_module(name)
    path = ROOT / "tests" / "benchmarks" / f"{name}.json"
    results = json.loads(path.read_text())
    table = module.markdown(results.get("rows", results))
    assert rows_missing(table, report) == []


def benchmark_rows(name: str) -> dict:
    return json.loads((ROOT / "tests" / "benchmarks" / f"{name}.json").read_text())["rows"]


def spread(runs: list[float]) -> str:
    return f"{statistics.mean(runs):.3f} (s.d. {statistics.stdev(runs):.3f})"


def test_headline_is_the_mean_of_the_runs(report: str) -> None:
    rows = benchmark_rows("accuracy")
    names = {  # as README.md's table calls them
        "default": "this project, 5 seeds",
        "128,809-parameter CNN, own recipe": "small CNN (Darkkavn, GitHub), own recipe, 3 seeds",
        "MedMNIST's official ResNet-18": "MedMNIST's official ResNet-18 recipe, 1 seed",
    }
    table = []
    for key, name in names.items():
        row = rows[key]
        cells = [name, f"{row['parameters']:,}"]
        for part in (row["test"], row["test_tta"]):
            runs = part["runs"]
            cells.append(spread(runs) if len(runs) > 1 else f"{runs[0]:.3f}")
        ensemble = row.get("ensemble_test_tta")
        cells.append(f"{ensemble:.3f}" if ensemble else "")
        table.append(" | ".join(["", *cells, f"{row['seconds']['mean']:.0f} s", ""]).strip())
    assert rows_missing("\n".join(table), (ROOT / "README.md").read_text()) == []
    ours = rows["default"]
    texts = [spread(ours[key]["runs"]) for key in ("test", "test_tta")]
    for text in (*texts, f"{ours['ensemble_test_tta']:.3f}"):
        assert f"**{text}**" in report.partition("## 1.")[0]
    text = " ".join(report.split())
    ours, small, theirs = (rows[name] for name in names)
    above = [100 * (ours["test"]["mean"] - other["test"]["mean"]) for other in (theirs, small)]
    times = theirs["seconds"]["mean"] / ours["seconds"]["mean"]
    assert (
        f"the default is {above[0]:.0f} points above MedMNIST's recipe, {times:.1f} times as fast, "
        f"and {above[1]:.0f} points above the small CNN."
    ) in text


def test_the_committed_run_is_seed_0_of_the_benchmark(report: str, metrics: dict) -> None:
    row = benchmark_rows("accuracy")["default"]
    assert metrics["seed"] == row["seeds"][0] == 0
    val, one, eight = (row[key]["runs"] for key in ("val", "test", "test_tta"))
    for key, runs in (("val", val), ("test", one), ("test_tta", eight)):
        assert runs[0] == pytest.approx(metrics[key]["accuracy"])
    assert val[0] == max(val) and val.count(val[0]) == 2
    assert one[0] == min(one) and eight[0] == max(eight)
    means = [row[key]["mean"] for key in ("test", "test_tta")]
    assert (
        f"its test accuracy the lowest from one view ({one[0]:.3f}, mean {means[0]:.3f}) and the "
        f"highest over eight ({eight[0]:.3f}, mean {means[1]:.3f}), so judge"
    ) in " ".join(report.split())


def test_what_the_mixture_of_classes_explains_is_what_the_committed_run_says(
    report: str, metrics: dict
) -> None:
    expected, reached = [], []
    for val, test in (("val", "test"), ("val_tta", "test_tta")):
        pairs = [(metrics[val]["per_class"][n], metrics[test]["per_class"][n]) for n in CLASS_NAMES]
        expected.append(sum(v["recall"] * t["support"] for v, t in pairs) / 359)
        reached.append(metrics[test]["accuracy"])
    text = " ".join(report.split())
    said = "would give {:.3f} from one view and {:.3f} over eight; it has {:.3f} and {:.3f}."
    assert said.format(*expected, *reached) in text
    higher = {
        name
        for name in CLASS_NAMES
        if metrics["test"]["per_class"][name]["recall"]
        > metrics["val"]["per_class"][name]["recall"]
    }
    assert higher == {"mucus"}
    matrix = np.array(metrics["test"]["confusion_matrix"])
    mistakes = matrix - np.diag(np.diag(matrix))
    order = np.argsort(mistakes, axis=None)[::-1]
    names = [tuple(SHORT_NAMES[i] for i in np.unravel_index(k, matrix.shape)) for k in order[:3]]
    assert names == [("MUS", "STR"), ("TUM", "NORM"), ("STR", "MUS")]
    counts = [mistakes.flat[k] for k in order[:4]]
    assert counts[2] > counts[3]
    said = "are MUS taken for STR ({}), TUM for NORM ({}) and STR for MUS ({}):"
    assert said.format(*counts[:3]) in text


def three_figures(row: dict) -> str:
    """Return test accuracy from one view, over eight and of the ensemble as a sentence has them."""
    one, eight = (f"{row[key]['mean']:.3f}" for key in ("test", "test_tta"))
    return f"{one}, {eight} and {row['ensemble_test_tta']:.3f}"


def test_what_other_processors_reach_is_what_their_runs_say(report: str) -> None:
    import accuracy

    names = ("accuracy", "accuracy_amd", "accuracy_fp32", "accuracy_zen5")
    first, third, fifth, sixth = map(benchmark_rows, names)
    plain = benchmark_rows("accuracy_zen4_fp32")["default without bf16"]
    for name, row in third.items():  # "agree in every figure of every run"
        for key in ("val", "shift", "test", "test_tta"):
            assert row[key]["runs"] == sixth[name][key]["runs"]
    rows = {
        "third, AVX-512 BF16, bf16": third["default"],
        "sixth, AVX-512 BF16, bf16": sixth["default"],
        "fifth, AVX-512, plain fp32": fifth["default"],
        "third, plain fp32 (`accuracy_zen4_fp32.json`)": plain,
    }
    assert rows_missing("\n".join(accuracy.markdown(rows).splitlines()[1:]), report) == []
    text = " ".join(report.split())
    figures = three_figures(fifth["default"])
    both = f"{three_figures(third['default'])} in bf16 and {figures} in fp32."
    assert f"on two others five runs each reached {both}" in text
    machines, table, short = [row["default"] for row in (first, third, fifth)], [], []
    for name, key, goal in (
        ("one view, mean", "test", 0.92),
        ("eight views, mean", "test_tta", 0.93),
        ("eight views, ensemble", "ensemble_test_tta", 0.94),
    ):
        reached = [row[key] if "ens" in key else row[key]["mean"] for row in machines]
        cells = [f"**{x:.3f}**" if x >= goal else f"{x:.3f}" for x in reached]
        table.append(f"| {name} | {goal:.3f} | {' | '.join(cells)} |")
        spreads = [0 if "ens" in key else row[key]["std"] for row in machines]
        short += [goal - x < sd for x, sd in zip(reached, spreads, strict=True) if sd]
    assert rows_missing("\n".join(table), report) == [] and all(short)
    tiles = [math.ceil(0.94 * 359) - round(row["ensemble_test_tta"] * 359) for row in machines]
    assert (min(tiles), max(tiles)) == (2, 4) and "by the ensembles, by two to four tiles." in text
    small = [
        f"{machine['128,809-parameter CNN, own recipe']['test']['mean']:.3f}"
        for machine in (third, fifth, first)
    ]
    said = "reached {} on the third and the sixth and {} on the fifth, as on the first (section 4)."
    assert small[1] == small[2] and said.format(*small) in text
    ours, theirs, other = (
        sixth[name]
        for name in (
            "default",
            "MedMNIST's official ResNet-18",
            "128,809-parameter CNN, own recipe",
        )
    )
    below = [100 * (ours["test"]["mean"] - row["test"]["mean"]) for row in (theirs, other)]
    times = theirs["seconds"]["mean"] / ours["seconds"]["mean"]
    assert (
        f"it reached {theirs['test']['mean']:.3f}, {below[0]:.0f} points below the default, which "
        f"was {times:.1f} times as fast, and the small CNN is {below[1]:.0f} points below it."
    ) in text
    defaults = [machine["default"] for machine in (first, third, fifth)] + [plain]
    means = [
        spread([run for row in defaults for run in row[key]["runs"]])
        for key in ("test", "test_tta")
    ]
    ensembles = [f"{row['ensemble_test_tta']:.3f}" for row in defaults]
    said = "Over the twenty different runs (the first machine's, too) the means are {} on test and "
    said += "{} over eight views, and four ensembles of five reached {}, {}, {} and {}."
    assert said.format(*means, *ensembles) in text


def test_the_recipe_before_is_what_its_runs_say(record: str) -> None:
    import accuracy

    files = ("accuracy", "accuracy_amx", "accuracy_avx2")
    tables = [benchmark_rows(f"fixed_stains/{name}") for name in files]
    defaults = [table["default"] for table in tables]
    bf16, amx, avx2 = defaults
    rows = {
        "first, AMX, bf16": amx,
        "third, AVX-512 BF16, bf16": bf16,
        "third, plain fp32": tables[0]["default without rounding to bf16"],
        "fourth, AVX2, rounded to bf16": avx2,
    }
    assert rows_missing("\n".join(accuracy.markdown(rows).splitlines()[1:]), record) == []
    text = " ".join(record.split())
    theirs, small = "MedMNIST's official ResNet-18", "128,809-parameter CNN, own recipe"
    reached, others = (
        "{1:.3f}, {0:.3f} and {2:.3f}".format(*(table[name]["test"]["mean"] for table in tables))
        for name in (theirs, small)
    )
    seconds = ((table[theirs]["seconds"], table["default"]["seconds"]) for table in tables)
    times = "{1:.1f}, {0:.1f} and {2:.1f}".format(*(a["mean"] / b["mean"] for a, b in seconds))
    assert (
        f"MedMNIST's recipe reached {reached} on the first, third and fourth, at {times} times the "
        f"training time, and the small CNN {others}."
    ) in text
    means = [
        spread([run for row in defaults for run in row[key]["runs"]])
        for key in ("test", "test_tta")
    ]
    said = "Over the fifteen runs in bf16, or rounded to it, the means are {} on test and {} over"
    assert said.format(*means) in text
    assert f"| {differences([(benchmark_rows('accuracy')['default'], amx)])} |\n" in record


def differences(pairs: list[tuple[dict, dict]]) -> str:
    """Return a row's cells: the first less the second, run by run, as mean and its error."""
    cells = []
    for key in ("val", "shift", "test", "test_tta"):
        both = [zip(a[key]["runs"], b[key]["runs"], strict=False) for a, b in pairs]
        gains = [first - second for runs in both for first, second in runs]
        error = statistics.stdev(gains) / len(gains) ** 0.5
        cells.append(f"{statistics.mean(gains):+.3f} ({error:.3f})")
    return " | ".join(cells)


def test_what_the_parts_are_worth_is_what_the_runs_say(report: str) -> None:
    import accuracy

    here, there = benchmark_rows("accuracy"), benchmark_rows("accuracy_zen4")
    table = []
    for name, row in here.items():
        part = name.removeprefix("default without ")
        if part == name:
            continue
        assert row["seeds"] == there[name]["seeds"] == here["default"]["seeds"][: len(row["seeds"])]
        pairs = [(rows["default"], rows[name]) for rows in (here, there)]
        table.append(f"| {part} | {2 * len(row['seeds'])} | {differences(pairs)} |")
    plain = benchmark_rows("accuracy_zen4_fp32")["default without bf16"]
    pairs = [(there["default"], plain)]
    table.append(f"| bf16 (on the third machine alone) | 5 | {differences(pairs)} |")
    assert len(table) == 6 and rows_missing("\n".join(table), report) == []
    text = " ".join(report.split())
    again = there.pop("default")
    for key in ("val", "shift", "test", "test_tta"):  # "came out the same to the last digit"
        assert again[key]["runs"] == benchmark_rows("accuracy_amd")["default"][key]["runs"]
    assert rows_missing(accuracy.markdown(there), report) == []
    base, colour = here["default"], here["default without colour augmentation"]
    steps = [
        f"from {statistics.mean(base[key]['runs'][:3]):.3f} to {colour[key]['mean']:.3f}"
        for key in ("val", "shift", "test")
    ]
    said = "without it, with AMX, val goes {}, val under simulated shift {} and test {}."
    assert said.format(*steps) in text
    few = here["default, 400 training images"]
    steps = [f"from {few[key]['mean']:.3f} to {base[key]['mean']:.3f}" for key in ("val", "test")]
    assert "val still rises {} and test {}, and no curve is flat, though".format(*steps) in text


def test_the_wider_networks_figures_are_those_of_its_runs(report: str, record: str) -> None:
    names = ("accuracy", "accuracy_fp32", "accuracy_amd", "accuracy_avx2")
    one, two, three, four = (benchmark_rows(f"wider/{name}") for name in names)
    groups = [one["default"], two["default"], two["default, other seeds"], three["default"]]
    groups.append(four["default"])
    appendix = " ".join(record.split())
    for key in ("test", "test_tta"):
        runs = [accuracy for row in groups for accuracy in row[key]["runs"]]
        assert len(runs) == 25
        assert f"**{spread(runs)}**" in appendix
    assert all(f"**{row['ensemble_test_tta']:.3f}**" in appendix for row in groups)
    said = f"met all three with AMX ({three_figures(groups[0])}; over 25 runs on four machines "
    means = [
        statistics.mean(run for row in groups for run in row[key]["runs"])
        for key in ("test", "test_tta")
    ]
    said += f"{means[0]:.3f} and {means[1]:.3f})."
    assert said in " ".join(report.split())
    import accuracy

    plain = "default without rounding to bf16"
    table = {
        "first, AMX, bf16": one["default"],
        "second, AVX-512, rounded to bf16": two["default"],
        "the same, seeds 5 to 9": two["default, other seeds"],
        "second, plain fp32": two[plain],
        "the same, seeds 5 to 9, plain fp32": two[f"{plain}, other seeds"],
        "third, AVX-512 BF16, bf16": three["default"],
        "third, plain fp32": three[plain],
        "fourth, AVX2, rounded to bf16": four["default"],
    }
    rows = accuracy.markdown(table).splitlines()[1:]
    assert rows_missing("\n".join(rows), record) == []
    theirs = "MedMNIST's official ResNet-18"
    reached = [rows[theirs]["test"]["mean"] for rows in (one, three)]
    times = [
        rows[theirs]["seconds"]["mean"] / rows["default"]["seconds"]["mean"]
        for rows in (one, three)
    ]
    said = (
        f"reached {reached[0]:.3f} on the first machine and {reached[1]:.3f} on the third, at "
        f"{times[0]:.1f} and {times[1]:.1f} times the training time"
    )
    assert said in appendix


def test_the_wider_networks_speed_is_what_was_measured(record: str) -> None:
    machines = {"first, AMX": "", "third, AVX-512 BF16": "_amd", "fourth, AVX2": "_avx2"}
    table = []
    for name, suffix in machines.items():
        path = ROOT / "tests" / "benchmarks" / "wider" / f"speed{suffix}.json"
        results = json.loads(path.read_text())
        step, whole = results["step"], results["runs"].get("1")
        ours = step["training step, default"]
        cells = [name, f"{ours:,.0f}"]
        for other in ("same model in fp32 NCHW", "ResNet-18 as MedMNIST"):
            cells.append(f"{ours / step[f'training step, {other}']:.1f}")
        share = step["GFLOP/s, default"] / step["GFLOP/s, matmul 4096"]
        cells.append(f"{share:.0%}".replace("%", " %"))
        cells.append(f"{whole['seconds']:,.0f} s" if whole else "")
        cells.append(f"{whole['peak_mib']:,.0f} MiB" if whole else "")
        table.append(f"| {' | '.join(cells)} |")
    assert rows_missing("\n".join(table), record) == []


def test_what_rounding_gains_is_what_the_runs_say(record: str) -> None:
    two, three = map(benchmark_rows, ("wider/accuracy_fp32", "wider/accuracy_amd"))
    here = benchmark_rows("fixed_stains/accuracy")
    names = ("default", "default without rounding to bf16")
    ten = [tuple(two[name + more] for name in names) for more in ("", ", other seeds")]
    wider, present = ([tuple(rows[name] for name in names)] for rows in (three, here))
    for pairs in (ten, wider, ten + wider, present):
        assert f" | {differences(pairs)} |\n" in record


def folds_of(name: str) -> dict[str, dict[int, dict]]:
    """Return a search's logged runs by variant and fold."""
    runs: dict[str, dict[int, dict]] = {}
    for line in (ROOT / "tests" / "benchmarks" / f"{name}.jsonl").read_text().splitlines():
        run = json.loads(line)
        runs.setdefault(run["variant"], {})[run["fold"]] = run
    return runs


SEARCHES = [
    "",
    "_small",
    "_adamw",
    "_blocks",
    "_domains",
    "_stem",
    "_loss",
    "_colour",
    "_stains",
    "_fp32",
    "_screened",
    "_screened_colour",
]


@pytest.mark.parametrize("name", SEARCHES)
def test_search_table_is_what_its_runs_say(record: str, name: str) -> None:
    (first, base), *others = folds_of(f"search{name}").items()
    keys = ("val", "val_tta", "shift", "val_tta_loss")
    means = [sum(run[key] for run in base.values()) / len(base) for key in keys]
    table = [f"| {first} | {len(base)} | " + " | ".join(f"{m:.3f}" for m in means) + " |"]
    for name, folds in others:
        gains = [sum(folds[i][key] - base[i][key] for i in folds) / len(folds) for key in keys]
        table.append(f"| {name} | {len(folds)} | " + " | ".join(f"{g:+.3f}" for g in gains) + " |")
    assert rows_missing("\n".join(table), record) == []


def test_the_screenings_effects_are_what_its_runs_say(record: str) -> None:
    lines = (ROOT / "tests" / "benchmarks" / "search_screening.jsonl").read_text().splitlines()
    runs = [json.loads(line) for line in lines]
    names = list(runs[0]["settings"])
    levels = {name: sorted({run["settings"][name] for run in runs}) for name in names}
    signs = [[levels[name].index(run["settings"][name]) * 2 - 1 for name in names] for run in runs]
    folds = np.array([run["fold"] for run in runs])
    design = np.hstack([folds[:, None] == np.unique(folds), signs]).astype(float)
    keys = ("val", "val_tta", "shift", "val_tta_loss")
    figures = np.array([[run[key] for key in keys] for run in runs])
    figures = np.hstack([figures[:, :3].mean(1, keepdims=True), figures])
    fitted = np.linalg.lstsq(design, figures, rcond=None)[0]
    spare = len(runs) - design.shape[1]
    residuals = ((figures - design @ fitted) ** 2).sum(0)
    effects, errors = 2 * fitted[-len(names) :], 2 * np.sqrt(residuals / spare / len(runs))
    table = [
        f" | {low:g} | {high:g} | " + " | ".join(f"{gain:+.3f}" for gain in gains) + " |"
        for (low, high), gains in zip(levels.values(), effects, strict=True)
    ]
    assert len(table) == 13 and [row for row in table if row not in record] == []
    assert [f"{error:.3f}" for error in errors] == ["0.003", "0.003", "0.004", "0.004", "0.008"]
    useful = (abs(effects[:, 0]) > 2 * errors[0]) & (effects[:, 0] * effects[:, 4] < 0)
    on = {name for name, yes in zip(names, useful, strict=True) if yes}
    assert on == {"lr", "label_smoothing", "cutmix", "stain_gain", "warmup"}
    assert f"half their sum, {effects[useful, 0].sum() / 2:.3f}, was" in " ".join(record.split())


def test_what_the_screened_gain_is_what_the_folds_say(record: str) -> None:
    gains = []
    for name in ("search_screened", "search_screened_colour"):
        base, other = folds_of(name).values()
        gains.append(
            [
                statistics.mean(other[i][key] - base[i][key] for key in ("val", "val_tta", "shift"))
                for i in base
            ]
        )
    text = " ".join(record.split())
    for said, values in (
        ("Over all nine the mean gains {:.3f} (standard error {:.3f}):", gains[0] + gains[1]),
        ("On the random folds alone it is {:+.3f} ({:.3f}),", gains[0]),
        ("had seen the images, {:+.3f} ({:.3f}).", gains[1]),
    ):
        error = statistics.stdev(values) / len(values) ** 0.5
        assert said.format(statistics.mean(values), error) in text


def test_what_plain_fp32_costs_is_what_the_folds_say(record: str) -> None:
    rounded, plain = folds_of("search_fp32").values()

    def gain(*keys: str) -> tuple[float, float]:
        gains = [statistics.mean(plain[i][key] - rounded[i][key] for key in keys) for i in plain]
        return statistics.mean(gains), statistics.stdev(gains) / len(gains) ** 0.5

    assert len(plain) == len(rounded) == 10
    mean, error = gain("val", "val_tta", "shift")
    assert mean > -0.005  # the rule
    val, eight, shift = gain("val"), gain("val_tta"), gain("shift")
    lower = sum(plain[i]["shift"] < rounded[i]["shift"] for i in plain)
    seconds = [
        statistics.mean(run["seconds"] for run in runs.values()) for runs in (plain, rounded)
    ]
    assert lower == 9 and 0.85 < seconds[0] / seconds[1] < 0.95  # "nine folds", "a tenth less"
    assert (
        f"The mean of the three accuracies is {-mean:.3f} lower (standard error {error:.3f}), and "
        "training took a tenth less time. So plain fp32 **is the default since, where bf16 is not "
        f"faster**. Val is {-val[0]:.3f} lower ({val[1]:.3f}), over eight views {eight[0]:.3f} "
        f"higher ({eight[1]:.3f}). Simulated shift is {-shift[0]:.3f} lower ({shift[1]:.3f}), on "
        "nine folds of ten"
    ) in " ".join(record.split())


def test_how_often_the_last_epoch_was_kept_is_what_the_searches_say(report: str) -> None:
    files = (ROOT / "tests" / "benchmarks").glob("search*.jsonl")
    runs = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    kept = [run["best_epoch"] == run.get("epochs", 123) for run in runs if "best_epoch" in run]
    text = f"{sum(kept)} of the {len(kept)} runs of appendix A whose kept epoch is logged"
    assert text in " ".join(report.split())


def test_what_varied_stains_gain_is_what_the_folds_say(record: str) -> None:
    runs: dict[str, dict[tuple, dict]] = {}
    for name in ("search_colour", "search_stains"):
        for variant, folds in folds_of(name).items():
            found = {(name, fold): run for fold, run in folds.items()}
            runs.setdefault(variant, {}).update(found)
    base = runs["default of that time"]

    def gain(variant: str, *keys: str) -> tuple[float, float]:
        """Return the mean gain over the folds, of the mean of these figures, and its error."""
        gains = [
            statistics.mean(run[key] - base[fold][key] for key in keys)
            for fold, run in runs[variant].items()
        ]
        return abs(statistics.mean(gains)), statistics.stdev(gains) / len(gains) ** 0.5

    three = ("val", "val_tta", "shift")
    kept = "colours of the stains vary by 0.1 (kept)"
    text = " ".join(record.split())
    for said, *arguments in (
        (
            "three accuracies was {:.3f} higher on the colour folds (standard error {:.3f})",
            "colours of the stains vary, normally distributed",
            *three,
        ),
        ("Over all nine folds it gains {:.3f} ({:.3f}):", kept, *three),
        ("gains {:.3f} ({:.3f}): val", kept, *three),
        ("val {:.3f} ({:.3f}), over eight", kept, "val"),
        ("over eight views {:.3f} ({:.3f}), under", kept, "val_tta"),
        ("under simulated shift {:.3f} ({:.3f}); the loss", kept, "shift"),
        ("the loss of a single view falls by {:.3f} ({:.3f}).", kept, "val_loss"),
        ("the other two accuracies alone gain {:.3f} ({:.3f}).", kept, *three[:2]),
        (
            "Twice that width, run afterwards, loses {:.3f} ({:.3f}) of val over the nine.",
            "colours of the stains vary by 0.2",
            "val",
        ),
        ("Without stain jitter the mean falls by {:.3f} ({:.3f}),", "no stain jitter", *three),
        ("without gain and offset by {:.3f} ({:.3f}):", "no gain and offset", *three),
        ("is {:.3f} ({:.3f}) behind on these", "the wider network", *three),
    ):
        assert said.format(*gain(*arguments)) in text, said
    fresh = {fold: run for fold, run in runs[kept].items() if fold[0] == "search_stains"}
    runs["on the random folds"] = fresh
    said = "on these the mean gains {:.3f} ({:.3f}), less than two"
    assert len(fresh) == 5 and said.format(*gain("on the random folds", *three)) in text
    lines = (ROOT / "tests" / "benchmarks" / "stains_amx.txt").read_text().splitlines()[1:]
    before, after = (statistics.median(map(float, line.split()[1:])) for line in lines)
    assert f"as fast as before, {after:,.0f} images/s against {before:,.0f} (medians" in text


def test_cheaper_table_is_what_its_runs_say(record: str) -> None:
    runs = (ROOT / "tests" / "benchmarks" / "search_cheaper.jsonl").read_text().splitlines()
    variants: dict[str, list[dict]] = {}
    for run in map(json.loads, runs):
        variants.setdefault(run["variant"], []).append(run)
    table = []
    for name, rows in variants.items():
        where = "folds" if "fold" in rows[0] else "seeds"
        cells = [name, f"{rows[0]['parameters']:,}", f"{len(rows)} {where}"]
        for key in ("val", "val_tta", "shift", "val_tta_loss"):
            values = [row[key] for row in rows if key in row]
            cells.append(f"{sum(values) / len(values):.3f}" if values else "")
        table.append(f"| {' | '.join(cells)} |")
    assert rows_missing("\n".join(table), record) == []


def test_cutmix_explains_the_jumps_of_train_loss(report: str) -> None:
    """Replays what CutMix drew in each epoch of the committed run, on tiny black images."""
    import torch

    from Training import SEED_STEP, Config, augment, cutmix

    settings = json.loads((BEST / "config.json").read_text())["config"]
    config = Config(**settings)
    rows = csv.DictReader((BEST / "history.csv").read_text().splitlines())
    losses = [float(row["train_loss"]) for row in rows]
    entropies = []
    for epoch in range(config.epochs):
        number = config.seed * SEED_STEP + epoch  # as in `seed_epoch`, for one process
        generator = torch.Generator().manual_seed(number)
        total = 0.0
        for size in [64] * 12 + [32]:  # 800 images
            augment(torch.zeros(size, 4, 4, 3, dtype=torch.uint8), generator, config)
            images, targets = torch.zeros(size, 1, 28, 28), torch.eye(size)
            kept = cutmix(images, targets, generator, config.cutmix)[1][0]
            total += size * torch.special.entr(kept).sum().item()
        entropies.append(total / 800)
    # From epoch 21 on, differences to the mean over nine epochs around it.
    series = torch.tensor([losses, entropies])
    around = torch.nn.functional.avg_pool1d(series, 9, stride=1)[:, 16:]
    correlation = torch.corrcoef(series[:, 20:-4] - around)[0, 1].item()
    assert f"correlation of {correlation:.2f}" in " ".join(report.split())


def test_what_muons_own_step_gains_is_what_was_timed(report: str) -> None:
    lines = (ROOT / "tests" / "benchmarks" / "muon_avx2.txt").read_text().splitlines()[-2:]
    before, after = (statistics.median(map(float, line.split()[1:])) for line in lines)
    text = f"is {after / before:.1f} times as fast: {after:.0f} images/s against {before:.0f} with"
    assert text in " ".join(report.split())


def test_what_pooling_first_gains_is_what_was_timed(record: str) -> None:
    path = ROOT / "tests" / "benchmarks" / "pooling_first_avx2.txt"
    lines = path.read_text().splitlines()[-2:]
    before, after = (statistics.median(map(float, line.split()[1:])) for line in lines)
    assert f"a step is {after / before:.1f} times as fast (`tests/" in " ".join(record.split())


def test_what_the_narrower_network_gains_is_what_was_timed(record: str) -> None:
    lines = (ROOT / "tests" / "benchmarks" / "narrower_avx2.txt").read_text().splitlines()[-2:]
    before, after = (statistics.median(map(float, line.split()[1:])) for line in lines)
    text = f"{after / before:.1f} times as fast without bf16: {after:.0f} images/s"
    text += f" against {before:.0f} (medians"
    assert text in " ".join(record.split())


def test_what_the_narrower_network_costs_is_what_its_folds_say(record: str) -> None:
    runs = folds_of("search_adamw")
    wider, narrower = runs["default of that time"], runs["C of the third search (kept)"]
    cells = []
    for key in ("val", "val_tta", "shift", "val_tta_loss", "val_loss"):
        gains = [narrower[fold][key] - wider[fold][key] for fold in range(5)]
        cells.append((statistics.mean(gains), statistics.stdev(gains) / 5**0.5))
    means = "-{:.3f}, +{:.3f}, {:.3f} and {:.3f},".format(*(abs(mean) for mean, _ in cells[:4]))
    errors = "{:.3f}, {:.3f}, {:.3f} and {:.3f}.".format(*(error for _, error in cells[:4]))
    single = "is {:.3f} higher, standard error {:.3f}.)".format(*cells[4])
    for text in (means, errors, single):
        assert text in " ".join(record.split())


def test_what_speaks_against_the_narrower_network_is_what_the_runs_say(record: str) -> None:
    names = {"accuracy": "_amd", "accuracy_amx": "", "accuracy_avx2": "_avx2"}
    pairs = [
        (
            benchmark_rows(f"fixed_stains/{name}")["default"],
            benchmark_rows(f"wider/accuracy{old}")["default"],
        )
        for name, old in names.items()
    ]
    (val, _, test, views), (val_amx, _, test_amx, views_amx), (val_avx2, *_), everywhere = (
        [re.findall(r"[-+.\d]+", cell) for cell in differences(some).split(" | ")]
        for some in ([pairs[0]], [pairs[1]], [pairs[2]], pairs)
    )
    lower = (val, val_amx, test, test_amx, views, views_amx)
    assert all(mean.startswith("-") for mean, _ in lower) and val_avx2[0].startswith("+")
    ensembles = [old["ensemble_test_tta"] - new["ensemble_test_tta"] for new, old in pairs]
    text = " ".join(record.partition("**What speaks against it**")[2].split())
    for said in (
        f"val is {val[0][1:]} lower with AVX-512 BF16 (mean of the paired differences; standard "
        f"error over the seeds {val[1]}) and {val_amx[0][1:]} lower with AMX ({val_amx[1]};",
        f"({test[0][1:]} and {test_amx[0][1:]}; over eight views {views[0][1:]} and "
        f"{views_amx[0][1:]}; the ensemble {ensembles[0]:.3f} and {ensembles[1]:.3f})",
        f"its val was {val_avx2[0][1:]} higher ({val_avx2[1]})",
        "val differs by {} ({}), test by {} ({}), over eight views by {} ({})".format(
            *everywhere[0], *everywhere[2], *everywhere[3]
        ),
    ):
        assert said in text, said


def test_what_speaks_for_the_narrower_network_is_what_its_folds_say(record: str) -> None:
    searches = [folds_of("search_blocks"), folds_of("search_stem")]
    cells = []
    for key in ("val", "val_tta", "shift", "val_tta_loss"):
        gains = [
            run[key] - runs["default"][fold][key]
            for runs in searches
            for fold, run in runs["the wider network"].items()
        ]
        assert len(gains) == 9 and (statistics.mean(gains) > 0) == key.endswith("loss")
        cells += [abs(statistics.mean(gains)), statistics.stdev(gains) / len(gains) ** 0.5]
    said = (
        "val is {:.3f} lower with it (standard error {:.3f}), over eight views {:.3f} ({:.3f}), "
        "under simulated shift {:.3f} ({:.3f}), and the loss {:.3f} higher ({:.3f})"
    )
    text = " ".join(record.split())
    assert said.format(*cells) in text
    means = [
        statistics.mean(run["seconds"] for run in searches[1][name].values())
        for name in ("the wider network", "default")
    ]
    runs = [
        json.loads((ROOT / "tests" / "benchmarks" / name).read_text())["runs"]["1"]
        for name in ("wider/speed.json", "speed_amx.json")
    ]
    wider, narrower = (run["train_seconds"] / run["epochs"] for run in runs)
    assert f"the ninth search took {means[0] / means[1]:.2f} times as long with the wider" in text
    assert f"an epoch of the full file {wider:.0f} s against {narrower:.0f} s" in text


def test_where_val_loss_is_lowest_is_what_the_committed_run_says(report: str) -> None:
    rows = list(csv.DictReader((BEST / "history.csv").read_text().splitlines()))
    lowest, last = min(rows, key=lambda row: float(row["val_loss"])), rows[-1]
    (a, x), (b, y) = [
        (float(row["val_loss"]), float(row["val_accuracy"])) for row in (lowest, last)
    ]
    late = [float(row["val_accuracy"]) for row in rows[69:]]
    said = f"which from epoch 70 on moves between {min(late):.3f} and {max(late):.3f} without"
    assert said in " ".join(report.split())
    assert b <= a + float(lowest["val_loss_se"])  # "within a standard error"
    text = f"lowest at epoch {lowest['epoch']} ({a:.3f}, with an accuracy of {x:.3f}) and ends at "
    assert f"{text}{b:.3f} ({y:.3f})." in " ".join(report.split())


def speed_of(machine: str) -> dict:
    """Return what speed.py wrote on a machine, with the ratios that the goals are about."""
    results = json.loads((ROOT / "tests" / "benchmarks" / f"{machine}.json").read_text())
    step, loader = results["step"], results["loader"]
    ours, results["plain"], nchw, resnet = (
        value for name, value in step.items() if name.startswith("training step")
    )
    loading = results["counts"]["train"] / loader["loader, ours"]
    others = (f"loader, MedMNIST's way, {workers} workers" for workers in (0, 2))
    return results | {
        "images/s": ours,
        "loading": [loader["loader, ours"] / loader[other] for other in others],
        "loading's share": loading / results["epoch"]["epoch, training"],
        "over NCHW": ours / nchw,
        "over ResNet-18": ours / resnet,
        "of the matmul": step["GFLOP/s, default"] / step["GFLOP/s, matmul 4096"],
    }


# The columns of the goals' table, and two processors that were measured with earlier code.
MACHINES = ("speed", "speed_zen4_again", "speed_zen5", "speed_amx")
MACHINES += ("speed_zen4_fp32", "speed_zen4_avx2")
EARLIER = ("speed_fp32", "speed_avx2")


def full_avx2() -> tuple[int, float]:
    """Return the seconds of the full file's run of ten epochs with AVX2, and of eight of them."""
    timed = (ROOT / "tests" / "benchmarks" / "full_avx2.txt").read_text().split()
    ten = sum(s * 60**i for i, s in enumerate(map(int, reversed(timed[-7].split(":")))))
    return ten, round(ten - 2 * sum(speed_of("speed_avx2")["epoch"].values()), -1)


def epochs_fp32() -> tuple[float, float]:
    """Return the seconds of a fast and of a slow epoch of the full file in fp32 on the Xeon."""
    text = (ROOT / "tests" / "benchmarks" / "denormals_fp32.txt").read_text()
    epochs = re.search(r"broken off in the seventh\): (.*)", text)[1].split()[2:]
    return speed_of("speed_fp32")["epoch"]["epoch, training"], max(map(float, epochs))


def reckoned_fp32() -> list[float]:
    """Return how long the full file takes there, at the least and at the most."""
    whole = speed_of("speed_fp32")["runs"]["1"]
    beside = whole["seconds"] - whole["train_seconds"]
    return [round(8 * epoch + beside, -1) for epoch in epochs_fp32()]


def test_the_goals_table_is_what_was_measured(report: str) -> None:
    machines = [speed_of(name) for name in MACHINES]
    hidden = [(m["machine"]["instructions"], m["machine"]["precision"]) for m in machines[4:]]
    assert hidden == [("AVX512", "fp32"), ("AVX2", "fp32")]
    rows: dict[str, list[tuple[str, bool]]] = {}  # of each goal: a cell, and whether it is met

    def row(goal: str, *cells: tuple[str, bool]) -> None:
        rows[goal] = list(cells)

    row(
        "loading, over MedMNIST's way with 0 and with 2 workers: 4 times",
        *(("{:.1f}, {:.1f}".format(*m["loading"]), min(m["loading"]) >= 4) for m in machines),
    )
    share = "loading's share"
    row(
        "loading, share of an epoch: 5 %",
        *((f"{m[share]:.1%}".replace("%", " %"), m[share] <= 0.05) for m in machines),
    )
    row("training step, images/s", *((f"{m['images/s']:,.0f}", False) for m in machines))
    for goal, key, least in (
        ("the step over fp32 NCHW: 2.5 times", "over NCHW", 2.5),
        ("the step over the ResNet-18: 15 times", "over ResNet-18", 15),
    ):
        row(goal, *((f"{m[key]:.1f}", m[key] >= least) for m in machines))
    share = "of the matmul"
    row(
        "share of the matmul: 55 %",
        *((f"{m[share]:.0%}".replace("%", " %"), m[share] >= 0.55) for m in machines),
    )
    wholes = [m["runs"]["1"] for m in machines]
    row(
        "the full file: 15 minutes",
        *((f"{w['seconds']:,.0f} s", w["seconds"] <= 900) for w in wholes),
    )
    peaks = [whole["peak_mib"] for whole in wholes]
    row("its peak memory: 1.5 GiB", *((f"{peak:,.0f} MiB", peak <= 1536) for peak in peaks))
    more = []
    for m in machines:
        tenth, whole = (
            (m["runs"][share]["seconds"] - m["start_up"])
            / (m["runs"][share]["images"] * m["runs"][share]["epochs"])
            for share in ("0.1", "1")
        )
        more.append(
            (
                f"{whole / tenth - 1:+.0%}".replace("-0%", "0%").replace("%", " %"),
                abs(whole / tenth - 1) <= 0.15,
            )
        )
    row("an image and epoch of it, against one of a tenth of it: within 15 %", *more)
    row(
        "`analyze_data.py` on it: 6 s, 900 MiB",
        *(
            (f"{seconds:.1f} s, {mib:.0f} MiB", seconds <= 6 and mib <= 900)
            for seconds, mib in (m["analyze_data"] for m in machines)
        ),
    )
    timed = sample_runs()
    spans = (
        timed["AVX-512 BF16, Zen 4"],
        timed["AVX-512 BF16, Zen 4, another day"],
        timed["AVX-512 BF16, Zen 5"],
        timed["AMX"] + timed["AMX, some days before"],
        timed["Zen 4 without its bf16"],
        timed["Zen 4 with AVX2 alone"],
    )
    row("the sample's run: 150 s", *((span(all_), max(all_) <= 150) for all_ in spans))
    table = "\n".join(
        f"| {goal} | {' | '.join(f'**{cell}**' if met else cell for cell, met in cells)} |"
        for goal, cells in rows.items()
    )
    assert rows_missing(table, report) == []


def test_what_is_said_of_processors_measured_earlier_is_what_was_measured(report: str) -> None:
    xeon, zen3 = (speed_of(name) for name in EARLIER)
    now = speed_of("speed_zen4_avx2")
    timed = sample_runs()
    slow, fewer = full_avx2()
    (least, most), whole = reckoned_fp32(), xeon["runs"]["1"]["seconds"]
    text = " ".join(report.split())
    for said in (
        f"made {xeon['images/s']:.0f} images/s, {xeon['over ResNet-18']:.1f} times the ResNet-18 "
        f"and {xeon['of the matmul']:.0%} of the matmul",
        f"three sample runs took {span(timed['AVX-512, fp32'])}",
        f"The whole run on the full file, {whole:,.0f} s, was slowed by denormal numbers (below); "
        f"without them {least:,.0f} to {most:,.0f} s are reckoned, from epochs of "
        "{:.0f} to {:.0f} s.".format(*epochs_fp32()),
        f"made {zen3['images/s']:.0f} images/s ({zen3['plain']:.0f} in plain fp32, half of what "
        f"Zen 4 makes with AVX2 alone), {zen3['over ResNet-18']:.1f} times the ResNet-18 and "
        f"{zen3['of the matmul']:.0%} of the matmul",
        f"the full file took {slow:,} s with ten epochs, the least number then "
        f"(`full_avx2.txt`; {fewer:,.0f} s without two of them)",
        f"the sample's run {span(timed['AVX2'])}",
    ):
        assert said.replace("%", " %") in text, said
    assert 0.45 < zen3["plain"] / now["images/s"] < 0.55


def test_what_is_said_of_speed_is_what_was_measured(report: str, record: str) -> None:
    here, again, zen5, matrix_units, *_ = (speed_of(name) for name in MACHINES)
    earlier, faster, before = map(speed_of, ("speed_before", "speed_zen5_first", "wider/speed_amd"))
    text = " ".join(report.split())
    resnet = "training step, ResNet-18 as MedMNIST"
    assert 0.9 < again["step"][resnet] / here["step"][resnet] < 1
    loader, slow, _ = here["loader"].values()
    assert f"appendix B): {loader:,.0f} images/s against {slow:,.0f} the usual way" in text
    more = [run["images/s"] / run["plain"] - 1 for run in (here, zen5, matrix_units)]
    assert 0.3 < min(more) < 0.37 and 0.63 < max(more) < 0.7
    said = "Where bf16 is fast, fp32 takes a third to two thirds as long again"
    assert said in (ROOT / "README.md").read_text()
    said = f"BF16 a step is {earlier['images/s'] / before['images/s']:.1f} times as fast as with"
    assert f"{said} the wider one" in " ".join(record.split())
    peaks = [
        [run["step"][f"GFLOP/s, matmul 4096{end}"] for end in ("", " in fp32")]
        for run in (here, matrix_units)
    ]
    needed = 2.5 * here["step"]["training step, same model in fp32 NCHW"]
    needed *= here["step"]["GFLOP per image"] / peaks[0][0]
    for said in (
        f"would take {needed:.0%} of the bf16 matmul on Zen 4, which there is only "
        f"{peaks[0][0] / peaks[0][1]:.1f} times as fast as that in fp32.",
        f"With AMX that factor is {peaks[1][0] / peaks[1][1]:.1f} ({peaks[1][0]:,.0f} GFLOP/s "
        f"against {peaks[1][1]:.0f}), but the whole step is only "
        f"{matrix_units['images/s'] / matrix_units['plain']:.1f} times as fast as in plain fp32",
        "before freed memory was kept, the full file took "
        f"{earlier['runs']['1']['seconds']:.0f} s, and "
        f"the step made {earlier['images/s']:,.0f} images/s and {earlier['of the matmul']:.1%} of "
        "the matmul (`speed_before.json`)",
        f"On Zen 4 the step made {here['images/s']:,.0f} images/s, on another day "
        f"{again['images/s']:,.0f}, and the ResNet-18 less than a tenth fewer "
        f"({again['step'][resnet]:.0f} against {here['step'][resnet]:.0f})",
        f"On Zen 5 the step made {faster['images/s']:,.0f} images/s half an hour earlier, "
        f"{faster['over ResNet-18']:.1f} times the ResNet-18 and {faster['of the matmul']:.0%} of "
        "the matmul",
    ):
        assert said.replace("%", " %") in text


def test_what_is_said_of_slow_bf16_and_denormals_is_what_was_measured(report: str) -> None:
    folder = ROOT / "tests" / "benchmarks"
    lines = (folder / "bf16_without_amx.txt").read_text().splitlines()[1:]
    fp32, bf16, peak, peak_bf16 = (
        statistics.median(map(float, line.split(":")[1].split())) for line in lines
    )
    text = " ".join(report.split())
    assert (
        f"makes {peak_bf16:.0f} GFLOP/s against {peak:.0f}, and a training step {bf16:.0f} "
        f"images/s against {fp32:.0f} (medians of seven"
    ) in text
    lines = (folder / "denormals_fp32.txt").read_text().splitlines()[-4:]
    keep, flush, keep_bf16, flush_bf16 = (
        statistics.mean(map(float, line.split(":")[1].split())) for line in lines
    )
    first, second = (
        json.loads((folder / f"speed_fp32{name}.json").read_text()) for name in ("_first", "")
    )
    whole = [f"{results['runs']['1']['seconds']:,.0f}" for results in (first, second)]
    assert f"whole runs took {whole[0]} and {whole[1]} s (" in text
    shares = [
        results["step"]["GFLOP/s, default"] / results["step"]["GFLOP/s, matmul 4096"]
        for results in (second, first)
    ]
    said = "{:.0%} of the matmul ({:.0%} in another run, `speed_fp32_first.json`)".format(*shares)
    assert said.replace("%", " %") in text
    assert (
        f"a step makes {flush:.0f} images/s with flushing and {keep:.0f} without, and in bf16 "
        f"{flush_bf16:.0f} and {keep_bf16:.0f} (`denormals_fp32.txt`)"
    ) in text


def test_what_is_said_of_freed_memory_is_what_was_measured(report: str) -> None:
    text = (ROOT / "tests" / "benchmarks" / "freed_memory.txt").read_text()
    rows = re.findall(r": ([\d.]+), (\d+) faults", text)
    given, again, kept, given_fp32, again_fp32, kept_fp32 = (float(ms) for ms, _ in rows)
    said = " ".join(report.split())
    assert (
        f"in bf16 {kept:.1f} ms against {given:.1f} and {again:.1f} in two processes without it, "
        f"in fp32 {kept_fp32:.1f} against {given_fp32:.1f} and {again_fp32:.1f} (medians"
    ) in said
    times = ((given, kept), (again, kept), (given_fp32, kept_fp32), (again_fp32, kept_fp32))
    less = [round(100 * (1 - after / before)) for before, after in times]
    assert f"With none a step takes {min(less)} to {max(less)} % less time" in said
    assert f"3\n# to {max(less)} % of a step's time" in (ROOT / "Training.py").read_text()
    faults = sorted(round(int(n), -3) for _, n in rows if n != "0")
    assert f"{faults[0]:,} to {faults[-1]:,} page faults for a step" in said


def sample_runs() -> dict[str, list[float]]:
    """Return the seconds of the whole runs on the sample, by machine."""
    lines = (ROOT / "tests" / "benchmarks" / "sample_runs.txt").read_text().splitlines()[1:]
    return {
        name: [float(s) for s in rest.split("(")[0].split()]
        for name, rest in (line.split(":", 1) for line in lines)
    }


def span(seconds: list[float]) -> str:
    return f"{min(seconds):.0f} to {max(seconds):.0f} s"


def test_how_long_the_samples_run_takes_is_what_was_timed(report: str) -> None:
    timed = sample_runs()
    zen4, zen5, slow = "AVX-512 BF16, Zen 4", "AVX-512 BF16, Zen 5", "AVX-512, fp32"
    other, before = f"{zen4}, another day", "AMX, some days before"
    (said,) = re.findall(
        r"in turn with it (.*)\)$",
        (ROOT / "tests" / "benchmarks" / "sample_runs.txt").read_text(),
        re.M,
    )
    once, twice = (
        [float(s) for s in seconds] for seconds in re.findall(r"([\d.]+) and ([\d.]+) s", said)
    )
    (said,) = re.findall(
        r"images/s in training: (.*)\)$",
        (ROOT / "tests" / "benchmarks" / "sample_runs.txt").read_text(),
        re.M,
    )
    turns = [re.findall(r"\d{3}", part) for part in said.split(",")]
    text = " ".join(report.split())
    for said in (
        f"for TensorBoard, which took {(sum(twice) - sum(once)) / 2:.0f} s more (means of two",
        f"six with AMX took {span(timed['AMX'])}, in the median "
        f"{statistics.median(timed['AMX']):.0f} s, four on another day {span(timed[before])}; on "
        f"Zen 4 four took {span(timed[zen4])} and four, on another day, {span(timed[other])}.",
        "at its end training made, in turn, {} to {} images/s without bf16, {} to {} with AVX2 "
        "alone and {} to {} with bf16 (three".format(*chain(*((min(r), max(r)) for r in turns))),
    ):
        assert said in text

    def minutes(*names: str) -> str:
        """Return the span of these machines' runs in halves of minutes."""
        runs = [seconds for name in names for seconds in timed[name]]
        low, high = (round(seconds / 30) / 2 for seconds in (min(runs), max(runs)))
        return f"{low:g} minutes" if low == high else f"{low:g} to {high:g} minutes"

    rows = {
        "AVX2": (
            minutes("Zen 4 with AVX2 alone", "AVX2"),
            f"{full_minutes('_zen4_avx2')[:-8]} to about {full_avx2()[1] / 60:.0f} minutes",
        ),
        "AVX-512, bf16 missing or slow": (
            minutes(slow, "Zen 4 without its bf16"),
            f"about {reckoned_fp32()[1] / 60:.0f} to {full_minutes('_zen4_fp32')}",
        ),
        "AVX-512 BF16, AMD Zen 4": (minutes(zen4, other), full_minutes("", "_zen4_again")),
        "AVX-512 BF16, AMD Zen 5": (minutes(zen5), full_minutes("_zen5")),
        "bf16 matrix units (AMX)": (minutes("AMX", before), full_minutes("_amx")),
    }
    table = "\n".join(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items())
    assert rows_missing(table, (ROOT / "README.md").read_text()) == []


def full_minutes(*machines: str) -> str:
    """Return how long the run on the full file took there."""
    files = [ROOT / "tests" / "benchmarks" / f"speed{machine}.json" for machine in machines]
    runs = [json.loads(file.read_text())["runs"]["1"]["seconds"] / 60 for file in files]
    return f"{' to '.join(f'{run:.0f}' for run in runs)} minutes"


def test_how_often_a_training_was_repeated_is_what_was_counted() -> None:
    text = (ROOT / "tests" / "benchmarks" / "repeat_bf16.txt").read_text()
    rows = re.findall(r"^(.*): (\d+) repetitions, (\d+) different$", text, re.M)
    assert {different for _, _, different in rows} == {"0"}
    count = sum(int(n) for _, n, _ in rows)
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"not again in {count} repetitions of one (`tests/benchmarks/repeat_bf16.txt`)" in readme
    text = (ROOT / "tests" / "benchmarks" / "killed_resumed.txt").read_text()
    rows = re.findall(r"^\| [a-z, ]+ \| (\d+) \| (\d+) \| (\d+) \|$", text, re.M)
    assert len(rows) == 3 and {cell for row in rows for cell in row[1:]} == {"0"}
    kills, runs = re.search(r"^(\d+) kills of (\d+) runs", text, re.M).groups()
    assert sum(int(tried) for tried, *_ in rows) == int(kills) > int(runs)
    said = f"of {runs} tiny runs that were killed once or twice and resumed with it, two at a time"
    assert f"{said}, none differed (`tests/benchmarks/killed_resumed.txt`)" in readme


def test_what_the_other_stem_gains_is_what_was_timed(record: str) -> None:
    lines = (ROOT / "tests" / "benchmarks" / "stem_amx.txt").read_text().splitlines()[2:]
    medians = [statistics.median(map(float, line.split()[1:])) for line in lines]
    one, *two = (other / ours for ours, other in zip(medians[::2], medians[1::2], strict=True))
    said = f"{one:.2f} times as fast with one thread, and {min(two):.2f} to {max(two):.2f} times"
    assert said in " ".join(record.split())


def test_what_bounds_the_step_is_what_was_profiled(report: str) -> None:
    texts = [
        (ROOT / "tests" / "benchmarks" / f"profile_{name}.txt").read_text()
        for name in ("bf16", "zen5", "amx")
    ]
    parts = [dict(re.findall(r"^(\w+) ([\d.]+)%$", text, re.M)) for text in texts]
    table = [
        f"| {name} | " + " | ".join(f"{shares[name]} %" for shares in parts) + " |"
        for name in ("convolutions", "Muon", "BatchNorm", "MaxPool")
    ]
    assert rows_missing("\n".join(table), report) == []
    said = " ".join(report.split())
    old, new = (speed_of(name)["step"]["GFLOP/s, matmul 4096"] for name in ("speed", "speed_zen5"))
    for text, where, end in zip(
        texts,
        ("for the first, run", "its convolutions run"),
        (f" (the matmul: {old:.0f}).", ", but BatchNorm"),
        strict=False,
    ):
        rows = re.findall(r"^(?:for|back)ward +[\d.]+ +(\d+) +\[\d+, (\d+),.*, 3, 3\]$", text, re.M)
        speeds = [int(speed) for speed, channels in rows if channels != "3"]
        assert len(speeds) == 14
        assert f"{where} at {min(speeds)} to {max(speeds)} GFLOP/s{end}" in said
    assert f"matmul of Zen 5 ({new:.0f}) is {new / old:.1f} times as fast, and" in said


def test_what_compiling_costs_is_what_was_timed(report: str) -> None:
    lines = (ROOT / "tests" / "benchmarks" / "compile_amx.txt").read_text().splitlines()[1:]
    without, compiled = (statistics.median(map(float, line.split()[1:])) for line in lines)
    said = f"{compiled:,.0f} images/s with the model compiled against {without:,.0f} without"
    assert said in " ".join(report.split())


def test_every_picture_in_the_texts_exists() -> None:
    for document in (ROOT / "report.md", ROOT / "README.md"):
        pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", document.read_text())
        assert pictures
        assert [p for p in pictures if not (ROOT / p).is_file()] == []


def test_committed_run_is_small_and_its_checkpoint_gives_its_numbers(
    report: str, metrics: dict
) -> None:
    assert (BEST / "best.pt").stat().st_size < 5e6
    assert sum(p.stat().st_size for p in BEST.glob("events*")) < 3e6
    assert not list(BEST.glob("*.npz")) and not list(BEST.rglob("*sprite*"))
    shared = ROOT.parent / "shared" / "data" / "pathmnist_sample.npz"
    if not shared.exists():
        pytest.skip("needs the real sample, ../shared/data/pathmnist_sample.npz")
    from analyze_data import load_data
    from PathMNIST import load_model, make_loader
    from Training import predict

    model, _ = load_model(BEST, "cpu")
    probs, labels = predict(model, make_loader(load_data(shared), "train", 500))
    right = (probs.argmax(1) == labels).sum()
    assert f"the kept weights are right for {right} of 800" in " ".join(report.split())
    probs, labels = predict(model, make_loader(load_data(shared), "test", 500))
    again = Evaluation.compute_metrics(probs, labels)
    assert again["accuracy"] == pytest.approx(metrics["test"]["accuracy"], abs=1.5 / len(labels))
    assert again["auc"] == pytest.approx(metrics["test"]["auc"], abs=1e-4)
